"""Names that commands had in version 0.1. Each is hidden, works as before, and names the new command on standard error.

They go in version 0.3.
"""

import copy
from typing import Any, cast

import click

from vcf_batch import storage
from vcf_batch.cli import model
from vcf_batch.cli.command import Command, check_ending, debug_option
from vcf_batch.cli.look import SHEET_ROWS, draw_sheet


def _say(old: str, new: str) -> None:
    click.echo(f"'vcf-batch {old}' will go in version 0.3: use 'vcf-batch {new}'", err=True)


def _renamed(command: click.Command, old: str, new: str) -> click.Command:
    """``command`` under its old name."""

    def call(*arguments: Any, **options: Any) -> Any:
        _say(old, new)
        return cast(Any, command.callback)(*arguments, **options)

    alias = copy.copy(command)
    alias.name, alias.hidden, alias.callback = old, True, call
    return alias


@click.command("contact-sheet", cls=Command, hidden=True)
@click.argument("output")
@click.option(
    "--rows", type=click.IntRange(min=1), default=SHEET_ROWS, show_default=True, help="Number of samples to show."
)
@click.option("--out", metavar="FILE", help="The PNG to write.  [default: contact_sheet.png in OUTPUT]")
@debug_option
def contact_sheet(output: str, rows: int, out: str | None) -> None:
    """Draw the first samples of OUTPUT beside their references, as one picture."""
    _say("contact-sheet OUTPUT", "report OUTPUT --png FILE")
    target = out if out is not None else storage.join(storage.absolute(output), "contact_sheet.png")
    check_ending("--out", target, "image/png")
    click.echo(draw_sheet(output, target, rows))


train_aligner = _renamed(model.train, "train-aligner", "model train")
evaluate = _renamed(model.evaluate, "evaluate", "model evaluate")

ALIASES = (contact_sheet, train_aligner, _renamed(model.assemble, "assemble", "model assemble"), evaluate)
