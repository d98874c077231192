"""Compiled networks, and the experiment with numbers of 8 bits."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from gpu_bench import Bench
from gpu_kernels import rate
from gpu_record import Figure, below
from torch import Tensor, nn

E4M3_MAX = 448.0
"""Largest number of ``torch.float8_e4m3fn``."""

Figures = Iterator[Figure]


def batch(bench: Bench) -> Figures:
    """Measure compiled networks: the first start, sampling, and a start with the cache on disk."""
    number = bench.batch
    plain = bench.draw(number, bench.few)
    with bench.compiled():
        _, cold = bench.timed(lambda: bench.draw(number, 1))
        yield Figure(f"compiled, batch {number}: s to the first images, new", f"{cold:.0f}", values={"value": cold})
        took = bench.time("compiled/batch", number, 2)
        what = f"compiled sampling, batch {number}: s/image"
        goals = bench.goals
        yield below(what, took, goals.batch, goals.shown, required=not bench.smoke, kernel=bench.device.attention)
        if stock := bench.per_image.get("stock/batch"):
            ratio = stock / took
            what = f"compiled, with references, against stock diffusers in batches of {number}"
            yield Figure(what, f"{ratio:.2f}", values={"value": ratio})
        drawn = bench.draw(number, bench.few)
        change = (drawn - plain).abs().mean().item()
        yield below("compiled against not: mean difference of images in [0, 1]", change, 0.01, required=True)
        torch.compiler.reset()
        _, warm = bench.timed(lambda: bench.draw(number, 1))
        what = f"compiled, batch {number}: s to the first images, from the cache on disk"
        yield Figure(what, f"{warm:.0f}", values={"value": warm})
        same = torch.equal(drawn, bench.draw(number, bench.few))
        yield Figure("compiled, new and from the cache: the same bits", "yes" if same else "no", "yes", same, True)


def single(bench: Bench) -> Figures:
    """Measure compiled networks for one image at a time."""
    with bench.compiled():
        _, cold = bench.timed(lambda: bench.draw(1, 1))
        yield Figure("compiled, batch 1: s to the first images, new", f"{cold:.0f}", values={"value": cold})
        took = bench.time("compiled/single", 1, 2)
        yield below("compiled sampling, batch 1: s/image", took, bench.goals.one)


# 8 bits


class Linear8(nn.Module):
    """A linear layer with weights and inputs of 8 bits, each row of both with a scale of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = _rounded(linear.weight.detach())
        self.weight, self.scale, self.bias = weight.t(), scale.t().contiguous(), linear.bias

    def forward(self, inputs: Tensor, *unused: Any) -> Tensor:
        """Product of inputs ``[..., K]``, ``[..., N]`` in their dtype."""
        rows, scale = _rounded(inputs.flatten(0, -2).contiguous())
        return _product(rows, self.weight, scale, self.scale, self.bias).unflatten(0, inputs.shape[:-1])


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[M, K]`` in 8 bits, and the scale of each, float32 ``[M, 1]``."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / E4M3_MAX
    return (rows / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def _product(rows: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    if rows.device.type == "cpu":  # torch 2.11 has no product with scales of rows there
        product = (rows.float() * scale) @ (weight.float() * weight_scale)
        return (product if bias is None else product + bias).to(torch.bfloat16)
    return torch._scaled_mm(
        rows, weight, scale_a=scale, scale_b=weight_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


@contextlib.contextmanager
def _in_eight_bits(unet: nn.Module) -> Iterator[int]:
    """Within the block the linear layers of the UNet's transformers compute in 8 bits. Gives their number."""
    found = [
        (parent, name, child)
        for path, parent in unet.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
        and "attentions" in path
        and child.in_features % 16 == child.out_features % 16 == 0
    ]
    try:
        for parent, name, child in found:
            setattr(parent, name, Linear8(child))
        yield len(found)
    finally:
        for parent, name, child in found:
            setattr(parent, name, child)


def eight_bit_product(bench: Bench) -> Figures:
    """Measure a product of matrices in 8 bits, with the inputs rounded before and within."""
    size = 64 if bench.smoke else 8192
    a, b = (torch.randn(size, size, device=bench.kind, dtype=torch.bfloat16) for _ in range(2))
    (rows, scale), (weight, weight_scale) = _rounded(a), _rounded(b)
    columns = weight_scale.t().contiguous()
    works = {
        "rounded before": lambda: _product(rows, weight.t(), scale, columns, None),
        "rounded within": lambda: _product(*_with(_rounded(a), weight.t(), columns), None),
    }
    for name, work in works.items():
        teraflops = 2 * size**3 / rate(bench, work) / 1e12
        what = f"8-bit product of {size}, inputs {name}: TFLOP/s"
        yield Figure(what, f"{teraflops:.0f}", values={"tflops": teraflops})


def _with(rounded: tuple[Tensor, Tensor], weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return rounded[0], weight, rounded[1], columns


def eight_bit_linears(bench: Bench) -> Figures:
    """Measure the UNet with linear layers in 8 bits: its error, and the time."""
    unet = bench.pipeline.unet
    plain, images = bench.predict(unet), bench.draw(bench.batch, bench.few)
    with _in_eight_bits(unet) as count:
        error = ((bench.predict(unet) - plain).norm() / plain.norm()).item()
        what = f"{count} linear layers in 8 bits: error of the UNet relative to bfloat16"
        yield Figure(what, f"{error:.4f}", values={"value": error})
        change = (bench.draw(bench.batch, bench.few) - images).abs().mean().item()
        what = f"the same: mean difference of images in [0, 1], {bench.few} steps"
        yield Figure(what, f"{change:.4f}", values={"value": change})
        took = bench.time_from_few(bench.batch)
        what = f"the same, batch {bench.batch}: s/image, from 2 and {bench.few} steps"
        yield Figure(what, f"{took:.3f}", values={"value": took})


def eight_bit_compiled(bench: Bench) -> Figures:
    """Measure the same compiled, where rounding is part of other kernels."""
    with _in_eight_bits(bench.pipeline.unet), bench.compiled():
        _, cold = bench.timed(lambda: bench.draw(bench.batch, 1))
        took = bench.time_from_few(bench.batch)
    what = f"linear layers in 8 bits, compiled, batch {bench.batch}: s/image, from 2 and {bench.few} steps"
    yield Figure(what, f"{took:.3f}", values={"value": took, "cold": cold})


def eight_bit_convolutions(bench: Bench) -> Figures:
    """Measure a convolution in 8 bits, if torch has one."""
    channels, edge = (32, 8) if bench.smoke else (320, 96)
    images = torch.randn(2 * bench.batch, channels, edge, edge, device=bench.kind, dtype=torch.bfloat16)
    weight = torch.randn(channels, channels, 3, 3, device=bench.kind, dtype=torch.bfloat16)
    images, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (images, weight))
    took = rate(bench, lambda: F.conv2d(images, weight, padding=1))
    what = f"convolution of {channels} channels, {edge}x{edge}: ms"
    yield Figure(f"{what}, bfloat16", f"{took * 1e3:.3f}", values={"value": took})
    small, small_weight = images.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    try:
        took = rate(bench, lambda: F.conv2d(small, small_weight, padding=1))
    except (RuntimeError, NotImplementedError) as error:
        shown = f"torch {torch.__version__} has none"
        yield Figure(f"{what}, 8 bits", shown, values={"reason": str(error)[:300]})
        return
    yield Figure(f"{what}, 8 bits", f"{took * 1e3:.3f}", values={"value": took})
