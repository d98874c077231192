"""Fusion: how image tokens join the text tokens (docs/method.md, sections 4 and 8)."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vcf_batch.config.limits import ALIGNED_FUSIONS, FUSIONS, IP_ADAPTER, ROLED_FUSIONS
from vcf_batch.config.strengths import reference_shares
from vcf_batch.errors import UsageError
from vcf_batch.vcf.acceleration import upload
from vcf_batch.vcf.base.family import AddedInputs
from vcf_batch.vcf.roles.reach import Reach, logarithm
from vcf_batch.vcf.roles.role import ALL, Layers, Role


def fuse(
    text_tokens: Tensor,
    image_tokens: Tensor,
    mode: str,
    strength: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Fuse text tokens with the aligned image tokens of the same samples.

    The fusion is computed in float32, within ``torch.autocast`` too, and sample by sample: nothing is averaged or
    scaled over the batch.

    Args:
        text_tokens: ``[B, T, Dt]``.
        image_tokens: aligned, ``[B, N, Dt]``; the tokens of several references stand one after the other.
        mode: one of :data:`vcf_batch.config.limits.ALIGNED_FUSIONS`.
        strength: the weight ``a`` of the image part; 0 is text only. ``concat`` returns the same tokens at every
            strength: its strength is a bias on the attention logits of the image tokens, and callers pass the bias on
            beside the tokens.
        weights: weights of the image tokens, ``[B, N]``, above 0. A token of weight 2 counts as two tokens of weight 1;
            None is equal weights. With ``concat`` the weights too are part of the bias.

    Returns:
        ``[B, T, Dt]``, or ``[B, T + N, Dt]`` for ``concat``; in the dtype of ``text_tokens``.

    Raises:
        UsageError: ``mode`` is unknown.
    """
    _check_mode(mode, ALIGNED_FUSIONS)
    if mode == "concat":
        return torch.cat([text_tokens, image_tokens.to(text_tokens.dtype)], dim=1)
    text, image = text_tokens.float(), image_tokens.float()
    weights = torch.ones_like(image[..., 0]) if weights is None else weights
    with _in_float32(text.device.type):
        mixed = _mean(image, weights) if mode == "naive" else _attend(text, image, weights)
    return torch.lerp(text, mixed.expand_as(text), strength).to(text_tokens.dtype)


def _in_float32(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off, where a device has it: its matrix products would be in bfloat16."""
    has_autocast = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if has_autocast else contextlib.nullcontext()


def _check_mode(mode: str, known: Sequence[str]) -> None:
    if mode not in known:
        raise UsageError(f"fusion is {mode!r}; it must be one of {', '.join(known)}")


def _mean(image: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of the image tokens: ``[B, 1, Dt]``."""
    return (weights / weights.sum(dim=1, keepdim=True))[:, None] @ image


def _attend(text: Tensor, image: Tensor, weights: Tensor) -> Tensor:
    """For each text token, a mean of the image tokens, weighted by cosine and rescaled to the text's mean norm.

    Returns:
        ``[B, T, Dt]``.
    """
    text_norm = text.norm(dim=-1, keepdim=True).mean(dim=1, keepdim=True)
    direction = F.normalize(image, dim=-1)
    cosine = F.normalize(text, dim=-1) @ direction.mT
    attention = (cosine / math.sqrt(text.shape[-1]) + weights.log()[:, None]).softmax(dim=-1)
    return attention @ (direction * text_norm)


@dataclass(frozen=True)
class Fusion:
    """The references of one sample, and how they are fused with its prompt.

    Raises:
        UsageError: a value is outside its limits.
    """

    image_tokens: Sequence[Tensor] = ()
    """Aligned image tokens, or those of the IP-Adapter: ``[N, Dt]`` for each reference. An empty sequence is text
    only."""
    mode: str = "concat"
    strength: float = 1.0
    """Weight of the references; 0 is text only, on the unconditional side too."""
    weights: Sequence[float] | None = None
    """Relative weights, one per reference; None is equal weights. A reference of weight 0 is left out."""
    unconditional: Tensor | None = None
    """``[N, Dt]``: image tokens, fused with the unconditional side in the same way. None follows the authors:
    ``concat`` gets zeros in place of image tokens, the other modes fuse nothing. (IP-Adapters have tokens for it:
    :meth:`vcf_batch.vcf.ip_adapter.IPAdapter.nothing`.)"""
    lo: float = 0.0
    """Start of the fusion range; 1 is pure noise. Steps with ``lo <= t / 999 <= hi`` use the fused tokens, the others
    use text alone."""
    hi: float = 1.0
    roles: Sequence[Role] | None = None
    """Roles, one per reference, of ``concat`` and IP-Adapters alone; None is no limit. The image tokens have been
    projected already."""
    masks: Sequence[Image.Image | None] | None = None
    """Where each reference may act in the picture, as :func:`vcf_batch.vcf.roles.reach.mask_of` gives it."""

    def __post_init__(self) -> None:
        _check_mode(self.mode, FUSIONS)
        if not 0 <= self.strength < math.inf:
            raise UsageError(f"strength is {self.strength}; it must be a number of 0 or more")
        if not 0 <= self.lo <= self.hi <= 1:
            raise UsageError(
                f"fusion_lo is {self.lo} and fusion_hi {self.hi}; both must be between 0 and 1, the lower one first"
            )
        reference_shares(self.weights, len(self.image_tokens))
        for name, values in (("roles", self.roles), ("masks", self.masks)):
            if values is not None and len(values) != len(self.image_tokens):
                raise UsageError(
                    f"reference_{name} has {len(values)} values for {len(self.image_tokens)} references; give one for "
                    "each"
                )
        if self.is_limited and self.mode not in ROLED_FUSIONS:
            raise UsageError(
                f"fusion is {self.mode}, whose references cannot be limited by roles or masks; use "
                f"{' or '.join(ROLED_FUSIONS)}, or leave them out"
            )

    @property
    def is_limited(self) -> bool:
        """Whether a role or mask limits a reference."""
        return any(role != ALL for role in self.roles or ()) or any(mask is not None for mask in self.masks or ())

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each reference; one of share 0 is left out."""
        return reference_shares(self.weights, len(self.image_tokens))

    @property
    def reach(self) -> Reach | None:
        """The limits of the references that are not left out; None if there are none."""
        used = [number for number, share in enumerate(self.shares) if share > 0]
        if not self.is_limited or not used or not self.strength:
            return None
        roles, masks = self.roles or [ALL] * len(self.shares), self.masks or [None] * len(self.shares)
        return Reach(
            [roles[number] for number in used],
            [self.shares[number] for number in used],
            [masks[number] for number in used],
            [len(self.image_tokens[number]) for number in used],
        )

    def positive(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Fuse the tokens ``[T, Dt]`` of the prompt.

        Returns:
            The fused tokens ``[S, Dt]``, and on the CPU the bias ``[S]`` of their attention logits.
        """
        return self._fuse(text, self.image_tokens, self.shares)

    def negative(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Fuse the tokens of the negative prompt for the unconditional side; shapes as in :meth:`positive`."""
        if self.unconditional is not None:
            return self._fuse(text, [self.unconditional], [1.0])
        zeros = [torch.zeros_like(tokens) for tokens in self.image_tokens[:1] if self.mode == "concat"]
        return self._fuse(text, zeros, [1.0] * len(zeros))

    def _fuse(self, text: Tensor, images: Sequence[Tensor], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
        used = [(image, share) for image, share in zip(images, shares, strict=True) if share > 0]
        if not used or not self.strength or self.mode == IP_ADAPTER:
            return text, torch.zeros(len(text))
        image = torch.cat([image for image, _ in used]).to(text.device)
        weights = torch.cat([torch.full([len(image)], share) for image, share in used])
        tokens = fuse(text[None], image[None], self.mode, self.strength, upload(weights[None], text.device))[0]
        bias = torch.zeros(len(tokens))
        if self.mode == "concat":
            bias[len(text) :] = (self.strength * weights).log()
        return tokens, bias

    def positive_image_prompt(self) -> "ImagePrompt | None":
        """What the IP-Adapter adds on the prompt's side; None without an adapter or without effect."""
        return self._prompt(self.image_tokens, self.shares)

    def negative_image_prompt(self) -> "ImagePrompt | None":
        """What the IP-Adapter adds on the unconditional side; None without an adapter or without effect."""
        if self.unconditional is None:
            return None
        # As many as on the other side: repeated tokens change nothing, and padding would need a bias.
        count = max(1, sum(share > 0 for share in self.shares))
        return self._prompt([self.unconditional] * count, [1 / count] * count)

    def _prompt(self, images: Sequence[Tensor], shares: Sequence[float]) -> "ImagePrompt | None":
        used = [(image, share) for image, share in zip(images, shares, strict=True) if share > 0]
        if self.mode != IP_ADAPTER or not self.strength or not used:
            return None
        # Equal weights give no bias, which would keep the fastest kernels away.
        bias = torch.cat([torch.full([len(image)], share * len(used)) for image, share in used]).log()
        return ImagePrompt(torch.cat([image for image, _ in used]), bias, self.strength)


@dataclass(frozen=True)
class ImagePrompt:
    """The tokens of an IP-Adapter for one side of one sample."""

    tokens: Tensor
    """``[M, Dt]``, those of several references one after the other."""
    bias: Tensor
    """float32 ``[M]`` on the CPU, added to their logits: the logarithm of each reference's weight beside the others."""
    strength: float
    """Factor of what attention to them gives, above 0."""


@dataclass(frozen=True)
class ImagePrompts:
    """The tokens of an IP-Adapter for one side of a batch."""

    tokens: Tensor
    """``[B, M, Dt]``, padded with zeros. M is 0 if no sample has any."""
    bias: Tensor
    """float32 ``[B, M]`` on the CPU, ``-inf`` on padding. Samples without tokens have 0 throughout, so that their
    attention is finite."""
    strength: Tensor
    """float32 ``[B]`` on the CPU; 0 for samples without tokens."""

    @classmethod
    def of(cls, samples: Sequence[ImagePrompt | None], text_tokens: Tensor, length: int) -> "ImagePrompts":
        """Put the tokens of all samples into one batch, in the dtype and on the device of the text tokens.

        Args:
            samples: the tokens of each sample.
            text_tokens: ``[B, T, Dt]``.
            length: M, at least the largest number of tokens.
        """
        nothing = text_tokens.new_zeros(length, text_tokens.shape[-1]), torch.zeros(length)
        padded = [_padded(each.tokens.to(text_tokens), each.bias, length) if each else nothing for each in samples]
        return cls(
            torch.stack([tokens for tokens, _ in padded]),
            torch.stack([bias for _, bias in padded]),
            torch.tensor([each.strength if each else 0.0 for each in samples]),
        )


@dataclass(frozen=True)
class Side:
    """The UNet's conditioning on one side of the guidance: a batch of samples, each with its own fusion."""

    tokens: Tensor
    """``[B, S, Dt]``: each sample's fused tokens, padded with zeros."""
    bias: Tensor
    """float32 ``[B, S]`` on the CPU, added to the attention logits of the tokens: 0 on text, log(strength x share) on
    the image tokens of ``concat``, ``-inf`` on padding."""
    text: Tensor
    """``[B, T, Dt]``: the tokens used in steps outside a sample's fusion range, padded with zeros."""
    text_bias: Tensor
    """float32 ``[B, T]`` on the CPU: 0 on text, ``-inf`` on padding."""
    image_prompts: ImagePrompts
    """The tokens of an IP-Adapter."""

    def select(self, inside: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Tokens and bias of a step in which the samples marked with True are fused and the others are text alone."""
        if all(inside):
            return self.tokens, self.bias
        if not any(inside):
            return self.text, self.text_bias
        fused = torch.tensor(inside)[:, None]
        text, bias = _padded(self.text, self.text_bias, self.tokens.shape[1])
        tokens = torch.where(upload(fused[..., None], text.device), self.tokens, text)
        return tokens, torch.where(fused, self.bias, bias)


Inside = bool | tuple[int, ...]
"""Whether a sample is fused in a step; for one with limits the numbers of the references that act, () for none."""


@dataclass(frozen=True)
class Conditioning:
    """Both sides of the guidance, with the same number of tokens, and the fusion range of each sample."""

    positive: Side
    negative: Side
    ranges: Sequence[tuple[float, float]]
    """``lo`` and ``hi`` of each sample."""
    reaches: Sequence[Reach | None] = ()
    """The limits of each sample's references; None, or an empty sequence, for none."""
    strengths: Sequence[float] = ()
    """Strength of each sample with limits."""
    added: AddedInputs = field(default_factory=dict)
    """What else the UNet gets at each step."""

    def added_inputs(self, guided: bool) -> dict[str, Tensor] | None:
        """The UNet's ``added_cond_kwargs``, with the rows of :meth:`select`; None without any."""
        sides = {name: both if guided else both[1:] for name, both in self.added.items()}
        return {name: torch.cat(own) for name, own in sides.items()} or None

    @property
    def is_limited(self) -> bool:
        """Whether a sample has references that roles or masks limit."""
        return any(reach is not None for reach in self.reaches)

    def inside(self, time: float) -> tuple[Inside, ...]:
        """For each sample, whether it is fused at ``time`` (t / 999), or which of its references act."""
        reaches = self.reaches or [None] * len(self.ranges)
        return tuple(
            lo <= time <= hi if reach is None else reach.acting(time) if lo <= time <= hi else ()
            for (lo, hi), reach in zip(self.ranges, reaches, strict=True)
        )

    def select(
        self, inside: Sequence[Inside], guided: bool, layers: Sequence[Layers] = ()
    ) -> tuple[Tensor, dict[str, Any]]:
        """The UNet's input in a step.

        Args:
            inside: the result of :meth:`inside`.
            guided: whether the unconditional side is computed, too.
            layers: the UNet's resolutions; needed if :attr:`is_limited`.

        Returns:
            Tokens ``[B, S, Dt]``, or ``[2B, S, Dt]`` with the unconditional side first if ``guided``; and further
            arguments of :class:`vcf_batch.vcf.attention.TokenBiasAttention` with as many rows, where limits apply by
            the number of queries. What would change nothing is left out, so that attention takes its fastest path.
        """
        used = [self.negative, self.positive] if guided else [self.positive]
        fused = [bool(each) for each in inside]
        sides = [side.select(fused) for side in used]
        tokens = torch.cat([tokens for tokens, _ in sides])
        bias = torch.cat([bias for _, bias in sides])[:, None]
        prompts = [side.image_prompts for side in used]
        strength = torch.cat([own.strength * torch.tensor(fused) for own in prompts])[:, None, None]
        # What samples that are text alone attend to does not count.
        ip_bias = torch.cat([own.bias for own in prompts])[:, None].where(strength > 0, 0)
        settings: dict[str, Any] = {}
        if any(each and reach for each, reach in zip(inside, self.reaches, strict=False)):
            settings |= self._limited(bias, strength, ip_bias, inside, layers)
        else:
            settings = {"token_bias": bias, "ip_strength": strength, "ip_bias": ip_bias}
        if not strength.any():
            del settings["ip_strength"], settings["ip_bias"]
        else:
            settings["ip_tokens"] = torch.cat([own.tokens for own in prompts])
        return tokens, {
            name: _each(value, lambda each: upload(each, tokens.device))
            for name, value in settings.items()
            if name in ("ip_tokens", "ip_strength") or _any(value)
        }

    def _limited(
        self, bias: Tensor, strength: Tensor, ip_bias: Tensor, inside: Sequence[Inside], layers: Sequence[Layers]
    ) -> dict[str, dict[int, Tensor]]:
        """The arguments of a step with limits, by the number of queries.

        Args:
            bias, strength, ip_bias: ``[R, 1, S]``, ``[R, 1, 1]`` and ``[R, 1, M]``, those without limits. There are one
                or two of the R rows for each sample, the unconditional side first.
            inside, layers: see :meth:`select`.
        """
        samples, texts = len(inside), (self.positive.text_bias > -math.inf).sum(dim=1).tolist()
        limits: dict[str, dict[int, Tensor]] = {"token_bias": {}, "ip_strength": {}, "ip_bias": {}}
        for each in layers:
            rows: dict[str, list[Tensor]] = {name: [] for name in limits}
            for row in range(len(bias)):
                sample = row % samples
                own = {"token_bias": bias[row], "ip_strength": strength[row], "ip_bias": ip_bias[row]}
                reach = self.reaches[sample]
                acting = inside[sample]
                if reach is not None and isinstance(acting, tuple) and acting:
                    weights, total = reach.in_layers(each, acting)
                    is_positive = row >= len(bias) - samples
                    own = _limit(own, texts[sample], weights if is_positive else total, total, self.strengths[sample])
                for name, value in own.items():
                    rows[name].append(value)
            for name, values in rows.items():
                queries = max(map(len, values))
                limits[name][each.queries] = torch.stack([value.expand(queries, -1) for value in values])
        return limits


def _limit(own: Mapping[str, Tensor], text: int, weights: Tensor, total: Tensor, strength: float) -> dict[str, Tensor]:
    """One row's arguments in layers of one resolution.

    Args:
        own: the arguments without limits: ``[1, S]``, ``[1, 1]`` and ``[1, M]``.
        text: number of text tokens.
        weights: ``[Q, N]`` of the image tokens, or ``[Q, 1]`` for all of them.
        total: ``[Q, 1]``, of all references together.
        strength: the sample's strength.
    """
    queries = len(weights)
    bias, ip_bias = (own[name].expand(queries, -1).clone() for name in ("token_bias", "ip_bias"))
    if count := int((bias[0, text:] > -math.inf).sum()):
        bias[:, text : text + count] = logarithm(strength * weights).expand(-1, count)
    factor = own["ip_strength"]
    if factor.any():
        count = int((ip_bias[0] > -math.inf).sum())
        # Where none of them acts, what is attended to does not count.
        ip_bias[:, :count] = torch.where(total > 0, logarithm(weights), 0.0).expand(-1, count)
        factor = factor * total
    return {"token_bias": bias, "ip_strength": factor.expand(queries, -1), "ip_bias": ip_bias}


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return {key: change(each) for key, each in value.items()} if isinstance(value, dict) else change(value)


def _any(value: Tensor | dict[int, Tensor]) -> bool:
    return any(bool(each.any()) for each in (value.values() if isinstance(value, dict) else [value]))


def filled(tokens: Tensor, length: int, empty: Tensor) -> Tensor:
    """Fill the tokens ``[T, Dt]`` of a text up to ``length`` with windows of the empty text, ``[W, Dt]`` each.

    The shorter of a prompt and its negative prompt is filled in this way, so that both sides of the guidance have as
    many tokens.
    """
    return torch.cat([tokens, *[empty] * ((length - len(tokens)) // len(empty))])


def condition(
    text_tokens: Tensor | Sequence[Tensor], negative_tokens: Tensor | Sequence[Tensor], fusions: Sequence[Fusion]
) -> Conditioning:
    """Fuse each sample in its own way and put all samples into one batch.

    A sample's tokens do not depend on its neighbours: shorter samples are padded, and the bias hides the padding. A
    sample at strength 0 has no image tokens at all, so it is exactly text only.

    Args:
        text_tokens: tokens of the prompts, ``[B, T, Dt]``; or ``[T, Dt]`` of each, which may differ in T.
        negative_tokens: tokens of the negative prompts, as many for each sample.
        fusions: one per sample.
    """
    positive = [fusion.positive(text) for fusion, text in zip(fusions, text_tokens, strict=True)]
    negative = [fusion.negative(text) for fusion, text in zip(fusions, negative_tokens, strict=True)]
    longest = max(len(tokens) for tokens, _ in positive + negative)

    prompts = [fusion.positive_image_prompt() for fusion in fusions]
    avoided = [fusion.negative_image_prompt() for fusion in fusions]
    most = max((len(each.tokens) for each in (*prompts, *avoided) if each), default=0)

    def side(
        samples: Sequence[tuple[Tensor, Tensor]], texts: Sequence[Tensor], own: Sequence[ImagePrompt | None]
    ) -> Side:
        tokens, bias = _batched(samples, longest)
        text, text_bias = _batched([(each, torch.zeros(len(each))) for each in texts], max(map(len, texts)))
        return Side(tokens, bias, text, text_bias, ImagePrompts.of(own, text, most))

    return Conditioning(
        side(positive, [*text_tokens], prompts),
        side(negative, [*negative_tokens], avoided),
        [(fusion.lo, fusion.hi) for fusion in fusions],
        [fusion.reach for fusion in fusions],
        [fusion.strength for fusion in fusions],
    )


def _batched(samples: Sequence[tuple[Tensor, Tensor]], length: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, S, Dt]`` and biases ``[B, S]`` of samples, each padded with hidden tokens to ``length``."""
    padded = [_padded(tokens, bias, length) for tokens, bias in samples]
    return torch.stack([tokens for tokens, _ in padded]), torch.stack([bias for _, bias in padded])


def _padded(tokens: Tensor, bias: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[..., S, Dt]`` and their bias ``[..., S]``, padded with hidden tokens to ``length``."""
    missing = length - tokens.shape[-2]
    return F.pad(tokens, (0, 0, 0, missing)), F.pad(bias, (0, missing), value=-math.inf)
