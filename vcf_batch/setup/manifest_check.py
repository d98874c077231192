"""The checks of a run's manifest: it keeps its contract, lies apart from the output, its references may be read, and
its prompts fit the default model."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from vcf_batch import storage
from vcf_batch.config.fingerprint import field_of
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import RefusedError, UsageError, redact
from vcf_batch.manifest.check import Census
from vcf_batch.manifest.columns import cut, shown
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.manifest.references import LoraReader, ReferenceReader, refusal
from vcf_batch.models.embedded import EMBEDDED
from vcf_batch.models.resolution import TINY
from vcf_batch.output import run_file
from vcf_batch.output.output import EXPORT_NAME
from vcf_batch.output.run_file import RunRecord
from vcf_batch.setup import default_model

_MOST_WORDS = 600
"""Most characters of a list of columns."""
_log = logging.getLogger(__name__)

POLICY_ROWS = 1000
"""Number of rows at the manifest's start whose references are checked against the allowed places before models load."""

POLICY_ROWS_EMBEDDED = 64
"""Replacement for POLICY_ROWS in a manifest that carries its images, which are always allowed and may be large."""


def open_checked(config: RunConfig, record: RunRecord | None) -> Manifest:
    """Open the manifest of a run and check it. When the run is resumed, the ids are not checked again.

    Args:
        config: the run, with absolute paths.
        record: the record of the output's run; None if it has none.

    Raises:
        ManifestError: the manifest breaks its contract.
        UsageError: most of its first rows have references that may not be read, or prompts that the default model
            cannot draw where no model is named; or the output is where its files would become a part of the manifest
            or the model.
        RefusedError: the output is an export.
    """
    _log.info("reading %s", redact(config.manifest))
    manifest = run_file.open_manifest(config, record)
    found = [check() for check in checks(manifest, config, record)]
    for name, words in told(manifest, found):
        _log.info("%s: %s", name, words)
    if config.model is None:
        _log.info("model: %s, an %s, because none is named", TINY, EMBEDDED)
    return manifest


Found = Census | default_model.Undrawable | None
"""What a check finds where it does not fail."""


def checks(manifest: Manifest, config: RunConfig, record: RunRecord | None) -> list[Callable[[], Found]]:
    """The checks that :func:`open_checked` runs, in order. Each raises on failure; one of them counts, and one looks
    at prompts."""
    fields = record.fields if record else {}
    limit = None if manifest.is_whole else config.limit
    was = tuple(field_of(fields, name) for name in ("manifest_id", "limit", "rows"))
    known = was == (manifest.identity, limit, config.rows)
    return [
        lambda: _check_output(manifest, config),
        # Before all rows are read, which takes a while.
        lambda: default_model.check(config, record, lambda: manifest.prompts(default_model.JUDGED_ROWS)),
        *([] if known else [manifest.check]),
        lambda: _check_policy(manifest, config),
    ]


def census_of(found: Iterable[Found]) -> Census | None:
    """The count among what the checks have found; None if rows are not counted again, or the counting failed."""
    return next((each for each in found if isinstance(each, Census)), None)


def told(manifest: Manifest, found: Sequence[Found]) -> Iterator[tuple[str, str]]:
    """Yield what is read of a manifest and what is not, as pairs of a short name and words.

    Args:
        found: what the checks have found. A run that is resumed has no census, as rows are not counted again.
    """
    census = census_of(found)
    places = [f"{name!r} from {shown(column)}" for name, column in manifest.mapped.items()]
    read = [f"reads {', '.join(places)}"] if places else []
    if census:
        read.insert(0, _counts(census))
    if read:
        yield "columns", "; ".join(read)
    if names := manifest.carried_schema.names:
        remarks = {name: f" ({remark})" for name, remark in manifest.remarks.items()}
        yield "carried", cut(", ".join(name + remarks.get(name, "") for name in names), _MOST_WORDS)
    if manifest.left_out:
        left = (f"{name} ({reason})" for name, reason in manifest.left_out.items())
        yield "left out", cut(", ".join(left), _MOST_WORDS)
    if census and census.weighted:
        prompts = "prompt has" if census.weighted == 1 else "prompts have"
        yield (
            "weights",
            f"{census.weighted:,} {prompts} a weight such as (word:1.2), which is taken literally: it is text like any "
            "other",
        )
    for each in found:
        if isinstance(each, default_model.Undrawable):
            yield "prompts", each.told


def _counts(census: Census) -> str:
    """The number of rows, and the columns that all of them, some of them and none of them have."""
    names: dict[int | None, list[str]] = {}
    for name, count in census.having.items():
        names.setdefault(count, []).append(name)
    whole = "1 row, with" if census.rows == 1 else f"{census.rows:,} rows, all with"
    words = {census.rows: whole, 0: "none with", None: "not counted:"}
    # The prompt comes first, and every row has one.
    return "; ".join(f"{words.get(count, f'{count:,} with')} {', '.join(each)}" for count, each in names.items())


def _check_output(manifest: Manifest, config: RunConfig) -> None:
    with storage.refusals_as_storage_errors():
        is_export = storage.exists(storage.join(config.output, EXPORT_NAME))
    if is_export:
        raise RefusedError(
            f"output {config.output} is an export, a dataset that was made of outputs, and would be mixed with a run; "
            "name another folder"
        )
    output = _real(config.output)
    if output == _real(manifest.base):
        raise UsageError(
            f"output {config.output} is the manifest's own folder, where the two would be taken for one; name another "
            "folder, or one in it"
        )
    if config.model and os.path.isdir(config.model) and f"{output}/".startswith(f"{_real(config.model)}/"):
        raise UsageError(
            f"output {config.output} lies in the folder of the model, and its files would count as the model's; name "
            "another folder"
        )


def _real(url: str) -> str:
    return os.path.realpath(storage.absolute(url)) if storage.is_local(url) else url.rstrip("/")


def _check_policy(manifest: Manifest, config: RunConfig) -> None:
    references = ReferenceReader(manifest.base, config.reference_root, config.max_pixels)
    loras = LoraReader(manifest.base, config.reference_root)
    rows = [*manifest.first_rows(POLICY_ROWS_EMBEDDED, config.seed)]
    if not any(reference.data for row in rows for reference in row.images):
        rows = [*manifest.first_rows(POLICY_ROWS, config.seed)]
    reasons = (refusal(row, references, loras) for row in rows)
    refused = [reason for reason in reasons if reason]
    if 2 * len(refused) > len(rows):
        raise UsageError(
            f"{len(refused):,} of the first {len(rows):,} rows have references or LoRAs that may not be read; the "
            f"first: {refused[0]}"
        )
