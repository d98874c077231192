"""Programs that ``benchmarks/peers.py`` compares with ``vcf-batch generate``: ``python benchmarks/peer_programs.py``.

Each samples the rows of a manifest on the embedded model with diffusers' own pipeline, as somebody writes it who has
diffusers and no vcf-batch. The judge is the one of vcf-batch, so that the scores can be compared. Images, prompts and
scores go into tars of WebDataset's form.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import click

BATCH = 8
STEPS = 10
FIRST = "first"
"""Name of a file in the output that is made when the first batch is finished."""


def sampler() -> Any:
    """diffusers' own pipeline with the embedded model's weights, and the guidance scale that the model recommends."""
    import torch
    from diffusers import StableDiffusionPipeline

    from vcf_batch.models.resolution import tiny_folder
    from vcf_batch.vcf import quiet

    quiet()
    torch.set_num_threads(1)
    folder = tiny_folder()
    scale = json.loads(Path(folder, "model_index.json").read_text())["default_guidance_scale"]
    stock = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)

    def sample(prompts: Sequence[str], seeds: Sequence[int]) -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return stock([*prompts], num_inference_steps=STEPS, guidance_scale=scale, generator=generators).images

    return sample


class Generation:
    """Sampling, scores and encoding of batches. It is a plain object for a loop, and an actor for Ray Data.

    Args:
        output: folder of the output.
    """

    def __init__(self, output: str) -> None:
        from vcf_batch.metrics.clip_score import ClipJudge
        from vcf_batch.models.resolution import tiny_folder

        self._first, self._sample = Path(output, FIRST), sampler()
        self._judge = ClipJudge.from_pretrained(os.path.join(tiny_folder(), "judge"))

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """The columns of a tar's samples for a batch of the manifest's columns."""
        from vcf_batch.metrics.clip_score import cosine

        prompts = [str(prompt) for prompt in batch["prompt"]]
        pictures = self._sample(prompts, [int(seed) for seed in batch["seed"]])
        scores = cosine(self._judge.embed_images(pictures), self._judge.embed_texts(prompts)).tolist()
        files = [BytesIO() for _ in pictures]
        for picture, file in zip(pictures, files, strict=True):
            picture.save(file, "png", compress_level=1)
        self._first.touch()
        return {
            "__key__": [str(key) for key in batch["sample_id"]],
            "png": [file.getvalue() for file in files],
            "txt": [prompt.encode() for prompt in prompts],
            "json": [json.dumps({"clip_score": score}).encode() for score in scores],
        }


def batches(manifest: str) -> Iterator[Mapping[str, Sequence[Any]]]:
    """The columns of a manifest, batch by batch."""
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(manifest).iter_batches(BATCH):
        yield batch.to_pydict()


@click.group()
def main() -> None:
    """Sample MANIFEST into the folder OUTPUT."""


@main.command()
@click.argument("manifest")
@click.argument("output")
def sampling(manifest: str, output: str) -> None:
    """Sample in batches, and keep nothing."""
    sample = sampler()
    for batch in batches(manifest):
        sample(batch["prompt"], batch["seed"])
        Path(output, FIRST).touch()


@main.command()
@click.argument("manifest")
@click.argument("output")
def loop(manifest: str, output: str) -> None:
    """Sample, score and write one batch after the other."""
    import webdataset

    generate = Generation(output)
    with webdataset.TarWriter(os.path.join(output, "00000.tar"), encoder=False) as tar:
        for batch in batches(manifest):
            columns = generate(batch)
            for values in zip(*columns.values(), strict=True):
                tar.write(dict(zip(columns, values, strict=True)))


@main.command()
@click.option("--actors", default=2, show_default=True)
@click.option("--blocks", default=0, help="Number of blocks to repartition the manifest into; 0 leaves it to Ray Data.")
@click.argument("manifest")
@click.argument("output")
def ray_data(actors: int, blocks: int, manifest: str, output: str) -> None:
    """Sample and score in actors of Ray Data, which write the tars."""
    import ray

    # One CPU more than the actors have: they keep theirs, and without another one no row would ever be read.
    ray.init("local", num_cpus=actors + 1, include_dashboard=False)
    rows = ray.data.read_parquet(manifest)
    if blocks:
        rows = rows.repartition(blocks)
    rows.map_batches(
        Generation,
        fn_constructor_args=(output,),
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=1,
    ).write_webdataset(output, encoder=None)


if __name__ == "__main__":
    main()
