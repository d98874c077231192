"""``status``, ``contact-sheet``, ``report``, ``card`` and ``push``: an output to look at and to hand on."""

import io
import json
from typing import Any

import click

from vcf_batch import storage
from vcf_batch.cli.command import Command, debug_option, moved_option
from vcf_batch.cli.generation import given, hand_on
from vcf_batch.errors import printable, redact


@click.command(cls=Command)
@click.argument("output")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
@debug_option
def status(output: str, as_json: bool) -> None:
    """Tell how the run in OUTPUT stands: while it runs, after it ended, after it died.

    It is read from OUTPUT alone, so on any machine that sees it; shards count once they are finished. Nothing is
    written.

    \b
    Exit codes: 0 told, however the run stands ("state": finished, running or stopped); 1 unexpected; 2 no run there;
    5 damage.
    """
    from vcf_batch.report import status as statuses  # pyarrow is not needed to print a help text

    found = statuses.read(output)
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else printable(str(found)))


@click.command(cls=Command)
@click.argument("output")
@click.option("--rows", type=click.IntRange(min=1), default=64, show_default=True, help="Samples to show.")
@click.option("--out", metavar="FILE", help="The PNG to write.  [default: contact_sheet.png in OUTPUT]")
@debug_option
def contact_sheet(output: str, rows: int, out: str | None) -> None:
    """Draw references beside what became of them: the first samples of OUTPUT as one picture."""
    from vcf_batch.report import contact_sheet as sheets  # Pillow and pyarrow are not needed to print a help text

    output = storage.absolute(output)
    target = storage.absolute(out) if out is not None else storage.join(output, "contact_sheet.png")
    picture = io.BytesIO()
    sheets.contact_sheet(output, rows).save(picture, "png")
    storage.publish_bytes(target, picture.getvalue())
    click.echo(redact(target))


@click.command(cls=Command)
@click.argument("output")
@click.option("--out", metavar="FILE", help="The HTML file to write.  [default: index.html in OUTPUT]")
@moved_option("manifest")
@debug_option
@click.pass_context
def report(ctx: click.Context, output: str, out: str | None, **_: Any) -> None:
    """Write a page to look at OUTPUT with: scores, samples, failures, throughput, configuration.

    It is one HTML file that needs nothing else, and shows the best, the worst and random samples beside their
    references. OUTPUT may be unfinished.

    \b
    Exit codes: 0 written; 1 unexpected; 2 no finished shard there; 5 damage.
    """
    from vcf_batch.output.output import Output  # Pillow and pyarrow are not needed to print a help text
    from vcf_batch.report import page

    opened = Output.open(output, given(ctx))
    target = storage.absolute(out) if out is not None else storage.join(opened.url, page.PAGE_NAME)
    storage.publish_bytes(target, page.render(opened).encode())
    click.echo(redact(target))


@click.command(cls=Command)
@click.argument("output")
@click.option(
    "--license", "licence", metavar="ID", help="As Hugging Face names it, such as cc-by-4.0.  [default: open]"
)
@click.option("--force", is_flag=True, help="Replace a README.md that somebody else wrote or changed.")
@debug_option
def card(output: str, licence: str | None, force: bool) -> None:
    """Write a dataset card, README.md in OUTPUT, to hand it on with.

    It has the header that Hugging Face reads, columns, scores, models and settings, how to load the dataset, its bias
    and limits. Read and complete it: what the prompts and references are, only you know.

    \b
    Exit codes: 0 written; 1 unexpected; 2 no finished shard there, or a README.md that is not ours; 5 damage.
    """
    from vcf_batch.output.output import Output  # pyarrow is not needed to print a help text
    from vcf_batch.report import card as cards

    click.echo(redact(cards.write(Output.open(output), licence, force)))


@click.command(cls=Command)
@click.argument("output")
@click.argument("target")
@debug_option
def push(output: str, target: str) -> None:
    """Copy OUTPUT to TARGET, another storage: its finished shards, its card and its report.

    TARGET is a folder or any URL that fsspec opens, such as s3://bucket/dataset, or hf://datasets/OWNER/NAME of a
    repository that exists. What is there already is not copied again, so that calling it again goes on; a README.md
    that somebody else wrote is never replaced.

    \b
    Exit codes: 0 copied; 1 unexpected; 2 no finished shard, or somebody else's README.md; 4 TARGET holds another run;
    5 damage.
    """
    hand_on(output, target)
