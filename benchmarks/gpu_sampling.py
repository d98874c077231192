"""Correctness, sampling that is not compiled, stock diffusers beside it, and prompt-noise optimisation."""

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import full_size
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from gpu_bench import SCALE, Bench
from gpu_kernels import clocks
from gpu_record import Figure, below
from measure import between, mark, peak_memory, seconds
from sampling import stock_pipeline
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vcf_batch.vcf import pno
from vcf_batch.vcf.attention import TokenBiasAttention

KERNELS = 20
"""Number of kernels that are listed."""

Figures = Iterator[Figure]

# Correctness


def models(bench: Bench) -> Figures:
    """Build the pipeline, and draw a batch for the first time."""
    _, took = bench.timed(lambda: bench.pipeline)
    gib = torch.cuda.memory_allocated() / 2**30 if bench.kind == "cuda" else 0.0
    yield Figure("models: s to build with random weights", f"{took:.1f}", values={"seconds": took, "gib": gib})
    images, took = bench.timed(lambda: bench.draw(bench.batch, 2))
    finite = bool(images.isfinite().all())
    what = f"first batch of {bench.batch}, 2 steps: s"
    values = {"seconds": took, "kernel": bench.device.attention, "std": images.std().item()}
    yield Figure(what, f"{took:.1f}", "finite", finite, required=True, values=values)


def _plain(bench: Bench) -> Any:
    """The pipeline as it is loaded, without any setting for speed."""
    return bench.built("plain", lambda: full_size.pipeline(bench.shapes, bench.kind, torch.bfloat16))


def networks(bench: Bench) -> Figures:
    """Compare the UNet with float32, as it samples and as it is loaded."""
    unet = bench.pipeline.unet
    exact = bench.predict(full_size.pipeline(bench.shapes, bench.kind, torch.float32).unet)
    for what, network in (("as it samples", unet), ("as it is loaded", _plain(bench).unet)):
        error = ((bench.predict(network) - exact).norm() / exact.norm()).item()
        yield below(f"UNet in bfloat16, {what}: error relative to float32", error, 0.05, required=True)


def images(bench: Bench) -> Figures:
    """Compare images with those of the pipeline as it is loaded."""
    plain = _plain(bench)
    change = (bench.draw(2, bench.few) - bench.draw(2, bench.few, pipeline=plain)).abs().mean().item()
    bench.drop("plain")
    yield below("images of both: mean difference in [0, 1]", change, 0.01, required=True)
    same = torch.equal(bench.draw(bench.batch, 2), bench.draw(bench.batch, 2))
    yield Figure("images twice: the same bits", "yes" if same else "no", "yes", same, required=True)


def waits(bench: Bench) -> Figures:
    """Count how often sampling waits for the device."""
    counts = [_waits(bench, steps) for steps in (2, bench.few)]
    what = f"waits for the device in 2 and in {bench.few} steps"
    yield Figure(what, str(counts), "equal", counts[0] == counts[1], required=True, values={"counts": counts})


def _waits(bench: Bench, steps: int) -> int:
    sample, noise, conditioning = bench.inputs(2, steps)
    with torch.no_grad(), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if bench.kind == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            sample(noise, conditioning)
        finally:
            if bench.kind == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in found)


# Sampling


def by_rule(bench: Bench) -> Figures:
    """Measure sampling as a worker does it without ``--compile``."""
    took = bench.time("eager/rule", bench.batch, 2)
    found = clocks()
    what = f"sampling, batch {bench.batch}: s/image"
    yield below(what, took, bench.goals.batch, bench.goals.shown, kernel=bench.device.attention, clocks=found)


def strict(bench: Bench) -> Figures:
    """Measure sampling with torch's own choice among the deterministic kernels of attention."""
    with bench.attention(TokenBiasAttention()):
        took = bench.time("eager/strict", bench.batch)
    yield Figure(f"strict in attention too, batch {bench.batch}: s/image", f"{took:.3f}", values={"value": took})


def contiguous(bench: Bench) -> Figures:
    """Measure sampling with the UNet in the layout that it is loaded in."""
    with bench.contiguous(bench.pipeline.unet):
        took = bench.time("eager/nchw", bench.batch)
    what = f"UNet in NCHW, not channels last, batch {bench.batch}: s/image"
    yield Figure(what, f"{took:.3f}", values={"value": took})


def kernels(bench: Bench) -> Figures:
    """List the kernels that take most of the device's time."""
    sample, noise, conditioning = bench.inputs(bench.batch, 3)
    work = torch.no_grad()(functools.partial(sample, noise, conditioning))
    _, plain = bench.timed(work)
    activities = [ProfilerActivity.CPU] if bench.smoke else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        bench.timed(work)
    wanted, column = (
        (DeviceType.CPU, "self_cpu_time_total") if bench.smoke else (DeviceType.CUDA, "self_device_time_total")
    )
    found = [event for event in profiler.key_averages() if event.device_type == wanted]
    found.sort(key=lambda event: getattr(event, column), reverse=True)
    total = sum(getattr(event, column) for event in found)
    what = f"3 steps and decoding, batch {bench.batch}: device's share of the time"
    values = {"device_seconds": total / 1e6, "seconds": plain, "kernels": sum(event.count for event in found)}
    yield Figure(what, f"{total / 1e6 / plain:.1%}", values=values)
    for number, event in enumerate(found[:KERNELS], 1):
        taken = getattr(event, column)
        name = " ".join(event.key.replace("|", "/").split())
        values = {"name": event.key[:500], "seconds": taken / 1e6, "calls": event.count, "share": taken / total}
        yield Figure(f"kernel {number}: {name[:80]}", f"{taken / total:.1%}, {event.count} calls", values=values)


def sizes(bench: Bench, size: int) -> Figures:
    """Measure another batch size. That it does not fit into the memory is an answer too."""
    batch = bench.sizes[size]
    limit, goal = (bench.goals.one, "") if batch == 1 else (bench.goals.batch, bench.goals.shown)
    if bench.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        if batch == 1:
            took, what = bench.time("batches/1", 1), "sampling, batch 1: s/image"
        else:
            took, what = bench.time_from_few(batch), f"sampling, batch {batch}: s/image, from 2 and {bench.few} steps"
    except torch.OutOfMemoryError as error:
        yield Figure(f"sampling, batch {batch}: s/image", "out of memory", values={"reason": str(error)[:300]})
        return
    gib = torch.cuda.max_memory_allocated() / 2**30 if bench.kind == "cuda" else 0.0
    yield below(what, took, limit, goal, peak_gib=gib)


def decoding(bench: Bench) -> Figures:
    """Measure the VAE decoder alone."""
    edge = bench.shapes.unet["sample_size"]
    for batch in (1, bench.batch):
        latents = torch.randn(batch, 4, edge, edge, device=bench.kind)
        decode = torch.no_grad()(functools.partial(bench.pipeline.decode, latents))
        decode()
        took = seconds(decode, 3) / batch
        yield Figure(f"VAE decode, batch {batch}: s/image", f"{took:.4f}", values={"value": took})


def deep_cache(bench: Bench) -> Figures:
    """Measure the reuse of deep blocks."""
    took = bench.time("batches/deep-cache", bench.batch, deep_cache=3)
    what = f"deep blocks in every 3rd step, batch {bench.batch}: s/image"
    yield Figure(what, f"{took:.3f}", values={"value": took})


# Stock diffusers


def stock_batch(bench: Bench) -> Figures:
    """Measure diffusers' own pipeline on the same weights and batches, and ours for the same prompts, text only.

    Stock diffusers has its own memory layout and attention processor, and torch's own choice of kernels.
    """
    batch, tokens = bench.batch, bench.shapes.text_tokens
    stock = _stock_call(bench, batch)
    what = f"stock diffusers, batch {batch}, {tokens} tokens: s/image"
    yield Figure(what, f"{stock:.3f}", values={"value": stock})
    ours = bench.time("stock/ours", batch, 2, text_only=True)
    yield Figure(f"sampling, batch {batch}, {tokens} tokens: s/image", f"{ours:.3f}", values={"value": ours})
    bench.per_image["stock/batch"] = stock
    what = f"the same, against stock diffusers in batches of {batch}"
    yield Figure(what, f"{stock / ours:.2f}", values={"value": stock / ours})


def stock_single(bench: Bench) -> Figures:
    """Measure diffusers' own pipeline with one call per prompt."""
    stock = _stock_call(bench, 1)
    yield Figure("stock diffusers, one call per prompt: s/image", f"{stock:.3f}", values={"value": stock})
    for name in ("stock/ours", "eager/rule"):
        if name in bench.per_image:
            ratio = stock / bench.per_image[name]
            tokens = bench.shapes.text_tokens + (257 if name == "eager/rule" else 0)
            what = f"batches of {bench.batch}, {tokens} tokens, against one call per prompt"
            yield Figure(what, f"{ratio:.2f}", ">= 2.0", ratio >= 2, values={"value": ratio})


def _stock_call(bench: Bench, batch: int) -> float:
    """Seconds per image of diffusers' own pipeline, from prompts to images on the CPU."""
    pipeline = bench.pipeline
    stock = stock_pipeline(pipeline)

    def call(steps: int) -> torch.Tensor:
        made = stock(bench.prompts(batch), guidance_scale=SCALE, num_inference_steps=steps, output_type="pt")
        images: torch.Tensor = made.images
        return images.cpu()

    with bench.as_stock(), bench.attention(AttnProcessor2_0()), bench.contiguous(pipeline.unet, pipeline.vae):
        call(2)
        return seconds(lambda: call(bench.shapes.steps), 2) / batch


# Prompt-noise optimisation


def optimization(bench: Bench, steps: int | None) -> Figures:
    """Measure a step of prompt-noise optimisation, and its peak memory beyond the models.

    Args:
        bench: the models.
        steps: number of denoising steps by position in :attr:`Bench.few_steps`; None is the usual number.
    """
    guide = bench.built("guide", lambda: full_size.guide(bench.shapes, bench.kind))
    batch, number = bench.batch, bench.shapes.steps if steps is None else bench.few_steps[steps]
    targets = guide.targets([[picture] for picture in bench.pictures[:batch]], [None] * batch)
    sample, noise, conditioning = bench.inputs(batch, number)
    marks = []

    def marked(*given: Any) -> torch.Tensor:
        marks.append(mark())
        images: torch.Tensor = sample(*given)
        return images

    rates = {"lr_conditioning": 1e-2, "lr_noise": 1e-2, "gamma": 0.1}
    optimize = functools.partial(
        pno.optimize, marked, noise, conditioning, guide, targets, seeds=range(batch), steps=1, **rates
    )
    gib = peak_memory(optimize) / 1024
    bench.synchronize()
    took = between(marks[0], marks[1]) / batch  # The last image is sampled without gradients.
    name = f"PNO, batch {batch}, {number} denoising steps"
    values = {"value": took, "peak_gib": gib}
    yield Figure(f"{name}: peak GiB beyond the models", f"{gib:.2f}", "flat", values=values)
    if steps is None:
        yield below(f"{name}: s per step and image", took, bench.goals.optimisation)
    else:
        yield Figure(f"{name}: s per step and image", f"{took:.3f}", values={"value": took})
