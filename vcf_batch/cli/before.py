"""``manifest``, ``plan`` and ``preview``: what is settled before a run starts."""

import dataclasses
import io
from typing import Any

import click

from vcf_batch import storage
from vcf_batch.cli.command import Command, check_ending, debug_option, json_option, run_config, tell
from vcf_batch.cli.documents import DOCUMENTS
from vcf_batch.cli.option_groups import OPTION_GROUPS
from vcf_batch.cli.run import generate
from vcf_batch.config.limits import PAIRINGS
from vcf_batch.driver.progress import steps
from vcf_batch.errors import UsageError, redact

PROMPTS_HELP = (
    "The prompts: a text with one prompt a line, or a table, which is .csv or .tsv with a header, .jsonl, .ndjson, "
    ".json or Parquet. Texts are UTF-8, or have a byte order mark."
)
REFERENCES_HELP = "Folder of reference images, found by their first bytes, whatever their names."
COLUMN_HELP = "The column with the prompts, where --prompts names a table.  [default: prompt]"


@click.command(
    cls=Command,
    document=DOCUMENTS["manifest"],
    examples=(
        (
            "vcf-batch manifest pairs.parquet --prompts prompts.txt --references photos",
            "Every prompt with every picture",
        ),
        (
            "vcf-batch manifest pairs.parquet --prompts prompts.csv --references photos --pairing balanced "
            "--rows 10000",
            "Ten thousand pairs, each prompt and each picture equally often",
        ),
    ),
)
@click.argument("target", metavar="MANIFEST", required=False)
@click.option("--prompts", required=True, metavar="FILE", help=f"{PROMPTS_HELP} Blank prompts are left out.")
@click.option("--prompt-column", "column", metavar="NAME", help=COLUMN_HELP)
@click.option("--references", metavar="DIR", help=f"{REFERENCES_HELP} Without it, the rows are text only.")
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
    "--seeds",
    type=click.IntRange(min=1),
    help="Number of images of each pair. With --pairing cross, the seeds 0, 1, 2, ... are written into their rows: all "
    "pairs start from the same noises, and 'generate --seed' has no effect.  "
    "[default: one image, whose seed 'generate' derives]",
)
@click.option(
    "--pairing-seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Chooses the sample of the pairings random and balanced.",
)
@click.option(
    "--keep-duplicates",
    is_flag=True,
    help="Keep prompts that are equal to an earlier one. Without it, they are left out and counted.",
)
@click.option("--out", hidden=True, help="MANIFEST, as version 0.1 had it.")
@json_option
@debug_option
def manifest(
    target: str | None,
    prompts: str,
    column: str | None,
    references: str | None,
    out: str | None,
    as_json: bool,
    **pairing: Any,
) -> None:
    """Pair prompts with references, and write the pairs as MANIFEST.

    MANIFEST becomes a Parquet file. The command tells what it has left out: equal prompts, and files that are no
    image in a format that is read.
    """
    from vcf_batch.manifest import image_files  # pyarrow and numpy are not needed to print a help text
    from vcf_batch.manifest import prompts as prompt_files
    from vcf_batch.manifest.build import build

    if (target is None) == (out is None):
        raise UsageError("name the manifest to write once, as in: vcf-batch manifest manifest.parquet --prompts FILE")
    if out is not None:
        click.echo("'--out FILE' will go in version 0.3: use 'vcf-batch manifest FILE'", err=True)
    target = storage.absolute(written := target or out or "")
    images = image_files.ImageFiles((), {})
    if references:
        images = image_files.find(references, target, lambda names, total: steps(names, "looking at", total, "file"))
    built = build(prompt_files.read(prompts, column), images.uris, target, **pairing)
    duplicates = "duplicates kept" if pairing["keep_duplicates"] else "duplicates left out"
    words = [
        f"{redact(written)}: {built.rows:,} rows",
        f"prompts: {built.prompts:,} ({duplicates}: {built.duplicates:,}, blank: {built.blank:,})",
        f"references: {len(images.uris):,}" if references else "references: none; the rows are text only",
        *images.told(),
        "seeds: none is written; 'generate --seed' and the row's key decide each"
        if built.seeds is None
        else f"seeds: 0 to {built.seeds - 1} in the rows of each pair; 'generate --seed' does not change them",
    ]
    document = {
        "manifest": redact(target),
        **dataclasses.asdict(built),
        "references": len(images.uris),
        "skipped": {
            reason: {"files": len(names), "first": names[: image_files.NAMES_SHOWN]}
            for reason, names in images.skipped.items()
        },
    }
    tell("\n".join(words), document, as_json)


@click.command(
    cls=Command,
    document=DOCUMENTS["plan"],
    params=[option for option in generate.params if option.name not in ("dump_config", "deadline")],
    groups=OPTION_GROUPS,
    examples=(
        ("vcf-batch plan demo out/demo", "What the demo would take"),
        (
            "vcf-batch plan manifest.parquet s3://bucket/dataset --model sd15 --fusion ip_adapter "
            "--ip-adapter ip-adapter-sd15 --calibrate --price-per-gpu-hour 2.5",
            "Time and cost, by the speed of this machine",
        ),
    ),
)
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
@click.pass_context
def plan(ctx: click.Context, calibrate: bool, price: float | None, as_json: bool, **_: Any) -> None:
    """Show what a run would take, and every reason to refuse it.

    The run is the one that 'generate' would start with the same options. The plan has its rows and shards, what is done
    already, bytes, GPU-hours, cost, and the time that --num-workers workers take (by default one).
    Time and bytes come from finished shards of this run, else from --calibrate; they are never guessed. Nothing is
    written, and no cluster is needed: without --gpus-per-worker, the GPUs of this machine decide.

    Exit codes: 0 nothing is in the way; 1 unexpected; 2 or 4 if 'generate' would end with it. All reasons are listed.
    """
    from vcf_batch.commands import plan  # pyarrow is not needed to print a help text

    if calibrate:
        from vcf_batch.vcf import quiet  # nor torch to count rows

        quiet()
    found = plan.look(run_config(ctx), calibrate)
    tell(found.told(price), found.to_dict(price), as_json)
    ctx.exit(max((problem.exit_code for problem in found.problems), default=0))


_NOT_OF_PREVIEWS = ("output", "push", "rows", "dump_config", "deadline")


@click.command(
    cls=Command,
    document=DOCUMENTS["preview"],
    params=[option for option in generate.params if option.name not in _NOT_OF_PREVIEWS],
    groups=OPTION_GROUPS,
    examples=(
        ("vcf-batch preview demo --sweep strength=0,0.1,0.3,1", "Which strength to use"),
        (
            "vcf-batch preview pairs.parquet --model my-model --sweep fusion=naive,concat --rows 4",
            "Which fusion to use",
        ),
    ),
)
@click.option(
    "--rows",
    "shown",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Number of rows of MANIFEST to show.",
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
@click.pass_context
def preview(ctx: click.Context, shown: int, sweeps: tuple[str, ...], out: str, as_json: bool, **_: Any) -> None:
    """Draw the first rows of MANIFEST with several settings.

    They are drawn side by side in one picture, with their scores. Its columns are the reference, text only, and each
    combination of the --sweep values. A row's images all start from the same noise. The command takes the options of
    'generate', needs no cluster, and writes nothing but the picture.

    Exit codes: 0 written; 1 unexpected; 2 wrong option or manifest.
    """
    check_ending("--out", out, "image/png")
    from vcf_batch.vcf import quiet  # torch is not needed to print a help text

    quiet()
    from vcf_batch.commands import preview as previews  # brings what would warn

    picture = io.BytesIO()
    previews.draw(run_config(ctx, output=out), shown, previews.parsed(sweeps)).save(picture, "png")
    storage.publish_bytes(target := storage.absolute(out), picture.getvalue())
    tell(redact(target), {"picture": redact(target)}, as_json)
