"""Make the demo manifests and their reference images: ``python -m vcf_batch.tiny.demo manifests``.

There are sixteen prompts, which name an object and its colour, and eight references, which differ in everything else.
Each prompt is generated four times from the same noise: once at strength 0, then with three references.

A second manifest shows roles: four prompts, each at strength 0, with the style, the palette and the layout of one
reference each, with all three at once, and with a reference in the left half alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vcf_batch.config.limits import ROLES
from vcf_batch.images import from_unit
from vcf_batch.tiny import world

DEMO_SEED = 7

REFERENCES = {
    "mosaic-dots": "ring white dotted blue yellow mosaic center large",
    "soft-waves": "circle white wavy pink purple soft left medium",
    "ink-stripes": "diamond cyan striped yellow orange outlined right medium",
    "pencil-checks": "square brown checkered green white sketchy top medium",
    "flat-glow": "triangle gray radial black red flat bottom medium",
    "mosaic-dusk": "crescent yellow gradient purple orange mosaic left large",
    "ink-camouflage": "cross red noisy green brown outlined center large",
    "pencil-sea": "heart pink wavy cyan blue sketchy right large",
}
"""File name to the scene's shape, colour, pattern, background colours, style, position and size."""

PROMPTS = (
    "a red star",
    "a green heart",
    "a blue arrow",
    "an orange ring",
    "a white crescent",
    "a black cross",
    "a yellow triangle",
    "a pink diamond",
    "a purple square",
    "a cyan circle",
    "a brown star",
    "a gray heart",
    "a red arrow",
    "a white ring",
    "a yellow crescent",
    "a black circle",
)


ROLED_PROMPTS = 4
"""Number of the prompts that the manifest of roles has."""

LEFT_HALF = "references/left-half.png"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Write FOLDER/demo.parquet, FOLDER/roles.parquet and FOLDER/references/."""
    order = ("shape", "color", "pattern", "background", "background2", "style", "position", "size")
    scenes = world.compose([dict(zip(order, text.split(), strict=True)) for text in REFERENCES.values()], DEMO_SEED)
    (folder / "references").mkdir(parents=True, exist_ok=True)
    files = [f"references/{name}.png" for name in REFERENCES]
    for file, pixels in zip(files, from_unit(world.render(scenes).permute(0, 2, 3, 1).numpy()), strict=True):
        Image.fromarray(pixels).save(folder / file)

    rows = []
    for number, prompt in enumerate(PROMPTS):
        # Steps of 3 through 8 references: each reference is used with six prompts, and at strength 0 with two.
        chosen = [files[(3 * number + step) % len(files)] for step in range(3)]
        for variant, (reference, strength) in enumerate([(chosen[0], 0.0), *((file, None) for file in chosen)]):
            rows.append(
                {
                    "sample_id": f"demo-{number:02d}-{variant}",
                    "prompt": prompt,
                    "reference": reference,
                    "seed": number,
                    "strength": strength,
                }
            )
    schema = pa.schema(
        {
            "sample_id": pa.string(),
            "prompt": pa.string(),
            "reference": pa.string(),
            "seed": pa.int64(),
            "strength": pa.float64(),
        }
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "demo.parquet")
    mask = Image.new("L", (world.SIZE, world.SIZE))
    mask.paste(255, (0, 0, world.SIZE // 2, world.SIZE))
    mask.save(folder / LEFT_HALF)
    pq.write_table(_roles(files), folder / "roles.parquet")


def _roles(files: Sequence[str]) -> pa.Table:
    """The manifest of roles."""
    rows: list[dict[str, Any]] = []
    for number, prompt in enumerate(PROMPTS[:ROLED_PROMPTS]):
        three = [files[(3 * number + step) % len(files)] for step in range(3)]
        variants: list[dict[str, Any]] = [{"reference": three[:1], "strength": 0.0}]
        variants += [{"reference": [file], "roles": [role]} for file, role in zip(three, ROLES[1:], strict=False)]
        variants.append({"reference": three, "roles": ROLES[1:]})
        variants.append({"reference": three[:1], "masks": [LEFT_HALF]})
        rows += [
            {
                "sample_id": f"roles-{number}-{variant}",
                "prompt": prompt,
                "reference": own["reference"],
                "reference_roles": own.get("roles"),
                "reference_masks": own.get("masks"),
                "seed": number,
                "strength": own.get("strength"),
            }
            for variant, own in enumerate(variants)
        ]
    texts = pa.list_(pa.string())
    lists = {"reference": texts, "reference_roles": texts, "reference_masks": texts}
    names = {"sample_id": pa.string(), "prompt": pa.string()}
    schema = pa.schema({**names, **lists, "seed": pa.int64(), "strength": pa.float64()})
    return pa.Table.from_pylist(rows, schema)


if __name__ == "__main__":
    main()
