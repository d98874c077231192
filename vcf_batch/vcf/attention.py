"""Cross-attention with a bias on the tokens' logits, which strength and padding need and diffusers does not pass on."""

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor


class TokenBiasAttention(AttnProcessor2_0):
    """Scaled dot-product attention whose cross-attention takes an additive bias per token.

    The UNet's own ``encoder_attention_mask`` cannot carry the bias: it turns a mask ``m`` into ``(1 - m) * -10000`` in
    the model's dtype, and bfloat16 rounds such values too coarsely.
    """

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
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def accept_token_bias(unet: UNet2DConditionModel) -> None:
    """Make a UNet use ``cross_attention_kwargs={"token_bias": ...}``. Other processors drop the bias with a warning."""
    if not all(isinstance(processor, TokenBiasAttention) for processor in unet.attn_processors.values()):
        unet.set_attn_processor(TokenBiasAttention())
