"""``run.json``: what an output holds, and the refusal to generate anything else into it."""

import json
from collections.abc import Mapping
from typing import Any

from vcf_batch import storage
from vcf_batch.config import fingerprint
from vcf_batch.errors import RefusedError

NAME = "run.json"
MAX_BYTES = 1 << 20


def read(output: str) -> dict[str, Any] | None:
    """The output's ``run.json``; None if there is none.

    Raises:
        RefusedError: it is there, but is not what a run writes.
        StorageError: the storage failed.
    """
    url = storage.join(output, NAME)
    try:
        with storage.refusals_as_storage_errors():
            record = json.loads(storage.read_bytes(url, limit=MAX_BYTES))
        if isinstance(record["fields"], dict) and record["fingerprint"] == fingerprint(record["fields"]):
            return record
    except FileNotFoundError:
        return None
    except (storage.NotAFileError, ValueError, KeyError, TypeError):
        pass
    raise RefusedError(f"{storage.redact(url)} is damaged or was not written by vcf-batch; use another output")


def claim(output: str, fields: Mapping[str, Any], description: Mapping[str, Any], *, begun: bool) -> None:
    """Publish ``run.json``, or find that the output holds this very run. For the driver that owns the output.

    What another run left there is replaced as long as it has not begun.

    Args:
        output: the run's output.
        fields: what the fingerprint covers.
        description: what else is recorded of the run that comes first.
        begun: whether the output holds something that a run has finished.

    Raises:
        RefusedError: the output holds another run. Every difference is listed.
        StorageError: the storage failed.
    """
    found = read(output)
    if found is None and begun:
        raise RefusedError(f"{storage.redact(output)} holds results but no {NAME}; use another output")
    there = found["fields"] if found else {}
    if found and there == fields:
        return
    if begun:
        lines = [
            f"  {name}: {_shown(there, name)} there, {_shown(fields, name)} now"
            for name in sorted(there.keys() | fields.keys())
            if there.get(name) != fields.get(name)
        ]
        raise RefusedError(
            f"{storage.redact(output)} holds another run; they differ in:\n" + "\n".join(lines) + "\nUse another "
            "output, or rerun with the settings of the run that is there."
        )
    record = {"fields": fields, "fingerprint": fingerprint(fields), **description}
    storage.publish_bytes(storage.join(output, NAME), json.dumps(record, indent=2).encode())


def _shown(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    return "nothing" if value is None else value[:12] if name.endswith("_id") else json.dumps(value)
