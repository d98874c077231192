"""Count operations and memory of Stable Diffusion at full size, without computing it: ``python benchmarks/counts.py``.

Parameters, operations, and the memory that a gradient keeps are those of the published configurations in
``vcf_batch/models/single_file/layouts``, at the native size. Everything is on torch's meta device, whose tensors have
no values. A gradient is taken as prompt-noise optimisation takes it: the weights are frozen, attention keeps what
FlashAttention keeps, and UNet and VAE are in the precision that they have in a run of bfloat16.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import click
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vcf_batch.models.single_file import layout

TOKENS = 77
IMAGE_TOKENS = 257
FAMILIES = ("sd15", "sd21", "sdxl")


class _Flash(torch.autograd.Function):
    """Attention that keeps what FlashAttention keeps for its gradient: inputs, output and one sum for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError("nothing is computed")


@contextlib.contextmanager
def flash() -> Iterator[None]:
    """Within the block attention is :class:`_Flash`."""

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        return _Flash.apply(query, key, value)

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield


def kept(network: nn.Module, work: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of a call, without the weights of the network."""
    weights = {each.untyped_storage()._cdata for each in (*network.parameters(), *network.buffers())}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with flash(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def operations(work: Callable[[], Any]) -> int:
    """Number of multiplications and additions of a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


class Counted:
    """The networks of a family on the meta device, and calls of them at an image's size.

    Args:
        family: one of :data:`FAMILIES`.
        height, width: size of the image in pixels; None is the native one.
    """

    def __init__(self, family: str, height: int | None = None, width: int | None = None) -> None:
        unet, vae = (layout.read_config(family, f"{part}/config.json") for part in ("unet", "vae"))
        half = torch.float32 if vae.get("force_upcast") else torch.bfloat16
        with torch.device("meta"):
            self.unet = UNet2DConditionModel.from_config(unet).to(torch.bfloat16).requires_grad_(False)
            self.vae = AutoencoderKL.from_config(vae).to(half).requires_grad_(False)
        native = 8 * unet["sample_size"]
        self.size = height or native, width or native

    def latents(self, count: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(count, 4, *(edge // 8 for edge in self.size), device="meta", dtype=dtype, requires_grad=True)

    def predict(self, count: int, tokens: int) -> Any:
        """Call the UNet for ``count`` latents with ``tokens`` tokens each."""
        config = self.unet.config
        options: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
        added = None
        if config.addition_embed_type is not None:
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            added = {
                "text_embeds": torch.empty(count, pooled, **options),
                "time_ids": torch.empty(count, 6, device="meta"),
            }
        text = torch.empty(count, tokens, config.cross_attention_dim, **options, requires_grad=True)
        step = torch.tensor(500, device="meta")
        return self.unet(self.latents(count), step, text, added_cond_kwargs=added)

    def decode(self) -> Any:
        return self.vae.decode(self.latents(1, self.vae.dtype))

    def encode(self) -> Any:
        return self.vae.encode(torch.empty(1, 3, *self.size, device="meta", dtype=self.vae.dtype))

    def row(self) -> list[str]:
        """The figures of the table, each in its unit."""
        predictions = [functools.partial(self.predict, 1, count) for count in (TOKENS, TOKENS + IMAGE_TOKENS)]
        work: list[Callable[[], Any]] = [*predictions, self.decode, self.encode]
        teraflops = [f"{operations(each) / 1e12:.3f}" for each in work]
        # Both sides of the guidance are one call.
        guided = kept(self.unet, lambda: self.predict(2, TOKENS + IMAGE_TOKENS))
        gibibytes = [f"{each / 2**30:.2f}" for each in (guided, kept(self.vae, self.decode))]
        counts = [f"{sum(each.numel() for each in network.parameters()):,}" for network in (self.unet, self.vae)]
        return [f"{self.size[1]} x {self.size[0]}", *counts, *teraflops, *gibibytes]


@click.command()
@click.option("--family", "families", type=click.Choice(FAMILIES), multiple=True, help="Repeatable.  [default: all]")
@click.option("--height", type=int, help="[default: the native size]")
@click.option("--width", type=int, help="[default: the native size]")
def main(families: tuple[str, ...], height: int | None, width: int | None) -> None:
    """Print one line for each family."""
    logging.set_verbosity_error()  # diffusers warns of every conversion to another precision
    head = ["family", "pixels", "UNet", "VAE", f"TFLOP: UNet, {TOKENS} tokens", f"{TOKENS + IMAGE_TOKENS} tokens"]
    head += ["decode", "encode", "GiB kept: UNet, guided", "decode"]
    click.echo(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for family in families or FAMILIES:
        click.echo(f"| {' | '.join([family, *Counted(family, height, width).row()])} |")


if __name__ == "__main__":
    main()
