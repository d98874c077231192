"""Files of settings: YAML as people write it, the ``run.json`` of an output, and what a command line amounts to."""

from typing import Any

import yaml

from vcf_batch import storage
from vcf_batch.config.mapping import SETTLED, checked_mapping, load_yaml
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import UsageError, redact

MAX_BYTES = 1 << 20
_RECORD = {"layout", "fields", "config"}
"""Entries by which a ``run.json`` is known."""


def read(source: str) -> dict[str, Any]:
    """The settings in a file, by their names.

    Of a ``run.json``, these are the settings of its run. Strengths that the run left to their defaults are left to them
    again.

    Raises:
        UsageError: the file cannot be read, or is no file of settings.
    """
    try:
        text = storage.read_bytes(source, limit=MAX_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the configuration file {source}: {error}") from error
    values = load_yaml(text, redact(source))
    if values.keys() >= _RECORD:
        values = checked_mapping(values["config"], redact(source))
        if values.pop("default_strengths", None) is not None:
            values.pop("strength", None)
    if settled := sorted(SETTLED & values.keys()):
        raise UsageError(f"{settled[0]} in {redact(source)} is no option: leave it out, or give strength instead")
    return values


def dump(config: RunConfig) -> str:
    """Every setting of a run as YAML that :func:`read` takes, without credentials in URLs."""
    values = {name: value for name, value in config.to_record().items() if name not in SETTLED}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
