"""Settings as a mapping: from options, Python or YAML, checked against the fields of a configuration."""

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from vcf_batch.config.checks import SHORT, in_words, is_a
from vcf_batch.errors import UsageError

SETTLED = frozenset({"default_strengths"})
"""Fields of a run's configuration that are no options: only the settling of defaults fills them in."""

DIFFUSERS_NAMES: Mapping[str, str] = {
    "num_inference_steps": "steps",
    "guidance": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "ip_adapter_scale": "strength",
    "sampler": "scheduler",
    "generator": "seed",
    "torch_dtype": "dtype",
    "variant": "dtype",
    "pretrained_model_name_or_path": "model",
    "image_size": "height",
    "resolution": "height",
    "original_size": "original_height",
    "target_size": "target_height",
    "crops_coords_top_left": "crop_top",
    "output_type": "image_format",
    "num_images_per_prompt": "attempts",
}
"""Settings of diffusers and of programs like it, each with the setting of a run that is closest to it."""


def checked_values(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for the fields of a configuration, a dataclass. Paths become texts.

    Raises:
        UsageError: an unknown name, a missing one, or a value of another type than its field's.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        known = [name for name in fields if name not in SETTLED]
        found = meant(unknown[0], known)
        hint = f"did you mean {' or '.join(found)}?" if found else f"known are: {', '.join(known)}"
        raise UsageError(f"unknown setting {SHORT.repr(unknown[0])}; {hint}")
    required = (name for name, field in fields.items() if field.default is dataclasses.MISSING)
    missing = [name for name in required if not values.get(name)]
    if missing:
        raise UsageError(f"{missing[0]} is missing: give it on the command line or in the configuration file")
    given = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in values.items()}
    for name, value in given.items():
        expected = fields[name].type
        if not is_a(value, expected):
            raise UsageError(f"{name} is {SHORT.repr(value)}; it must be {in_words(expected)}")
    return given


def load_yaml(text: str, source: str) -> dict[str, Any]:
    """Parse a configuration file: one mapping of setting to value. Tags are refused (safe loader).

    Raises:
        UsageError: not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(text) or {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UsageError(f"{source} is not valid YAML in line {line}: {error.problem}") from error
    # Numbers and dates that Python cannot hold, and endless nesting, get past YAML's own errors.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(f"{source} is not valid YAML: {error}") from error
    return checked_mapping(values, source)


def checked_mapping(values: Any, source: str) -> dict[str, Any]:
    """A mapping of setting to value, whose names may be written like options.

    Raises:
        UsageError: ``values`` is no mapping.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{source} must be a mapping of setting to value, not {type(values).__name__}")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def meant(name: str, known: Iterable[str]) -> list[str]:
    """The settings of ``known`` that a wrong name may stand for, the best first; none if nothing is like it."""
    there = [*known]
    other = DIFFUSERS_NAMES.get(name)
    return [other] if other in there else difflib.get_close_matches(name, there)
