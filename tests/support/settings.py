"""Settings of runs: the defaults, and a valid value other than the default for each."""

from typing import Any

from vcf_batch.config.run_config import RunConfig

OTHER: dict[str, Any] = {
    "manifest": "n.parquet", "output": "elsewhere", "model": "org/model", "revision": "v1", "fusion": "naive",
    "strength": 0.5, "steps": 7, "guidance_scale": 3.0, "scheduler": "euler", "height": 64, "width": 72,
    "dtype": "float16", "negative_prompt": "blurry", "batch_size": 9, "shard_size": 10, "reference_root": ("s3://b",),
    "max_pixels": 5, "max_failed": 0.5, "judge": "org/clip", "lpips": "none", "lpips_weights": "folder",
    "long_prompts": "refuse", "image_format": "webp", "seed": 3, "limit": 4, "num_workers": 2, "gpus_per_worker": 0.5,
    "cpus_per_worker": 2,
    "mark": False, "log_format": "json", "verbosity": "quiet", "allow_smaller_batches": True, "profile": True,
    "stall_timeout": 60.0,
    "address": "auto", "fusion_lo": 0.25, "fusion_hi": 0.75, "unconditional": "blank", "image_tokens": "cls",
    "role": "layout", "rows": "2:4", "original_height": 16, "original_width": 16, "crop_top": 8, "crop_left": 8,
    "target_height": 16, "target_width": 16,
    "eta": 0.5, "pno_steps": 10, "pno_guide": "org/guide", "pno_lr_conditioning": 0.002, "pno_lr_noise": 0.002,
    "pno_gamma": 0.3, "min_clip_score": 0.2, "min_clip_reference": 0.2, "max_lpips": 0.7, "best_by": "lpips",
    "attempts": 3, "min_content_alignment": 0.3, "min_style_similarity": 0.5, "triplets": True, "texture": True,
    "safety_checker": "own", "guidance_lo": 0.1, "guidance_hi": 0.9, "compile": True, "one_device_type": True,
    "deep_cache": 2, "default_strengths": {"naive": 0.5, "concat": 0.4, "cross_attention": 0.2, "ip_adapter": 0.7},
    "prompt_column": "caption", "reference_column": "image", "id_column": "uid", "seed_column": "noise",
    "carry": ("Seed",), "ip_adapter": "org/weights:x.safetensors", "image_encoder": "org/clip",
    "calibration": "calibration.json", "lora": ("ink=ink.safetensors:0.5",),
}  # fmt: skip
"""A valid value other than the default, for every setting."""


def config(**values: Any) -> RunConfig:
    return RunConfig(**{"manifest": "m.parquet", "output": "out"} | values)
