"""``manifest``, ``plan`` and ``preview``: what is settled before a run starts."""

import io
from typing import Any

import click

from vcf_batch import storage
from vcf_batch.cli.command import Command, check_ending, debug_option, json_option, run_config, tell
from vcf_batch.cli.run import generate
from vcf_batch.errors import UsageError, redact
from vcf_batch.manifest.pairing import PAIRINGS

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


@click.command(cls=Command)
@click.argument("target", metavar="MANIFEST", required=False)
@click.option("--prompts", required=True, metavar="FILE", help="Text file, one prompt a line. Empty lines are skipped.")
@click.option("--references", metavar="DIR", help="Folder of reference images. Without it, the rows are text only.")
@click.option(
    "--pairing",
    type=click.Choice(PAIRINGS),
    default="cross",
    show_default=True,
    help="Which pairs become rows: every prompt with every reference (cross), a random sample of these pairs (random), "
    "or a sample in which each prompt and each reference comes equally often (balanced).",
)
@click.option("--rows", type=click.IntRange(min=1), help="Number of rows to write.  [default: all combinations]")
@click.option(
    "--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Number of images of each pair."
)
@click.option(
    "--pairing-seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Chooses the sample of the pairings random and balanced.",
)
@click.option("--out", hidden=True, help="MANIFEST, as version 0.1 had it.")
@json_option
@debug_option
def manifest(
    target: str | None, prompts: str, references: str | None, out: str | None, as_json: bool, **pairing: Any
) -> None:
    """Pair prompts with references, and write the pairs as MANIFEST.

    MANIFEST becomes a Parquet file.
    """
    from vcf_batch.manifest.build import build

    if (target is None) == (out is None):
        raise UsageError("name the manifest to write once, as in: vcf-batch manifest manifest.parquet --prompts FILE")
    if out is not None:
        click.echo("'--out FILE' will go in version 0.3: use 'vcf-batch manifest FILE'", err=True)
    target = storage.absolute(written := target or out or "")
    images = images_in(references, target) if references else []
    count = build(prompts_in(prompts), images, target, **pairing)
    tell(f"{redact(written)}: {count:,} rows", {"manifest": redact(target), "rows": count}, as_json)


@click.command(cls=Command, params=[*generate.params])
@click.option(
    "--calibrate",
    is_flag=True,
    help="Load the model in this process and measure its speed on a few rows, unless finished shards tell the speed.",
)
@click.option(
    "--price-per-gpu-hour",
    "price",
    type=click.FloatRange(min=0),
    metavar="PRICE",
    help="Price of an hour of one GPU, or of one worker where workers have no GPU. In any currency.",
)
@json_option
@click.pass_context
def plan(ctx: click.Context, calibrate: bool, price: float | None, as_json: bool, **_: Any) -> None:
    """Show what a run would take, and every reason to refuse it.

    The run is the one that 'generate' would start with the same options. The plan has its rows and shards, what is done
    already, bytes, GPU-hours, cost, and the time that --num-workers workers take (by default one).
    Time and bytes come from finished shards of this run, else from --calibrate; they are never guessed. Nothing is
    written, and no cluster is needed: without --gpus-per-worker, the GPUs of this machine decide.

    \b
    Exit codes: 0 nothing is in the way; 1 unexpected; 2 or 4 if 'generate' would end with it. All reasons are listed.
    """
    from vcf_batch.commands import plan  # pyarrow is not needed to print a help text

    if calibrate:
        from vcf_batch.vcf.quiet import quiet  # nor torch to count rows

        quiet()
    found = plan.look(run_config(ctx), calibrate)
    tell(found.told(price), found.to_dict(price), as_json)
    ctx.exit(max((problem.exit_code for problem in found.problems), default=0))


@click.command(cls=Command, params=[option for option in generate.params if option.name not in ("output", "push")])
@click.option(
    "--rows", type=click.IntRange(min=1), default=16, show_default=True, help="Number of rows of MANIFEST to show."
)
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="NAME=VALUES",
    help="Show a column for each value, such as strength=0,0.5,1 or fusion=naive,concat. NAME may also be fusion_lo, "
    "fusion_hi, guidance_scale, pno_steps or seed. Given more than once, each combination is a column.  "
    "[default: one column, with the settings of the run]",
)
@click.option("--out", default="preview.png", show_default=True, metavar="FILE", help="The PNG to write.")
@json_option
@click.pass_context
def preview(ctx: click.Context, rows: int, sweeps: tuple[str, ...], out: str, as_json: bool, **_: Any) -> None:
    """Draw the first rows of MANIFEST with several settings.

    They are drawn side by side in one picture, with their scores. Its columns are the reference, text only, and each
    combination of the --sweep values. A row's images all start from the same noise. The command takes the options of
    'generate', needs no cluster, and writes nothing but the picture.

    \b
    Exit codes: 0 written; 1 unexpected; 2 wrong option or manifest.
    """
    check_ending("--out", out, "image/png")
    from vcf_batch.vcf.quiet import quiet  # torch is not needed to print a help text

    quiet()
    from vcf_batch.commands import preview as previews  # brings what would warn

    picture = io.BytesIO()
    previews.draw(run_config(ctx, output=out), rows, sweeps).save(picture, "png")
    storage.publish_bytes(target := storage.absolute(out), picture.getvalue())
    tell(redact(target), {"picture": redact(target)}, as_json)


def prompts_in(file: str) -> list[str]:
    """The lines of a text file.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        return storage.read_text(file).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read prompts from {file}: {error}") from error


def images_in(folder: str, manifest: str) -> list[str]:
    """The images below a folder, sorted: relative to the manifest's folder if they lie in it, else absolute.

    Raises:
        UsageError: the folder holds no image.
    """
    folder, base = storage.absolute(folder), storage.parent(storage.absolute(manifest)).rstrip("/") + "/"
    names = sorted(name for name in storage.list_tree(folder) if name.lower().endswith(IMAGE_SUFFIXES))
    if not names:
        raise UsageError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return [storage.join(folder, name).removeprefix(base) for name in names]
