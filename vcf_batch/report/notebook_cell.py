"""An output as the cell of a notebook: its state and its first pictures, as HTML of bounded size."""

import base64
import html
from collections.abc import Iterator, Mapping
from typing import Any

from vcf_batch.errors import VcfBatchError, printable, redact
from vcf_batch.output import shards
from vcf_batch.output.output import Output
from vcf_batch.report import status, thumbnails
from vcf_batch.report.contact_sheet import scores_of
from vcf_batch.report.figures import parquet_of, setting_of

PICTURES = 8
"""Most pictures of a cell."""
SHARDS_LOOKED_AT = 4
"""Number of finished shards, from the first one, whose first rows are looked at for pictures."""
HEIGHT = 128
"""Height of a picture as it is shown, in pixels."""
TEXT_LENGTH = 200
"""Most characters shown of a text."""
_MAX_PICTURE_BYTES = 16 << 10
_COLUMNS = ["key", "status", "prompt", "reference", "strength", "fusion", "pno_steps"]
_SCORES = ["clip_score", "clip_reference", "lpips"]


def address(output: Output) -> str:
    """The place of an output, without secrets."""
    return printable(redact(output.url))


def render(output: Output) -> str:
    """The cell, below 512 KB for an output of any size. What cannot be read is told in it."""
    try:
        found = status.of(output)
    except VcfBatchError as error:
        return f"<div>{_text(address(output))}<br>{_text(str(error))}</div>"
    try:
        pictures = "".join(_pictures(output, found))
    except VcfBatchError as error:
        pictures = _text(str(error))
    table = "".join(
        f'<tr><td style="text-align:left">{_text(name)}</td><td style="text-align:left">{_text(line)}</td></tr>'
        for name, line in (("", found.headline()), *found.lines())
    )
    return f"<div><table>{table}</table><div>{pictures}</div></div>"


def _pictures(output: Output, found: status.Status) -> Iterator[str]:
    """The first successful rows of the first finished shards, each beside its reference."""
    chosen = dict(_first_rows(output, found))
    for number, pair in thumbnails.read(output, chosen).items():
        row = chosen[number]
        shown = "".join(_picture(data) for data in (pair.reference, pair.output) if data)
        notes = f"{setting_of(row)}<br>{_text('  '.join(scores_of(row)))}"
        yield (
            f'<div style="display:inline-block;vertical-align:top;margin:4px;max-width:{2 * thumbnails.EDGE + 8}px">'
            f"{shown}<br><small>{_text(row['key'])}: {_text(row['prompt'])}<br>{notes}</small></div>"
        )


def _first_rows(output: Output, found: status.Status) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number and values of at most :data:`PICTURES` successful rows."""
    left = PICTURES
    for index in sorted(found.totals.done)[:SHARDS_LOOKED_AT]:
        shard = output.plan[index]
        with parquet_of(output, shard) as parquet:
            batches = parquet.iter_batches(shards.ROWS_AT_ONCE, columns=[*_COLUMNS, *_SCORES], use_threads=False)
            rows = next(batches).to_pylist()
        for place, row in enumerate(rows):
            if left and row["status"] == "success":
                left -= 1
                yield shard.start + place, row


def _picture(data: bytes) -> str:
    if len(data) > _MAX_PICTURE_BYTES:
        return "<small>(too large to show)</small>"
    source = "data:image/webp;base64," + base64.b64encode(data).decode()
    return f'<img src="{source}" style="display:inline;height:{HEIGHT}px;margin:1px;image-rendering:pixelated">'


def _text(text: str) -> str:
    text = printable(text)
    return html.escape(text if len(text) <= TEXT_LENGTH else text[: TEXT_LENGTH - 1] + "…")
