"""Choices, limits and defaults of settings."""

from collections.abc import Mapping

ALIGNED_FUSIONS = ("naive", "concat", "cross_attention")
"""Fusions of the tokens that an aligner gives: the paper's."""
IP_ADAPTER = "ip_adapter"
"""The fusion by the published weights of an IP-Adapter, which needs no aligner."""
FUSIONS = (*ALIGNED_FUSIONS, IP_ADAPTER)
ROLES = ("all", "style", "palette", "layout")
"""What a reference may decide on: :mod:`vcf_batch.vcf.roles.role`. ``all`` is no limit."""
ROLED_FUSIONS = ("concat", IP_ADAPTER)
"""Fusions that keep the tokens of references apart, so that roles and masks can limit them."""
ADAPTED_ROLES = ("all", "style", "layout")
"""Roles of the fusion ``ip_adapter``. Its tokens have no projections, and without one nothing tells ``palette`` from
``style``."""
UNCONDITIONALS = ("zeros", "blank", "negative")
IMAGE_TOKENS = ("all", "patches", "cls")
SCHEDULERS = ("ddim", "dpm++", "euler")
LONG_PROMPTS = ("truncate", "refuse", "chunk")
MAX_WINDOWS = 16
"""Largest number of windows of a prompt that is encoded in windows (``long_prompts="chunk"``)."""
IMAGE_FORMATS = ("png", "webp", "jpg")
LOG_FORMATS = ("text", "json")
VERBOSITIES = ("quiet", "normal", "verbose")
DTYPES = ("auto", "float32", "bfloat16", "float16")
PAIRINGS = ("cross", "random", "balanced")
LPIPS_NETWORKS = ("auto", "alex", "vgg", "none")

GATES: Mapping[str, str] = {
    "min_clip_score": "clip_score",
    "min_clip_reference": "clip_reference",
    "max_lpips": "lpips",
    "min_content_alignment": "content_alignment",
    "min_style_similarity": "style_similarity",
}
"""Settings that limit the scores of samples, each with its score."""

FALSE_ACCEPTS = (0.01, 0.05, 0.1)
"""Shares of false accepts that a calibration has thresholds for, and that a gate may name."""

DEFAULT_STEPS = 50
DEFAULT_GUIDANCE_SCALE = 9.0
"""Defaults, those of the paper, for a model that recommends nothing (``default_...`` in its model_index.json)."""

MAX_BATCH_SIZE = 4096
MAX_STEPS = 1000
MAX_PNO_STEPS = 1000
MAX_ATTEMPTS = 100
MAX_SEED = 2**63 - 1
MAX_DEEP_CACHE = 1000
MAX_GUIDANCE_SCALE = 1000.0
MAX_STRENGTH = 1000.0
MAX_WEIGHT = 1000.0
"""Largest weight of a reference."""
MAX_PIXELS = 178_000_000
"""Largest number of pixels of a reference. Pillow itself opens nothing larger."""
MAX_EDGE = 8192
"""Longest edge of an output image, in pixels."""
MIN_EDGE = 32
"""Shortest edge of an output image, in pixels. The perceptual networks cannot take less."""

TOLD_SIZES = ("original_height", "original_width", "crop_top", "crop_left", "target_height", "target_width")
"""Sizes in pixels that a Stable Diffusion XL is told, in the order of its time ids."""
MAX_TOLD_SIZE = 16384
