"""``verify`` and ``repair``: an output against what it should be."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from vcf_batch.cli.command import Command, debug_option, moved
from vcf_batch.cli.generation import generate, given, repair_command, run
from vcf_batch.errors import DamageFound, redact

if TYPE_CHECKING:
    from vcf_batch.commands.verify import Finding


@click.command(cls=Command)
@click.argument("output")
@click.option(
    "--regenerate",
    type=click.IntRange(min=1),
    metavar="N",
    help="Draw so many samples again, on this machine, and compare them with what is there: byte for byte on the same "
    "type of device with the same versions, else within a mean difference of 5 of 255.",
)
@click.option("--regenerate-seed", type=int, default=0, show_default=True, help="Chooses which samples these are.")
@moved
@debug_option
@click.pass_context
def verify(ctx: click.Context, output: str, regenerate: int | None, regenerate_seed: int, **_: Any) -> None:
    """Read OUTPUT again, all of it, and tell which shards are damaged or missing, and why.

    Receipts are compared with the files, tars with parquets, parquets with the manifest; every image is decoded.

    \b
    Exit codes: 0 no damage; 1 unexpected; 2 no output there; 4 the model is not the run's; 5 damage.
    """
    from vcf_batch.commands import verify
    from vcf_batch.output.output import Output

    opened = Output.open(output, given(ctx))
    _tell(verify.check(opened), output)
    if regenerate is not None:
        from vcf_batch.vcf.quiet import quiet  # nor torch to read files

        quiet()
        from vcf_batch.commands import regenerate as regeneration  # brings what would warn

        _tell(regeneration.regenerate(opened, regenerate, regenerate_seed), output)
    click.echo(f"{redact(output)}: {opened.plan.num_rows:,} rows in {len(opened.plan):,} shards, no damage")


def _tell(findings: Iterable["Finding"], output: str) -> None:
    damage = 0
    for finding in findings:
        click.echo(str(finding))
        damage += finding.is_damage
    if damage:
        raise DamageFound(f"{output} is damaged. To mend it: {repair_command(output)}")


_OWN = {"address": None, "log_format": "text", "num_workers": None, "max_failed": 0.0}
"""What a repair does not take from the run that it repairs."""


@click.command(cls=Command, params=[option for option in generate.params if option.name in _OWN])
@click.argument("output")
@click.option(
    "--where",
    metavar="SQL",
    default="status = 'failed'",
    show_default=True,
    help="Which rows to generate again: a condition on the columns of the parquets.",
)
@moved
@debug_option
@click.pass_context
def repair(ctx: click.Context, output: str, where: str, **_: Any) -> None:
    """Generate again what is damaged or missing in OUTPUT, and the rows that --where selects.

    OUTPUT is read again, as by 'verify'. Damaged and missing shards are generated whole; of the others, the selected
    rows alone: their other samples stay, byte for byte. Keys, shards and settings stay as they are.

    \b
    Exit codes: as 'generate'; 5 where OUTPUT is damaged in a way that generating does not mend.
    """
    from vcf_batch.commands.repair import Repair
    from vcf_batch.output.output import Output  # pyarrow and DuckDB are not needed to print a help text

    opened = Output.open(output, _OWN | given(ctx))
    needed = Repair(opened, where)
    run(opened.config, lambda: needed.rows(click.echo))
