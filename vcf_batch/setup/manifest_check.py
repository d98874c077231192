"""The checks of a run's manifest: it keeps its contract, lies apart from the output, and its references may be read."""

import os
from collections.abc import Callable

from vcf_batch import storage
from vcf_batch.config import RunConfig
from vcf_batch.errors import UsageError
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.output import run_file
from vcf_batch.output.run_file import RunRecord

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
        UsageError: most of its first rows have references that may not be read, or the output is where its files would
            become a part of the manifest or the model.
    """
    manifest = run_file.open_manifest(config, record)
    for check in checks(manifest, config, record):
        check()
    return manifest


def checks(manifest: Manifest, config: RunConfig, record: RunRecord | None) -> list[Callable[[], object]]:
    """The checks that :func:`open_checked` runs, in order. Each raises on failure."""
    fields = record.fields if record else {}
    known = (fields.get("manifest_id"), fields.get("limit")) == (manifest.identity, config.limit)
    return [
        lambda: _check_output(manifest, config),
        *([] if known else [manifest.check]),
        lambda: _check_policy(manifest, config),
    ]


def _check_output(manifest: Manifest, config: RunConfig) -> None:
    output = _real(config.output)
    if output == _real(manifest.base):
        raise UsageError(
            f"output {config.output} is the manifest's own folder, where the two would be taken for one; name another "
            "folder, or one in it"
        )
    if os.path.isdir(config.model) and f"{output}/".startswith(f"{_real(config.model)}/"):
        raise UsageError(
            f"output {config.output} lies in the folder of the model, and its files would count as the model's; name "
            "another folder"
        )


def _real(url: str) -> str:
    return os.path.realpath(storage.absolute(url)) if storage.is_local(url) else url.rstrip("/")


def _check_policy(manifest: Manifest, config: RunConfig) -> None:
    reader = ReferenceReader(manifest.base, config.reference_root, config.max_pixels)
    rows = manifest.rows(0, min(POLICY_ROWS_EMBEDDED, manifest.num_rows), config.seed)
    if not any(reference.data for row in rows for reference in row.images):
        rows += manifest.rows(len(rows), min(POLICY_ROWS, manifest.num_rows), config.seed)
    reasons = [next(filter(None, map(reader.policy_error, row.images)), None) for row in rows]
    refused = [reason for reason in reasons if reason]
    if 2 * len(refused) > len(rows):
        raise UsageError(
            f"{len(refused):,} of the first {len(rows):,} rows have references that may not be read; the first: "
            f"{refused[0]}"
        )
