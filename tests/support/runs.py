"""Small real runs: a random model with a judge, a manifest over images drawn here, and what a run left behind."""

import dataclasses
import io
import itertools
import json
import socket
import tarfile
import tempfile
import time
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from support.scorers import save_clip
from support.tiny_models import build_pipeline
from vcf_batch import sharding, storage
from vcf_batch.config.fingerprint import fingerprint_fields
from vcf_batch.config.row_settings import settings_of
from vcf_batch.config.run_config import RunConfig
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.models.resolution import ResolvedModel
from vcf_batch.output import commits, receipts, shards
from vcf_batch.output.receipts import Receipt
from vcf_batch.output.row_json import row_json
from vcf_batch.output.run_file import RunRecord
from vcf_batch.records import TRIPLET, Objective, Sample, Scores, Shard, Status
from vcf_batch.setup import absolute_paths, claim, defaults, manifest_check, model_check, run_models
from vcf_batch.setup.job import Job, fusions_of, schema_of
from vcf_batch.setup.run_models import Models
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.worker import worker
from vcf_batch.worker.worker import Worker

SIZE: Mapping[str, Any] = {"height": 32, "width": 32}
"""The smallest images that a run may ask for; the model's own 16 pixels are below it."""

PROMPTS = ("a red disc", "a blue star on sand", "two rings", "green waves, soft")


def save_model(folder: Path) -> Path:
    """A pipeline of 16x16 images with random weights, and a judge beside it."""
    build_pipeline().save_pretrained(folder)
    save_clip(folder / "judge")
    return folder


def png(seed: int, size: int = 24) -> bytes:
    """A random picture as a PNG file."""
    return picture(seed, size, "png")


def picture(seed: int, size: int, image_format: str) -> bytes:
    """A random picture as an image file; ``image_format`` is its extension."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {"jpg": "JPEG"}.get(image_format, image_format))
    return buffer.getvalue()


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write files into a folder, by their paths in it."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_manifest(folder: Path, rows: int, columns: Mapping[str, list[Any]] | None = None) -> Path:
    """A manifest over four prompts and three references; every fifth row is text only. ``columns`` replace or add."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        (folder / f"reference{number}.png").write_bytes(png(number))
    values: dict[str, list[Any]] = {
        "prompt": [PROMPTS[row % len(PROMPTS)] for row in range(rows)],
        "reference": [None if row % 5 == 4 else f"reference{row % 3}.png" for row in range(rows)],
        "label": [f"row {row}" for row in range(rows)],
    }
    pq.write_table(pa.table(values | dict(columns or {})), folder / "manifest.parquet")
    return folder / "manifest.parquet"


def write_output(
    manifest: Path,
    output: Path,
    shard_size: int,
    failed: Container[int] = (),
    model: str = "m",
    rejected: Container[int] = (),
    **options: Any,
) -> Job:
    """What a run leaves behind, without a model: random pictures and scores by row number, but for the failed and the
    rejected rows. ``model`` is the name in its record, ``options`` are further settings."""
    job = begin_output(manifest, output, shard_size, model, **options)
    for shard in job.shards:
        commit_pictures(job, shard, failed, rejected)
    return job


def begin_output(manifest: Path, output: Path, shard_size: int, model: str = "m", **options: Any) -> Job:
    """What a run without a model leaves behind that has finished no shard; see :func:`write_output`."""
    opened = Manifest.open(str(manifest))
    chosen = {"strength": 1.0, "steps": 4, "guidance_scale": 5.0, "dtype": "float32", "gpus_per_worker": 0}
    settings: dict[str, Any] = {**SIZE, **chosen, "shard_size": shard_size, **options}
    config = RunConfig(manifest=opened.url, output=str(output), **settings)
    fields = fingerprint_fields(
        config,
        manifest=opened.identity,
        model="m",
        judge="m/judge",
        lpips="none",
        pno_guide=None,
        safety_checker=None,
        ip_adapter=None,
    )
    job = Job(config, opened, Models(ResolvedModel(model, "hub", model, "0" * 40), None, "none", "none"), fields)
    claim.claim(job)
    return job


def commit_pictures(job: Job, shard: Shard, failed: Container[int] = (), rejected: Container[int] = ()) -> None:
    """Commit a shard with random pictures and scores by row number, but for the failed and the rejected rows."""
    manifest, ending = job.manifest, job.config.image_format
    with (
        tempfile.TemporaryDirectory() as scratch,
        shards.ShardWriter(scratch, shard, ending, schema_of(job.config, manifest)) as writer,
    ):
        for row in manifest.rows(shard.start, shard.stop, job.config.seed):
            used = settings_of(row, job.config)
            if row.number in failed or row.number in rejected:
                status: Status = "failed" if row.number in failed else "rejected"
                writer.add(Sample(row, status, used, error_message="no"))
                continue
            scores, objective = (
                Scores(row.number / 16, None, None),
                Objective(1.5, 0.5, row.number, row.number % 2 == 1),
            )
            drawn = picture(row.number, 32, ending)
            triplet = {name: picture(row.number + 99, 32, ending) for name in TRIPLET if job.config.triplets}
            writer.add(Sample(row, "success", used, drawn, 32, 32, scores, pno_objective=objective, triplet=triplet))
        files = writer.finish()
        receipt = Receipt(
            shard, job.fingerprint, 1, files.counts, files.entries, {}, {}, files.means, sampled=files.sampled
        )
        commits.commit(job.config.output, receipt, commits.stage(files, job.config.output, shard, "attempt"))


def settled(manifest: Path, output: Path, model: Path, **options: Any) -> Job:
    """What the driver knows before it starts workers."""
    config = RunConfig(
        manifest=str(manifest), output=str(output), model=str(model), gpus_per_worker=0, **SIZE, **options
    )
    return settle(absolute_paths.absolute(config))


def settle(config: RunConfig, record: RunRecord | None = None) -> Job:
    """A run with absolute paths, checked and settled as the driver does it."""
    opened = manifest_check.open_checked(config, record)
    models = run_models.resolve(config, claim.commits_of(config, record))
    model_check.check(config, opened, models, fusions_of(config, opened))
    return defaults.settle(config, opened, models)


def load(manifest: Path, output: Path, model: Path, **options: Any) -> Worker:
    """A worker in this process, as an actor starts it."""
    return worker.load(settled(manifest, output, model, **options))


def another(loaded: Worker, manifest: Path, output: Path, **options: Any) -> Worker:
    """A worker for another manifest with the parts of ``loaded``."""
    options = {"batch_size": 4, "shard_size": 1000} | options
    opened = Manifest.open(str(manifest))
    config = loaded.components.config.replace(manifest=str(manifest), output=str(output), **options)
    reader = ReferenceReader(opened.base, (), 1_000_000)
    return Worker(dataclasses.replace(loaded.components, config=config, references=reader), opened, "f" * 64)


def stage(
    subject: Worker, task: ShardTask, attempt_id: str, existing: Mapping[int, Sample] = MappingProxyType({})
) -> tuple[Receipt, dict[str, str]]:
    """The receipt and the staged files of an attempt at a shard."""
    made = subject.run(task, attempt_id, existing)
    assert made, "an attempt leaves files"
    return made


def commit(
    subject: Worker, attempt: int = 1, existing: Mapping[int, Sample] = MappingProxyType({}), **given: Any
) -> Receipt:
    """Run the manifest as one shard and commit it, as the driver does; ``given`` are fields of the task."""
    task = ShardTask(sharding.ShardPlan(subject.manifest.num_rows, 1000)[0], attempt, **given)
    receipt, staged = stage(subject, task, f"attempt-{attempt}", existing)
    commits.commit(subject.components.config.output, receipt, staged)
    return receipt


def generate(manifest: Path, output: Path, model: Path, **options: Any) -> Path:
    """A whole run in this process, shard by shard and without Ray: what no fault can happen to. Returns ``output``."""
    run_here(settled(manifest, output, model, **options).config)
    return output


def run_here(config: RunConfig) -> None:
    """A whole run in this process, shard by shard and without Ray."""
    job = settle(absolute_paths.absolute(config))
    claim.claim(job)
    loaded = worker.load(job)
    for shard in job.shards:
        commits.commit(job.config.output, *stage(loaded, ShardTask(shard), shard.name))


def data_files(output: Path) -> dict[str, bytes]:
    """Name to bytes of a run's tars and parquets."""
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.suffix in (".tar", ".parquet")}


def rows_of(output: Path) -> list[dict[str, Any]]:
    """The rows of all parquets, in order."""
    return [row for path in sorted(output.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Look again and again until ``condition`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def read_receipts(output: str) -> dict[int, Receipt]:
    """The receipts of an output by shard index."""
    return {receipt.shard.index: receipt for receipt in receipts.read(output)}


class Files:
    """One shard of an output, taken apart."""

    def __init__(self, output: Path, name: str) -> None:
        self.tar, self.parquet = output / f"{name}.tar", output / f"{name}.parquet"
        self.receipt = output / f"{name}_stats.json"
        self.table = pq.read_table(self.parquet)
        with tarfile.open(self.tar) as tar:
            self.members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.table.to_pylist()

    def edit(self, row: int, **columns: Any) -> None:
        """Change a row in the parquet."""
        rows = self.rows
        rows[row] |= columns
        self.table = pa.Table.from_pylist(rows, self.table.schema)

    def edit_everywhere(self, row: int, **columns: Any) -> None:
        """Change a row in the parquet and the JSON that repeats it."""
        self.edit(row, **columns)
        key = self.rows[row]["key"]
        self.replace(f"{key}.json", row_json(self.table.slice(row, 1).to_batches()[0]))

    def replace(self, name: str, data: bytes) -> None:
        self.members = [(member, data if member == name else old) for member, old in self.members]

    def write(self) -> None:
        """Put it back together with a receipt to match, as someone does who knows how."""
        pq.write_table(self.table, self.parquet)
        with tarfile.open(self.tar, "w") as tar:
            for name, data in self.members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        self.match()

    def match(self) -> None:
        entries = {"tar": storage.digest(str(self.tar)), "parquet": storage.digest(str(self.parquet))}
        self.edit_receipt(files={kind: dataclasses.asdict(entry) for kind, entry in entries.items()})

    def edit_receipt(self, **changes: Any) -> None:
        self.receipt.write_text(json.dumps(json.loads(self.receipt.read_text()) | changes))


class Killed(BaseException):
    """The driver dies here."""


def dies_in_scores(work: Callable[[], object], steps: int, after: bool) -> bool:
    """Let a call die at a change below ``_scores``, once it has made ``steps``; whether it died.

    Args:
        work: the call.
        after: whether it dies after that change, rather than before.
    """
    left = itertools.count()

    def dying(change: Any) -> Any:
        def run(url: str, *arguments: Any, **given: Any) -> Any:
            is_last = "_scores" in url and next(left) == steps
            if is_last and not after:
                raise Killed
            result = change(url, *arguments, **given)
            if is_last:
                raise Killed
            return result

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in ("publish_bytes", "remove"):
            patch.setattr(storage, name, dying(getattr(storage, name)))
        try:
            work()
        except Killed:
            return True
    return False


def kill_after(steps: int, work: Callable[[], object]) -> None:
    """Let the driver die at its work, once it has made so many changes to the output."""
    left = iter(range(steps))

    def dying(step: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            if next(left, None) is None:
                raise Killed
            step(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("move", "publish_bytes", "remove_tree"):
            patch.setattr(storage, name, dying(getattr(storage, name)))
        with pytest.raises(Killed):
            work()
