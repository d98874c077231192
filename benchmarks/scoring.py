"""Measure what ``score`` takes beside its networks: ``python benchmarks/scoring.py``.

An output of one shard is written without a model: pictures of 512 x 512 pixels, each with a prompt and a reference of
its own, so that nothing is seen twice. A worker scores it by networks of published shapes with random weights: it reads
tar, manifest and references, checks hashes, decodes, prepares, and writes the scores. Beside it the networks alone see
the same inputs in the same batches. Both take turns. The figures are seconds of a processor for a picture, with one
thread for the networks, so they do not depend on what else the machine does.
"""

import functools
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import click
import full_size
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from vcf_batch.commands.score import wanted
from vcf_batch.config.row_settings import settings_of
from vcf_batch.output.output import Output
from vcf_batch.output.shards import ShardWriter
from vcf_batch.records import Sample, Scores
from vcf_batch.setup.job import schema_of
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.worker.scoring.job import ScoreJob
from vcf_batch.worker.scoring.worker import load

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

KINDS = ("clip", "dino")


def photo(seed: int, pixels: int) -> Image.Image:
    """A picture that compresses as photographs do: soft shapes under a little noise."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    soft = soft.resize((pixels, pixels), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 3, (pixels, pixels, 1))
    return Image.fromarray(np.clip(np.asarray(soft) + grain, 0, 255).astype(np.uint8))


def build(folder: Path, rows: int, pixels: int) -> Output:
    """Write manifest, references and an output of one shard."""
    from support import runs
    from vcf_batch.output.receipts import RECEIPT_SUFFIX, Receipt

    (folder / "in").mkdir()
    for number in range(rows):
        photo(number, pixels).save(folder / f"in/{number}.png")
    table = {"prompt": [f"thing {n}" for n in range(rows)], "reference": [f"{n}.png" for n in range(rows)]}
    pq.write_table(pa.table(table), folder / "in/manifest.parquet")
    job = runs.begin_output(folder / "in/manifest.parquet", folder / "out", rows)
    with ShardWriter(str(folder / "out"), job.shards[0], "png", schema_of(job.config, job.manifest)) as writer:
        for row in job.manifest.iter_rows(0, rows, 0):
            file = io.BytesIO()
            photo(rows + row.number, pixels).save(file, "PNG")
            used = settings_of(row, job.config)
            writer.add(Sample(row, "success", used, file.getvalue(), pixels, pixels, Scores(None, None, None)))
        files = writer.finish()
    receipt = Receipt(job.shards[0], job.fingerprint, 1, files.counts, files.entries, {}, {}, sampled=files.sampled)
    (folder / f"out/{job.shards[0].name}{RECEIPT_SUFFIX}").write_bytes(receipt.to_json())
    return Output(folder / "out")


def save_network(kind: str, folder: Path) -> None:
    """Write a network of a published shape with random weights: CLIP ViT-B/32, or DINOv2 ViT-B/14."""
    torch.manual_seed(0)
    if kind == "clip":
        judge = full_size.judge(full_size.FULL, "cpu")
        for part in (judge.model, judge.tokenizer, judge.processor):
            part.save_pretrained(folder)
        return
    Dinov2Model(Dinov2Config(image_size=518, patch_size=14)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    BitImageProcessorPil(**size, do_center_crop=True, do_resize=True).save_pretrained(folder)


class Recorded:
    """The calls of networks within the block, to be made once more without anything around them."""

    def __enter__(self) -> Self:
        self._calls: list[tuple[torch.nn.Module, tuple[object, ...], dict[str, object]]] = []
        self._plain = torch.nn.Module.__call__
        is_inside = False

        def call(module: torch.nn.Module, *given: object, **named: object) -> object:
            nonlocal is_inside
            if is_inside:
                return self._plain(module, *given, **named)
            self._calls.append((module, given, named))
            is_inside = True
            try:
                return self._plain(module, *given, **named)
            finally:
                is_inside = False

        torch.nn.Module.__call__ = call  # type: ignore[method-assign]
        return self

    def __exit__(self, *exc_info: object) -> None:
        torch.nn.Module.__call__ = self._plain  # type: ignore[method-assign]

    @torch.inference_mode()
    def again(self) -> None:
        for module, given, named in self._calls:
            module(*given, **named)


def seconds(call: Callable[[], object]) -> float:
    """Seconds of a processor that a call takes, in all of its threads."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


@click.command()
@click.option("--rows", default=64, show_default=True, help="Pictures; a multiple of the images of a forward pass.")
@click.option("--pixels", default=512, show_default=True, help="Width and height of pictures and references.")
@click.option("--rounds", default=5, show_default=True)
def main(rows: int, pixels: int, rounds: int) -> None:
    """Measure score against its networks alone."""
    torch.set_num_threads(1)
    click.echo(
        f"{rows} pictures of {pixels} pixels, medians of {rounds} rounds\n\n"
        "| networks | score, s a picture | networks alone, s a picture | ratio |\n|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(prefix="vcf-batch-scoring-") as scratch:
        output = build(Path(scratch), rows, pixels)
        for kind in KINDS:
            save_network(kind, Path(scratch, kind))
            scores = wanted.resolve([wanted.parse(f"{kind}={scratch}/{kind}")], None, [])
            worker = load(ScoreJob(output, output.config, scores))
            task = ShardTask(output.plan[0])
            with Recorded() as recorded:
                worker.run(task, "warm")
            score = functools.partial(worker.run, task, "timed")
            pairs = [(seconds(score), seconds(recorded.again)) for _ in range(rounds)]
            whole, alone = (statistics.median(side) / rows for side in zip(*pairs, strict=True))
            ratio = statistics.median(one / other for one, other in pairs)
            click.echo(f"| {kind} | {whole:.4f} | {alone:.4f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
