"""``push`` and ``card``: an output to hand on."""

import click

from vcf_batch.cli.command import Command, debug_option, hand_on, json_option, tell
from vcf_batch.errors import redact


@click.command(cls=Command)
@click.argument("output")
@click.argument("target")
@click.option("--partial", is_flag=True, help="Exit with 0 although shards are left out.")
@json_option
@debug_option
def push(output: str, target: str, partial: bool, as_json: bool) -> None:
    """Copy OUTPUT to TARGET, another storage.

    The finished shards, the card and the report are copied. TARGET is a folder or any URL that fsspec opens, such as
    s3://bucket/dataset, or hf://datasets/OWNER/NAME for a repository that exists. Shards that are there already are not
    copied again, so a copy that was interrupted goes on. A README.md that somebody else wrote is never replaced.

    Shards that are damaged or not generated yet are left out and named, and the exit code says so unless --partial is
    given.

    \b
    Exit codes: 0 copied; 1 unexpected; 2 no finished shard, or somebody else's README.md; 4 TARGET holds another run;
    5 damaged shards are left out; 6 shards that are not generated yet are left out.
    """
    hand_on(output, target, as_json, partial)


@click.command(cls=Command)
@click.argument("output")
@click.option(
    "--license",
    "licence",
    metavar="ID",
    help="Licence of the dataset, as Hugging Face names it, such as cc-by-4.0.  [default: left open]",
)
@click.option("--force", is_flag=True, help="Replace a README.md that somebody else wrote or changed.")
@json_option
@debug_option
def card(output: str, licence: str | None, force: bool, as_json: bool) -> None:
    """Write the dataset card of OUTPUT, README.md.

    Hand it on with the dataset. The card has the header that Hugging Face reads, columns, scores, models and
    settings, how to load the dataset, its bias and limits. Read and complete it: only you know what the prompts and
    references are.

    \b
    Exit codes: 0 written; 1 unexpected; 2 no finished shard there, or somebody else's README.md; 5 damage.
    """
    from vcf_batch.output.output import Output  # pyarrow is not needed to print a help text
    from vcf_batch.report import card as cards

    written = redact(cards.write(Output(output), licence, force))
    tell(written, {"card": written}, as_json)
