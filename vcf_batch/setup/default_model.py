"""The default of ``--model``: the embedded model, for prompts that it can draw. For other prompts a run has no default.

So a forgotten option ends a run before it begins, and not with images of something else.
"""

from collections.abc import Callable, Sequence

from vcf_batch.config import RunConfig
from vcf_batch.errors import UsageError
from vcf_batch.manifest.columns import cut
from vcf_batch.models.embedded import EMBEDDED, SHAPES, can_draw
from vcf_batch.models.resolution import TINY
from vcf_batch.output import commits
from vcf_batch.output.run_file import RunRecord

JUDGED_ROWS = 1000
"""Number of rows at the manifest's start whose prompts decide."""

_EXAMPLE = 80
"""Most characters of a prompt that is told."""


def check(config: RunConfig, record: RunRecord | None, prompts: Callable[[], Sequence[str]]) -> None:
    """Refuse a run without a model if the embedded one cannot draw half of its first prompts or more.

    A run that the embedded model has begun goes on.

    Args:
        config: the run, with an absolute output.
        record: the record of the output's run; None if it has none.
        prompts: gives the prompts of the first :data:`JUDGED_ROWS` rows. Called only if they decide.

    Raises:
        UsageError: no model is named, and half of the prompts have words that the embedded one does not know, or name
            none of its shapes.
        ManifestError, StorageError: the prompts cannot be read.
    """
    if config.model is not None:
        return
    if record is not None and record.config.get("model") == TINY and commits.any_committed(config.output):
        return
    first = prompts()
    unknown = [prompt for prompt in first if not can_draw(prompt)]
    if unknown and 2 * len(unknown) >= len(first):
        raise UsageError(
            f"no model is named, and the default {TINY!r} is an {EMBEDDED} that draws {len(SHAPES)} shapes and nothing "
            f"else: {', '.join(SHAPES)}. It cannot draw {len(unknown):,} of the first {len(first):,} prompts, such as "
            f"{cut(unknown[0], _EXAMPLE)!r}. Name a model:\n"
            "  --model MODEL  a folder, a URL such as s3://bucket/model, or a Hub id, such as\n"
            "    --model stable-diffusion-v1-5/stable-diffusion-v1-5, which takes references with\n"
            "    --fusion ip_adapter --ip-adapter ip-adapter-sd15\n"
            f"  --model {TINY}   to draw shapes all the same"
        )
