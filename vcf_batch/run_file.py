"""``run.json``: what an output holds, and the lock against generating anything else into it."""

import json
from collections.abc import Mapping
from typing import Any

from vcf_batch import shards, storage
from vcf_batch.config import fingerprint
from vcf_batch.errors import RefusedError

NAME = "run.json"
MAX_BYTES = 1 << 20
TOKEN = "token-"
"""What the names of the files begin with that drivers at work keep in the staging folder."""


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


def claim(output: str, fields: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """Publish ``run.json``, or find that the output holds this very run.

    What another run left there is replaced as long as it has finished no shard and no driver is at work.

    Args:
        output: the run's output.
        fields: what the fingerprint covers.
        description: what else is recorded of the run that comes first.

    Raises:
        RefusedError: the output holds another run. Every difference is listed.
        StorageError: the storage failed.
    """
    url = storage.join(output, NAME)
    data = json.dumps({"fields": fields, "fingerprint": fingerprint(fields), **description}, indent=2).encode()
    found = earlier = read(output)
    if found is None:
        if shards.any_committed(output):
            raise RefusedError(f"{storage.redact(output)} holds shards but no {NAME}; use another output")
        try:
            storage.publish_bytes(url, data, create=True)
            return
        except FileExistsError:  # another driver came first, perhaps with the same run
            found = read(output) or {"fields": {}}
    lines = [
        f"  {name}: {_shown(found['fields'], name)} there, {_shown(fields, name)} now"
        for name in sorted(found["fields"].keys() | fields.keys())
        if found["fields"].get(name) != fields.get(name)
    ]
    if not lines:
        return
    remedy = "Use another output, or rerun with the settings of the run that is there."
    if not shards.any_committed(output):
        tokens = [name for name in storage.list_files(storage.join(output, shards.STAGING)) if name.startswith(TOKEN)]
        if earlier and not tokens:
            storage.publish_bytes(url, data)
            return
        remedy += " It has finished no shard yet: once it has ended, any settings will do."
        if tokens:
            remedy += f" If it was killed, delete {storage.redact(storage.join(output, shards.STAGING, tokens[0]))}."
    raise RefusedError(
        f"{storage.redact(output)} holds another run; they differ in:\n" + "\n".join(lines) + f"\n{remedy}"
    )


def _shown(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    return "nothing" if value is None else value[:12] if name.endswith("_id") else json.dumps(value)
