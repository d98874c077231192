"""``plan``: what comes of a run, before it starts."""

import json
from typing import Any

import click

from vcf_batch.cli.command import Command
from vcf_batch.cli.generation import generate, run_config
from vcf_batch.errors import printable


@click.command(cls=Command, params=[*generate.params])
@click.option(
    "--calibrate",
    is_flag=True,
    help="Where no finished shard tells the speed, load the model in this process and measure it on a few rows.",
)
@click.option(
    "--price-per-gpu-hour",
    "price",
    type=click.FloatRange(min=0),
    metavar="PRICE",
    help="Of one GPU, or where workers have none, of one worker. In any currency.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
@click.pass_context
def plan(ctx: click.Context, calibrate: bool, price: float | None, as_json: bool, **_: Any) -> None:
    """Tell what 'generate' with these options will take, and whatever would refuse it.

    Rows, shards, what is done already, bytes, time with --num-workers workers (default here: one), GPU-hours and cost.
    Time and bytes come from finished shards of this run, else from --calibrate; they are never guessed. Nothing is
    written, and no cluster is needed: where --gpus-per-worker is not given, this machine stands for it.

    \b
    Exit codes: 0 nothing is in the way; 1 unexpected; 2 or 4 as 'generate' would end, all reasons are listed.
    """
    from vcf_batch import forecast  # pyarrow is not needed to print a help text

    found = forecast.look(run_config(ctx), calibrate)
    click.echo(json.dumps(found.to_dict(price), indent=2) if as_json else printable(found.told(price)))
    ctx.exit(max((problem.exit_code for problem in found.problems), default=0))
