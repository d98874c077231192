"""The models that ``benchmarks/gpu.py`` measures, and the settings that it measures them with."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import full_size
import numpy as np
import torch
from full_size import FAMILIES
from gpu_record import Measurement
from measure import seconds
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from vcf_batch.config.run_config import RunConfig
from vcf_batch.config.sampling import Sampling
from vcf_batch.vcf.attention import Kernel
from vcf_batch.vcf.fusion import Fusion
from vcf_batch.vcf.pipeline import VCFPipeline
from vcf_batch.worker.device import Device

SCALE = 9.0
ASSUMED = {"sd21": 0.6, "sdxl": 1.2}
"""Seconds that an image is assumed to take until one has been measured."""
SMOKE_SHARE = 0.1
"""Share of the estimated seconds that a measurement is assumed to take at the tiny shapes."""
STOCK_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Kernels of attention as torch prefers them on Hopper, if nothing is fixed."""


class Goals(NamedTuple):
    """The most seconds that an image may take, and how the table shows it; None where nobody has set a goal."""

    batch: float | None = None
    shown: str = ""
    one: float | None = None
    """For a batch of one."""
    optimisation: float | None = None
    """For a step of prompt-noise optimisation."""


GOALS = {"sd21": Goals(0.45, "<= 0.45; 0.39; 0.35", 0.8, 1.4), "sdxl": Goals()}


class Bench:
    """The models, each built when it is first needed. What cannot be built fails the measurements that need it.

    Args:
        smoke: take tiny shapes on the CPU.
        family: one of :data:`full_size.FAMILIES`.
    """

    def __init__(self, smoke: bool, family: str = "sd21") -> None:
        self.smoke, self.family = smoke, family
        self.goals = GOALS[family]
        self.shapes = FAMILIES[family][smoke]
        self.kind = "cpu" if smoke else "cuda"
        self.batch = 3 if smoke else 8
        self.sizes = (1, 2, 4, 5) if smoke else (1, 16, 32, 64)
        """Batch sizes that are measured besides :attr:`batch`."""
        self.few = 4 if smoke else 10
        """Number of denoising steps for comparisons of output."""
        self.few_steps = (1, 2) if smoke else (5, 20)
        """Numbers of denoising steps that are measured besides the usual one."""
        self.config = RunConfig(
            manifest="-",
            output="-",
            gpus_per_worker=0 if smoke else 1,
            dtype="bfloat16",
            steps=self.shapes.steps,
            guidance_scale=SCALE,
            strength=1.0,
            height=self.shapes.pixels,
            width=self.shapes.pixels,
            image_tokens="all",
            compile=True,
            batch_size=self.batch,
        )
        self.per_image: dict[str, float] = {}
        """Measured seconds per image, by name of the measurement."""
        self.device_failure: Exception | None = None
        """Why the device could not be set up as a worker does it."""
        self._built: dict[str, Any] = {}

    def estimate(self, measurement: Measurement) -> float:
        """Seconds that a measurement is likely to take."""
        image = self.per_image.get("eager/rule", 0 if self.smoke else ASSUMED[self.family])
        return measurement.seconds * (SMOKE_SHARE if self.smoke else 1) + measurement.images * image

    # Models

    def built(self, name: str, build: Callable[[], Any]) -> Any:
        """The result of ``build``, which is called once. Its failure is raised each time, and costs time only once."""
        if name not in self._built:
            try:
                self._built[name] = build()
            except Exception as error:
                self._built[name] = RuntimeError(f"{name} could not be built: {type(error).__name__}: {error}")
                raise
        if isinstance(self._built[name], Exception):
            raise self._built[name]
        return self._built[name]

    def drop(self, name: str) -> None:
        """Forget a model, to free its memory."""
        self._built.pop(name, None)

    @functools.cached_property
    def device(self) -> Device:
        """The device as a worker sets it up, or else with torch's own choice among the fixed kernels of attention."""
        try:
            return Device.set_up(self.config)
        except Exception as error:
            self.device_failure = error
            return Device(self.kind, torch.bfloat16, self.config.cpus_per_worker, "flash2", True)

    @property
    def kernel(self) -> Kernel | None:
        """The kernel of the UNet's attention by the rule."""
        return self.device.attention_kernel

    @property
    def pipeline(self) -> VCFPipeline:
        """The pipeline, set up as a worker does it."""
        kernel = self.kernel  # before the pipeline, as setting up the device fixes what kernels may be chosen

        def build() -> VCFPipeline:
            return full_size.pipeline(self.shapes, self.kind, torch.bfloat16).set_up(self.kind, attention=kernel)

        built: VCFPipeline = self.built("pipeline", build)
        return built

    @functools.cached_property
    def pictures(self) -> list[Image.Image]:
        """A reference for each sample of the largest batch."""
        random = np.random.default_rng(0).integers(0, 256, (max(self.batch, *self.sizes), 64, 64, 3), dtype=np.uint8)
        return [Image.fromarray(pixels).resize((self.shapes.pixels,) * 2) for pixels in random]

    # Settings

    @contextlib.contextmanager
    def attention(self, processor: Any) -> Iterator[None]:
        """Within the block the UNet has another attention processor."""
        unet = self.pipeline.unet
        own = unet.attn_processors
        unet.set_attn_processor(processor)
        try:
            yield
        finally:
            unet.set_attn_processor(dict(own))

    @contextlib.contextmanager
    def contiguous(self, *networks: torch.nn.Module) -> Iterator[None]:
        """Within the block the networks are in the layout that they are loaded in, not channels last."""
        for network in networks:
            network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        try:
            yield
        finally:
            for network in networks:
                if self.kind == "cuda":
                    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @contextlib.contextmanager
    def as_stock(self) -> Iterator[None]:
        """Within the block torch chooses its kernels as it does without this package."""
        torch.use_deterministic_algorithms(False)
        try:
            with sdpa_kernel(STOCK_ORDER, set_priority=True):
                yield
        finally:
            torch.use_deterministic_algorithms(True)

    @contextlib.contextmanager
    def compiled(self) -> Iterator[None]:
        """Within the block UNet and VAE decoder are compiled when they are called."""
        pipeline = self.pipeline.set_up(self.kind, compiled=True, attention=self.kernel)
        try:
            yield
        finally:
            for network in (pipeline.unet, pipeline.vae.decoder):
                del network.forward
            torch.compiler.reset()

    # Work

    def draw(
        self,
        batch: int,
        steps: int | None = None,
        pipeline: VCFPipeline | None = None,
        text_only: bool = False,
        **sampling: Any,
    ) -> torch.Tensor:
        """Generate ``batch`` images, each with its own prompt and, unless ``text_only``, its own reference.

        Returns:
            float32 ``[B, 3, H, W]`` on the CPU.
        """
        return (pipeline or self.pipeline).generate(
            self.prompts(batch),
            None if text_only else self.pictures[:batch],
            seeds=range(batch),
            guidance_scale=SCALE,
            steps=steps,
            strength=1.0,
            **sampling,
        )

    def prompts(self, batch: int) -> list[str]:
        """``batch`` different prompts."""
        return [f"a picture of the {number}th thing" for number in range(batch)]

    def time(self, name: str, batch: int, repeats: int = 1, **how: Any) -> float:
        """Seconds per image, from the encoding of prompts and references to images on the CPU.

        Two denoising steps come first, so that the memory is allocated and kernels are loaded. The result is kept.

        Args:
            name: name of the measurement.
            batch: number of images.
            repeats: number of calls, whose median counts.
            how: see :meth:`draw`.
        """
        self.draw(batch, **{**how, "steps": 2})
        self.per_image[name] = seconds(lambda: self.draw(batch, **how), repeats) / batch
        return self.per_image[name]

    def time_from_few(self, batch: int) -> float:
        """Seconds per image of all steps, reckoned from 2 and :attr:`few` steps: every step takes the same time."""
        self.draw(batch, 2)
        short, long = (seconds(functools.partial(self.draw, batch, steps), 1) for steps in (2, self.few))
        return (short + (self.shapes.steps - 2) * (long - short) / (self.few - 2)) / batch

    def inputs(self, batch: int, steps: int) -> tuple[Any, torch.Tensor, Any]:
        """The result of :meth:`VCFPipeline.prepare` for ``batch`` samples."""
        text, negative = (self.pipeline.family.encode([text] * batch) for text in ("a picture", ""))
        fusions = [Fusion([tokens]) for tokens in self.pipeline.encode_references(self.pictures[:batch])]
        sampling = Sampling(steps=steps)
        return self.pipeline.prepare(
            text, negative, fusions, seeds=range(batch), guidance_scale=SCALE, sampling=sampling
        )

    def predict(self, unet: Any, batch: int = 2) -> torch.Tensor:
        """A UNet's prediction for fixed random latents and tokens, float32 ``[B, 4, h, w]``."""
        size, width = self.shapes.unet["sample_size"], self.shapes.unet["cross_attention_dim"]
        random = torch.Generator(self.kind).manual_seed(0)
        latents, tokens = (
            torch.randn(batch, *shape, device=self.kind, generator=random).to(unet.dtype)
            for shape in ((4, size, size), (100, width))
        )
        with torch.no_grad():
            return unet(latents, 500, tokens, added_cond_kwargs=self._added(batch, unet), return_dict=False)[0].float()

    def _added(self, batch: int, unet: Any) -> dict[str, torch.Tensor] | None:
        """What the UNet of the family gets besides tokens, for ``batch`` samples."""
        if self.shapes.text_2 is None:
            return None
        sizes = torch.tensor([[self.shapes.pixels, self.shapes.pixels, 0, 0, self.shapes.pixels, self.shapes.pixels]])
        pooled = torch.ones(batch, self.shapes.text_2["projection_dim"], device=self.kind, dtype=unet.dtype)
        return {"text_embeds": pooled, "time_ids": sizes.float().repeat(batch, 1).to(self.kind)}

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """The result of a call, and the seconds until the device has done its work."""
        self.synchronize()
        begin = time.perf_counter()
        result = work()
        self.synchronize()
        return result, time.perf_counter() - begin
