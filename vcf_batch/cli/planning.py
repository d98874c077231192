"""``plan`` and ``preview``: what comes of a run, before it starts."""

import io
import json
from typing import Any

import click

from vcf_batch import storage
from vcf_batch.cli.command import Command
from vcf_batch.cli.generation import generate, run_config
from vcf_batch.errors import printable, redact


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
    from vcf_batch.commands import plan  # pyarrow is not needed to print a help text

    if calibrate:
        from vcf_batch.vcf.quiet import quiet  # nor torch to count rows

        quiet()
    found = plan.look(run_config(ctx), calibrate)
    click.echo(json.dumps(found.to_dict(price), indent=2) if as_json else printable(found.told(price)))
    ctx.exit(max((problem.exit_code for problem in found.problems), default=0))


@click.command(cls=Command, params=[option for option in generate.params if option.name not in ("output", "push")])
@click.option("--rows", type=click.IntRange(min=1), default=16, show_default=True, help="Rows of MANIFEST to show.")
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="NAME=VALUES",
    help="Show a column for each value, such as strength=0,0.5,1 or fusion=naive,concat. Repeatable: then a column for "
    "each combination. Also fusion_lo, fusion_hi, guidance_scale, pno_steps and seed.  [default: as asked]",
)
@click.option("--out", default="preview.png", show_default=True, metavar="FILE", help="The PNG to write.")
@click.pass_context
def preview(ctx: click.Context, rows: int, sweeps: tuple[str, ...], out: str, **_: Any) -> None:
    """Draw the first rows of MANIFEST with several settings, side by side, with their scores.

    The columns: reference, text only, and each combination of the --sweep values, all of a row from the same noise. It
    takes the options of 'generate', but needs no cluster, and writes nothing but the PNG.

    \b
    Exit codes: 0 written; 1 unexpected; 2 wrong option or manifest.
    """
    from vcf_batch.vcf.quiet import quiet  # torch is not needed to print a help text

    quiet()
    from vcf_batch.commands import preview as previews  # brings what would warn

    picture = io.BytesIO()
    previews.draw(run_config(ctx, output=out), rows, sweeps).save(picture, "png")
    storage.publish_bytes(target := storage.absolute(out), picture.getvalue())
    click.echo(redact(target))
