"""Sampling: the settings of the way from noise to an image."""

from dataclasses import dataclass

from vcf_batch.config.checks import check_between, check_choice
from vcf_batch.config.limits import MAX_DEEP_CACHE, MAX_STEPS, MAX_TOLD_SIZE, SCHEDULERS, TOLD_SIZES
from vcf_batch.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The way from noise to an image, as all samples of a batch take it.

    Raises:
        UsageError: a value is outside its limits.
    """

    guidance_lo: float = 0.0
    """Start of the guided part of the schedule, as a fraction t / 999; 1 is pure noise. The part ends at
    ``guidance_hi``, both included. In other steps the unconditional side is not computed, which halves their
    operations."""
    guidance_hi: float = 1.0
    deep_cache: int = 1
    """Number N of steps that share one output of the UNet's deep blocks: they are computed only in every Nth step. 1
    computes them in every step."""
    steps: int | None = None
    """Number of denoising steps. None is the model's recommendation."""
    scheduler: str | None = None
    """One of :data:`SCHEDULERS`. None is the pipeline's own scheduler, which no run uses."""
    eta: float = 0.0
    """Share of new noise in each step, 0 to 1. Only ``ddim`` takes another value than 0."""
    height: int | None = None
    """Height of an image in pixels. None is the model's native size."""
    width: int | None = None
    original_height: int | None = None
    """Height of the picture before any cropping, as a Stable Diffusion XL is told; small ones make blurred images. None
    is that of the image. Other models are told none of these sizes."""
    original_width: int | None = None
    crop_top: int = 0
    """Number of rows of pixels cut off at the top, as a Stable Diffusion XL is told."""
    crop_left: int = 0
    target_height: int | None = None
    """Height of the picture that is meant, as a Stable Diffusion XL is told. None is that of the image."""
    target_width: int | None = None

    def __post_init__(self) -> None:
        for name in TOLD_SIZES:
            check_between(name, getattr(self, name), 0 if name.startswith("crop") else 1, MAX_TOLD_SIZE)
        check_between("guidance_lo", self.guidance_lo, 0, 1)
        check_between("guidance_hi", self.guidance_hi, self.guidance_lo, 1)
        check_between("deep_cache", self.deep_cache, 1, MAX_DEEP_CACHE)
        check_between("steps", self.steps, 1, MAX_STEPS)
        if self.scheduler is not None:
            check_choice("scheduler", self.scheduler, SCHEDULERS)
        check_between("eta", self.eta, 0, 1)
        if self.eta and self.scheduler not in (None, "ddim"):
            raise UsageError(f"eta is {self.eta:g}; the scheduler {self.scheduler!r} takes 0 only: use ddim")

    @property
    def told_sizes(self) -> list[str]:
        """The names of :data:`TOLD_SIZES` that differ from their default."""
        return [name for name in TOLD_SIZES if getattr(self, name) != getattr(Sampling, name)]

    @property
    def added_noises(self) -> int:
        """Number of noises that a sample needs besides its initial one. Its number of steps is given."""
        return (self.steps or 0) if self.eta else 0
