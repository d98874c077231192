"""Attention: a bias on the tokens' logits, which diffusers does not pass on, and on GPUs a kernel chosen by one rule.

Strength and padding need the bias. torch chooses among its kernels in silence: cuDNN's where it is new enough, another
one where an older cuDNN is found first. Two nodes with one GPU model could so write different bytes, and so every node
keeps to the rule or refuses to load. Nothing of it has run on a GPU; the rule is tested as a function of a description.
"""

import importlib.util
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel

from vcf_batch.errors import NodeError, UsageError

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of queries, keys and values ``[B, heads, L, D]`` without a bias and without gradients."""

ByQueries = Tensor | dict[int, Tensor]
"""What is one for all layers, or one for each number of queries."""

MAX_HEAD_DIM = 128
"""Largest head dimension that a kernel of its own is given."""

MIN_CUDNN = 91501
"""Oldest cuDNN, 9.15.1, whose attention torch itself prefers."""

CUDNN_CAPABILITIES = ((9, 0), (10, 0))
"""Compute capabilities on which torch prefers cuDNN's attention: Hopper and Blackwell of data centres."""

FALLBACKS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels for what the chosen one does not compute, in this order. Which one computes a call depends on its shapes,
dtype, mask and gradients only; each is deterministic under ``use_deterministic_algorithms``."""


_REPLACED = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0)
"""diffusers' own processors that compute the same as :class:`TokenBiasAttention` without a bias."""


class TokenBiasAttention:
    """Scaled dot-product attention whose cross-attention takes a bias per token, and the tokens of an IP-Adapter.

    The UNet's own ``encoder_attention_mask`` cannot carry the bias: it turns a mask ``m`` into ``(1 - m) * -10000`` in
    the model's dtype, and bfloat16 rounds such values too coarsely.

    Args:
        kernel: computes attention without a bias where no gradients flow and the head dimension is a multiple of 8, at
            most :data:`MAX_HEAD_DIM`; torch's own choice computes the rest. None leaves everything to that choice.
        to_k_ip, to_v_ip: keys and values of the adapter's tokens in this layer; None without an adapter. They are no
            part of the UNet, and not saved with it.
        fused: compute with the fused projections that ``fuse_qkv_projections`` has made.
    """

    def __init__(
        self,
        kernel: Kernel | None = None,
        to_k_ip: nn.Linear | None = None,
        to_v_ip: nn.Linear | None = None,
        fused: bool = False,
    ) -> None:
        self.kernel, self.to_k_ip, self.to_v_ip, self.fused = kernel, to_k_ip, to_v_ip, fused

    @classmethod
    def in_place_of(
        cls, processor: Any, to_k_ip: nn.Linear | None = None, to_v_ip: nn.Linear | None = None
    ) -> "TokenBiasAttention":
        """What replaces a processor, with its kernel and its use of fused projections."""
        fused = isinstance(processor, FusedAttnProcessor2_0) or getattr(processor, "fused", False)
        return cls(getattr(processor, "kernel", None), to_k_ip, to_v_ip, fused)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        token_bias: ByQueries | None = None,
        ip_tokens: Tensor | None = None,
        ip_bias: ByQueries | None = None,
        ip_strength: ByQueries | None = None,
    ) -> Tensor:
        """Compute the attention.

        Args:
            attn: the attention layer.
            hidden_states: queries, ``[B, Q, D]``.
            encoder_hidden_states: tokens, ``[B, S, Dt]``; None in self-attention, which ignores what follows.
            attention_mask: diffusers' own mask, used if there is no bias.
            temb: time embedding.
            token_bias: ``[B, 1, S]``, added to the logits of every query and head; ``-inf`` hides a token. With ``[B,
                Q, S]`` each query has its own, in this argument and the next ones.
            ip_tokens: tokens of an IP-Adapter, ``[B, M, Dt]``.
            ip_bias: ``[B, 1, M]``, added to the logits of those tokens.
            ip_strength: ``[B, 1, 1]``, the factor of what those tokens give. 0 is exactly the text alone.

        Returns:
            ``[B, Q, D]``.
        """
        is_cross, queries = encoder_hidden_states is not None, hidden_states.shape[1]
        bias = _of(token_bias, queries) if is_cross else None
        bias = attention_mask if bias is None else bias.to(hidden_states.dtype)
        if not _is_plain(attn, hidden_states):
            processor = FusedAttnProcessor2_0() if self.fused else AttnProcessor2_0()
            return processor(attn, hidden_states, encoder_hidden_states, bias, temb)
        projected = self._project(attn, hidden_states, encoder_hidden_states)
        query, key, value = [_heads(each, attn) for each in projected]
        attended = self._attend(query, key, value, bias)
        strength = _of(ip_strength, queries) if is_cross else None
        if ip_tokens is not None and strength is not None and self.to_k_ip and self.to_v_ip:
            key, value = _heads(self.to_k_ip(ip_tokens), attn), _heads(self.to_v_ip(ip_tokens), attn)
            attended = attended + strength * self._attend(query, key, value, _of(ip_bias, queries))
        return attn.to_out[1](attn.to_out[0](attended))

    def _project(self, attn: Attention, hidden_states: Tensor, tokens: Tensor | None) -> tuple[Tensor, ...]:
        """Queries, keys and values of a layer."""
        if self.fused and tokens is None:
            return attn.to_qkv(hidden_states).chunk(3, dim=-1)
        if self.fused:
            return attn.to_q(hidden_states), *attn.to_kv(tokens).chunk(2, dim=-1)
        tokens = hidden_states if tokens is None else tokens
        return attn.to_q(hidden_states), attn.to_k(tokens), attn.to_v(tokens)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Attention of ``[B, heads, L, D]``, with a bias ``[B, 1 or Q, L]`` or none, and the heads side by side."""
        if self.kernel and bias is None and not torch.is_grad_enabled() and _is_for_kernel(query.shape[-1]):
            attended = self.kernel(query, key, value)
        else:
            mask = None if bias is None else bias[:, None]  # one for all heads
            attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
        return attended.transpose(1, 2).flatten(2)


def _of(value: ByQueries | None, queries: int) -> Tensor | None:
    return value[queries] if isinstance(value, dict) else value


def _heads(tokens: Tensor, attn: Attention) -> Tensor:
    return tokens.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _is_plain(attn: Attention, hidden_states: Tensor) -> bool:
    """Whether a layer does nothing besides its projections, as those of Stable Diffusion's transformer blocks.

    diffusers also divides their results by 1, which costs a pass over memory.
    """
    norms = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
    plain = not any(norms) and not attn.residual_connection and attn.rescale_output_factor == 1
    return plain and hidden_states.ndim == 3


def _is_for_kernel(head_dim: int) -> bool:
    return head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM


def accept_token_bias(unet: UNet2DConditionModel, adapted: bool = False) -> None:
    """Make a UNet use ``cross_attention_kwargs={"token_bias": ...}``. Other processors drop the bias with a warning.

    diffusers' default processors are replaced; fused projections stay in use.

    Args:
        unet: the UNet.
        adapted: whether it is given tokens of an IP-Adapter, too.

    Raises:
        UsageError: the UNet has other processors, such as sliced ones or somebody's own.
    """
    processors = unet.attn_processors
    if not all(isinstance(processor, TokenBiasAttention) for processor in processors.values()):
        refuse_other_processors(unet)
        unet.set_attn_processor({name: _with_bias(each) for name, each in processors.items()})
    if adapted and not any(processor.to_k_ip for processor in unet.attn_processors.values()):
        raise UsageError(
            "the UNet's attention processors were replaced after use_ip_adapter, and those of the IP-Adapter with "
            "them: call use_ip_adapter again, after what replaces processors"
        )


def _with_bias(processor: Any) -> TokenBiasAttention:
    return processor if isinstance(processor, TokenBiasAttention) else TokenBiasAttention.in_place_of(processor)


def refuse_other_processors(unet: UNet2DConditionModel) -> None:
    """Refuse to replace processors that are not diffusers' default ones.

    Raises:
        UsageError: the UNet has such processors; with the class of one, and how to undo it.
    """
    for name, processor in unet.attn_processors.items():
        if type(processor) not in (TokenBiasAttention, *_REPLACED):
            raise UsageError(
                f"{name} of the UNet is {type(processor).__name__}, which cannot take the strength of references: call "
                "pipeline.unet.set_attn_processor(AttnProcessor2_0()) of diffusers, or generate from prompts alone"
            )


def use_kernel(unet: UNet2DConditionModel, kernel: Kernel | None) -> None:
    """Make a UNet's attention use a kernel; an IP-Adapter stays.

    Raises:
        UsageError: the UNet has processors of another kind.
    """
    accept_token_bias(unet)
    for processor in unet.attn_processors.values():
        processor.kernel = kernel


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


def choose_kernel(gpu: Gpu, dtype: torch.dtype) -> str:
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


def refuse_node(gpu: Gpu, chosen: str, failure: str | None, host: str) -> None:
    """Refuse a node that cannot have the chosen kernel.

    Args:
        gpu: the node.
        chosen: the result of :func:`choose_kernel`.
        failure: the error of a first call; None if it succeeded.
        host: name of the node.

    Raises:
        NodeError: torch refuses the cuDNN that is loaded, cuDNN is chosen and older than :data:`MIN_CUDNN`, or the
            first call failed.
    """
    least = MIN_CUDNN if chosen == "cudnn" else 0
    if gpu.cudnn_built and (gpu.cudnn is None or gpu.cudnn < least):
        loaded = gpu.cudnn or "that torch refuses"
        raise NodeError(
            f"{host} loads cuDNN {loaded}; it must be {least or gpu.cudnn_built} or newer, as torch was built with "
            f"{gpu.cudnn_built} and attention is computed by {chosen}. Remove the older one from LD_LIBRARY_PATH "
            "there, or leave the node out"
        )
    if failure:
        raise NodeError(
            f"attention is computed by {chosen} on this GPU, and it fails on {host}: {failure}. Install the same "
            "driver and packages there as on the other nodes, or leave the node out"
        )


def pin_kernel(dtype: torch.dtype) -> str:
    """Choose the kernel on this node's GPU, try it, and fix it for the whole process.

    Returns:
        The name of the kernel, for the receipt.

    Raises:
        NodeError: this node cannot have it.
    """
    gpu = describe_gpu()
    chosen, failure = choose_kernel(gpu, dtype), None
    refuse_node(gpu, chosen, None, socket.gethostname())
    try:
        if chosen == "flash3":
            activate_flash_attention_impl("FA3")
        _fix(FALLBACKS)
        _try_out(chosen, dtype)
    except Exception as error:  # CUDA, cuDNN and packages have no common error type
        failure = f"{type(error).__name__}: {error}"
    refuse_node(gpu, chosen, failure, socket.gethostname())
    return chosen


def describe_gpu() -> Gpu:
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


def cudnn_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention by cuDNN, without a bias and without gradients, ``[B, heads, L, D]``.

    It is called by name: torch's own choice refuses it under ``use_deterministic_algorithms``, which only its backward
    pass needs, and that switch belongs to the whole process, where another thread scores images.
    """
    attended: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, False)[0]
    return attended


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
