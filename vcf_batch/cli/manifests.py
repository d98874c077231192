"""``manifest``, and the prompts and images that other commands take as well."""

from typing import Any

import click

from vcf_batch import storage
from vcf_batch.cli.command import Command, debug_option
from vcf_batch.errors import UsageError, redact
from vcf_batch.manifest.pairing import PAIRINGS

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


@click.command(cls=Command)
@click.option("--prompts", required=True, metavar="FILE", help="Text file, one prompt a line; empty lines are skipped.")
@click.option("--references", metavar="DIR", help="Folder of reference images. Without it, prompts alone.")
@click.option(
    "--pairing",
    type=click.Choice(PAIRINGS),
    default="cross",
    show_default=True,
    help="Every prompt with every reference (cross), a random sample of these pairs, or a sample in which each prompt "
    "and each reference comes equally often (balanced).",
)
@click.option("--rows", type=click.IntRange(min=1), help="Rows to write.  [default: all combinations]")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Images of each pair.")
@click.option("--pairing-seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of random, balanced.")
@click.option("--out", required=True, metavar="FILE", help="The Parquet manifest to write.")
@debug_option
def manifest(prompts: str, references: str | None, out: str, **pairing: Any) -> None:
    """Build a manifest: prompts paired with references."""
    from vcf_batch.manifest.build import build

    images = images_in(references, out) if references else []
    count = build(prompts_in(prompts), images, storage.absolute(out), **pairing)
    click.echo(f"{redact(out)}: {count:,} rows")


def prompts_in(file: str) -> list[str]:
    """The lines of a text file."""
    try:
        return storage.read_text(file).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read prompts from {file}: {error}") from error


def images_in(folder: str, out: str) -> list[str]:
    """The images below a folder, sorted: relative to the manifest's folder where they lie in it, else absolute."""
    folder, base = storage.absolute(folder), storage.parent(storage.absolute(out)).rstrip("/") + "/"
    names = sorted(name for name in storage.list_tree(folder) if name.lower().endswith(IMAGE_SUFFIXES))
    if not names:
        raise UsageError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return [storage.join(folder, name).removeprefix(base) for name in names]
