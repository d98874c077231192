"""Thumbnails of chosen rows: the generated image and its reference."""

import contextlib
import io
import itertools
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from vcf_batch import images, storage
from vcf_batch.config.limits import MAX_PIXELS
from vcf_batch.errors import DamageFound, RowError, StorageError
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.output import shards
from vcf_batch.output.output import ManifestLost, Output
from vcf_batch.output.shards import side_by_side
from vcf_batch.records import Shard
from vcf_batch.storage import tar as tar_members

EDGE = 160
"""Longest edge in pixels; smaller pictures stay as they are."""

MAX_THUMBNAIL_BYTES = 7 << 10
"""Size aimed at for a thumbnail; pictures that compress badly lose detail."""

_ENCODINGS: tuple[Mapping[str, Any], ...] = (
    {"lossless": True},
    *({"quality": quality} for quality in (80, 50, 20, 1)),
)


class Thumbnails(NamedTuple):
    """Two thumbnails of a row, as WebP files."""

    output: bytes
    reference: bytes | None
    """The reference's thumbnail; None if there is no reference, or it can no longer be read."""


def read(output: Output, chosen: Mapping[int, Mapping[str, Any]]) -> dict[int, Thumbnails]:
    """Thumbnails of successful rows. Each shard's tar is streamed up to its last chosen sample.

    Args:
        chosen: parquet rows by row number, with at least ``key``, ``reference`` and ``strength``.

    Raises:
        DamageFound: a tar does not match its receipt.
        StorageError: the storage failed.
    """
    manifest, config = output.manifest, output.config
    reader = manifest and ReferenceReader(manifest.base, config.reference_root, config.max_pixels)

    def reference(number: int) -> bytes | None:
        if not (output.manifest and reader and chosen[number]["strength"] and chosen[number]["reference"]):
            return None
        try:
            row = next(output.manifest_rows(number, number + 1))
            return thumbnail(reader.read(row.references[0]))
        except (RowError, StorageError, ManifestLost):
            return None

    def pairs(shard: Shard) -> dict[int, Thumbnails]:
        numbers = {
            f"{chosen[number]['key']}.{config.image_format}": number
            for number in chosen
            if shard.start <= number < shard.stop
        }
        outputs = from_tar(shards.file_url(output.url, shard, "tar"), numbers, lambda _, image: thumbnail(image))
        return {numbers[name]: Thumbnails(picture, reference(numbers[name])) for name, picture in outputs.items()}

    wanted = (output.plan[index] for index in sorted({output.plan.index_of(number) for number in chosen}))
    return dict(itertools.chain.from_iterable(found.items() for _, found in side_by_side(pairs, wanted)))


def thumbnail(image: Image.Image) -> bytes:
    """Encode a picture as a small WebP file."""
    image = image.copy()
    image.thumbnail((EDGE, EDGE))
    for options in _ENCODINGS:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", **options)
        if buffer.tell() <= MAX_THUMBNAIL_BYTES:
            break
    return buffer.getvalue()


def picture(tar: str, key: str, image_format: str) -> Image.Image:
    """The image of one sample. The members before it are skipped.

    Raises:
        DamageFound: the tar is damaged, or has no such sample.
        StorageError: the storage failed.
    """
    name = f"{key}.{image_format}"
    return from_tar(tar, [name], lambda _, image: image)[name]


Made = TypeVar("Made")


def from_tar(tar: str, names: Iterable[str], make: Callable[[str, Image.Image], Made]) -> dict[str, Made]:
    """What ``make`` makes of some images of a tar, each given with its name. Other members are skipped.

    Raises:
        DamageFound: the tar is damaged up to the last of them, or has no such member.
        StorageError: the storage failed.
    """
    left, found = {*names}, {}
    with _damage_told(tar), storage.open_read(tar) as file:
        for member in tar_members.members(file):
            if member.name in left:
                left.remove(member.name)
                found[member.name] = make(member.name, images.decode(member.read(), MAX_PIXELS))
            if not left:
                return found
    raise DamageFound(f"{tar} has no sample {min(left).partition('.')[0]}; see 'vcf-batch verify'")


@contextlib.contextmanager
def _damage_told(tar: str) -> Iterator[None]:
    try:
        with storage.refusals_as_storage_errors():
            yield
    except (tarfile.TarError, FileNotFoundError, KeyError, ValueError, RowError) as error:
        raise DamageFound(f"{tar} cannot be read: {error}; see 'vcf-batch verify'") from error
