"""``vcf-batch score``: an output is opened, its scores are found out, and what it lacks is scored."""

from collections.abc import Mapping, Sequence
from typing import Any

from vcf_batch import storage
from vcf_batch.commands.score import wanted as wants
from vcf_batch.commands.score.duplicates import adding, near_embeddings
from vcf_batch.commands.score.duplicates.search import Search
from vcf_batch.commands.score.scoring import Added, add, require_manifest
from vcf_batch.commands.score.wanted import Wanted, resolve
from vcf_batch.config.run_config import RunConfig
from vcf_batch.output import lease
from vcf_batch.output.output import Output
from vcf_batch.output.scores import calibration
from vcf_batch.output.scores.calibration import Calibration
from vcf_batch.output.scores.store import ScoreStore
from vcf_batch.setup.defaults import SILENT_SECONDS
from vcf_batch.worker.scoring.job import needs
from vcf_batch.worker.scoring.resolved_score import ResolvedScore


def score(
    output_url: str,
    wanted: Sequence[Wanted],
    aesthetic_clip: str | None,
    changes: Mapping[str, Any],
) -> Added:
    """Add scores to the finished shards of an output.

    Args:
        output_url: folder or URL of the output.
        wanted: the scores.
        aesthetic_clip: the CLIP of aesthetic heads; None for the one of LAION's.
        changes: settings that have changed, such as the place of the manifest.

    Raises:
        UsageError: there is no output, or a score cannot be had.
        VcfBatchError: see :func:`vcf_batch.commands.score.scoring.add`.
    """
    output = Output(output_url, changes)
    scores = resolve(wanted, aesthetic_clip, ScoreStore(output.url).definitions())
    refuse_lost_manifest(output, scores)
    return add(output, scores, scoring_config(output, changes))


def find_duplicates(output_url: str, searches: Sequence[Search], changes: Mapping[str, Any]) -> list[Added]:
    """Search an output for duplicates, once for each search.

    Embeddings that a search compares are computed first, where shards lack them.

    Raises:
        UsageError: there is no output, or an extra is not installed.
        VcfBatchError: see :func:`vcf_batch.commands.score.scoring.add` and
            :func:`vcf_batch.commands.score.duplicates.adding.add`.
    """
    output = Output(output_url, changes)
    return [_found(output, search, changes) for search in searches]


def _found(output: Output, search: Search, changes: Mapping[str, Any]) -> Added:
    if search.by != "clip":
        return adding.add(output, search)
    near_embeddings.faiss()  # before what takes hours
    embedding = wants.embedding(search.clip, ScoreStore(output.url).definitions())
    if adding.is_complete(output, search, embedding.definition):
        return adding.add(output, search, embedding.definition)
    refuse_lost_manifest(output, (embedding,))
    add(output, (embedding,), scoring_config(output, changes))
    return adding.add(output, search, embedding.definition)


def calibrate(
    output_url: str, wanted: Sequence[Wanted], aesthetic_clip: str | None, changes: Mapping[str, Any]
) -> Calibration:
    """Measure the scores of an output's run, and those that are asked for, and write ``_scores/calibration.json``.

    Raises:
        UsageError, VcfBatchError: see :func:`vcf_batch.commands.score.calibrating.calibrate`.
    """
    # Here, as scores are computed in this process, by libraries that take seconds to import.
    from vcf_batch.commands.score import calibrating
    from vcf_batch.vcf import quiet
    from vcf_batch.worker.device import Device
    from vcf_batch.worker.in_process import has_gpu

    quiet()
    output = Output(output_url, changes)
    config = scoring_config(output, changes)
    if config.gpus_per_worker is None:
        config = config.replace(gpus_per_worker=float(has_gpu()))
    device = Device.set_up(config)
    with lease.hold(output.url) as held:
        scores = resolve(wanted, aesthetic_clip, ScoreStore(output.url).definitions())
        found = calibrating.calibrate(output, scores, device)
        held.confirm()
        storage.publish_bytes(calibration.place(output.url), found.to_json())
    return found


_OWN: Mapping[str, Any] = {
    "address": None,
    "log_format": "text",
    "verbosity": "normal",
    "num_workers": None,
    "gpus_per_worker": None,
    "cpus_per_worker": 1,
}
"""Settings of workers that are not taken from the run."""


def scoring_config(output: Output, changes: Mapping[str, Any]) -> RunConfig:
    """The settings of workers that score: those of the run, but for its kind of numbers and its machines."""
    own = {name: changes.get(name, value) for name, value in _OWN.items()}
    silent = output.config.stall_timeout or SILENT_SECONDS
    return output.config.replace(
        dtype="float32", compile=False, one_device_type=False, profile=False, stall_timeout=silent, **own
    )


def refuse_lost_manifest(output: Output, scores: Sequence[ResolvedScore]) -> None:
    """Refuse scores that need references, if the manifest that names them is not there.

    Raises:
        UsageError: it cannot be read any more, or has changed.
    """
    if needs(scores, "reference"):
        require_manifest(output)
