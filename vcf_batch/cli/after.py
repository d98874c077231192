"""``score``, ``export``, ``push`` and ``card``: an output to select from and to hand on."""

import json
from typing import Any

import click

from vcf_batch.cli import keys_file
from vcf_batch.cli.command import (
    Command,
    debug_option,
    given,
    hand_on,
    json_option,
    moved,
    repair_command,
    tell,
    tell_line,
)
from vcf_batch.cli.documents import DOCUMENTS
from vcf_batch.cli.option_groups import WORKER_GROUPS
from vcf_batch.cli.run import generate
from vcf_batch.driver.progress import plural, plural_are
from vcf_batch.errors import DamageFound, Unfinished, UsageError, redact

_MACHINES = ("num_workers", "gpus_per_worker", "cpus_per_worker", "log_format", "verbosity", "address")


@click.command(
    cls=Command,
    document=DOCUMENTS["score"],
    params=[option for option in generate.params if option.name in _MACHINES],
    groups=WORKER_GROUPS,
    examples=(
        (
            "vcf-batch score out/demo --with texture --with duplicates",
            "How alike pictures are drawn, and which are twice",
        ),
        (
            "vcf-batch score out/demo --with clip:l14=openai/clip-vit-large-patch14 --calibrate",
            "Cosines by another CLIP",
        ),
    ),
)
@click.argument("output")
@click.option(
    "--with",
    "wanted",
    metavar="KIND[:NAME][=MODEL]",
    multiple=True,
    help="A score to add. Repeatable. clip=MODEL: cosines with prompt and reference. dino=MODEL: cosines of patches "
    "with reference and twin, by a DINOv2. lpips-alex=FOLDER, lpips-vgg=FOLDER: distance from the reference, by the "
    "published weights. aesthetic=FILE: a linear head on a CLIP. texture: how alike image and reference are drawn. "
    "python=MODULE:FUNCTION: numbers of your own. duplicates: the key of the first row with the same image, and of the "
    "first one with the same reference; duplicates=MODEL for --by clip. MODEL is a directory, a Hub id or a URL; "
    "NAME is that of the columns, where it is not KIND.",
)
@click.option(
    "--aesthetic-clip",
    metavar="MODEL",
    help="The CLIP that the head of --with aesthetic was trained on.  [default: openai/clip-vit-large-patch14]",
)
@click.option(
    "--by",
    metavar="HOW",
    help="What --with duplicates compares images by. phash: the perceptual hash in the column of that name. clip: "
    "embeddings by the CLIP that --with duplicates=MODEL names, openai/clip-vit-base-patch32 without one.  "
    "[default: phash]",
)
@click.option(
    "--threshold",
    type=float,
    metavar="T",
    help="How far near-duplicates may be apart: 0 to 16 of the 64 bits of a hash; by clip their least cosine, above 0 "
    "and at most 1.  [default: 4; by clip 0.95]",
)
@click.option(
    "--calibrate",
    is_flag=True,
    help="Also measure how well scores separate images beside what they were made from, and beside something else: "
    "the scores of the run and those of --with. Thresholds go to OUTPUT/_scores/calibration.json.",
)
@moved
@json_option
@debug_option
@click.pass_context
def score(
    ctx: click.Context,
    output: str,
    wanted: tuple[str, ...],
    aesthetic_clip: str | None,
    by: str | None,
    threshold: float | None,
    calibrate: bool,
    as_json: bool,
    **_: Any,
) -> None:
    """Add scores to OUTPUT, without generating anything.

    Every image gets the scores that --with asks for, in files of their own below OUTPUT/_scores; no other file changes.
    'export', 'repair --where', 'report' and 'status' see them as further columns, and 'verify' checks them. A call that
    was interrupted goes on with the same command, and so does one for shards that were generated or repaired since.

    Exit codes: 0 every shard has its scores; 1 unexpected; 2 wrong option or model; 4 a score of this name is there by
    another model or other settings, or a run is at work in OUTPUT; 5 damaged shards are left out; 6 shards that are not
    generated yet are left out; 130 or 143 interrupted.
    """
    from vcf_batch.commands.score import command  # torch is not needed to print a help text
    from vcf_batch.commands.score import wanted as wants
    from vcf_batch.report.calibration_table import markdown

    asked = [*map(wants.parse, wanted)]
    if not asked and not calibrate:
        raise UsageError(f"--with is missing: say what to add, as in --with {wants.EXAMPLES['clip']}; or --calibrate")
    searches = wants.searches(asked, by, threshold, aesthetic_clip)
    scores = [each for each in asked if each.kind != "duplicates"]
    steps = [command.score(output, scores, aesthetic_clip, given(ctx))] if scores or not searches else []
    steps += command.find_duplicates(output, searches, given(ctx))
    measured = command.calibrate(output, scores, aesthetic_clip, given(ctx)) if calibrate else None
    words = []
    for step in steps if asked else ():
        names = ", ".join(each.name for each in step.scores)
        words.append(f"{redact(output)}: {names} of {plural(step.shards, 'shard')}, {step.scored:,} of them scored now")
        words += [f"  {note}" for note in step.notes]
        if step.without:
            words.append(f"{step.without:,} images could not be scored; the first: {step.reason}")
    if measured:
        words.append(markdown(measured))
    added = steps[-1]
    document = {
        "output": redact(output),
        "scores": {each.name: [column.name for column in each.columns] for step in steps for each in step.scores},
        "shards": added.shards,
        "scored": max(step.scored for step in steps),
        "without": sum(step.without for step in steps),
        "notes": [note for step in steps for note in step.notes],
        "damaged": added.damaged,
        "unfinished": added.unfinished,
        "calibration": measured and json.loads(measured.to_json()),
    }
    tell("\n".join(words), document, as_json)
    if added.damaged:
        raise DamageFound(
            f"{plural_are(added.damaged, 'damaged shard')} left out. To mend: {repair_command(output)}; score again"
        )
    if added.unfinished:
        raise Unfinished(
            f"{plural_are(added.unfinished, 'shard')} left out, as not generated yet. Rerun the command of the run, "
            "then score again"
        )


@click.command(
    cls=Command,
    document=DOCUMENTS["export"],
    examples=(
        (
            'vcf-batch export out/demo dataset --where "clip_score > 0.2" --split train=0.98,validation=0.02',
            "The better images, in two splits",
        ),
        (
            "vcf-batch export out/a out/b dataset --format parquet --references copy",
            "Two parts as one, images in the rows",
        ),
    ),
)
@click.argument("outputs", nargs=-1, required=True, metavar="OUTPUT...")
@click.argument("target")
@click.option(
    "--where",
    metavar="SQL",
    help="Rows to keep: a condition on the columns of the parquets and run_fingerprint.  [default: all with an image]",
)
@click.option("--exclude", metavar="FILE", help="A text file with a key on each line: rows to leave out.")
@click.option(
    "--split",
    metavar="NAME=SHARE,...",
    default="train=1",
    show_default=True,
    help="Splits and the share of the rows that each gets, such as train=0.98,validation=0.02.",
)
@click.option(
    "--split-by",
    metavar="COLUMN",
    default="key",
    show_default=True,
    help="What decides on the split: key, prompt, reference, or prompt,reference. By the last, rows whose prompt and "
    "reference are of different splits are left out.",
)
@click.option(
    "--format",
    metavar="FORMAT",
    default="webdataset",
    show_default=True,
    help="webdataset: tars, and a parquet of rows beside each. energon: the same with Energon's .nv-meta. parquet: the "
    "images in the rows, as Hugging Face has them.",
)
@click.option(
    "--images",
    metavar="NAME,...",
    default="",
    help="Images of triplets that go along: content, style, or both.  [default: none]",
)
@click.option(
    "--references",
    metavar="HOW",
    default="relative",
    show_default=True,
    help="relative: names of references, without paths of this machine. copy: each image too, once, named by its hash.",
)
@click.option(
    "--shard-bytes",
    metavar="SIZE",
    default="512MB",
    show_default=True,
    help="Size at which a shard is closed, such as 1GB or 256MiB.",
)
@click.option("--partial", is_flag=True, help="Leave out shards that are damaged or not generated yet.")
@json_option
@debug_option
def export(
    outputs: tuple[str, ...],
    target: str,
    where: str | None,
    exclude: str | None,
    split: str,
    split_by: str,
    format: str,
    images: str,
    references: str,
    shard_bytes: str,
    partial: bool,
    as_json: bool,
) -> None:
    """Make TARGET, a new dataset of images of OUTPUT.

    Rows are selected, split, put into new shards and written in the form that a training reads. Images are copied byte
    for byte. Several outputs become one dataset, if no key is in two of them. The dataset has receipts of its own, and
    'vcf-batch verify TARGET' compares it with them. An export that was interrupted goes on with the same command.

    Exit codes: 0 exported; 1 unexpected; 2 wrong option, no row left, or a key twice; 4 TARGET holds something else;
    5 an output is damaged; 6 an output has shards that are not generated yet.
    """
    from vcf_batch.commands.export import settings as options
    from vcf_batch.commands.export import split as splits
    from vcf_batch.commands.export.exporting import export  # pyarrow and DuckDB are not needed to print a help text

    settings = options.ExportSettings(
        where=where,
        exclude=frozenset() if exclude is None else keys_file.read("--exclude", exclude),
        shares=splits.parse(split),
        split_by=split_by,
        format=format,
        images=options.parse_images(images),
        references=references,
        shard_bytes=options.parse_bytes(shard_bytes),
        partial=partial,
    )
    exported = export(outputs, target, settings, lambda line: tell_line(line, err=True))
    record = exported.record
    shards = sum(exported.shards.values())
    parts = ", ".join(f"{name} {rows:,}" for name, rows in record.splits.items())
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in record.left_out.items())
    words = [f"{redact(target)}: {plural(record.rows, 'row')} in {plural(shards, 'shard')} ({parts})"]
    words += [f"left out: {left_out}"] if left_out else []
    document = {
        "target": redact(target),
        "rows": record.rows,
        "splits": dict(record.splits),
        "left_out": dict(record.left_out),
        "shards": shards,
        "written": exported.written,
        "notes": [redact(line) for line in exported.lines],
    }
    tell("\n".join([*words, *exported.lines]), document, as_json)


@click.command(
    cls=Command,
    document=DOCUMENTS["push"],
    examples=(
        ("vcf-batch push out/demo s3://bucket/dataset", "To a bucket"),
        ("vcf-batch push out/demo hf://datasets/OWNER/NAME", "To the Hugging Face Hub"),
    ),
)
@click.argument("output")
@click.argument("target")
@click.option("--partial", is_flag=True, help="Exit with 0 although shards are left out.")
@json_option
@debug_option
def push(output: str, target: str, partial: bool, as_json: bool) -> None:
    """Copy OUTPUT to TARGET, another storage.

    The finished shards, the scores that were added to them, the card and the report are copied. TARGET is a folder or
    any URL that fsspec opens, such as s3://bucket/dataset, or hf://datasets/OWNER/NAME for a repository that exists.
    Shards that are there already are not copied again, so a copy that was interrupted goes on. A README.md that
    somebody else wrote is never replaced.

    Shards that are damaged or not generated yet are left out and named, and the exit code says so unless --partial is
    given.

    Exit codes: 0 copied; 1 unexpected; 2 no finished shard, or somebody else's README.md; 4 TARGET holds another run;
    5 damaged shards are left out; 6 shards that are not generated yet are left out.
    """
    hand_on(output, target, as_json, partial)


@click.command(
    cls=Command,
    document=DOCUMENTS["card"],
    examples=(("vcf-batch card out/demo --license cc-by-4.0", "The card of the demo"),),
)
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

    Exit codes: 0 written; 1 unexpected; 2 no finished shard there, or somebody else's README.md; 5 damage.
    """
    from vcf_batch.output.output import Output  # pyarrow is not needed to print a help text
    from vcf_batch.report import card as cards

    written = redact(cards.write(Output(output), licence, force))
    tell(written, {"card": written}, as_json)
