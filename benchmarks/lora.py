"""Measure how busy workers are with many LoRAs: ``python benchmarks/lora.py``.

A run on Ray generates 50 prompts with each of 200 LoRAs, on a Stable Diffusion 1.5 of reduced width with random
weights, whose steps are few and short, so that all else counts. LoRAs update every attention of UNet and text encoder,
in kohya's format and in diffusers' by turns. Printed are the share of the workers' time that was spent in sampling, and
what the rest went into. The benchmark exits with 1 if the share is below :data:`GOAL`. ``--unsorted`` deals the LoRAs
out to the rows by turns, and ``--peft`` compares the cost of loading, switching and sampling with PEFT's.
"""

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from vcf_batch.vcf import quiet

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

GOAL = 0.9
"""Share of the workers' time that has to be spent in sampling."""
SHOWN = ("sample", "switch_loras", "wait_for_loras", "wait_for_references", "wait_for_scores", "stage")


def write(folder: Path, count: int, prompts: int, unsorted: bool) -> None:
    """Write a model, a judge, LoRAs, and the manifest."""
    from support import loras, runs, sd_layouts
    from vcf_batch.vcf.pipeline import VCFPipeline

    sd_layouts.save_sd15(folder / "model")
    sd_layouts.save_clip(folder / "judge")
    pipeline = VCFPipeline.from_pretrained(str(folder / "model"))
    names = [*loras.names_of(folder / "in", pipeline, count)]
    rows = count * prompts
    columns: dict[str, list[Any]] = {
        "prompt": [f"a red star on a wall, number {row}" for row in range(rows)],
        "reference": [None] * rows,
        "lora": [names[row % count if unsorted else row // prompts] for row in range(rows)],
    }
    runs.write_manifest(folder / "in", rows, columns)


def generate(folder: Path, workers: int, steps: int) -> dict[str, Any]:
    """Run the job, and return its seconds by phase, summed over shards."""
    import vcf_batch
    from vcf_batch.output import receipts
    from vcf_batch.output.sums import RunSums

    begin = time.monotonic()
    vcf_batch.run(
        manifest=str(folder / "in"),
        output=str(folder / "out"),
        model=str(folder / "model"),
        judge=str(folder / "judge"),
        steps=steps,
        num_workers=workers,
        gpus_per_worker=0,
        batch_size=8,
        shard_size=100,
        address="local",
    )
    sums = RunSums()
    for receipt in receipts.read(str(folder / "out")):
        sums.add(receipt)
    return {
        "rows": sums.counts.total(),
        "succeeded": sums.counts["success"],
        "seconds": round(time.monotonic() - begin, 1),
        "worker_seconds": round(sums.worker_seconds, 1),
        **{phase: round(sums.phases[phase], 2) for phase in SHOWN},
        "busy": round(sums.phases["sample"] / sums.worker_seconds, 4),
    }


def compare(folder: Path) -> None:
    """Print the seconds that loading, switching and sampling take, merged here and as layers of PEFT."""
    from support import loras, sd_layouts
    from vcf_batch.vcf.lora.switch import LoraSwitch
    from vcf_batch.vcf.lora.weights import layers_of, read
    from vcf_batch.vcf.pipeline import VCFPipeline

    sd_layouts.save_sd15(folder / "model")
    ours, theirs = (VCFPipeline.from_pretrained(str(folder / "model")).set_up("cpu") for _ in range(2))
    names = [*loras.names_of(folder / "in", ours, 8)]
    layers = layers_of(ours)
    switch, weights = LoraSwitch(layers), []

    def draw(pipeline: VCFPipeline) -> Callable[[int], object]:
        return lambda _: pipeline.generate(["a red star"] * 8, seeds=range(8), steps=5)

    def ours_loads(number: int) -> None:
        weights.append(read((folder / "in" / names[number]).read_bytes(), names[number], ours, layers))

    def theirs_loads(number: int) -> None:
        theirs.load_lora_weights(str(folder / "in"), weight_name=names[number], adapter_name=f"lora{number}")

    plain = _each(draw(ours), 8)
    click.echo(f"sampling without a LoRA: {plain:.3f} s for 8 images in 5 steps")
    works: tuple[tuple[str, Callable[[int], object], Callable[[int], object]], ...] = (
        ("load a LoRA", ours_loads, theirs_loads),
        (
            "switch",
            lambda number: switch.use([(weights[number], 0.7)]),
            lambda number: theirs.set_adapters([f"lora{number}"], [0.7]),
        ),
        ("sample", draw(ours), draw(theirs)),
    )
    for name, own, other in works:
        click.echo(f"{name}: {_each(own, 8):.3f} s merged, {_each(other, 8):.3f} s by PEFT with 8 LoRAs loaded")


def _each(work: Callable[[int], object], count: int) -> float:
    begin = time.perf_counter()
    for number in range(count):
        work(number)
    return (time.perf_counter() - begin) / count


@click.command()
@click.option("--loras", default=200, show_default=True, help="Number of LoRAs.")
@click.option("--prompts", default=50, show_default=True, help="Number of rows for each LoRA.")
@click.option("--workers", default=1, show_default=True, help="Number of workers.")
@click.option("--steps", default=5, show_default=True, help="Denoising steps.")
@click.option("--unsorted", is_flag=True, help="Give the rows the LoRAs by turns.")
@click.option("--peft", is_flag=True, help="Compare the costs with those of PEFT, instead of a run.")
def main(loras: int, prompts: int, workers: int, steps: int, unsorted: bool, peft: bool) -> None:
    """Print how busy the workers were. Exit with 1 if that is too little."""
    quiet()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="vcf-batch-loras-") as temporary:
        if peft:
            compare(Path(temporary))
            return
        write(Path(temporary), loras, prompts, unsorted)
        figures = generate(Path(temporary), workers, steps)
    click.echo(json.dumps(figures, indent=2))
    if figures["busy"] < GOAL or figures["succeeded"] < figures["rows"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
