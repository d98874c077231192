"""The headings under which help texts list the settings of a run."""

from collections.abc import Mapping, Sequence

OPTION_GROUPS: Mapping[str, Sequence[str]] = {
    "Settings": ("config", "dump_config"),
    "Manifest": (
        *("limit", "rows", "seed", "prompt_column", "reference_column", "id_column", "seed_column", "carry"),
        *("reference_root", "max_pixels"),
    ),
    "Model": ("model", "revision", "dtype", "compile"),
    "What transfers": (
        *("fusion", "strength", "ip_adapter", "image_encoder", "fusion_lo", "fusion_hi", "role", "unconditional"),
        *("image_tokens", "lora"),
    ),
    "Sampling": (
        *("steps", "guidance_scale", "guidance_lo", "guidance_hi", "scheduler", "eta", "deep_cache"),
        *("negative_prompt", "long_prompts", "height", "width", "original_height", "original_width", "crop_top"),
        *("crop_left", "target_height", "target_width", "batch_size"),
    ),
    "Prompt-noise optimisation": ("pno_steps", "pno_guide", "pno_lr_conditioning", "pno_lr_noise", "pno_gamma"),
    "Scores and gates": (
        *("judge", "lpips", "lpips_weights", "texture", "min_clip_score", "min_clip_reference", "max_lpips"),
        *("min_content_alignment", "min_style_similarity", "calibration", "safety_checker", "attempts", "best_by"),
        "max_failed",
    ),
    "Output": ("image_format", "triplets", "mark", "shard_size", "push"),
    "Cluster": (
        *("num_workers", "gpus_per_worker", "cpus_per_worker", "one_device_type", "allow_smaller_batches"),
        *("stall_timeout", "deadline", "address"),
    ),
    "Diagnostics": ("as_json", "verbosity", "log_format", "profile", "debug", "_click_default_help"),
}
"""Names of the parameters of ``generate``, by their heading."""

WORKER_GROUPS: Mapping[str, Sequence[str]] = {name: OPTION_GROUPS[name] for name in ("Cluster", "Diagnostics")}
"""Headings of commands that use workers, and take their other settings from an output."""
