"""Draw docs/roles.png, what each role takes from its reference and what three take together: ``make roles``."""

from pathlib import Path

import click
import pyarrow.parquet as pq
from PIL import Image

from vcf_batch.images import from_unit
from vcf_batch.models.resolution import tiny_folder
from vcf_batch.report.contact_sheet import Cell, grid
from vcf_batch.vcf import quiet
from vcf_batch.vcf.pipeline import VCFPipeline

MANIFEST = Path(__file__).parent.parent / "manifests" / "roles.parquet"
PICTURE = Path(__file__).parent / "roles.png"


@click.command()
@click.option("--weights", default=tiny_folder(), show_default="the package's", help="A model of the tiny family.")
@click.option("--out", type=click.Path(path_type=Path), default=PICTURE, show_default=True)
def main(weights: str, out: Path) -> None:
    """Draw a row for each prompt of manifests/roles.parquet: the references, and the pictures of its rows."""
    quiet()
    pipeline = VCFPipeline.from_pretrained(weights)
    pipeline.set_progress_bar_config(disable=True)
    rows = [row for row in pq.read_table(MANIFEST).to_pylist() if row["reference_masks"] is None]
    by_prompt: dict[str, list[dict]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    roles = rows[-1]["reference_roles"]
    heads = [[f"{role} from"] for role in roles] + [["text only"], *([role] for role in roles), ["all three"]]
    drawn = []
    for prompt, own in by_prompt.items():
        shown = {uri: Image.open(MANIFEST.parent / uri).convert("RGB") for row in own for uri in row["reference"]}
        made = pipeline.generate(
            [prompt] * len(own),
            [[shown[uri] for uri in row["reference"]] for row in own],
            seeds=[row["seed"] for row in own],
            strength=[row["strength"] for row in own],
            reference_roles=[row["reference_roles"] for row in own],
        )
        pictures = [Image.fromarray(each) for each in from_unit(made.permute(0, 2, 3, 1).numpy())]
        drawn.append((prompt, [Cell(each, "") for each in (*(shown[uri] for uri in own[-1]["reference"]), *pictures)]))
    grid(heads, drawn).save(out, optimize=True)
    click.echo(out)


if __name__ == "__main__":
    main()
