"""``status`` and ``report``: an output to look at."""

import io
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import click

from vcf_batch import storage
from vcf_batch.cli.command import Command, check_ending, debug_option, given, json_option, moved_option, tell
from vcf_batch.cli.documents import DOCUMENTS
from vcf_batch.errors import UsageError, redact

SHEET_ROWS = 64
"""Samples in the picture of a report, unless another number is asked for."""


@click.command(
    cls=Command,
    document=DOCUMENTS["status"],
    examples=(
        ("vcf-batch status out/demo", "How far the demo is"),
        ("vcf-batch status s3://bucket/dataset --json", "The same for a program"),
    ),
)
@click.argument("output")
@json_option
@debug_option
def status(output: str, as_json: bool) -> None:
    """Show the state of the run in OUTPUT.

    This works while the run goes on, after it ended, and after it died. Only OUTPUT is read, so any machine that
    sees it can do this. Shards count once they are finished. Nothing is written.

    Exit codes: 0 in every state of a run ("state": finished, running or stopped); 1 unexpected; 2 no run there;
    5 damage.
    """
    from vcf_batch.report import status as statuses  # pyarrow is not needed to print a help text

    found = statuses.read(output)
    tell(str(found), found.to_dict(), as_json)


@click.command(
    cls=Command,
    document=DOCUMENTS["report"],
    examples=(
        ("vcf-batch report out/demo", "The page"),
        ("vcf-batch report out/demo --png samples.png --rows 16", "A picture of 16 samples"),
        ("vcf-batch report out/weak out/strong --out compared.html", "Two runs of one manifest beside each other"),
    ),
)
@click.argument("output")
@click.argument("other", required=False)
@click.option(
    "--out",
    metavar="FILE",
    help="The page to write, as HTML.  [default: index.html in OUTPUT, if neither --png nor OTHER is given]",
)
@click.option(
    "--png", metavar="FILE", help="Write a contact sheet: the first samples beside their references, as one picture."
)
@click.option(
    "--rows",
    "shown",
    type=click.IntRange(min=1),
    help=f"Number of samples in the picture of --png.  [default: {SHEET_ROWS}]",
)
@moved_option("manifest")
@json_option
@debug_option
@click.pass_context
def report(
    ctx: click.Context,
    output: str,
    other: str | None,
    out: str | None,
    png: str | None,
    shown: int | None,
    as_json: bool,
    **_: Any,
) -> None:
    """Write a page, or a picture, that shows OUTPUT.

    The page has scores, samples, failures, throughput and configuration. It is one HTML file that needs nothing else,
    and shows the best, the worst and random samples beside their references. Samples open large there, and keys are
    flagged for 'repair --keys' and 'export --exclude'. With --png, a picture of the first samples is written instead of
    the page; with --out as well, both. OUTPUT may be unfinished.

    With OTHER, a second output, the two are compared row by row, by their keys: scores, and which rows are better or
    worse in OTHER. Nothing is written, unless --out names a page, which also shows the rows that changed most.

    Exit codes: 0 written; 1 unexpected; 2 no finished shard there; 5 damage.
    """
    if shown is not None and png is None:
        raise UsageError(f"--rows {shown} is the number of samples in the picture: give --png FILE too")
    if out is not None:
        check_ending("--out", out, "text/html")
    if png is not None:
        check_ending("--png", png, "image/png")
    if other is not None:
        if png is not None:
            raise UsageError(f"--png {png} shows one output: leave it out, or leave {other} out")
        _compare(output, other, given(ctx), out, as_json)
        return
    written: dict[str, str] = {}
    if out is not None or png is None:
        from vcf_batch.output.output import Output  # Pillow and pyarrow are not needed to print a help text
        from vcf_batch.report import page

        opened = Output(output, given(ctx))
        target = storage.absolute(out) if out is not None else storage.join(opened.url, page.PAGE_NAME)
        storage.publish_bytes(target, page.render(opened).encode())
        written["page"] = redact(target)
    if png is not None:
        written["picture"] = draw_sheet(output, png, shown or SHEET_ROWS, given(ctx))
    tell("\n".join(written.values()), written, as_json)


def _compare(first: str, second: str, changes: Mapping[str, Any], out: str | None, as_json: bool) -> None:
    """Compare two outputs, and write a page of it to ``out``, if there is one."""
    from vcf_batch.output.output import Output  # Pillow and pyarrow are not needed to print a help text
    from vcf_batch.report.two_outputs import beside, pairs

    outputs = Output(first, changes), Output(second, changes)
    found = pairs.compare(*outputs)
    document = {"first": redact(first), "second": redact(second), **found.to_dict()}
    words = beside.markdown(found)
    if out is not None:
        target = storage.absolute(out)
        storage.publish_bytes(target, beside.render(found, outputs).encode())
        document["page"] = redact(target)
        words += f"\n\n{redact(target)}"
    tell(words, document, as_json)


def draw_sheet(output: str, target: str, rows: int, changes: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Write the contact sheet of an output as a PNG; where it is, without secrets.

    Args:
        output: folder or URL that a run has written.
        target: the file to write.
        rows: samples at most.
        changes: settings that are not what they were in the run, such as the place of a manifest that has moved.
    """
    from vcf_batch.report import contact_sheet  # Pillow and pyarrow are not needed to print a help text

    picture = io.BytesIO()
    contact_sheet.contact_sheet(storage.absolute(output), rows, changes).save(picture, "png")
    storage.publish_bytes(target := storage.absolute(target), picture.getvalue())
    return redact(target)
