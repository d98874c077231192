"""The status of a run, from its output alone: while it runs, after it ended, and after it died."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow.compute as pc

from vcf_batch.driver.progress import duration, plural, told_truncated
from vcf_batch.errors import DamageFound, redact
from vcf_batch.models import embedded
from vcf_batch.output import lease, progress_file
from vcf_batch.output.lease import Owner
from vcf_batch.output.output import Output
from vcf_batch.output.progress_file import Told
from vcf_batch.output.scores.store import ScoreStore
from vcf_batch.output.shards import side_by_side
from vcf_batch.output.sums import RunSums
from vcf_batch.records import STATUSES, Shard
from vcf_batch.report.figures import Cause, Figures, read_rows

State = Literal["finished", "running", "stopped"]

MOST_LISTED = 10_000
"""Largest number of shards of a run at work whose files are listed. An object store lists them in 30 requests, one
after the other, and a disk in half a second."""
SHOWN_CAUSES = 8


@dataclass(frozen=True, repr=False)
class Status:
    """The status of a run. As text it is told in words, as ``vcf-batch status`` prints it."""

    output: str
    state: State
    """``running`` if a driver is at work, ``stopped`` if shards are left and no driver is at work."""
    rows: int
    """Number of rows of the manifest."""
    shards: int
    """Number of shards of the run."""
    totals: RunSums
    """Sums over the finished shards."""
    set_aside: dict[str, str]
    """Reasons of the shards that failed for good when the run was last driven, by name of the shard."""
    damaged: dict[str, str]
    """Shards that have a receipt and do not exist, by name: what is wrong with each. Empty if nothing was listed."""
    files_listed: bool
    """Whether the files were listed and compared with the counts. Else these are those that the driver at work has last
    told, ten seconds ago at most."""
    causes: list[Cause]
    """Causes for which rows of :attr:`RunSums.failing` have no sample, most frequent first."""
    model: Mapping[str, Any]
    """The model that generates: ``name`` and ``identity``, as ``run.json`` has them."""
    ip_adapter: str | None
    """The name of the IP-Adapter; None without one."""
    fusion: str
    """Fusion of rows without one of their own."""
    strength: float
    """Strength of rows without a fusion and a strength of their own."""
    owner: Owner | None
    loras: Sequence[str] = ()
    """The LoRAs of the run, each with its scale. Rows may have others, in their column."""
    scores: Mapping[str, int] = field(default_factory=dict)
    """Number of shards with each score that was added, by its name. Those replaced since count too."""

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last row at the last rate; None if the rate is not known or nothing is left."""
        left = self.rows - self.totals.counts.total()
        return left / self.totals.rate if left and self.totals.rate else None

    def to_dict(self) -> dict[str, Any]:
        """The status as plain JSON types."""
        totals = self.totals
        ended = totals.latest and datetime.fromtimestamp(totals.latest, UTC).isoformat(timespec="seconds")
        return {
            "output": redact(self.output),
            "state": self.state,
            "model": self.model.get("name"),
            "embedded_test_model": embedded.is_embedded(self.model),
            "ip_adapter": self.ip_adapter,
            "loras": [*self.loras],
            "fusion": self.fusion,
            "strength": self.strength,
            "rows": {"total": self.rows, **{status: totals.counts[status] for status in STATUSES}},
            "shards": {"total": self.shards, "done": len(totals.done), "retried": totals.retried},
            "prompts_truncated": totals.truncated,
            "bytes": totals.bytes,
            "rows_per_second": totals.rate,
            "workers": len(totals.at_work),
            "seconds_left": self.seconds_left,
            "last_shard_ended": ended,
            "means": totals.means,
            "device_types": totals.device_types,
            "devices": {
                name: {"rows": rows, "rows_per_worker_second": _ratio(rows, totals.device_seconds[name])}
                for name, rows in totals.devices.items()
            },
            "device_busy": _ratio(totals.phases["sample"], totals.worker_seconds),
            "set_aside": self.set_aside,
            "damaged": self.damaged,
            "files_listed": self.files_listed,
            "scores": {name: {"shards": count} for name, count in self.scores.items()},
            "causes": [asdict(cause) for cause in self.causes],
            "owner": self.owner and asdict(self.owner),
        }

    def __str__(self) -> str:
        return "\n".join([self.headline(), *(f"  {name:<10}{text}" for name, text in self.lines())])

    __repr__ = __str__

    def headline(self) -> str:
        """Output, state, and number of rows and shards that are done."""
        done = self.totals.counts.total()
        damaged = f", {len(self.damaged):,} damaged" if self.damaged else ""
        return (
            f"{redact(self.output)}: {self.state}, {done:,} of {self.rows:,} rows ({done / self.rows:.0%}), "
            f"{len(self.totals.done):,} of {self.shards:,} shards{damaged}"
        )

    def lines(self) -> list[tuple[str, str]]:
        """The rest in words, each line with its name."""
        totals = self.totals
        lines = [
            ("rows", ", ".join(f"{totals.counts[status]:,} {status}" for status in STATUSES)),
            ("model", embedded.label(self.model) + (f", IP-Adapter {self.ip_adapter}" if self.ip_adapter else "")),
            *(("lora", told) for told in self.loras),
            ("fusion", f"{self.fusion}, strength {self.strength:g}"),
        ]
        if totals.truncated:
            lines.append(("cut off", told_truncated(totals.truncated)))
        if totals.rate:
            left = f"; {duration(self.seconds_left)} left at this rate" if self.seconds_left else ""
            lines.append(
                ("rate", f"{totals.rate:.2f} samples a second by {plural(len(totals.at_work), 'worker')}{left}")
            )
        if totals.latest is not None:
            lines.append(("last", f"a shard ended {duration(max(time.time() - totals.latest, 0))} ago"))
        if totals.means:
            lines.append(("means", ", ".join(f"{name} {mean:.3f}" for name, mean in totals.means.items())))
        if self.scores:
            scored = (f"{name} of {plural(count, 'shard')}" for name, count in self.scores.items())
            lines.append(("scores", ", ".join(scored)))
        lines += [("device", text) for text in self._devices()]
        lines.append(("lease", _described(self.owner)))
        if not self.files_listed:
            why = f"as the run has more than {MOST_LISTED:,} shards"
            lines.append(("files", f"not listed, {why}: the counts are those that its driver has told"))
        lines += [("set aside", f"{name}: {why}") for name, why in self.set_aside.items()]
        lines += [("damaged", f"{name}: {why}") for name, why in list(self.damaged.items())[:SHOWN_CAUSES]]
        lines += [(cause.status, f"{cause.count:,} x {cause.text}") for cause in self.causes[:SHOWN_CAUSES]]
        if len(totals.failing) > 1 or len(self.causes) > SHOWN_CAUSES:
            lines.append(("", f"(reasons in {len(totals.failing)} shards; 'vcf-batch report' reads them all)"))
        return lines

    def _devices(self) -> list[str]:
        totals = self.totals
        busy = _ratio(totals.phases["sample"], totals.worker_seconds)
        told = []
        for name, rows in totals.devices.most_common():
            rate = _ratio(rows, totals.device_seconds[name])
            told.append(f"{name}: {rows:,} rows" + (f", {rate:.2f} a second by each worker" if rate else ""))
        if totals.device_types > 1:
            told.append(f"{totals.device_types} types, whose bytes for the same row may differ (--one-device-type)")
        return [*told, f"busy with sampling {busy:.0%} of the workers' time"] if busy else told


def read(url: str) -> Status:
    """Read the status of a run from its output. Nothing is written, and the reads do not grow with the rows.

    Raises:
        UsageError: there is no output.
        DamageFound: ``run.json`` or a parquet is damaged.
        StorageError: the storage failed.
    """
    return of(Output(url))


def of(output: Output) -> Status:
    """The status of an output's run. For errors see :func:`read`.

    Of a run with more than :data:`MOST_LISTED` shards, the counts of the driver at work are taken as they are.
    """
    owner = lease.owner(output.url)
    if owner and owner.alive and len(output.plan) > MOST_LISTED:
        told = progress_file.glance(output.url, output.fingerprints, output.plan)
        # A shard that was counted may be damaged since: then all are looked at.
        with contextlib.suppress(DamageFound):
            if told is not None:
                return _status(output, owner, told, files_listed=False)
    return _status(output, owner, progress_file.look(output.url, output.fingerprints, output.plan), files_listed=True)


def _status(output: Output, owner: Owner | None, told: Told, files_listed: bool) -> Status:
    totals, num_shards = told.totals, len(output.plan)
    left, store = num_shards - len(totals.done), ScoreStore(output.url)
    return Status(
        output=output.url,
        state="running" if owner and owner.alive else "stopped" if left else "finished",
        rows=output.plan.num_rows,
        shards=num_shards,
        totals=totals,
        set_aside=dict(told.set_aside) if left else {},
        damaged={name: why for name, why in told.damaged.items() if int(name) < num_shards},
        files_listed=files_listed,
        causes=_causes(output, [output.plan[index] for index in totals.failing]),
        model=output.record.models["model"],
        ip_adapter=(output.record.models.get("ip_adapter") or {}).get("name"),
        fusion=output.config.fusion,
        strength=output.config.strength_of(output.config.fusion),
        owner=owner,
        loras=output.record.loras,
        scores={score.name: store.count(score.name) for score in store.definitions()},
    )


def _causes(output: Output, failing: list[Shard]) -> list[Cause]:
    found = Figures()
    for _, table in side_by_side(lambda shard: read_rows(output, shard), failing):
        found.add_failures(table.filter(pc.not_equal(table["status"], "success")))
    return sorted(found.causes.values(), key=lambda cause: -cause.count)


def _described(owner: Owner | None) -> str:
    if owner is None:
        return "nobody is at work"
    silent = "" if owner.silent is None else f", last heartbeat {duration(max(owner.silent, 0))} ago"
    dead = "" if owner.alive else "; it has died: rerun its command to resume"
    return f"process {owner.pid} on {owner.host}, since {owner.started}{silent}{dead}"


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
