"""What the device gives: versions, clocks, ceilings, and the kernels of attention one by one."""

import contextlib
import importlib.util
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from gpu_bench import Bench
from gpu_record import Figure
from torch import Tensor
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from vcf_batch.vcf.attention import describe_gpu

NO_GPU = "no GPU"
QUERIED = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"

Backend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of queries, keys, values and a bias or None."""


def rate(bench: Bench, work: Callable[[], Any], calls: int = 20) -> float:
    """Median seconds of a call over three rounds of ``calls``, after a round of warm-up."""
    if bench.smoke:
        calls = 2
    found = []
    for _ in range(4):
        bench.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        bench.synchronize()
        found.append((time.perf_counter() - begin) / calls)
    return statistics.median(found[1:])


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the first GPU, by name; nothing without it."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={QUERIED}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(QUERIED.split(","), (value.strip() for value in answer.split(",")), strict=False))


def device(bench: Bench) -> Iterator[Figure]:
    """Describe the device, and how attention is computed on it."""
    if bench.smoke:
        yield Figure("device", f"the CPU, which says nothing about speed; torch {torch.__version__}")
    else:
        gpu, found = describe_gpu(), torch.cuda.get_device_properties(0)
        values = {
            "name": found.name,
            "memory_gib": found.total_memory / 2**30,
            "multiprocessors": found.multi_processor_count,
            "capability": gpu.capability,
            "cuda": torch.version.cuda,
            "cudnn_built": gpu.cudnn_built,
            "cudnn": gpu.cudnn,
            "flash3": gpu.flash3,
        }
        shown = f"{found.name}, torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {gpu.cudnn}"
        yield Figure("device", shown, values=values)
    found_clocks = clocks()
    yield Figure("clocks, idle", ", ".join(found_clocks.values()) or NO_GPU, values=found_clocks)
    chosen = bench.device.attention
    if bench.device_failure:
        raise bench.device_failure
    yield Figure("attention by the rule", chosen)
    described = dict(bench.device.description)
    yield Figure("device of a receipt", described["type"], values=described)


def matmul(bench: Bench) -> Iterator[Figure]:
    """Measure a product of matrices: the ceiling of arithmetic."""
    size = 64 if bench.smoke else 8192
    a, b = (torch.randn(size, size, device=bench.kind, dtype=torch.bfloat16) for _ in range(2))
    took = rate(bench, lambda: a @ b)
    found = clocks()
    teraflops = 2 * size**3 / took / 1e12
    shown = f"{teraflops:.0f} ({found.get('clocks.sm', NO_GPU)}, {found.get('power.draw', NO_GPU)})"
    values = {"tflops": teraflops, "seconds": took, "clocks": found}
    yield Figure(f"bfloat16 product of {size}: TFLOP/s (clock, power)", shown, values=values)


def copies(bench: Bench) -> Iterator[Figure]:
    """Measure copies: within the device, and to the CPU for the images of a batch."""
    large = torch.empty(2**14 if bench.smoke else 2**32, dtype=torch.uint8, device=bench.kind)
    other = torch.empty_like(large)
    took = rate(bench, lambda: other.copy_(large), 5)
    gigabytes = 2 * large.numel() / took / 1e9
    yield Figure("copy on the device: GB/s read and written", f"{gigabytes:.0f}", values={"gb_per_s": gigabytes})
    large = other = torch.empty(0)  # frees them
    images = torch.rand(bench.batch, 3, bench.shapes.pixels, bench.shapes.pixels, device=bench.kind)
    pinned = torch.empty(images.shape, pin_memory=bench.kind == "cuda")
    for name, work in (("pinned", lambda: pinned.copy_(images, non_blocking=True)), ("pageable", images.cpu)):
        took = rate(bench, work, 5)
        size = images.nbytes / 1e9
        shown = f"{size / took:.1f} ({took * 1e3:.1f} ms)"
        values = {"gb_per_s": size / took, "seconds": took}
        yield Figure(f"copy of {1e3 * size:.1f} MB to the CPU, {name}: GB/s", shown, values=values)


def _by_name(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """cuDNN's attention, called as :func:`vcf_batch.vcf.attention.cudnn_attention` calls it."""
    attended: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, bias, False)[0]
    return attended


def _chosen(backend: SDPBackend) -> Backend:
    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, bias)

    return attend


BACKENDS: dict[str, Backend] = {
    "cudnn": _by_name,
    "cudnn by torch's choice": _chosen(SDPBackend.CUDNN_ATTENTION),
    "flash2": _chosen(SDPBackend.FLASH_ATTENTION),
    "flash3": _chosen(SDPBackend.FLASH_ATTENTION),
    "efficient": _chosen(SDPBackend.EFFICIENT_ATTENTION),
}


@contextlib.contextmanager
def _implementation(name: str) -> Iterator[None]:
    """Within the block torch's flash attention is version 3, if that is the name."""
    if name == "flash3":
        activate_flash_attention_impl("FA3")
    try:
        yield
    finally:
        if name == "flash3":
            restore_flash_attention_impl()


def attention(bench: Bench, cross: bool) -> Iterator[Figure]:
    """Measure the kernels of attention at the UNet's largest layer, guided, for a batch of 8."""
    heads, edge = bench.shapes.attention
    queries = edge**2
    keys = (bench.shapes.text_tokens + 257) if cross else queries
    query = torch.randn(2 * bench.batch, heads, queries, 64, device=bench.kind, dtype=torch.bfloat16)
    key, value = (torch.randn(*query.shape[:2], keys, 64, device=bench.kind, dtype=torch.bfloat16) for _ in range(2))
    some_bias = torch.randn(len(query), 1, 1, keys, device=bench.kind).to(torch.bfloat16)
    exact: dict[bool, Tensor] = {}
    for biased in (False, True):
        bias = some_bias.expand(-1, heads, 1, -1) if biased else None
        first = slice(0, 1)
        exact[biased] = F.scaled_dot_product_attention(
            query[first].float(),
            key[first].float(),
            value[first].float(),
            None if bias is None else bias[first].float(),
        )
    what = f"attention {'x'.join(map(str, query.shape))} to {keys}"
    for name, backend in BACKENDS.items():
        if name == "flash3" and importlib.util.find_spec("flash_attn_interface") is None:
            yield Figure(f"{what}, flash3", "not installed")
            continue
        for biased in (False, True):
            bias = some_bias.expand(-1, heads, 1, -1) if biased else None
            yield _attention(
                bench,
                f"{what}{', biased' if biased else ''}, {name}",
                name,
                backend,
                (query, key, value, bias),
                exact[biased],
            )


def _attention(bench: Bench, what: str, name: str, backend: Backend, inputs: tuple[Any, ...], exact: Tensor) -> Figure:
    """Time and error of a kernel, and whether it computes equal bits twice. A refusal is an answer."""
    query, keys = inputs[0], inputs[1].shape[2]
    operations = 4 * query.numel() * keys
    try:
        with torch.no_grad(), _implementation(name):
            found, again = backend(*inputs), backend(*inputs)
            took = rate(bench, lambda: backend(*inputs), 10)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as refusal:
        return Figure(what, "refused", values={"reason": str(refusal)[:300]})
    same, error = torch.equal(found, again), ((found[:1].float() - exact).norm() / exact.norm()).item()
    teraflops = operations / took / 1e12
    shown = f"{took * 1e3:.3f} ms, {teraflops:.0f} TFLOP/s, {'equal' if same else 'other'} bits, error {error:.4f}"
    values = {"seconds": took, "tflops": teraflops, "equal_bits": same, "error": error}
    return Figure(what, shown, "equal bits", same and error < 0.02, values=values)
