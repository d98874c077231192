"""The device types of a run: which there are, what tells them apart, and which one the run keeps to on request."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vcf_batch.output.receipts import device_type

MAX_SHOWN = 5
"""Number of differences between two device types that a message shows."""


class DeviceTypes:
    """The device types of a run's shards and workers.

    With ``one``, the run keeps to one type: the one with the most rows in the output, else that of the first worker
    that loads. It may be chosen anew while no shard is finished.

    Args:
        devices: one ``device`` for each type of the output's receipts, by type.
        rows: number of rows by type, as in :attr:`vcf_batch.output.sums.RunSums.devices`.
        one: whether workers of one type alone are used.
    """

    def __init__(self, devices: Mapping[str, Mapping[str, Any]], rows: Counter[str], one: bool) -> None:
        self.left_out: dict[str, str] = {}
        """A type of each node that is left out because no device there is of the chosen type."""
        self.chosen: str | None = None
        """The type that the run keeps to; None if it is open."""
        self._known, self._one = dict(devices), one
        """The device of each type that is met, by type."""
        if one:
            # Shards that are all done again have no rows yet, but a type.
            self.chosen = next((name for name, _ in rows.most_common() if name in devices), next(iter(devices), None))

    def takes(self, name: str) -> bool:
        """Whether a worker of this type is used. The first one decides where the type is open."""
        if self._one and self.chosen is None:
            self.chosen = name
        return not self._one or name == self.chosen

    def reopen(self) -> None:
        """Let the next worker that loads decide."""
        self.chosen = None
        self.left_out.clear()

    def differing(self, device: Mapping[str, Any]) -> str | None:
        """Take note of a worker's device.

        Returns:
            What tells its type from another one of the run, in words. None if the type is known already, or the first.
        """
        name = device_type(device)
        if name in self._known:
            return None
        other = next(iter(self._known), None)
        self._known[name] = device
        return None if self._one or other is None else f"{name} and {other} ({differences(device, self._known[other])})"

    def meet(self, device: Mapping[str, Any]) -> None:
        """Take note of a device that the run does not use."""
        self._known.setdefault(device_type(device), device)

    def refused(self, names: Iterable[str]) -> str:
        """Why devices of some types, all of them met, are not used, in words."""
        assert self.chosen is not None
        kept = self._known[self.chosen]
        told = (f"{name} ({differences(self._known[name], kept)})" for name in sorted({*names}))
        return f"{', '.join(told)}; the run keeps to {self.chosen}"


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first differences between two devices, in words."""
    ours, theirs = dict(_flat(one)), dict(_flat(other))
    found = [
        f"{name} {ours.get(name, 'none')} / {theirs.get(name, 'none')}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    more = f", and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else ""
    return ", ".join(found[:MAX_SHOWN]) + more


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
