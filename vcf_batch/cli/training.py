"""``train-aligner`` and ``assemble``: a model of one's own."""

from collections.abc import Callable
from typing import Any

import click

from vcf_batch import config as settings
from vcf_batch import storage
from vcf_batch.cli.command import Command, debug_option
from vcf_batch.errors import redact
from vcf_batch.training.training_config import TrainingConfig

_POSITIVE = click.FloatRange(min=0, min_open=True)
_COUNT = click.IntRange(min=1)


def _recipe(name: str, kind: Any, text: str, **extra: Any) -> Callable[[Any], Any]:
    """An option of ``train-aligner`` with the default of TrainingConfig."""
    return click.option(f"--{name}", type=kind, help=text, default=getattr(TrainingConfig, name.replace("-", "_")),
                        show_default=True, **extra)  # fmt: skip


@click.command(cls=Command)
@click.option(
    "--model",
    required=True,
    help="What the aligner is for: sd21, sd15 (presets of base and image encoder), tiny, a pipeline directory, a "
    "Hugging Face Hub id, or a URL.",
)
@click.option(
    "--data",
    required=True,
    metavar="URL",
    help="Captioned images: WebDataset tars or Parquet files. A file, a folder at any depth, or a pattern of file "
    "names in quotes, such as 's3://bucket/train-*.tar'.",
)
@click.option("--out", required=True, metavar="DIR", help="Folder or URL for the aligner, its checkpoints and its log.")
@_recipe("revision", str, "Branch, tag or commit of a Hub model.")
@_recipe("image-encoder", str, "The CLIP that the aligner reads.  [default: the preset's, else the model's own]")
@_recipe("image-encoder-revision", str, "Branch, tag or commit of an image encoder on the Hub.")
@_recipe("image-column", str, "Parquet column of images.  [default: the first struct<bytes, path> or binary one]")
@_recipe("caption-column", str, "Parquet column of captions.  [default: caption, captions, text, sentences, ...]")
@_recipe("limit", _COUNT, "Only the first pairs.", metavar="PAIRS")
@_recipe("validation-data", str, "Captioned images to validate on.  [default: the last pairs of --data]", metavar="URL")
@_recipe("validation-pairs", _COUNT, "Pairs to validate on.  [default: 5 % of the pairs, at most 1,000]")
@_recipe("tokens", click.Choice(("all", "patches", "cls")), "Image tokens that the aligner uses.")
@_recipe("epochs", _COUNT, "Passes over the data.")
@_recipe("batch-size", _COUNT, "Pairs in a step, over all workers; each is compared with all others.")
@_recipe("learning-rate", _POSITIVE, "Of AdamW, at the start; it falls to zero along a cosine.")
@_recipe("weight-decay", click.FloatRange(min=0), "Of AdamW.")
@_recipe("gradient-norm", _POSITIVE, "A longer gradient is shortened to it.")
@_recipe("info-nce-weight", click.FloatRange(min=0), "Lambda, the weight of the contrastive loss.")
@_recipe("temperature", _POSITIVE, "Of the contrastive loss; with --learn-temperature, at the start.")
@_recipe("learn-temperature", None, "Train the temperature too.", is_flag=True)
@_recipe("validate-every", _COUNT, "Steps between validations, each with a checkpoint.  [default: an epoch]")
@_recipe("shuffle-buffer", _COUNT, "Pairs that each worker shuffles at a time.")
@_recipe("seed", click.IntRange(min=0), "Of the first weights, the order and the drawn captions.")
@_recipe(
    "dtype",
    click.Choice(settings.DTYPES),
    "Precision of the frozen towers; auto is bfloat16 on GPUs and float32 on CPUs. With bfloat16 the aligner computes "
    "in mixed precision.",
)
@_recipe(
    "cache-features", str, "Folder or URL that keeps the towers' outputs, for later epochs and runs.", metavar="URL"
)
@_recipe("num-workers", _COUNT, "Workers.  [default: one per GPU, else one per --cpus-per-worker CPUs]")
@_recipe("gpus-per-worker", click.IntRange(0, 1), "0 computes on CPUs.  [default: 1 where there is a GPU, else 0]")
@_recipe("cpus-per-worker", _COUNT, "CPUs reserved for a worker: threads that decode, or compute without a GPU.")
@_recipe("address", str, "Ray cluster; 'local' starts a new one on this machine.  [default: as for generate]")
@debug_option
def train_aligner(**options: Any) -> None:
    """Train an aligner on captioned images, distributed by Ray Train.

    The default recipe is the paper's. DIR becomes an ImageAligner directory, with log.csv, run.json and checkpoints/
    beside it; 'vcf-batch assemble' makes a model of it. Rerunning the same command resumes.
    """
    from vcf_batch.training import train  # torch and ray are not needed to print a help text

    click.echo(str(train.run(TrainingConfig(**options))))


@click.command(cls=Command)
@click.option(
    "--base", required=True, metavar="ID", help="Stable Diffusion: sd21, sd15, tiny, a directory, Hub id or URL."
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a base on the Hub.")
@click.option(
    "--image-encoder", metavar="ID", help="CLIP of the aligner.  [default: the preset's, else the base's own]"
)
@click.option("--image-encoder-revision", metavar="REV", help="Branch, tag or commit of an image encoder on the Hub.")
@click.option("--aligner", required=True, metavar="DIR", help="What train-aligner wrote: a directory or URL.")
@click.option("--out", required=True, metavar="DIR", help="Folder or URL for the model.")
@click.option(
    "--dtype",
    type=click.Choice(settings.DTYPES[1:]),
    default="float32",
    show_default=True,
    help="Precision of the weights that are written.",
)
@debug_option
def assemble(
    base: str,
    revision: str | None,
    image_encoder: str | None,
    image_encoder_revision: str | None,
    aligner: str,
    out: str,
    dtype: str,
) -> None:
    """Put Stable Diffusion, image encoder and aligner together as one directory: what generate takes as --model."""
    import torch  # not needed to print a help text

    from vcf_batch.vcf.quiet import quiet

    quiet()
    from vcf_batch.vcf import assembly, parts  # bring what would warn

    found = parts.Parts.resolve(base, revision, image_encoder, image_encoder_revision)
    assembly.assemble(found, aligner, out, getattr(torch, dtype))
    click.echo(redact(storage.absolute(out)))
