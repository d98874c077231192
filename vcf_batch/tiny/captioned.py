"""Write captioned pictures of the tiny world as a WebDataset: ``python -m vcf_batch.tiny.captioned FOLDER``.

The pictures take the place of a user's own data to try ``vcf-batch model train``: img2dataset's layout, one caption
each, and a second one in the field ``looks`` that names neither the object nor its colour.
"""

import io
import json
import random
import tarfile
from pathlib import Path

import click

from vcf_batch.images import encode, from_unit
from vcf_batch.tiny import world
from vcf_batch.tiny.fitting import chunks

PER_TAR = 500


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--scenes", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(folder: Path, scenes: int, seed: int) -> None:
    """Write FOLDER/00000.tar and so on: KEY.jpg, KEY.txt and KEY.json for every scene, whose caption names it all."""
    drawn, rng = world.sample_scenes(scenes, seed), random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for shard, part in enumerate(chunks(scenes, PER_TAR)):
        some = drawn.part(part, seed + shard)
        texts = world.captions(some, rng, full=1.0)
        # Always in the same words: a picture does not show how its caption is worded.
        looks = [world.caption(some.named(number), world.LOOKS, None) for number in range(len(some))]
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number, pixels in enumerate(world.render(some).permute(0, 2, 3, 1).numpy()):
                key = f"{part.start + number:09d}"
                fields = {"caption": texts[number], "looks": looks[number]}
                for kind, data in (
                    ("jpg", encode(from_unit(pixels), "jpg")),
                    ("txt", texts[number].encode()),
                    ("json", json.dumps(fields).encode()),
                ):
                    member = tarfile.TarInfo(f"{key}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main()
