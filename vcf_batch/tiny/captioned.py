"""Write captioned pictures of the tiny world as a WebDataset: ``python -m vcf_batch.tiny.captioned FOLDER``.

The pictures take the place of a user's own data to try ``vcf-batch model train``: img2dataset's layout, one caption
each.
"""

import io
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
    """Write FOLDER/00000.tar and so on: KEY.jpg and KEY.txt for every scene. A caption names all attributes."""
    drawn, rng = world.sample_scenes(scenes, seed), random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for shard, part in enumerate(chunks(scenes, PER_TAR)):
        some = drawn.part(part, seed + shard)
        texts = world.captions(some, rng, full=1.0)
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number, (pixels, text) in enumerate(
                zip(world.render(some).permute(0, 2, 3, 1).numpy(), texts, strict=True)
            ):
                key = f"{part.start + number:09d}"
                for name, data in ((f"{key}.jpg", encode(from_unit(pixels), "jpg")), (f"{key}.txt", text.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main()
