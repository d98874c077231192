"""The kernel of attention on a GPU: one rule chooses it, and every node keeps to it or refuses to load.

torch chooses among its kernels in silence: cuDNN's where it is new enough, another one where an older cuDNN is found
first. Two nodes with one GPU model could so write different bytes. No line of this module has run on a GPU yet, except
the rule itself, which is tested as a function of a description.
"""

import importlib.util
import socket
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel

from vcf_batch.errors import NodeError

MIN_CUDNN = 91501
"""Oldest cuDNN, 9.15.1, whose attention torch itself prefers."""

CUDNN_CAPABILITIES = ((9, 0), (10, 0))
"""Compute capabilities on which torch prefers cuDNN's attention: Hopper and Blackwell of data centres."""

FALLBACKS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels for what the chosen one does not compute, in this order. Which one computes a call depends on its shapes,
dtype, mask and gradients only; each is deterministic under ``use_deterministic_algorithms``."""


@dataclass(frozen=True)
class Gpu:
    """What the rule looks at on a node."""

    capability: tuple[int, int]
    cudnn_built: int | None
    """cuDNN that torch was built with, such as 91501; None for a torch without cuDNN."""
    cudnn: int | None
    """cuDNN that is loaded; None if torch refuses it."""
    flash3: bool
    """Whether FlashAttention 3 is installed."""


def choose(gpu: Gpu, dtype: torch.dtype) -> str:
    """The kernel of attention without gradients: ``cudnn``, ``flash3``, ``flash2`` or ``efficient``.

    It is the first one that GPU, dtype and installed packages provide for. The cuDNN that is loaded has no say, so that
    a node where another one shadows torch's own does not fall back.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return "efficient"
    if gpu.capability in CUDNN_CAPABILITIES and (gpu.cudnn_built or 0) >= MIN_CUDNN:
        return "cudnn"
    if gpu.capability[0] == 9 and gpu.flash3:
        return "flash3"
    return "flash2" if gpu.capability >= (8, 0) else "efficient"


def refuse(gpu: Gpu, chosen: str, failure: str | None, host: str) -> None:
    """Refuse a node that cannot have the chosen kernel.

    Args:
        gpu: the node.
        chosen: the result of :func:`choose`.
        failure: the error of a first call; None if it succeeded.
        host: name of the node.

    Raises:
        NodeError: cuDNN is older than :data:`MIN_CUDNN`, or the first call failed.
    """
    if chosen == "cudnn" and (gpu.cudnn is None or gpu.cudnn < MIN_CUDNN):
        loaded = gpu.cudnn or "that torch refuses"
        raise NodeError(
            f"attention is computed by cuDNN on this GPU, and {host} loads cuDNN {loaded}; it must be {MIN_CUDNN} or "
            f"newer, as torch was built with {gpu.cudnn_built}. Remove the older one from LD_LIBRARY_PATH there, or "
            "leave the node out"
        )
    if failure:
        raise NodeError(
            f"attention is computed by {chosen} on this GPU, and it fails on {host}: {failure}. Install the same "
            "driver and packages there as on the other nodes, or leave the node out"
        )


def pin(dtype: torch.dtype) -> str:
    """Choose the kernel on this node's GPU, try it, and fix it for the whole process.

    Returns:
        The name of the kernel, for the receipt.

    Raises:
        NodeError: this node cannot have it.
    """
    gpu = look()
    chosen, failure = choose(gpu, dtype), None
    refuse(gpu, chosen, None, socket.gethostname())
    try:
        if chosen == "flash3":
            activate_flash_attention_impl("FA3")
        _fix(FALLBACKS)
        _try_out(chosen, dtype)
    except Exception as error:  # CUDA, cuDNN and packages have no common error type
        failure = f"{type(error).__name__}: {error}"
    refuse(gpu, chosen, failure, socket.gethostname())
    return chosen


def look() -> Gpu:
    """Describe this node's GPU and what its kernels depend on."""
    built = loaded = None
    if torch.backends.cudnn.is_available():
        major, minor, patch = torch.backends.cudnn._cudnn.getCompileVersion()  # type: ignore[attr-defined]
        built = major * 10000 + minor * 100 + patch
        try:
            loaded = torch.backends.cudnn.version()
        except RuntimeError:  # another major version, or an older one than torch was built with
            loaded = None
    return Gpu(
        torch.cuda.get_device_capability(), built, loaded, importlib.util.find_spec("flash_attn_interface") is not None
    )


def cudnn_attention(query: Any, key: Any, value: Any) -> Any:
    """Attention by cuDNN, without a bias and without gradients, ``[B, heads, L, D]``.

    It is called by name: torch's own choice refuses it under ``use_deterministic_algorithms``, which only its backward
    pass needs, and that switch belongs to the whole process, where another thread scores images.
    """
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, False)[0]


_fixed: list[AbstractContextManager[Any]] = []
"""The context of the fixed kernels, which would be left if it were forgotten."""


def _fix(backends: list[SDPBackend]) -> None:
    if not _fixed:
        _fixed.append(sdpa_kernel(backends, set_priority=True))
        _fixed[0].__enter__()


@torch.no_grad()
def _try_out(chosen: str, dtype: torch.dtype) -> None:
    """Compute attention once with the chosen kernel alone.

    Raises:
        Exception: the kernel fails.
    """
    tokens = torch.ones(2, 8, 128, 64, device="cuda", dtype=dtype)
    if chosen == "cudnn":
        result = cudnn_attention(tokens, tokens, tokens)
    else:
        backend = SDPBackend.EFFICIENT_ATTENTION if chosen == "efficient" else SDPBackend.FLASH_ATTENTION
        with sdpa_kernel(backend):
            result = torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
    if not bool((result - 1).abs().max() < 0.05):
        raise ValueError("the mean of equal values is another value")
