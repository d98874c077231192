"""``model``: the models known by name, and a model of one's own: trained, put together, measured."""

import dataclasses
from collections.abc import Callable
from typing import Any

import click

from vcf_batch import storage
from vcf_batch.cli.before import COLUMN_HELP, PROMPTS_HELP, REFERENCES_HELP
from vcf_batch.cli.command import Command, Group, check_failed, debug_option, json_option, run, run_config, tell
from vcf_batch.cli.documents import DOCUMENTS
from vcf_batch.cli.option_groups import OPTION_GROUPS
from vcf_batch.cli.run import generate
from vcf_batch.commands import known_models
from vcf_batch.config import limits
from vcf_batch.config.run_config import DECIDED_BY_EVALUATION
from vcf_batch.config.strengths import EVALUATED_STRENGTHS
from vcf_batch.errors import printable, redact
from vcf_batch.training.training_config import SELECTIONS, TrainingConfig

_DECIDED = {*DECIDED_BY_EVALUATION, "push", "dump_config", "deadline"}

_POSITIVE = click.FloatRange(min=0, min_open=True)
_COUNT = click.IntRange(min=1)


def _recipe(name: str, kind: Any, text: str, **extra: Any) -> Callable[[Any], Any]:
    """An option of ``model train`` with the default of TrainingConfig."""
    return click.option(f"--{name}", type=kind, help=text, default=getattr(TrainingConfig, name.replace("-", "_")),
                        show_default=True, **extra)  # fmt: skip


@click.group(cls=Group)
def model() -> None:
    """List, train, assemble and evaluate models."""


@model.command(
    "list", cls=Command, document=DOCUMENTS["model list"], examples=(("vcf-batch model list", "What is known by name"),)
)
@json_option
@debug_option
def list_models(as_json: bool) -> None:
    """List the models and IP-Adapters that are known by name.

    Each is listed with its licence, its size where it is published, what it needs before it can generate, and whether
    this node's cache has it. Besides these names, --model and --ip-adapter take directories, Hugging Face Hub ids and
    URLs.
    """
    models = known_models.describe()
    tell(known_models.in_words(models), {"models": models}, as_json)


@model.command(
    "fetch",
    cls=Command,
    document=DOCUMENTS["model fetch"],
    examples=(("vcf-batch model fetch sd15 --to s3://bucket/sd15", "For a cluster without access to the Hub"),),
)
@click.argument("name")
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.  [default: the main branch]")
@click.option(
    "--to",
    "target",
    metavar="URL",
    help="Copy the files on to this folder or bucket, for clusters without access to the Hub.  [default: this node's "
    "cache alone]",
)
@json_option
@debug_option
def fetch_model(name: str, revision: str | None, target: str | None, as_json: bool) -> None:
    """Fetch a model from the Hugging Face Hub, with all that it needs.

    NAME is one that 'model list' has, a Hub id, or a Hub id with ':' and the file of an IP-Adapter. The folder or
    bucket of --to can be given as --model or --ip-adapter as it is. Its file vcf_batch_model.json records the revision
    and the SHA-256 of each file. Rerunning the same command resumes.
    """
    from vcf_batch.commands import fetch  # the Hub's client takes a moment

    fetched = fetch.fetch(name, revision, target, lambda line: click.echo(printable(redact(line)), err=True))
    places = [redact(place) for place in fetched.places]
    found = f"{fetched.files} files, {fetch.size_in_words(fetched.size)}"
    words = [f"{place}: {found}, {fetched.copied} of them copied" for place in places] if target else places
    tell("\n".join(words), dataclasses.asdict(fetched) | {"places": places}, as_json)


@model.command(
    cls=Command,
    document=DOCUMENTS["model train"],
    examples=(
        (
            "vcf-batch model train --model sd21 --data 's3://bucket/captions/*.tar' --out s3://bucket/aligner "
            "--num-workers 8",
            "An aligner for Stable Diffusion 2.1",
        ),
    ),
)
@click.option(
    "--model",
    required=True,
    help="The model to train an aligner for: sd15, sd21 or sdxl (presets of base and image encoder), tiny, a pipeline "
    "directory, a Stable Diffusion in one .safetensors file, a Hugging Face Hub id, or a URL.",
)
@click.option(
    "--data",
    required=True,
    metavar="URL",
    help="Captioned images: WebDataset tars, Parquet files, tables of paths and captions (.jsonl, .csv, .json as COCO "
    "has it); a folder of these, of images with metadata, or of images with a text beside each; the committed tars of "
    "an output; or several files by braces or a pattern in quotes, such as 's3://bucket/{00000..00031}.tar' or "
    "'s3://bucket/train-*.tar'.",
)
@click.option("--out", required=True, metavar="DIR", help="Folder or URL for the aligner, its checkpoints and its log.")
@_recipe("revision", str, "Branch, tag or commit of a Hub model.")
@_recipe("image-encoder", str, "The CLIP that the aligner reads.  [default: the preset's, else the model's own]")
@_recipe("image-encoder-revision", str, "Branch, tag or commit of an image encoder on the Hub.")
@_recipe(
    "image-folder",
    str,
    "Folder or URL that paths of images start at.  [default: the folder of the file that names them]",
    metavar="DIR",
)
@_recipe(
    "image-column",
    str,
    "Column of images or of their paths.  [default: the first struct<bytes, path> or binary one, else file_name, "
    "image, path, ...]",
)
@_recipe(
    "caption-column",
    str,
    "Column, or field of JSON beside an image, with the captions.  [default: caption, captions, text, sentences, ...]",
)
@_recipe("limit", _COUNT, "Use only the first PAIRS pairs.", metavar="PAIRS")
@_recipe("validation-data", str, "Captioned images to validate on.  [default: the last pairs of --data]", metavar="URL")
@_recipe("validation-pairs", _COUNT, "Number of pairs to validate on.  [default: 5 % of the pairs, at most 1,000]")
@_recipe("tokens", click.Choice(("all", "patches", "cls")), "Image tokens that the aligner uses.")
@_recipe("epochs", _COUNT, "Number of passes over the data.")
@_recipe("batch-size", _COUNT, "Pairs in a step, of all workers together. Each pair is compared with all others.")
@_recipe("learning-rate", _POSITIVE, "Learning rate of AdamW at the start, 1 at most. It falls to zero along a cosine.")
@_recipe("weight-decay", click.FloatRange(min=0), "Weight decay of AdamW.")
@_recipe("gradient-norm", _POSITIVE, "Largest norm of the gradient. A longer one is shortened to it.")
@_recipe("info-nce-weight", click.FloatRange(min=0), "Weight of the contrastive loss, lambda.")
@_recipe(
    "tether",
    click.FloatRange(min=0),
    "Weight of the tether, which holds each image token close to the text tokens. 0 is the paper's loss.",
)
@_recipe("temperature", _POSITIVE, "Temperature of the contrastive loss; with --learn-temperature, at the start.")
@_recipe("learn-temperature", None, "Train the temperature too.", is_flag=True)
@_recipe(
    "match-norms",
    None,
    "Scale every image token to the mean norm of the text tokens, each text encoder's part to its own.",
    is_flag=True,
)
@_recipe(
    "validate-every",
    _COUNT,
    "Steps between validations, each of which writes a checkpoint.  [default: the steps of an epoch]",
)
@_recipe(
    "transfer-pairs",
    click.IntRange(min=0),
    "Pairs of prompt and reference that each validation generates, to log what pictures keep of the prompt and take "
    "from the reference. 0 generates none.  [default: 16 if there is a judge, else 0]",
    metavar="N",
)
@_recipe(
    "prompts",
    str,
    "Prompts of these pairs: a text with one a line, or a table with a column 'prompt'.  [default: captions of other "
    "validation images]",
    metavar="FILE",
)
@_recipe("judge", str, "The CLIP that compares these pictures.  [default: the model's own]", metavar="ID")
@_recipe(
    "tune-strength",
    None,
    "Generate the pairs at several strengths, and store the best one in the aligner as its default.",
    is_flag=True,
)
@_recipe(
    "select-by",
    click.Choice(SELECTIONS),
    "Keep the aligner of the validation with the lowest loss, or with the best pictures.",
)
@_recipe("shuffle-buffer", _COUNT, "Number of pairs that each worker shuffles at a time.")
@_recipe("seed", click.IntRange(min=0), "Seed of the first weights, of the order, and of the captions that are drawn.")
@_recipe(
    "dtype",
    click.Choice(limits.DTYPES),
    "Precision of the frozen towers. 'auto' is bfloat16 on GPUs and float32 on CPUs. With bfloat16 the aligner "
    "computes in mixed precision.",
)
@_recipe(
    "cache-features",
    str,
    "Folder or URL in which to keep the towers' outputs, for later epochs and runs.",
    metavar="URL",
)
@_recipe("num-workers", _COUNT, "Number of workers.  [default: one per GPU, else one per --cpus-per-worker CPUs]")
@_recipe(
    "gpus-per-worker",
    click.IntRange(0, 1),
    "GPUs reserved for each worker; 0 computes on CPUs.  [default: 1 if there is a GPU, else 0]",
)
@_recipe(
    "cpus-per-worker", _COUNT, "CPUs reserved for each worker. They decode images, and compute where there is no GPU."
)
@_recipe("address", str, "Ray cluster; 'local' starts a new one on this machine.  [default: as for generate]")
@json_option
@debug_option
def train(as_json: bool, **options: Any) -> None:
    """Train an aligner on captioned images, with Ray Train.

    The default recipe is the paper's with a tether. The folder of --out becomes an ImageAligner directory. In it are
    log.csv, run.json, checkpoints/, and transfer/ with pictures of each validation. 'vcf-batch model assemble' makes a
    model of it. Rerunning the same command resumes.
    """
    from vcf_batch.training import ray_training  # torch and ray are not needed to print a help text

    summary = ray_training.run(TrainingConfig(**options))
    tell(str(summary), dataclasses.asdict(summary) | {"out": redact(summary.out)}, as_json)


@model.command(
    cls=Command,
    document=DOCUMENTS["model assemble"],
    examples=(
        ("vcf-batch model assemble --base sd21 --aligner s3://bucket/aligner --out model", "A folder for --model"),
    ),
)
@click.option(
    "--base",
    required=True,
    metavar="ID",
    help="The Stable Diffusion model: sd15, sd21, sdxl, tiny, a directory, a .safetensors file, a Hub id or a URL.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a base on the Hub.")
@click.option(
    "--image-encoder",
    metavar="ID",
    help="The CLIP that the aligner reads.  [default: the preset's, else the base's own]",
)
@click.option("--image-encoder-revision", metavar="REV", help="Branch, tag or commit of an image encoder on the Hub.")
@click.option("--aligner", required=True, metavar="DIR", help="Directory or URL that 'model train' wrote.")
@click.option("--out", required=True, metavar="DIR", help="Folder or URL for the model.")
@click.option(
    "--dtype",
    type=click.Choice(limits.DTYPES[1:]),
    default="float32",
    show_default=True,
    help="Precision of the weights that are written.",
)
@json_option
@debug_option
def assemble(
    base: str,
    revision: str | None,
    image_encoder: str | None,
    image_encoder_revision: str | None,
    aligner: str,
    out: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Put the parts of a model together as one directory.

    The parts are Stable Diffusion, image encoder and aligner. 'generate' takes the directory as --model.
    """
    import torch  # not needed to print a help text

    from vcf_batch.vcf import quiet

    quiet()
    from vcf_batch.models.parts import Parts
    from vcf_batch.training import assembly  # brings what would warn

    found = Parts.resolve(base, revision, image_encoder, image_encoder_revision)
    assembly.assemble(found, aligner, out, getattr(torch, dtype))
    written = redact(storage.absolute(out))
    tell(written, {"model": written}, as_json)


@model.command(
    "fit-roles",
    cls=Command,
    document=DOCUMENTS["model fit-roles"],
    examples=(("vcf-batch model fit-roles --model model --pairs photos", "From the pictures of a folder"),),
)
@click.option("--model", "name", required=True, metavar="MODEL", help="Folder or URL of a model with an aligner.")
@click.option(
    "--pairs",
    metavar="DATA",
    help="Parquet file of pairs that differ in one attribute, with the columns first, second and attribute (style, "
    "palette, or any other); or a folder of images, which are recoloured, turned grey, blurred and shuffled.  "
    "[default: pictures from the tiny model's world, for models of its family]",
)
@click.option(
    "--count",
    type=click.IntRange(min=8),
    default=256,
    show_default=True,
    metavar="N",
    help="Pairs of each attribute that are rendered, or images of the folder that are used.",
)
@click.option("--out", metavar="FILE", help="File or URL to write.  [default: aligner/roles.safetensors in MODEL]")
@json_option
@debug_option
def fit_roles(name: str, pairs: str | None, count: int, out: str | None, as_json: bool) -> None:
    """Fit the roles style and palette to a model, from pairs of pictures that differ in one attribute.

    The file beside the aligner is a part of the model from then on, so that the model is another one for every run. The
    table shows the share of each attribute that a role keeps.
    """
    from vcf_batch.commands import fit_roles as fitting  # torch is not needed to print a help text
    from vcf_batch.vcf import quiet

    quiet()
    found = fitting.fit_roles(name, pairs, count, out, lambda line: click.echo(printable(redact(line)), err=True))
    attributes = [*found.pairs]
    lines = [f"{'kept':10}" + " ".join(f"{attribute:>9}" for attribute in attributes)]
    for role, shares in found.kept.items():
        lines.append(f"{role:10}" + " ".join(f"{shares[attribute]:>8.0%} " for attribute in attributes).rstrip())
    place = redact(found.file)
    tell("\n".join([*lines, place]), dataclasses.asdict(found) | {"file": place}, as_json)


@model.command(
    cls=Command,
    document=DOCUMENTS["model evaluate"],
    params=[option for option in generate.params if option.name not in _DECIDED],
    groups=OPTION_GROUPS,
    examples=(
        ("vcf-batch model evaluate --model tiny --out out/evaluation", "The embedded model"),
        (
            "vcf-batch model evaluate --model model --prompts prompts.txt --references photos --out out/evaluation",
            "A model of yours",
        ),
    ),
)
@click.option("--out", required=True, metavar="DIR", help="Folder or URL for manifest, samples, table and plot.")
@click.option("--prompts", metavar="FILE", help=f"{PROMPTS_HELP} Each prompt is paired with every reference.")
@click.option("--prompt-column", "column", metavar="NAME", help=COLUMN_HELP)
@click.option("--references", metavar="DIR", help=REFERENCES_HELP)
@click.option(
    "--pairs",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Take N pairs of prompt and reference from the tiny model's world, without --prompts and --references.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Images of each pair by each method.",
)
@click.option(
    "--strength",
    "sweep",
    type=float,
    multiple=True,
    default=EVALUATED_STRENGTHS,
    show_default=True,
    help="Evaluate concat, and an IP-Adapter, at this strength too, besides their own strengths. Repeatable.",
)
@click.option(
    "--pno-steps",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Steps of prompt-noise optimisation, in the method concat + PNO.",
)
@click.option(
    "--pno-samples",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Number of samples of the method concat + PNO. Each of its steps takes as many operations as three images. "
    "0 leaves the method out.",
)
@click.pass_context
def evaluate(
    ctx: click.Context,
    out: str,
    prompts: str | None,
    column: str | None,
    references: str | None,
    pairs: int,
    seeds: int,
    sweep: tuple[float, ...],
    pno_steps: int,
    pno_samples: int,
    as_json: bool,
    **_: Any,
) -> None:
    """Compare text only with each fusion of a model, its roles, and an IP-Adapter if --ip-adapter names one.

    All of them get the same prompts, references and noise. The samples are generated by an ordinary run, in the folder
    samples/ of --out: rerunning the same command resumes. Beside it, table.md has the scores with bootstrap intervals,
    results.json all figures, and tradeoff.png and tradeoff.svg the plot.
    """
    from vcf_batch import pool  # ray and torch are not needed to print a help text
    from vcf_batch.commands import evaluate as evaluation

    config = run_config(ctx, **evaluation.places(out), limit=None, rows=None, pno_steps=0)
    config = evaluation.prepared(
        config,
        lambda line: click.echo(printable(line), err=True),
        prompts=prompts,
        prompt_column=column,
        references=references,
        pairs=pairs,
        seeds=seeds,
        strengths=sweep,
        pno_steps=pno_steps,
        pno_samples=pno_samples,
    )
    if as_json:
        check_failed(config, pool.run(config))
    else:
        run(config)
    evaluated = evaluation.tabulate(config)
    tell(f"\n{evaluated.table}", evaluated.results, as_json)
