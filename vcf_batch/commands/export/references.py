"""References on their way out: names that tell nothing of this machine, hashes, and copies named by their hashes."""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

from vcf_batch import storage
from vcf_batch.commands.export.sources import Source, Sources, SourceShard
from vcf_batch.errors import RowError, UsageError, VcfBatchError
from vcf_batch.images.kinds import kind_of
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.output.output import ManifestLost, Output
from vcf_batch.records import Reference, Row

FOLDER = "references"
"""Folder of an export for copies of references, as ``references/ab/abcdef....png``."""

REMEMBERED = 100_000
"""References whose hashes are remembered. Others are read again."""

_ENDINGS = {"JPEG": "jpg", "PNG": "png", "WebP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif"}


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Copy(NamedTuple):
    """A reference by its content."""

    sha256: str
    ending: str

    @property
    def path(self) -> str:
        """Its place in an export."""
        return f"{FOLDER}/{self.sha256[:2]}/{self.sha256}.{self.ending}"


def listed(value: str | list[str] | None) -> list[str]:
    """The texts in a value of a column that has one text, several, or none in each row."""
    return [value] if isinstance(value, str) else value or []


class Names:
    """Names of references for receivers.

    What is relative stays, and so do URLs of object stores and web servers. A path of this machine becomes relative to
    the manifest's folder, or to the root that allowed it; of any other path only the last part is left.
    """

    def __init__(self, sources: Sources) -> None:
        self._roots = [_roots(source.output) for source in sources.all]

    def of(self, source: Source, value: str | list[str] | None) -> list[str]:
        """The names in a value of the column ``reference``."""
        return [self._relative(source, name) for name in listed(value)]

    def _relative(self, source: Source, name: str) -> str:
        if not storage.is_local(name):
            return name
        path = name.removeprefix("file://")
        if not os.path.isabs(path):
            return name
        path = os.path.normpath(path)
        root = next((root for root in self._roots[source.index] if path.startswith(root)), None)
        return path[len(root) :] if root else os.path.basename(path)


def _roots(output: Output) -> list[str]:
    """The local folders that references of an output may lie in, each with a slash behind it, the longest first."""
    manifest, config = output.record.manifest, output.config
    is_file = storage.name(config.manifest) in manifest.files
    folders = [storage.parent(config.manifest) if is_file else config.manifest, *config.reference_root]
    paths = {storage.absolute(folder).rstrip("/") + "/" for folder in folders if storage.is_local(folder)}
    return sorted(paths, key=len, reverse=True)


class ReferenceImages:
    """Images of references, read at their places or in the manifest. Threads may share it.

    Args:
        sources: the outputs, whose manifests have to be there.

    Raises:
        UsageError: a manifest cannot be read any more, or has changed.
    """

    def __init__(self, sources: Sources) -> None:
        self._readers: list[ReferenceReader] = []
        for source in sources.all:
            manifest, config = source.output.manifest, source.output.config
            if manifest is None:
                raise _lost(source, source.output.manifest_error)
            self._readers.append(ReferenceReader(manifest.base, config.reference_root, config.max_pixels))
        self._known: OrderedDict[tuple[int, str | None, str | None], Copy] = OrderedDict()
        self._copied: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def rows(self, shard: SourceShard) -> Iterator[Row]:
        """The rows of the manifest that a shard is made of.

        Raises:
            UsageError: the manifest cannot be read any more, or has changed meanwhile.
        """
        try:
            yield from shard.source.output.manifest_rows(shard.shard.start, shard.shard.stop)
        except ManifestLost as error:
            raise _lost(shard.source, error) from error

    def hashes(self, source: Source, row: Row) -> list[str]:
        """Hex SHA-256 of each reference of a row. A hash that the manifest gives is taken, as the run has checked it.

        Raises:
            UsageError: a reference cannot be read any more.
            StorageError: the storage failed.
        """
        return [each.sha256 or self._look(source, row, each)[0].sha256 for each in row.references]

    def copies(self, source: Source, row: Row, target: str) -> tuple[list[Copy], Copy | None]:
        """Copy the references of a row, and its negative one, into an export; those that are there stay.

        Returns:
            The references, and the negative one.

        Raises:
            UsageError: a reference cannot be read any more.
            StorageError: the storage failed.
        """
        negative = row.negative_reference
        return (
            [self._copy(source, row, each, target) for each in row.references],
            None if negative is None else self._copy(source, row, negative, target),
        )

    def _copy(self, source: Source, row: Row, reference: Reference, target: str) -> Copy:
        copy, data = self._look(source, row, reference)
        if copy.sha256 in self._copied:
            self._copied.move_to_end(copy.sha256)
            return copy
        url = storage.join(target, copy.path)
        with storage.refusals_as_storage_errors():
            if not storage.exists(url):
                storage.publish_bytes(url, self._read(source, row, reference) if data is None else data)
        _remember(self._copied, copy.sha256, None)
        return copy

    def _look(self, source: Source, row: Row, reference: Reference) -> tuple[Copy, bytes | None]:
        """The hash and the ending of a reference, and its bytes if they had to be read."""
        key = source.index, reference.uri, reference.sha256
        if reference.data is None:
            with self._lock:
                if key in self._known:
                    self._known.move_to_end(key)
                    return self._known[key], None
        data = self._read(source, row, reference)
        kind = kind_of(data)
        copy = Copy(hashlib.sha256(data).hexdigest(), _ENDINGS.get(kind.name, "img") if kind else "img")
        if reference.data is None:
            with self._lock:
                _remember(self._known, key, copy)
        return copy, data

    def _read(self, source: Source, row: Row, reference: Reference) -> bytes:
        try:
            return self._readers[source.index].read_bytes(reference)
        except RowError as error:
            raise UsageError(
                f"row {row.key!r} of {source.output.url}: {error}. Put the image back, leave the row out with "
                "--exclude, or hand on names alone with --references relative"
            ) from error


def _remember(memory: OrderedDict[_Key, _Value], key: _Key, value: _Value) -> None:
    memory[key] = value
    if len(memory) > REMEMBERED:
        memory.popitem(last=False)


def _lost(source: Source, error: VcfBatchError | None) -> UsageError:
    return UsageError(
        f"the manifest of {source.output.url} is needed to find references, and cannot be read: {error}. Put it back, "
        "or do without --references copy and the column reference_sha256 in --where"
    )
