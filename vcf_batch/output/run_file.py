"""``run.json``: the record of what an output holds, read and written."""

import contextlib
import dataclasses
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vcf_batch import __version__, storage
from vcf_batch.config.fingerprint import ADDED_SETTINGS, fingerprint
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import RefusedError, StorageError, redact_name
from vcf_batch.manifest.manifest import FileVersion, Manifest
from vcf_batch.output import commits

RUN_FILE_NAME = "run.json"
MAX_RUN_FILE_BYTES = 1 << 26
"""Most bytes of a ``run.json`` that are read. Each file of a manifest takes about 200."""

LAYOUT = 4
"""Version of an output's layout. Raise it whenever this code can no longer read, verify or resume older outputs."""

_SETTINGS = frozenset(field.name for field in dataclasses.fields(RunConfig))


class AnotherVersion(RefusedError):
    """The output was written by a version of vcf-batch with another layout, or with settings that are unknown here."""


@dataclass(frozen=True)
class RecordedManifest:
    """The manifest of a run, as its record names it."""

    url: str
    """The manifest's place, without credentials."""
    identity: str
    rows: int
    files: Mapping[str, FileVersion]
    """The manifest's files by name."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as its ``run.json`` describes it. Keys that a later version added are not kept."""

    fields: Mapping[str, Any]
    """The settings and identities that the fingerprint covers."""
    config: Mapping[str, Any]
    """Every setting, settled, as plain JSON types and without credentials."""
    manifest: RecordedManifest
    models: Mapping[str, Any]
    """Name and version of the model, of the PNO guide and of the source of each score; None where there is none."""
    shards: int
    shard_digits: int
    """Number of digits of a shard's number in the names of files."""
    versions: Mapping[str, str]
    """Versions of vcf-batch and of the libraries that decide on the output, by package."""
    extends: tuple[str, ...] = ()
    """Fingerprints of the run before rows were appended to its manifest, the first one first."""

    @property
    def named_models(self) -> dict[str, Mapping[str, Any]]:
        """The models of the run by their purpose, each with name and identity.

        A LoRA has the purpose ``lora NAME``, and its scale too.
        """
        loras = {f"lora {name}": lora for name, lora in self.models.get("lora", {}).items()}
        return {what: model for what, model in self.models.items() if model and what != "lora"} | loras

    @property
    def loras(self) -> list[str]:
        """The LoRAs of all rows in words, each with its scale. Rows may have others, in their column."""
        return [f"{name}, {lora['name']} at {lora['scale']:g}" for name, lora in self.models.get("lora", {}).items()]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.fields)

    @property
    def fingerprints(self) -> frozenset[str]:
        """Fingerprints that the receipts of the output may have."""
        return frozenset((self.fingerprint, *self.extends))

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "RunRecord":
        """Check the JSON object of a ``run.json``, as :func:`read_document` gives it.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: a part is missing or wrong.
        """
        manifest = document["manifest"]
        record = cls(
            fields=document["fields"],
            config=_mapping(document, "config"),
            manifest=RecordedManifest(
                str(manifest["url"]),
                str(manifest["identity"]),
                _count(manifest, "rows"),
                {str(name): _file_version(file) for name, file in _mapping(manifest, "files").items()},
            ),
            models=_mapping(document, "models"),
            shards=_count(document, "shards"),
            shard_digits=_count(document, "shard_digits"),
            versions={str(name): str(version) for name, version in document["versions"].items()},
            extends=tuple(map(str, document["extends"])),
        )
        for name in ("model", "clip_score", "clip_reference"):
            _mapping(record.models, name)
        for name in ("manifest_id", "limit", "shard_size"):
            record.fields[name]
        return record

    def to_document(self) -> dict[str, Any]:
        """The JSON object of ``run.json``."""
        described = dataclasses.asdict(self)
        return document(described.pop("fields"), extends=described.pop("extends"), description=described)

    def run_config(self, output: str, changes: Mapping[str, Any] = MappingProxyType({})) -> RunConfig:
        """The settled configuration of the run. Settings that the fingerprint covers are taken from its fields.

        Args:
            output: URL of the output now.
            changes: settings that have changed, such as the place of a manifest that has moved.

        Raises:
            AnotherVersion: the run has a setting that this version does not know.
            UsageError: a setting has no value that it can have.
        """
        unknown = sorted((self.config.keys() & self.fields.keys()) - _SETTINGS)
        if unknown:
            version = self.versions.get("vcf_batch")
            raise AnotherVersion(
                f"{output} was begun by vcf-batch {version}, with a setting that {__version__} does not "
                f"know: {unknown[0]} is {json.dumps(self.fields[unknown[0]])}. Use the version that began it"
            )
        # A setting of a later version that is not in the fields has the value that means the behaviour of this one.
        recorded = {name: value for name, value in self.config.items() if name in _SETTINGS}
        content = {name: self.fields[name] for name in recorded.keys() & self.fields.keys() - {"lpips"}}
        return RunConfig.from_mapping({**recorded, **ADDED_SETTINGS, **content, **changes, "output": output})


def open_manifest(config: RunConfig, record: RunRecord | None) -> Manifest:
    """Open the manifest of a configuration, see :meth:`vcf_batch.manifest.manifest.Manifest.open`.

    Files that the record of a run with the same manifest knows are not hashed again.

    Args:
        record: the record that is in the output; None if there is none.
    """
    known: Mapping[str, FileVersion] = {}
    if record and redact_name(config.manifest) == record.manifest.url:
        known = record.manifest.files
    return Manifest.open(
        config.manifest, config.limit, known=known, mapped=config.columns, carry=config.carry, part=config.part
    )


def document(fields: Mapping[str, Any], description: Mapping[str, Any], extends: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON object of a ``run.json``.

    Args:
        fields: the settings and identities that the fingerprint covers.
        description: the other entries of the record.
        extends: see :attr:`RunRecord.extends`.
    """
    return {
        "layout": LAYOUT,
        "fields": dict(fields),
        "fingerprint": fingerprint(fields),
        "extends": list(extends),
        **description,
    }


def read_document(output: str) -> dict[str, Any] | None:
    """The JSON object of the output's ``run.json``, of a run or a training, with the fingerprint that its fields have.

    None if there is no such file, or an empty one, as a driver leaves that died while it created it.

    Raises:
        RefusedError: it is there, but is not what vcf-batch writes.
        AnotherVersion: it is what another version writes.
        UsageError: there is no driver for the URL.
        StorageError: the storage failed.
    """
    url = storage.join(output, RUN_FILE_NAME)
    try:
        with storage.refusals_as_storage_errors():
            data = storage.read_bytes(url, limit=MAX_RUN_FILE_BYTES)
    except FileNotFoundError:
        return None
    except storage.NotAFileError as error:
        raise _damaged(url) from error
    if not data:
        return None
    try:
        there = json.loads(data)
        if isinstance(there["fields"], dict) and there["fingerprint"] == fingerprint(there["fields"]):
            if (layout := there.get("layout")) != LAYOUT:
                raise AnotherVersion(
                    f"{output} has layout {layout}, and this version of vcf-batch reads layout {LAYOUT}: use the "
                    f"version that wrote it, which {url} names, or another output"
                )
            return there
    except (ValueError, KeyError, TypeError):
        pass
    raise _damaged(url)


def _damaged(url: str) -> RefusedError:
    return RefusedError(f"{url} is damaged or was not written by vcf-batch; use another output")


def read(output: str) -> RunRecord | None:
    """The record of the output's run; None if there is no ``run.json``.

    Raises:
        RefusedError: it is there, but is not what a run writes.
        AnotherVersion: it is what a run of another version writes.
        StorageError: the storage failed.
    """
    there = read_document(output)
    try:
        return None if there is None else RunRecord.from_document(there)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        url = storage.join(output, RUN_FILE_NAME)
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise RefusedError(f"{url} is damaged, or not the record of a run: {reason}; use another output") from error


def write(
    output: str,
    document: Mapping[str, Any],
    *,
    replaces: bool = False,
    confirm: Callable[[], object] = lambda: None,
) -> None:
    """Write the output's ``run.json``. For the driver that owns the output.

    If the driver is suspended in here and loses its lease, the next owner's file stays. A file that is new here is
    created and replaces nothing. One that replaces another is staged first, and the next owner deletes what is staged
    (:func:`vcf_batch.output.commits.clean`) before its first commit. On object stores a request lies between the check
    of the lease and the replacement, as in :func:`vcf_batch.output.commits.commit`; :func:`check_stays` finds it.

    Args:
        replaces: whether the output has a ``run.json``, which is replaced.
        confirm: raises if the driver no longer owns the output. Called right before the file is published.

    Raises:
        RefusedError: another driver has written the file meanwhile, or ``confirm`` raises it.
        StorageError: the storage failed.
    """
    url, data = storage.join(output, RUN_FILE_NAME), json.dumps(document, indent=2).encode()
    if not replaces:
        confirm()
        try:
            storage.publish_bytes(url, data, create=True)
        except FileExistsError as error:
            confirm()  # It names the driver that took over.
            if read_document(output) != json.loads(data):
                raise RefusedError(f"another driver has written {url} meanwhile; rerun this command") from error
        return
    folder = storage.join(output, commits.STAGING, f"claim-{uuid.uuid4().hex}")
    staged = storage.join(folder, RUN_FILE_NAME)
    try:
        storage.publish_bytes(staged, data)
        confirm()
        try:
            storage.move(staged, url)
        except FileNotFoundError as error:
            confirm()
            raise StorageError(f"{staged} is gone, so {url} is not replaced; rerun this command") from error
    finally:
        with contextlib.suppress(StorageError):
            storage.remove_tree(folder)


def check_stays(output: str, name: str) -> None:
    """Check that the output still holds the record of a run. For the driver of that run.

    Args:
        name: the fingerprint of the run.

    Raises:
        RefusedError: the record is gone, damaged, or that of another run.
        StorageError: the storage failed.
    """
    there = read_document(output)
    if there is None or there["fingerprint"] != name:
        found = "it is gone" if there is None else f"it is of run {there['fingerprint'][:12]}"
        url = storage.join(output, RUN_FILE_NAME)
        raise RefusedError(
            f"{url} is not of this run, {name[:12]}, any more: {found}. Another driver has written or deleted it; "
            "rerun this command once no other run uses the output"
        )


def _file_version(file: Mapping[str, Any]) -> FileVersion:
    stamp = None if file["stamp"] is None else str(file["stamp"])
    return FileVersion(int(file["size"]), stamp, int(file["groups"]), str(file["sha256"]))


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(values[name], dict):
        raise ValueError(f"{name} is {values[name]!r}; it must be an object")
    return values[name]


def _count(values: Mapping[str, Any], name: str) -> int:
    if type(values[name]) is not int or values[name] < 1:
        raise ValueError(f"{name} is {values[name]!r}; it must be a number of 1 or more")
    return values[name]
