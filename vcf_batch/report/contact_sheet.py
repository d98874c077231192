"""The contact sheet of a run, drawn from its output and references alone."""

import bisect
import itertools
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from vcf_batch import images
from vcf_batch.config.limits import MAX_PIXELS
from vcf_batch.errors import DamageFound, RowError, StorageError, UsageError
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.models import embedded
from vcf_batch.output import receipts, shards
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Receipt
from vcf_batch.output_columns import COLUMNS
from vcf_batch.records import Row
from vcf_batch.report.figures import setting_of

TILE = 128
"""Edge of a picture on the sheet, in pixels."""

CARDS_PER_ROW = 4
"""Most cards side by side; a card is a reference and the image made from it."""

_GAP = 8
_LINE = 16
_CARD = (2 * TILE + _GAP, TILE + 2 * _LINE)
_SHORT = {"clip_score": "prompt", "clip_reference": "reference", "lpips": "lpips"}
_INK, _PALE, _PAPER = (30, 30, 30), (225, 225, 225), (255, 255, 255)


@dataclass(frozen=True)
class _Card:
    prompt: str
    reference: Image.Image | None
    output: Image.Image | None
    notes: Sequence[str]
    """Two lines at most."""


def contact_sheet(output: str, limit: int = 64, changes: Mapping[str, Any] = MappingProxyType({})) -> Image.Image:
    """Draw the first samples of a run: reference beside output, one heading a prompt, method and scores below.

    The first line names the model.

    Args:
        output: folder or URL of a run's output, finished or not.
        limit: most samples to draw.
        changes: settings that are not what they were, such as the place of a manifest that has moved.

    Raises:
        UsageError: the output has no finished shard.
        VcfBatchError: its manifest cannot be read any more, or has changed.
        DamageFound: a tar cannot be read.
        StorageError: the storage failed.
    """
    opened = Output(output, changes)
    record, done = opened.record, receipts.read(opened.url)
    first = next(done, None)
    if first is None:
        raise UsageError(f"{output} has no finished shard to show; generate into it first")
    cards = itertools.islice(_cards(opened, itertools.chain([first], done)), limit)
    by_prompt: dict[str, list[_Card]] = {}
    for card in cards:
        by_prompt.setdefault(card.prompt, []).append(card)
    groups = [*by_prompt.items()]

    columns = min(CARDS_PER_ROW, max(len(group) for _, group in groups))
    heights = [_LINE + _GAP + -(-len(group) // columns) * (_CARD[1] + _GAP) for _, group in groups]
    width = columns * (_CARD[0] + 2 * _GAP)
    title = [f"Model: {embedded.label(record.models['model'])}"]
    if adapter := record.models.get("ip_adapter"):
        title.append(f"IP-Adapter: {adapter['name']}")
    title += [f"LoRA: {told}" for told in record.loras]
    sheet = Image.new("RGB", (width, sum(heights) + len(title) * _LINE + 2 * _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, line in enumerate(title):
        draw.text((_GAP, _GAP + number * _LINE), _fit(line, font, width - 2 * _GAP), _INK, font)
    top = _GAP + len(title) * _LINE + _GAP
    for (prompt, group), height in zip(groups, heights, strict=True):
        draw.text((_GAP, top), _fit(prompt, font, width - 2 * _GAP), _INK, font)
        for place, card in enumerate(group):
            row, column = divmod(place, columns)
            x = _GAP + column * (_CARD[0] + 2 * _GAP)
            y = top + _LINE + _GAP // 2 + row * (_CARD[1] + _GAP)
            _paste(sheet, card.reference, (x, y), "text only")
            _paste(sheet, card.output, (x + TILE + _GAP, y), "failed")
            for number, note in enumerate(card.notes):
                draw.text((x, y + TILE + number * _LINE + 1), _fit(note, font, _CARD[0]), _INK, font)
        top += height
    return sheet


class Cell(NamedTuple):
    """One cell of a grid."""

    picture: Image.Image | None
    instead: str
    """Text shown if there is no picture."""
    notes: Sequence[str] = ()
    """Lines below the picture."""


def grid(heads: Sequence[Sequence[str]], rows: Sequence[tuple[str, Sequence[Cell]]]) -> Image.Image:
    """Draw pictures in rows and columns.

    Args:
        heads: lines above each column.
        rows: the heading of each row, and a cell for each column.
    """
    font = ImageFont.load_default(13)
    head_lines, note_lines = max(map(len, heads)), max(len(cell.notes) for _, cells in rows for cell in cells)
    height = _LINE + _GAP + TILE + note_lines * _LINE + _GAP
    width = len(heads) * (TILE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, head_lines * _LINE + len(rows) * height + 2 * _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)

    def write(lines: Sequence[str], x: int, y: int, most: int) -> None:
        for number, line in enumerate(lines):
            draw.text((x, y + number * _LINE), _fit(line, font, most), _INK, font)

    places = range(_GAP, width, TILE + _GAP)
    for x, lines in zip(places, heads, strict=False):
        write(lines, x, _GAP, TILE)
    for number, (heading, cells) in enumerate(rows):
        y = head_lines * _LINE + 2 * _GAP + number * height
        write([heading], _GAP, y, width - 2 * _GAP)
        y += _LINE + _GAP // 2
        for x, cell in zip(places, cells, strict=False):
            _paste(sheet, cell.picture, (x, y), cell.instead)
            write(cell.notes, x, y + TILE + 1, TILE)
    return sheet


def scores_of(record: Mapping[str, Any]) -> list[str]:
    """The scores of a sample, each in a few words."""
    return [f"{short} {record[name]:.2f}" for name, short in _SHORT.items() if record[name] is not None]


def _cards(output: Output, done: Iterable[Receipt]) -> Iterator[_Card]:
    config = output.config
    reader = ReferenceReader(output.need_manifest().base, config.reference_root, config.max_pixels)
    for receipt in done:
        shard = receipt.shard
        # Rows and samples are in manifest order; only successful rows have a sample.
        samples = _samples(shards.file_url(output.url, shard, "tar")) if receipt.counts["success"] else iter(())
        sample = next(samples, None)
        for row in output.manifest_rows(shard.start, shard.stop):
            if sample is None or sample["__key__"] != row.key:
                yield _Card(row.prompt, _reference(row, reader), None, ["see error_message in the parquet"])
                continue
            record = dict.fromkeys(COLUMNS) | sample["json"]
            picture = images.decode(sample[config.image_format], MAX_PIXELS)
            reference = _reference(row, reader) if record["strength"] else None
            yield _Card(row.prompt, reference, picture, [setting_of(record), "  ".join(scores_of(record))])
            sample = next(samples, None)


def _samples(tar: str) -> Iterator[dict[str, Any]]:
    try:
        yield from shards.read_samples(tar)
    except (tarfile.TarError, FileNotFoundError, LookupError, ValueError) as error:
        raise DamageFound(f"{tar} cannot be read: {error}; see 'vcf-batch verify'") from error


def _reference(row: Row, reader: ReferenceReader) -> Image.Image | None:
    """The row's first reference; None if there is none, or it can no longer be read."""
    if not row.references:
        return None
    try:
        return reader.read(row.references[0])
    except (RowError, StorageError):
        return None


def _paste(sheet: Image.Image, picture: Image.Image | None, place: tuple[int, int], instead: str) -> None:
    if picture is None:
        ImageDraw.Draw(sheet).rectangle((*place, place[0] + TILE - 1, place[1] + TILE - 1), _PALE)
        ImageDraw.Draw(sheet).text((place[0] + 8, place[1] + 8), instead, _INK, ImageFont.load_default(13))
        return
    # Small pictures are enlarged by whole pixels, so that the sheet shows the written pixels.
    method = Image.Resampling.NEAREST if picture.width < TILE else Image.Resampling.LANCZOS
    sheet.paste(picture.resize((TILE, TILE), method), place)


def _fit(text: str, font: Any, width: int) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    too_long = bisect.bisect_right(range(len(text)), width, key=lambda length: font.getlength(text[:length] + "..."))
    return text[: max(too_long - 1, 0)] + "..."
