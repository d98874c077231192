"""The tensors that a file of an IP-Adapter must have, by name and shape.

The header of the file and two configurations tell them. So the driver refuses what no worker could load, before
anything is written.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vcf_batch import storage
from vcf_batch.errors import ModelError, redact
from vcf_batch.models.resolution import ResolvedModel, read_config, tensor_shapes

Shape = tuple[int, ...]

PROJECTION, KEYS = "image_proj.", "ip_adapter."
"""Beginnings of the names of tensors: those of the projection, and the keys and values of the UNet's layers."""

REMEDY = "name another file with --ip-adapter"
_PUBLISHED = "published ones are for Stable Diffusion 1.5 and its fine-tunes: 'vcf-batch model list' has their names"

_BASE_TOKENS = 4
_RESAMPLER_LAYERS = 4
"""Number of layers of the resampler of IP-Adapter Plus, in every published file and in diffusers."""
_PLAIN_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
_MIDDLE_BLOCK = "UNetMidBlock2DCrossAttn"


_BIN_STARTS = (b"PK\x03\x04", b"\x80\x02")
"""Beginnings of what PyTorch saves: an archive, or as it was before version 1.6."""


class Widths(NamedTuple):
    """Widths of what an image encoder gives; None where its configuration does not tell."""

    tokens: int | None
    embedding: int | None


def check_files(adapter: ResolvedModel, encoder: ResolvedModel, unet: Mapping[str, Any]) -> None:
    """Refuse an adapter whose tensors do not fit the model or the image encoder. Weights are not fetched.

    Of a ``.bin`` file only the beginning is looked at, because it must be loaded to tell its tensors: workers do that.

    Args:
        adapter: the adapter's file.
        encoder: its image encoder.
        unet: the configuration of the model's UNet.

    Raises:
        ModelError: it does not fit, or a file is missing or damaged.
        StorageError: the storage failed.
    """
    name = redact(f"{encoder.location}/{encoder.within}" if encoder.within else encoder.name)
    if (config := read_config(encoder, "config.json")) is None:
        raise ModelError(
            f"the image encoder {name} has no config.json; it must be a CLIP vision tower in transformers' layout: "
            "name another with --image-encoder"
        )
    layers, what = cross_attention_layers(unet), f"the IP-Adapter {redact(adapter.name)}"
    if adapter.within.endswith(".bin") and adapter.kind in ("directory", "url"):
        start = storage.read_start(storage.join(adapter.location, adapter.within), 16)
        if not start.startswith(_BIN_STARTS):
            raise ModelError(
                f"{what} is damaged or no file of PyTorch: it begins with {start!r}; it may be a web page, or a "
                f"pointer of Git LFS. Copy it again, or {REMEDY}"
            )
    if layers is not None and adapter.within.endswith(".safetensors"):
        check(tensor_shapes(adapter, what, REMEDY), what, layers, encoder_widths(config), name)


def encoder_widths(config: Mapping[str, Any]) -> Widths:
    """Widths by the configuration of a CLIP, or of its vision tower alone."""
    return Widths(config.get("vision_config", config).get("hidden_size"), config.get("projection_dim"))


def cross_attention_layers(unet: Mapping[str, Any]) -> list[Shape] | None:
    """Shape ``[channels, Dt]`` of the keys of each cross-attention layer, in diffusers' order: down, up, middle.

    Args:
        unet: the configuration of a UNet.

    Returns:
        None for a UNet that is not built as those of Stable Diffusion 1, 2 and XL, which only a worker can look into.
    """
    channels, width = unet.get("block_out_channels", ()), unet.get("cross_attention_dim", 0)
    down, up = unet.get("down_block_types", ()), unet.get("up_block_types", ())
    count, depth = unet.get("layers_per_block", 2), unet.get("transformer_layers_per_block", 1)
    depths = depth if isinstance(depth, list | tuple) else [depth] * len(channels)
    if not (
        all(isinstance(number, int) for number in (width, count, *depths))
        and len(depths) == len(channels)
        and {*down, *up} <= _PLAIN_BLOCKS
        and len(down) == len(up) == len(channels) > 0
        and unet.get("mid_block_type", _MIDDLE_BLOCK) == _MIDDLE_BLOCK
        and not any(unet.get(name) for name in ("only_cross_attention", "dual_cross_attention"))
    ):
        return None
    found: list[Shape] = []
    levels = [*zip(channels, depths, strict=True)]
    for kinds, order, layers in ((down, levels, count), (up, levels[::-1], count + 1)):
        for kind, (own, deep) in zip(kinds, order, strict=True):
            found += [(own, width)] * (layers * deep if "CrossAttn" in kind else 0)
    return [*found, *[(channels[-1], width)] * depths[-1]]


def check(shapes: Mapping[str, Shape], what: str, layers: Sequence[Shape], encoder: Widths, encoder_name: str) -> None:
    """Refuse tensors that are not those of an IP-Adapter for a UNet and an image encoder.

    Args:
        shapes: shape of each tensor of the file, by its name, such as ``image_proj.proj.weight``.
        what: name of the adapter, for messages.
        layers: shape of the keys of each cross-attention layer of the UNet: see :func:`cross_attention_layers`.
        encoder: widths of the image encoder.
        encoder_name: its name, for messages.

    Raises:
        ModelError: they are of another kind, or do not fit; with the first difference.
    """
    own, keys = (
        {name.removeprefix(part): shape for name, shape in shapes.items() if name.startswith(part)}
        for part in (PROJECTION, KEYS)
    )
    if not (own and keys):
        raise ModelError(
            f"{what} is no IP-Adapter: it must have tensors {PROJECTION}* and {KEYS}*, and it has "
            f"{f'others, such as {min(shapes)}' if shapes else 'no tensors with names'}; {REMEDY}"
        )
    if _is_for_faces(own):
        raise ModelError(
            f"{what} is a FaceID adapter, which needs embeddings of faces that are not computed here; use an adapter "
            "without FaceID, such as ip-adapter-plus-face-sd15"
        )
    resampler = {int(found[1]) for name in own if (found := re.match(r"layers\.(\d+)\.", name))}
    if resampler and resampler != {*range(_RESAMPLER_LAYERS)}:
        raise ModelError(
            f"{what} has a resampler of {len(resampler)} layers; it must have {_RESAMPLER_LAYERS}: {REMEDY}"
        )
    _check_widths(own, what, layers[0][-1], encoder, encoder_name)
    _check_same(own, _projection(own, layers[0][-1]), f"{what}: the tensors of its projection", REMEDY)
    wanted = {f"{2 * place + 1}.to_{each}_ip.weight": shape for place, shape in enumerate(layers) for each in "kv"}
    layers_of = f"{what}: the keys and values for the {len(layers)} cross-attention layers of the model's UNet"
    _check_same(keys, wanted, layers_of, _PUBLISHED)


def _is_for_faces(projection: Mapping[str, Shape]) -> bool:
    """Whether a projection takes embeddings of InsightFace."""
    of_faces = "proj.0.weight" in projection and "proj.3.weight" not in projection
    return of_faces or any(name.startswith("perceiver_resampler.") for name in projection)


def _check_widths(own: Mapping[str, Shape], what: str, width: int, encoder: Widths, encoder_name: str) -> None:
    is_base = "proj.weight" in own
    first, last = next(
        (pair for pair in (("proj.weight", "norm.weight"), ("proj.0.weight", "proj.3.weight")) if pair[1] in own),
        ("proj_in.weight", "norm_out.weight"),
    )
    takes, gives = own.get(first, (None,))[-1], own.get(last, (None,))[-1]
    has = encoder.embedding if is_base else encoder.tokens
    if None not in (takes, has) and takes != has:
        raise ModelError(
            f"{what} reads {'embeddings' if is_base else 'tokens'} of width {takes}, but the image encoder "
            f"{encoder_name} gives width {has}; name the encoder that the adapter was trained with in --image-encoder"
        )
    if gives not in (None, width):
        raise ModelError(
            f"{what} gives tokens of width {gives}, but the model's UNet is conditioned on width {width}; {_PUBLISHED}"
        )


def _projection(own: Mapping[str, Shape], width: int) -> dict[str, Shape]:
    """Tensors of a projection that gives tokens of a width. Its other widths are those of the file."""
    if "proj.weight" in own:
        return _linear("proj", own["proj.weight"][-1], _BASE_TOKENS * width) | _norm("norm", width)
    if "proj.3.weight" in own:
        takes = own.get("proj.0.weight", (0,))[-1]
        return _linear("proj.0", takes, takes) | _linear("proj.2", takes, width) | _norm("proj.3", width)
    latents = own.get("latents", (1, 0, 0))
    inner, heads = latents[-1], own.get("layers.0.0.to_q.weight", (0,))[0]
    shapes = {"latents": latents} | _linear("proj_in", own.get("proj_in.weight", (0,))[-1], inner)
    shapes |= _linear("proj_out", inner, width) | _norm("norm_out", width)
    for layer in range(_RESAMPLER_LAYERS):
        attention, forward = f"layers.{layer}.0", f"layers.{layer}.1"
        shapes |= _norm(f"{attention}.norm1", inner) | _norm(f"{attention}.norm2", inner) | _norm(f"{forward}.0", inner)
        shapes |= {f"{attention}.to_q.weight": (heads, inner), f"{attention}.to_kv.weight": (2 * heads, inner)}
        shapes |= {f"{attention}.to_out.weight": (inner, heads)}
        shapes |= {f"{forward}.1.weight": (4 * inner, inner), f"{forward}.3.weight": (inner, 4 * inner)}
    return shapes


def _linear(name: str, takes: int, gives: int) -> dict[str, Shape]:
    return {f"{name}.weight": (gives, takes), f"{name}.bias": (gives,)}


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _check_same(shapes: Mapping[str, Shape], wanted: Mapping[str, Shape], what: str, remedy: str) -> None:
    missing, more = wanted.keys() - shapes.keys(), shapes.keys() - wanted.keys()
    if missing or more:
        told = [f"lack {len(missing)} tensors, such as {min(missing)}"] if missing else []
        told += [f"have {len(more)} that do not belong there, such as {min(more)}"] if more else []
        again = "" if more else "copy it again if it is cut short, or "
        raise ModelError(f"{what} {' and '.join(told)}; {again}{remedy}")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise ModelError(f"{what} have shape {[*shapes[name]]} in {name}, which must be {[*shape]}; {remedy}")
