"""Cross-attention with a bias on the tokens' logits, which strength and padding need and diffusers does not pass on."""

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of queries, keys and values ``[B, heads, L, D]`` without a bias and without gradients."""

MAX_HEAD_DIM = 128
"""Largest head dimension that a kernel of its own is given."""


class TokenBiasAttention(AttnProcessor2_0):
    """Scaled dot-product attention whose cross-attention takes an additive bias per token.

    The UNet's own ``encoder_attention_mask`` cannot carry the bias: it turns a mask ``m`` into ``(1 - m) * -10000`` in
    the model's dtype, and bfloat16 rounds such values too coarsely.

    Args:
        kernel: computes attention without a bias where no gradients flow and the head dimension is a multiple of 8, at
            most :data:`MAX_HEAD_DIM`; torch's own choice computes the rest. None leaves everything to that choice.
    """

    def __init__(self, kernel: Kernel | None = None) -> None:
        super().__init__()
        self.kernel = kernel

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        token_bias: Tensor | None = None,
    ) -> Tensor:
        """Compute the attention.

        Args:
            attn: the attention layer.
            hidden_states: queries, ``[B, Q, D]``.
            encoder_hidden_states: tokens, ``[B, S, Dt]``; None in self-attention, which ignores the bias.
            attention_mask: diffusers' own mask, used if there is no bias.
            temb: time embedding.
            token_bias: ``[B, 1, S]``, added to the logits of every query and head; ``-inf`` hides a token.

        Returns:
            ``[B, Q, D]``.
        """
        if encoder_hidden_states is not None and token_bias is not None:
            attention_mask = token_bias.to(hidden_states.dtype)
        tokens = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if self.kernel and attention_mask is None and not torch.is_grad_enabled() and _is_plain(attn, hidden_states):
            parts = (attn.to_q(hidden_states), attn.to_k(tokens), attn.to_v(tokens))
            query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
            attended = self.kernel(query, key, value).transpose(1, 2).flatten(2)
            return attn.to_out[1](attn.to_out[0](attended))
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def _is_plain(attn: Attention, hidden_states: Tensor) -> bool:
    """Whether a layer does nothing besides its projections, and a kernel of its own takes its head dimension."""
    norms = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
    plain = not any(norms) and not attn.residual_connection and attn.rescale_output_factor == 1
    head_dim = attn.inner_dim // attn.heads
    return plain and hidden_states.ndim == 3 and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM


def accept_token_bias(unet: UNet2DConditionModel) -> None:
    """Make a UNet use ``cross_attention_kwargs={"token_bias": ...}``. Other processors drop the bias with a warning."""
    if not all(isinstance(processor, TokenBiasAttention) for processor in unet.attn_processors.values()):
        unet.set_attn_processor(TokenBiasAttention())
