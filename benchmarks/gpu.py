"""Measure all figures of speed on a GPU in one run of at most about eight minutes: ``python benchmarks/gpu.py``.

The benchmark builds Stable Diffusion 2.1 and ViT-H with random weights on the device (``full_size.py``). It compares
their output with float32 and with the path that is not optimised, and then measures. It prints a Markdown table. It
needs neither Ray nor torchvision; without an installation, run ``PYTHONPATH=. python benchmarks/gpu.py``.

``--smoke`` runs the same code on the CPU at tiny shapes. Its figures mean nothing.
"""

import functools
import importlib.metadata
import math
import os
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import full_size
import numpy as np
import torch
from full_size import FULL, SMOKE
from measure import peak_memory, seconds
from PIL import Image
from sampling import stock_pipeline

from vcf_batch.config import RunConfig, Sampling
from vcf_batch.vcf import pno
from vcf_batch.vcf.fusion import Fusion
from vcf_batch.vcf.pipeline import VCFPipeline
from vcf_batch.worker.device import Device

REPEATS = 3
FEW = 10
"""Number of denoising steps for comparisons of output."""
SCALE = 9.0
Rows = Iterator[tuple[str, str, str]]
"""Rows of the table: name, goal, measured value. Taking the next row does its work."""


class Bench:
    """One model, and the measurements of it."""

    def __init__(self, smoke: bool) -> None:
        self.shapes = SMOKE if smoke else FULL
        self.kind = "cpu" if smoke else "cuda"
        self.batches: tuple[int, ...] = (4, 1) if smoke else (8, 1, 16)
        self.few_steps = (1, 2) if smoke else (5, 20)
        self.config = RunConfig(
            manifest="-",
            output="-",
            gpus_per_worker=0 if smoke else 1,
            dtype="bfloat16",
            steps=self.shapes.steps,
            guidance_scale=SCALE,
            strength=1.0,
            height=self.shapes.pixels,
            width=self.shapes.pixels,
            image_tokens="all",
            compile=True,
            batch_size=self.batches[0],
        )
        self.device = Device.set_up(self.config)
        self.pipeline = full_size.pipeline(self.shapes, self.kind, torch.bfloat16).set_up(self.kind)
        random = np.random.default_rng(0).integers(0, 256, (max(self.batches), 64, 64, 3), dtype=np.uint8)
        self.per_image: dict[int, float] = {}
        """Seconds per image of sampling that is not compiled, by batch size."""
        self.stock_call = math.nan
        """Seconds per image of stock diffusers."""
        self.pictures = [Image.fromarray(pixels).resize((self.shapes.pixels,) * 2) for pixels in random]

    def draw(self, pipeline: VCFPipeline, batch: int, steps: int | None = None, deep_cache: int = 1) -> torch.Tensor:
        """Generate ``batch`` images, each with its own prompt and reference: a tensor on the CPU."""
        prompts = [f"a picture of the {number}th thing" for number in range(batch)]
        return pipeline.generate(
            prompts,
            self.pictures[:batch],
            seeds=range(batch),
            guidance_scale=SCALE,
            steps=steps,
            strength=1.0,
            deep_cache=deep_cache,
        )

    def inputs(self, batch: int, steps: int) -> tuple[Any, torch.Tensor, Any]:
        """The result of :meth:`VCFPipeline.prepare` for ``batch`` samples."""
        text, negative = (self.pipeline.encode_prompts([text] * batch) for text in ("a picture", ""))
        fusions = [Fusion([tokens]) for tokens in self.pipeline.encode_references(self.pictures[:batch])]
        sampling = Sampling(steps=steps)
        return self.pipeline.prepare(
            text, negative, fusions, seeds=range(batch), guidance_scale=SCALE, sampling=sampling
        )

    # Correctness

    def correctness(self) -> Rows:
        """Check that the output equals that of the path that is not optimised, up to rounding."""
        size, width = self.shapes.unet["sample_size"], self.shapes.unet["cross_attention_dim"]
        latents, tokens = (torch.randn(2, *shape, device=self.kind) for shape in ((4, size, size), (100, width)))

        def predict(pipeline: VCFPipeline) -> torch.Tensor:
            with torch.no_grad():
                dtype = pipeline.unet.dtype
                return pipeline.unet(latents.to(dtype), 500, tokens.to(dtype), return_dict=False)[0].float()

        exact = predict(full_size.pipeline(self.shapes, self.kind, torch.float32))
        error = (predict(self.pipeline) - exact).norm() / exact.norm()
        yield "UNet in bfloat16, channels last: error relative to float32", "<= 0.05", _held(error, 0.05)
        plain = full_size.pipeline(self.shapes, self.kind, torch.bfloat16)
        error = (predict(plain) - exact).norm() / exact.norm()
        yield "the same as it is loaded", "<= 0.05", _held(error, 0.05)
        change = (self.draw(self.pipeline, 2, FEW) - self.draw(plain, 2, FEW)).abs().mean()
        yield "images of both: mean difference in [0, 1]", "<= 0.01", _held(change, 0.01)
        counts = [self._waits(steps) for steps in (2, FEW)]
        yield f"waits for the device in 2 and in {FEW} steps", "equal", _checked(str(counts), counts[0] == counts[1])

    def _waits(self, steps: int) -> int:
        """Number of times that sampling in ``steps`` denoising steps waits for the device."""
        sample, noise, conditioning = self.inputs(2, steps)
        with torch.no_grad(), warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            if self.kind == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                sample(noise, conditioning)
            finally:
                if self.kind == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in found)

    # Time and memory

    def sampling(self) -> Rows:
        """Measure exact sampling, from the encoding of prompts and references to images on the CPU."""
        for batch in self.batches:
            self.draw(self.pipeline, batch, 2)
            self.per_image[batch] = self._per_image(batch)
            yield f"sampling, batch {batch}: s/image", _goal(batch), f"{self.per_image[batch]:.3f}"
        took = self._per_image(batch, deep_cache=3)
        yield f"deep blocks in every 3rd step, batch {batch}: s/image", "", f"{took:.3f}"

    def _per_image(self, batch: int, deep_cache: int = 1) -> float:
        return seconds(lambda: self.draw(self.pipeline, batch, deep_cache=deep_cache), REPEATS) / batch

    def stock(self) -> Rows:
        """Measure diffusers' own pipeline on the same weights, with one call per prompt and its own memory layout."""
        for network in (self.pipeline.unet, self.pipeline.vae):
            network.to(memory_format=torch.contiguous_format)
        stock = stock_pipeline(self.pipeline)
        call = functools.partial(stock, "a picture", guidance_scale=SCALE, output_type="pt")
        call(num_inference_steps=2)
        self.stock_call = seconds(lambda: call(num_inference_steps=self.shapes.steps), REPEATS)
        self.pipeline.set_up(self.kind)
        yield "stock diffusers, one call per prompt: s/image", "", f"{self.stock_call:.3f}"
        for batch, took in self.per_image.items():
            yield f"batches of {batch}, against stock diffusers", ">= 2.0", f"{self.stock_call / took:.2f}"

    def decoding(self) -> Rows:
        """Measure the VAE decoder alone."""
        for batch in (1, 8):
            latents = torch.randn(batch, 4, *(self.shapes.unet["sample_size"],) * 2, device=self.kind)
            decode = torch.no_grad()(functools.partial(self.pipeline.decode, latents))
            decode()
            yield f"VAE decode, batch {batch}: s/image", "", f"{seconds(decode, REPEATS) / batch:.4f}"

    def optimization(self) -> Rows:
        """Measure prompt-noise optimisation: seconds per step, and peak memory by number of denoising steps."""
        guide, batch = full_size.guide(self.shapes, self.kind), self.batches[0]
        targets = guide.targets([[picture] for picture in self.pictures[:batch]], [None] * batch)
        rates = {"lr_conditioning": 1e-2, "lr_noise": 1e-2, "gamma": 0.1}
        for steps in (*self.few_steps, self.shapes.steps):
            sample, noise, conditioning = self.inputs(batch, steps)
            optimize = functools.partial(
                pno.optimize, sample, noise, conditioning, guide, targets, seeds=range(batch), steps=1, **rates
            )
            begin = time.perf_counter()
            peak = peak_memory(optimize) / 1024
            whole = time.perf_counter() - begin  # The images were copied from the device, so its work is done.
            yield f"PNO, batch {batch}, {steps} denoising steps: peak GiB beyond the models", "flat", f"{peak:.2f}"
        last = seconds(torch.no_grad()(functools.partial(sample, noise, conditioning)), REPEATS)
        yield f"PNO, batch {batch}: s per step and image", "<= 1.1", f"{(whole - last) / batch:.3f}"

    def job(self) -> Rows:
        """Measure a worker's whole job against bare sampling, with two shards that overlap."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from vcf_batch import sharding
        from vcf_batch.manifest.manifest import Manifest
        from vcf_batch.manifest.references import ReferenceReader
        from vcf_batch.metrics.scorer import Scorer
        from vcf_batch.setup.shard_task import ShardTask
        from vcf_batch.worker.components import Components
        from vcf_batch.worker.worker import Worker

        batch, batches = self.batches[0], 4
        with tempfile.TemporaryDirectory(prefix="vcf-batch-gpu-") as scratch:
            folder = Path(scratch)
            for number, picture in enumerate(self.pictures[:batch]):
                picture.save(folder / f"{number}.jpg", quality=95)
            count = 2 * batches * batch
            columns = {
                "prompt": [f"a picture of the {row}th thing" for row in range(count)],
                "reference": [f"{row % batch}.jpg" for row in range(count)],
            }
            pq.write_table(pa.table(columns), folder / "manifest.parquet")
            manifest = Manifest.open(str(folder / "manifest.parquet"))
            config = self.config.replace(manifest=manifest.url, output=str(folder / "out"), shard_size=batches * batch)
            reader = ReferenceReader(manifest.base, (), config.max_pixels)
            scorer = Scorer(full_size.judge(self.shapes, self.kind))
            components = Components(config, self.pipeline, scorer, reader, "random weights", self.device)
            worker = Worker(components, manifest, "0" * 64)
            shards = sharding.ShardPlan(count, batches * batch)
            marks: list[float] = []
            sample = self.pipeline.generate_from_tokens

            def marked(**inputs: Any) -> torch.Tensor:
                marks.append(time.perf_counter())
                images = sample(**inputs)
                marks.append(time.perf_counter())
                return images

            self.pipeline.generate_from_tokens = marked  # type: ignore[method-assign]
            try:
                with ThreadPoolExecutor(2) as threads:
                    list(threads.map(lambda shard: worker.run(ShardTask(shard), shard.name), shards))
            finally:
                del self.pipeline.generate_from_tokens
        whole, bare = (marks[-1] - marks[0]) / count, self._per_image(batch)
        what = f"whole job, shards of {batches} batches, first sampling to last, against bare sampling"
        yield what, ">= 0.97", f"{bare / whole:.3f}"
        idle = marks[2 * batches] - marks[2 * batches - 1]
        yield "idle between two shards: share of a shard of ten minutes", "< 1%", f"{idle / 600:.2%} ({idle:.2f} s)"

    def compiled(self) -> Rows:
        """Measure compiled networks: the first start, a start with the cache on disk, and sampling."""
        first = self.batches[0]
        plain = self.draw(self.pipeline, first, FEW)
        self.pipeline.set_up(self.kind, compiled=True)
        starts, drawn = [], []
        for _ in range(2):
            torch.compiler.reset()
            begin = time.perf_counter()
            self.draw(self.pipeline, first, 1)
            starts.append(time.perf_counter() - begin)
            drawn.append(self.draw(self.pipeline, first, FEW))
        what = f"compiled, batch {first}: s to the first images, new; from the cache on disk"
        yield what, "", f"{starts[0]:.0f}; {starts[1]:.0f}"
        change, same = (drawn[0] - plain).abs().mean(), torch.equal(*drawn)
        yield "compiled against not: mean difference of images in [0, 1]", "<= 0.01", _held(change, 0.01)
        yield "compiled, new and from the cache: the same bits", "yes", _checked("yes" if same else "no", same)
        for batch in self.batches:
            took = self._per_image(batch)
            yield f"compiled sampling, batch {batch}: s/image", _goal(batch), f"{took:.3f}"
            yield f"compiled, batches of {batch}, against stock diffusers", ">= 2.0", f"{self.stock_call / took:.2f}"


SECTIONS = ("correctness", "sampling", "stock", "decoding", "optimization", "job", "compiled")


@click.command()
@click.option("--smoke", is_flag=True, help="Run on the CPU at tiny shapes, as a test of the code.")
@click.option("--only", "sections", type=click.Choice(SECTIONS), multiple=True, default=SECTIONS, help="Repeatable.")
@click.option("--minutes", default=6.5, show_default=True, help="Begin no new measurement after this time.")
def main(smoke: bool, sections: tuple[str, ...], minutes: float) -> None:
    """Print the table. Exit with 1 if a measurement failed or a required figure is not met."""
    if not smoke and not torch.cuda.is_available():
        raise click.UsageError(f"torch {torch.__version__} sees no GPU; --smoke runs the same code on the CPU")
    deadline = time.monotonic() + 60 * minutes
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "transformers")]
    where = "the CPU, which says nothing about speed" if smoke else torch.cuda.get_device_name()
    command = shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    click.echo(f"`{command}` on {where}; {', '.join(versions)}, CUDA {torch.version.cuda}\n")
    click.echo("| what | goal | measured |\n|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="vcf-batch-compiled-") as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        bench = Bench(smoke)
        chosen = [name for name in SECTIONS if name in sections]
        failed = [name for name in chosen if not _measured(getattr(bench, name)(), name, deadline)]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _measured(rows: Rows, name: str, deadline: float) -> bool:
    """Print each row of a section as soon as it is measured. Return False if the section failed."""
    while True:
        if time.monotonic() > deadline:
            click.echo(f"| the rest of {name} | | not measured: out of time |")
            return True
        try:
            click.echo("| {} | {} | {} |".format(*next(rows)))
        except StopIteration:
            return True
        except Exception as error:  # A failed section does not stop the others.
            message = " ".join(f"{type(error).__name__}: {error}".split())
            click.echo(f"| the rest of {name} | | failed: {message[:200]} |")
            click.echo(traceback.format_exc(), err=True)
            return False


def _goal(batch: int) -> str:
    return "<= 0.8" if batch == 1 else "<= 0.45; 0.39"


class Wrong(Exception):
    """A required figure is not met."""


def _held(value: torch.Tensor, limit: float) -> str:
    return _checked(f"{value.item():.4f}", bool(value.isfinite()) and value.item() <= limit)


def _checked(shown: str, right: bool) -> str:
    if not right:
        raise Wrong(shown)
    return shown


if __name__ == "__main__":
    main()
