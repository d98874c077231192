"""The claim of a run on its output: ``run.json`` is published, or found to be the record of this very run."""

import dataclasses
import importlib.metadata
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from vcf_batch import __version__, sharding
from vcf_batch.config.fingerprint import ADDED_SETTINGS, field_of
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import RefusedError, redact_name
from vcf_batch.output import appended, commits, receipts, run_file
from vcf_batch.output.run_file import RecordedManifest, RunRecord
from vcf_batch.setup.job import Job
from vcf_batch.setup.run_models import hub_commits

PACKAGES = ("torch", "diffusers", "transformers", "ray", "pyarrow")
"""Libraries whose versions are recorded beside that of vcf-batch."""


Obstacle = Callable[[Mapping[str, Any]], str | None]
"""Function that takes the fields of a run that differs in its manifest or its limit alone. It gives the reason why that
run cannot be extended to this one; None if it can."""

_HASH = re.compile(r"[0-9a-f]{40,}")
_LENGTH = frozenset(("manifest_id", "limit"))
"""Fields in which a longer version of a run differs."""
_SETTINGS = frozenset(field.name for field in dataclasses.fields(RunConfig))


def resume(config: RunConfig, record: RunRecord | None) -> RunConfig:
    """Take the shard size, batch size and GPUs of a worker from the run in the output, if they are not given.

    So a restart cannot choose them differently.

    Args:
        config: the run, with an absolute output.
        record: the record of the output's run; None if it has none.

    Raises:
        StorageError: the storage failed.
    """
    names = [name for name in ("shard_size", "batch_size", "gpus_per_worker") if getattr(config, name) is None]
    if record is None or not names or not commits.any_committed(config.output):
        return config
    return config.replace(**{name: record.config.get(name) for name in names})


def commits_of(config: RunConfig, record: RunRecord | None) -> dict[str, str]:
    """The commit on the Hub of each model, IP-Adapter and LoRA of the run in the output, by its name.

    A restart takes these again, though a newer commit may be there by then. If another revision of the model is asked
    for than the run began with, that one decides.

    Args:
        config: the run, with an absolute output.
        record: see :func:`resume`.

    Raises:
        StorageError: the storage failed.
    """
    if record is None:
        return {}
    models = dict(record.named_models)
    if record.config.get("revision") != config.revision:
        models.pop("model", None)
    identities = {str(model["name"]): str(model["identity"]) for model in models.values()}
    if "ip_adapter" in models:  # its identity ends with that of its image encoder
        encoder = str(models["ip_adapter"]["identity"]).rpartition(" ")[2]
        identities[str(record.config.get("image_encoder"))] = encoder
    begun = hub_commits(identities)
    return begun if begun and commits.any_committed(config.output) else {}


def claim(job: Job, publish: bool = True, confirm: Callable[[], object] = lambda: None) -> tuple[str, ...]:
    """Publish ``run.json``, or find that the output holds this very run. For the driver that owns the output.

    The record of another run is replaced as long as that run has not begun. A run with fewer rows may be extended.

    Args:
        job: the run.
        publish: whether ``run.json`` is written. Without it any process may call this.
        confirm: raises if the driver no longer owns the output. Called right before ``run.json`` is published.

    Returns:
        The fingerprints of :attr:`Job.extends`.

    Raises:
        RefusedError: the output holds another run, or another driver took over.
        StorageError: the storage failed.
    """
    output = job.config.output
    there = run_file.read(output)  # again, because an earlier owner may have written it meanwhile
    record = record_of(job)
    # Without run.json, any file of a shard belongs to an unknown run.
    begun = commits.any_committed(output) if there else bool(receipts.files_found(output))

    def obstacle(fields: Mapping[str, Any]) -> str | None:
        return appended.obstacle(fields, job.manifest, there.manifest.files if there else {}, record.fields["limit"])

    if holds(
        output,
        None if there is None else there.fields,
        record.fields,
        begun=begun,
        obstacle=obstacle,
        version=None if there is None else there.versions.get("vcf_batch"),
    ):
        assert there is not None
        return there.extends
    extends: tuple[str, ...] = ()
    # Also if it has not begun as far as a listing shows, which may lag behind.
    if there is not None and (begun or _is_longer(there.fields, record.fields, obstacle)):
        extends = (*there.extends, there.fingerprint)
    if publish:
        document = dataclasses.replace(record, extends=extends).to_document()
        run_file.write(output, document, replaces=there is not None, confirm=confirm)
    return extends


def holds(
    output: str,
    there: Mapping[str, Any] | None,
    fields: Mapping[str, Any],
    *,
    begun: bool,
    obstacle: Obstacle | None = None,
    version: str | None = None,
) -> bool:
    """Whether an output holds the very run, or training, that has these fields. If not, it may be begun there.

    Args:
        output: URL of the output.
        there: the fields that its ``run.json`` has; None if there is none.
        fields: the settings and identities that the fingerprint covers.
        begun: whether the output holds something that was finished.
        obstacle: tells why a run with fewer rows cannot be extended; None extends no run.
        version: version of vcf-batch that began the run that is there; None if it is not known.

    Raises:
        RefusedError: the output holds another run that has begun and is not extended, or results without a record.
    """
    if there is None and begun:
        raise RefusedError(f"{output} holds results but no {run_file.RUN_FILE_NAME}; use another output")
    if there == fields:
        return True
    if there is not None and begun:
        _refuse_another(output, there, fields, obstacle, version)
    return False


def _refuse_another(
    output: str,
    there: Mapping[str, Any],
    fields: Mapping[str, Any],
    obstacle: Obstacle | None,
    version: str | None,
) -> None:
    """Refuse any run but a longer version of the one that is there."""
    differing = _differing(there, fields)
    reason = ""
    if obstacle and {*differing} <= _LENGTH:
        if (why := obstacle(there)) is None:
            return
        reason = why + " "
    if not {"limit", "rows"}.isdisjoint(differing):
        # The identity covers the rows in use: those of another limit or part have another one.
        differing = [name for name in differing if name != "manifest_id"]
    lines = "".join(_difference(name, there, fields) for name in differing)
    if version not in (None, __version__) and all(_is_of_one_version(name, there) for name in differing):
        raise RefusedError(
            f"{output} was begun by another version, vcf-batch {version}, and this is {__version__}; they differ in:\n"
            f"{lines}Finish it with that version, rerun with the values that are there, or use another output."
        )
    raise RefusedError(
        f"{output} holds another run; they differ in:\n{lines}{reason}"
        "Use another output, or rerun with the settings of the run that is there."
    )


def _differing(there: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
    return [name for name in sorted(there.keys() | fields.keys()) if field_of(there, name) != field_of(fields, name)]


def _is_longer(there: Mapping[str, Any], fields: Mapping[str, Any], obstacle: Obstacle) -> bool:
    """Whether ``fields`` are those of a longer version of the run that is there."""
    return {*_differing(there, fields)} <= _LENGTH and obstacle(there) is None


def _is_of_one_version(name: str, there: Mapping[str, Any]) -> bool:
    """Whether a setting is unknown to the version that wrote the fields ``there``, or to this one."""
    if name in ADDED_SETTINGS:
        return name not in there
    return not name.endswith("_id") and name not in _SETTINGS


def _difference(name: str, there: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """The line of a refusal that shows both values of a field."""
    if name == "default_strengths" and None in (field_of(there, name), field_of(fields, name)):
        left_open = "left open there, given now" if field_of(fields, name) is None else "given there, left open now"
        return f"  strength: {left_open} (rows with a fusion of their own differ)\n"
    return f"  {name}: {_shown(there, name)} there, {_shown(fields, name)} now\n"


def _shown(fields: Mapping[str, Any], name: str) -> str:
    value = field_of(fields, name)
    if value is None:
        return "nothing"
    # Identities are hashes and commits, and that of an adapter has the names of its files too.
    return _HASH.sub(lambda found: found[0][:12], value) if name.endswith("_id") else json.dumps(value)


def record_of(job: Job) -> RunRecord:
    """The record of a run that extends no other."""
    return RunRecord(
        fields=job.fields,
        config=job.config.to_record(),
        manifest=RecordedManifest(
            redact_name(job.manifest.url), job.manifest.identity, job.manifest.num_rows, job.manifest.versions
        ),
        models=job.models.describe(job.guided),
        shards=len(job.shards),
        shard_digits=len(sharding.shard_name(0, len(job.shards))),
        versions={"vcf_batch": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
    )
