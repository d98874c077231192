"""The pictures of the page: those of the shown samples, and of the dots in the plot."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from vcf_batch.driver.progress import steps
from vcf_batch.errors import RowError, StorageError
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.output import shards
from vcf_batch.output.output import ManifestLost, Output
from vcf_batch.output.shards import side_by_side
from vcf_batch.records import TRIPLET, Reference, Shard
from vcf_batch.report.pictures.fitting import LARGEST_EDGE, FittedPicture, fitted
from vcf_batch.report.pictures.shares import DOT_EDGE, shares
from vcf_batch.report.thumbnails import from_tar

MOST_TARS = 100
"""Number of shards from which on no tar is read for the sake of a dot. Each tar is read up to its last sample that is
wanted, so a thousand large ones would be read for hours."""


class PagePictures(NamedTuple):
    """Pictures by row number. One that cannot be read any more, or for which there is no room, is missing."""

    samples: Mapping[int, Mapping[str, FittedPicture]]
    """By what they show, the names of :data:`vcf_batch.report.pictures.shares.PICTURE_WEIGHTS`."""
    dots: Mapping[int, FittedPicture]


def read(output: Output, chosen: Mapping[int, Mapping[str, Any]], dots: Mapping[int, str], most: int) -> PagePictures:
    """Pictures of successful rows. Each shard's tar is read up to the last sample that is wanted of it.

    Args:
        output: the output.
        chosen: parquet rows of the shown samples by row number, with ``key``, ``reference`` and ``strength``.
        dots: keys of the rows that only a dot stands for, by row number.
        most: bytes that all pictures together may take in the page.

    Raises:
        DamageFound: a tar does not match its receipt.
        StorageError: the storage failed.
    """
    references = _references(output, chosen)
    twins = TRIPLET if output.config.triplets else ()
    distinct = dict.fromkeys(references.values())
    counts = {"output": len(chosen), "reference": len(distinct), **dict.fromkeys(twins, len(chosen))}
    bounds = shares(most, len(dots), counts)
    seen = dict(side_by_side(lambda each: _reference(output, each, bounds["reference"]), distinct))
    samples: dict[int, dict[str, FittedPicture]] = {number: {} for number in chosen}
    for number, reference in references.items():
        if picture := seen[reference]:
            samples[number]["reference"] = picture
    found: dict[int, FittedPicture] = {}
    ending = output.config.image_format

    def of_shard(shard: Shard) -> dict[tuple[int, str], FittedPicture | None]:
        here = range(shard.start, shard.stop)
        names = {f"{dots[number]}.{ending}": (number, "dot") for number in dots if number in here}
        for number, row in chosen.items():
            if number in here:
                names[f"{row['key']}.{ending}"] = number, "output"
                names |= {f"{row['key']}.{twin}.{ending}": (number, twin) for twin in twins}
        edges = {"dot": DOT_EDGE}
        pictures = from_tar(
            shards.file_url(output.url, shard, "tar"),
            names,
            lambda name, image: fitted(image, bounds[names[name][1]], edges.get(names[name][1], LARGEST_EDGE)),
        )
        return {names[name]: picture for name, picture in pictures.items()}

    some = _shards(output, chosen, dots)
    for _, pictures in steps(side_by_side(of_shard, some), "reading pictures", len(some), "shard"):
        for (number, what), picture in pictures.items():
            if picture and what == "dot":
                found[number] = picture
            elif picture:
                samples[number][what] = picture
    return PagePictures(samples, found)


def _shards(output: Output, chosen: Iterable[int], dots: Iterable[int]) -> list[Shard]:
    """The shards whose tars are read: all of the shown samples, and further ones for dots up to :data:`MOST_TARS`."""
    wanted = {output.plan.index_of(number) for number in chosen}
    for number in dots:
        if len(wanted) < MOST_TARS:
            wanted.add(output.plan.index_of(number))
    return [output.plan[index] for index in sorted(wanted)]


def _references(output: Output, chosen: Mapping[int, Mapping[str, Any]]) -> dict[int, Reference]:
    """The first reference of each row that has one, as far as the manifest is there."""

    def first(number: int) -> Reference | None:
        try:
            return next(output.manifest_rows(number, number + 1)).references[0]
        except (ManifestLost, IndexError):
            return None

    if not output.manifest:
        return {}
    using = [number for number, row in chosen.items() if row["strength"] and row["reference"]]
    return {number: reference for number, reference in side_by_side(first, using) if reference}


def _reference(output: Output, reference: Reference, most: int) -> FittedPicture | None:
    if not (manifest := output.manifest):
        return None
    try:
        reader = ReferenceReader(manifest.base, output.config.reference_root, output.config.max_pixels)
        return fitted(reader.read(reference), most)
    except (RowError, StorageError):
        return None
