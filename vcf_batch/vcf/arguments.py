"""The arguments of a call of the pipeline, as the sampler takes them: one value, generator or fusion for each image."""

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from PIL import Image
from torch import Generator, Tensor

from vcf_batch import sharding
from vcf_batch.config.limits import IP_ADAPTER, MAX_SEED, UNCONDITIONALS
from vcf_batch.errors import RowError, UsageError
from vcf_batch.vcf.base.family import EncodedText
from vcf_batch.vcf.fusion import Fusion, filled
from vcf_batch.vcf.roles.reach import mask_of
from vcf_batch.vcf.roles.role import ALL, Role, role_of
from vcf_batch.vcf.sampling import Generators

if TYPE_CHECKING:
    from vcf_batch.vcf.pipeline import VCFPipeline

References = Image.Image | Sequence[Image.Image] | None
"""The references of one prompt: one image, several, or None for text only."""

BLANK = Image.new("RGB", (32, 32), (128, 128, 128))
"""The plain image that the unconditional side is fused with for ``unconditional="blank"``."""

ENCODED_LONG_PROMPTS = ("truncate", "chunk")
"""What a call does with prompts of more tokens than the text encoder takes."""

P = ParamSpec("P")
R = TypeVar("R")


def tell_unknown(method: Callable[P, R]) -> Callable[P, R]:
    """Make a method tell an unknown argument by its name, with the nearest known one.

    The method keeps its signature, which editors and ``help`` show.
    """
    known = [*inspect.signature(method).parameters][1:]

    @functools.wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                longer = [each for each in known if each.startswith(name)] or [each for each in known if name in each]
                near = longer or difflib.get_close_matches(name, known, 1, 0.5)
                raise TypeError(
                    f"there is no argument {name!r}"
                    + (f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}")
                )
        return method(*args, **kwargs)

    return checked


def per_sample(name: str, value: Any, count: int) -> list[Any]:
    """One value for each prompt, from one for all or a sequence.

    Raises:
        UsageError: the sequence has another length.
    """
    if hasattr(value, "tolist"):  # a tensor or an array
        value = value.tolist()
    if value is None or not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise UsageError(f"{name} has {len(values)} values for {count} prompts; give one for each prompt")
    return values


def whole_number(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Refuse what is no whole number within limits.

    Raises:
        UsageError: with value and limits.
    """
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or value < low or (high is not None and value > high):
        limits = f"{low} or more" if high is None else f"between {low} and {high}"
        raise UsageError(f"{name} is {value!r}; it must be a whole number, {limits}")


def numbers_of(name: str, value: Any, count: int) -> list[Any]:
    """A number, or None, for each prompt: see :func:`per_sample`.

    Raises:
        UsageError: something is no number.
    """
    values = per_sample(name, value, count)
    for own in values:
        if own is not None and not isinstance(own, Real):
            raise UsageError(f"{name} is {own!r}; it must be a number")
    return values


def told_sizes(
    original: tuple[int, int] | None, crop: tuple[int, int] | None, target: tuple[int, int] | None
) -> dict[str, Any]:
    """The fields of :class:`vcf_batch.config.sampling.Sampling` for sizes as diffusers gives them, heights first.

    Raises:
        UsageError: one is no pair.
    """
    fields: dict[str, Any] = {}
    for name, pair, own in (
        ("original_size", original, ("original_height", "original_width")),
        ("crops_coords_top_left", crop or (0, 0), ("crop_top", "crop_left")),
        ("target_size", target, ("target_height", "target_width")),
    ):
        if pair is not None and (not isinstance(pair, list | tuple) or len(pair) != 2):
            raise UsageError(f"{name} is {pair!r}; it must have two whole numbers")
        fields |= dict(zip(own, pair or (None, None), strict=True))
    return fields


def texts_of(name: str, given: Any) -> list[str]:
    """One text or several, as a list.

    Raises:
        UsageError: there is something that is no text.
    """
    texts = [given] if isinstance(given, str) else list(given) if isinstance(given, list | tuple) else None
    if texts is None or not all(isinstance(text, str) for text in texts):
        wrong = given if texts is None else next(text for text in texts if not isinstance(text, str))
        raise UsageError(f"{name} has a {type(wrong).__name__}; give a text, or a list of texts")
    return texts


def _images_of(name: str, entry: Any) -> list[Image.Image]:
    """The images of one prompt.

    Raises:
        UsageError: there is something that is no image.
    """
    images = [] if entry is None else list(entry) if isinstance(entry, list | tuple) else [entry]
    for image in images:
        if not isinstance(image, Image.Image):
            raise UsageError(
                f"{name} has a {type(image).__name__}; give images of PIL, as Image.open(path) or "
                "Image.fromarray(array) makes them"
            )
    return images


def _roles_of(entry: Any, references: int, adapted: bool) -> list[Role] | None:
    """The roles of one prompt's references, from one name for all, one for each, or None for no limit.

    Args:
        entry: the names.
        references: number of references.
        adapted: whether their tokens are those of an IP-Adapter.
    """
    if entry is None:
        return None
    return [role_of(each, adapted) for each in ([entry] * references if isinstance(entry, str) else entry)]


def _masks_of(entry: Any) -> list[Image.Image | None] | None:
    """The masks of one prompt's references, from one image, several with None for none, or None."""
    if entry is None:
        return None
    masks = list(entry) if isinstance(entry, list | tuple) else [entry]
    try:
        return [mask_of(_images_of("reference_masks", mask)[0]) if mask is not None else None for mask in masks]
    except RowError as error:
        raise UsageError(f"reference_masks: {error}") from error


def generators_of(
    seed: int | Sequence[int] | None, generator: Generator | Sequence[Generator] | None, prompts: int, images: int
) -> Generators:
    """The generators of a call's noise.

    Args:
        seed: one for all prompts, one for each prompt, or one for each image; None is 0. A prompt's first image has
            its seed, and each further one is another draw: :func:`vcf_batch.sharding.draw_seed`.
        generator: generators in place of seeds: one for the whole batch, or one for each image.
        prompts: number of prompts.
        images: number of images of each prompt.

    Raises:
        UsageError: there are both, a sequence has another length, or a seed is out of its limits.
    """
    count = prompts * images
    if generator is not None:
        if seed is not None:
            raise UsageError("there are a seed and a generator; give one of them")
        if isinstance(generator, Generator):
            return generator
        if not isinstance(generator, list | tuple) or not all(isinstance(each, Generator) for each in generator):
            raise UsageError(f"generator is {generator!r}; give a torch.Generator, or one for each image in a list")
        if len(generator) != count:
            raise UsageError(
                f"generator has {len(generator)} generators for {count} images; give one for each image, or one for all"
            )
        return list(generator)
    given: Any = 0 if seed is None else seed
    if images > 1 and not isinstance(given, Real) and len(given) == count:
        seeds = list(given)
    else:
        of_prompts = per_sample("seed", given, prompts)
        seeds = [sharding.draw_seed(own, draw) for own in of_prompts for draw in range(images)]
    for own in seeds:
        if not 0 <= own <= MAX_SEED:
            raise UsageError(f"seed is {own}; it must be between 0 and {MAX_SEED}")
    return [Generator().manual_seed(int(own)) for own in seeds]


def draw(generators: Generators, shape: Sequence[int], count: int | None) -> Tensor:
    """Standard normal noise, float32 ``[B, *shape]`` on the generators' device.

    Args:
        generators: one for each of B samples, or one for all, whose noise depends on B.
        shape: shape of a sample's noise.
        count: B, where it is one.
    """
    if isinstance(generators, Generator):
        assert count is not None
        return torch.randn(count, *shape, generator=generators, device=generators.device)
    return torch.stack([torch.randn(*shape, generator=each, device=each.device) for each in generators])


def encode_texts(
    pipeline: "VCFPipeline", texts: Sequence[str], long_prompts: str, clip_skip: int | None = None
) -> list[EncodedText]:
    """Encoded texts, each distinct one encoded once.

    Args:
        pipeline: the pipeline.
        texts: prompts or negative prompts.
        long_prompts: ``truncate`` or ``chunk``, see :meth:`VCFPipeline.generate`.
        clip_skip: see :meth:`VCFPipeline.encode_prompts`.

    Raises:
        UsageError: a value outside its limits.
    """
    if long_prompts not in ENCODED_LONG_PROMPTS:
        raise UsageError(f"long_prompts is {long_prompts!r}; it must be one of {', '.join(ENCODED_LONG_PROMPTS)}")
    distinct = [*dict.fromkeys(texts)]
    encoded = pipeline.family.encode(distinct, long_prompts == "chunk", clip_skip)
    return [encoded[distinct.index(text)] for text in texts]


def leveled(
    pipeline: "VCFPipeline", positive: Sequence[EncodedText], negative: Sequence[EncodedText]
) -> tuple[list[EncodedText], list[EncodedText]]:
    """Prompts and negative prompts, both of each sample filled up to the longer one's windows."""
    lengths = [max(len(text.tokens) for text in both) for both in zip(positive, negative, strict=True)]
    sides = [[*zip(side, lengths, strict=True)] for side in (positive, negative)]
    if all(len(text.tokens) == length for side in sides for text, length in side):
        return [*positive], [*negative]
    empty = pipeline.family.encode([""])[0].tokens
    first, second = (
        [text._replace(tokens=filled(text.tokens, length, empty)) for text, length in side] for side in sides
    )
    return first, second


def fuse_references(
    pipeline: "VCFPipeline",
    count: int,
    references: Sequence[References] | References,
    *,
    reference_weights: Any,
    reference_roles: Any = None,
    reference_masks: Any = None,
    negative_references: Any,
    fusion: str | Sequence[str],
    strength: float | Sequence[float | None] | None,
    fusion_lo: float | Sequence[float],
    fusion_hi: float | Sequence[float],
    unconditional: str,
    image_tokens: str | None,
) -> list[Fusion]:
    """The fusion of each of ``count`` prompts, with the arguments of :meth:`VCFPipeline.generate`.

    Each distinct image object is encoded once.

    Raises:
        ModelError: there are references, but the model lacks a part they need.
        UsageError: a value outside its limits, or a sequence of the wrong length.
    """
    if unconditional not in UNCONDITIONALS:
        raise UsageError(f"unconditional is {unconditional!r}; it must be one of {', '.join(UNCONDITIONALS)}")
    if unconditional == "negative" and negative_references is None:
        raise UsageError("unconditional is 'negative', but there are no negative_references; give some")
    images = [_images_of("references", entry) for entry in per_sample("references", references, count)]
    avoided = per_sample("negative_references", negative_references, count)
    for entry in avoided:
        _images_of("negative_references", entry)
    paddings = [
        BLANK if negative is None and own and unconditional == "blank" else negative
        for own, negative in zip(images, avoided, strict=True)
    ]
    modes = per_sample("fusion", fusion, count)
    by_adapter = [mode == IP_ADAPTER for mode in modes]
    encoded: dict[tuple[bool, int], Tensor] = {}
    for adapted in sorted({*by_adapter}):
        own = [number for number in range(count) if by_adapter[number] == adapted]
        shown = [image for number in own for image in (*images[number], paddings[number]) if image is not None]
        distinct = {id(image): image for image in shown}
        if distinct:
            tokens = pipeline.encode_references([*distinct.values()], image_tokens, adapted=adapted)
            encoded |= {(adapted, key): each for key, each in zip(distinct, tokens, strict=True)}

    def unconditional_of(number: int) -> Tensor | None:
        if paddings[number] is not None:
            return encoded[by_adapter[number], id(paddings[number])]
        return pipeline.adapter.nothing() if by_adapter[number] and images[number] else None

    def tokens_of(number: int) -> list[Tensor]:
        tokens = [encoded[by_adapter[number], id(image)] for image in images[number]]
        own = roles[number] or [ALL] * len(tokens)
        return [pipeline.project(each, role, by_adapter[number]) for each, role in zip(tokens, own, strict=False)]

    roles = [
        _roles_of(entry, len(images[number]), by_adapter[number])
        for number, entry in enumerate(per_sample("reference_roles", reference_roles, count))
    ]
    masks = [_masks_of(entry) for entry in per_sample("reference_masks", reference_masks, count)]
    strengths = numbers_of("strength", strength, count)
    weights = per_sample("reference_weights", reference_weights, count)
    lows, highs = numbers_of("fusion_lo", fusion_lo, count), numbers_of("fusion_hi", fusion_hi, count)
    return [
        Fusion(
            tokens_of(i),
            modes[i],
            pipeline.resolve_strength(modes[i], strengths[i]),
            weights[i],
            unconditional_of(i),
            lows[i],
            highs[i],
            roles[i],
            masks[i],
        )
        for i in range(count)
    ]
