"""The default of ``--model``: the embedded model, for prompts that it can draw. For other prompts a run has no default.

So a forgotten option ends a run before it begins, and not with images of something else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vcf_batch.config.run_config import RunConfig
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

_EXAMPLES = 3
"""Most prompts that are told where they refuse no run."""


@dataclass(frozen=True)
class Undrawable:
    """Prompts that the embedded model cannot draw, among the first ones of a manifest."""

    prompts: Sequence[str]
    """These prompts, at least one."""
    judged: int
    """Number of prompts that were looked at."""

    @property
    def told(self) -> str:
        """Their number and the first few, in words."""
        few = ", ".join([repr(cut(prompt, _EXAMPLE)) for prompt in dict.fromkeys(self.prompts)][:_EXAMPLES])
        share = f"{len(self.prompts):,} of the first {self.judged:,}"
        return f"{TINY} cannot draw {share}, such as {few}: no shape that it draws, or a word that it does not know"


def check(config: RunConfig, record: RunRecord | None, prompts: Callable[[], Sequence[str]]) -> Undrawable | None:
    """Look for prompts that the embedded model cannot draw. If they are half of the first ones, or more, a run without
    a model is refused.

    A run that the embedded model has begun goes on.

    Args:
        config: the run, with an absolute output.
        record: the record of the output's run; None if it has none.
        prompts: gives the prompts of the first :data:`JUDGED_ROWS` rows. Called only if they decide.

    Returns:
        The prompts that it cannot draw; None if there are none, another model is named, or the run goes on.

    Raises:
        UsageError: no model is named, and half of the prompts have words that the embedded one does not know, or name
            none of its shapes.
        ManifestError, StorageError: the prompts cannot be read.
    """
    if config.model not in (None, TINY):
        return None
    if record is not None and record.config.get("model") == TINY and commits.any_committed(config.output):
        return None
    first = prompts()
    unknown = [prompt for prompt in first if not can_draw(prompt)]
    if config.model is None and unknown and 2 * len(unknown) >= len(first):
        raise UsageError(
            f"no model is named, and the default {TINY!r} is an {EMBEDDED} that draws {len(SHAPES)} shapes and nothing "
            f"else: {', '.join(SHAPES)}. It cannot draw {len(unknown):,} of the first {len(first):,} prompts, such as "
            f"{cut(unknown[0], _EXAMPLE)!r}. Name a model:\n"
            "  --model MODEL  a folder, a URL such as s3://bucket/model, or a Hub id, such as\n"
            "    --model stable-diffusion-v1-5/stable-diffusion-v1-5, which takes references with\n"
            "    --fusion ip_adapter --ip-adapter ip-adapter-sd15\n"
            f"  --model {TINY}   to draw shapes all the same"
        )
    return Undrawable(unknown, len(first)) if unknown else None
