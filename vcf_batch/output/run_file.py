"""``run.json``: what an output holds, and the refusal to generate anything else into it."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from vcf_batch import storage
from vcf_batch.config import fingerprint
from vcf_batch.errors import RefusedError

NAME = "run.json"
MAX_BYTES = 1 << 20

LAYOUT = 2
"""Of an output: it goes up with what an output of before cannot be read, verified or resumed by."""

Obstacle = Callable[[Mapping[str, Any]], str | None]
"""Given the fields of a run that differs in its manifest alone: why it cannot be extended to this one, if so."""


class AnotherLayout(RefusedError):
    """The output was written by a version of vcf-batch with other columns or settings."""


def read(output: str) -> dict[str, Any] | None:
    """The output's ``run.json``; None if there is none.

    Raises:
        RefusedError: it is there, but is not what a run writes.
        AnotherLayout: it is what a run of another version writes.
        StorageError: the storage failed.
    """
    url = storage.join(output, NAME)
    try:
        with storage.refusals_as_storage_errors():
            record = json.loads(storage.read_bytes(url, limit=MAX_BYTES))
        if isinstance(record["fields"], dict) and record["fingerprint"] == fingerprint(record["fields"]):
            if (layout := record.get("layout")) != LAYOUT:
                raise AnotherLayout(
                    f"{output} has layout {layout}, and this version of vcf-batch reads layout {LAYOUT}: use the "
                    f"version that wrote it, which {url} names, or another output"
                )
            return record
    except FileNotFoundError:
        return None
    except (storage.NotAFileError, ValueError, KeyError, TypeError):
        pass
    raise RefusedError(f"{url} is damaged or was not written by vcf-batch; use another output")


def claim(
    output: str,
    found: Mapping[str, Any] | None,
    fields: Mapping[str, Any],
    description: Mapping[str, Any],
    *,
    begun: bool,
    obstacle: Obstacle | None = None,
    publish: bool = True,
) -> tuple[str, ...]:
    """Publish ``run.json``, or find that the output holds this very run. For the driver that owns the output.

    What another run left there is replaced as long as it has not begun. A run with fewer rows may be extended.

    Args:
        output: the run's output.
        found: its ``run.json``, read since the driver owns it.
        fields: what the fingerprint covers.
        description: what else is recorded of the run.
        begun: whether the output holds something that a run has finished.
        obstacle: without it, no run is extended.
        publish: False only looks.

    Returns:
        Fingerprints of the runs that this one extends.

    Raises:
        RefusedError: the output holds another run. Every difference is listed.
        StorageError: the storage failed.
    """
    if found is None and begun:
        raise RefusedError(f"{output} holds results but no {NAME}; use another output")
    extends: tuple[str, ...] = tuple(found.get("extends", ())) if found else ()
    if found and found["fields"] == fields:
        return extends
    if found and begun:
        _refuse_another(output, found["fields"], fields, obstacle)
        extends = (*extends, found["fingerprint"])
    else:
        extends = ()
    if publish:
        record = {
            "layout": LAYOUT,
            "fields": fields,
            "fingerprint": fingerprint(fields),
            "extends": extends,
            **description,
        }
        storage.publish_bytes(storage.join(output, NAME), json.dumps(record, indent=2).encode())
    return extends


def _refuse_another(
    output: str, there: Mapping[str, Any], fields: Mapping[str, Any], obstacle: Obstacle | None
) -> None:
    """Refuse whatever is not a longer run than the one that is there."""
    differing = [name for name in sorted(there.keys() | fields.keys()) if there.get(name) != fields.get(name)]
    reason = ""
    if obstacle and differing == ["manifest_id"]:
        if (found := obstacle(there)) is None:
            return
        reason = found + " "
    lines = "".join(f"  {name}: {_shown(there, name)} there, {_shown(fields, name)} now\n" for name in differing)
    raise RefusedError(
        f"{output} holds another run; they differ in:\n{lines}{reason}"
        "Use another output, or rerun with the settings of the run that is there."
    )


def _shown(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    return "nothing" if value is None else value[:12] if name.endswith("_id") else json.dumps(value)
