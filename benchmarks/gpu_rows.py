"""The measurements of ``benchmarks/gpu.py``, in their order: what decides most comes first."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gpu_compiled
import gpu_job
import gpu_kernels
import gpu_sampling
from gpu_record import Figure, Measurement


def _job(part: str, scheduler: str, steps: int | None, image_format: str, network: str, batches: int) -> Any:
    shown = f"{scheduler}, {steps or 50} steps, {image_format}, {network}"
    how: dict[str, Any] = {"scheduler": scheduler, "steps": steps, "image_format": image_format}
    work: Callable[..., Iterator[Figure]] = partial(gpu_job.job, name=shown, network=network, batches=batches, **how)
    share = (steps or 50) / 50
    return Measurement(f"job/{part}", work, 6, share * 8 * (2 * batches + (1.5 if steps else 0)))


MEASUREMENTS = (
    Measurement("device/versions", gpu_kernels.device, 5),
    Measurement("device/matmul", gpu_kernels.matmul, 5),
    Measurement("device/copies", gpu_kernels.copies, 4),
    Measurement("attention/self", partial(gpu_kernels.attention, cross=False), 8),
    Measurement("attention/cross", partial(gpu_kernels.attention, cross=True), 3),
    Measurement("correctness/models", gpu_sampling.models, 25),
    Measurement("correctness/networks", gpu_sampling.networks, 15),
    Measurement("correctness/images", gpu_sampling.images, 5, 2),
    Measurement("correctness/waits", gpu_sampling.waits, 3),
    Measurement("eager/rule", gpu_sampling.by_rule, 2, 17),
    Measurement("eager/strict", gpu_sampling.strict, 1, 10),
    Measurement("eager/nchw", gpu_sampling.contiguous, 3, 10),
    Measurement("eager/kernels", gpu_sampling.kernels, 8, 2),
    Measurement("stock/batch", gpu_sampling.stock_batch, 4, 34),
    Measurement("stock/single", gpu_sampling.stock_single, 8),
    Measurement("compiled/batch", gpu_compiled.batch, 100, 24),
    _job("ddim-png", "ddim", None, "png", "alex", 2),
    _job("dpm-png", "dpm++", 20, "png", "alex", 3),
    _job("dpm-webp", "dpm++", 20, "webp", "alex", 3),
    _job("dpm-png-vgg", "dpm++", 20, "png", "vgg", 3),
    Measurement("pno/50", partial(gpu_sampling.optimization, steps=None), 5, 33),
    Measurement("pno/5", partial(gpu_sampling.optimization, steps=0), 2, 4),
    Measurement("pno/20", partial(gpu_sampling.optimization, steps=1), 2, 13),
    Measurement("batches/1", partial(gpu_sampling.sizes, size=0), 8),
    Measurement("batches/16", partial(gpu_sampling.sizes, size=1), 1, 5),
    Measurement("batches/32", partial(gpu_sampling.sizes, size=2), 1, 10),
    Measurement("batches/64", partial(gpu_sampling.sizes, size=3), 1, 20),
    Measurement("batches/vae", gpu_sampling.decoding, 3),
    Measurement("batches/deep-cache", gpu_sampling.deep_cache, 1, 6),
    Measurement("fp8/product", gpu_compiled.eight_bit_product, 3),
    Measurement("fp8/linears", gpu_compiled.eight_bit_linears, 6, 10),
    Measurement("fp8/convolutions", gpu_compiled.eight_bit_convolutions, 2),
    Measurement("compiled/single", gpu_compiled.single, 60, 2),
    _job("ddim-webp", "ddim", None, "webp", "alex", 2),
    Measurement("fp8/compiled", gpu_compiled.eight_bit_compiled, 80, 5),
)
"""Every measurement. The seconds are estimates for one H200."""
