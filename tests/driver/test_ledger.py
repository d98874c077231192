"""What of a run is committed, and what its receipts say of samples that a repair keeps."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from support import runs
from vcf_batch import storage
from vcf_batch.driver.ledger import Ledger
from vcf_batch.output.receipts import Receipt
from vcf_batch.setup.shard_task import ShardTask

OLD, NEW = {"type": "old GPU", "dtype": "float32"}, {"type": "new GPU", "dtype": "float32"}
BOTH = {"several": [OLD, NEW]}


@pytest.mark.parametrize(
    ("there", "here", "device", "at_once"),
    [
        ((OLD, None), (OLD, None), OLD, None),
        ((OLD, None), (NEW, None), BOTH, None),
        ((BOTH, None), (NEW, None), BOTH, None),
        ((BOTH, None), (OLD, 2), BOTH, 2),
        ((OLD, 2), (OLD, None), OLD, 2),
        ((OLD, 2), (OLD, 1), OLD, 1),
    ],
)
def test_kept_samples_keep_what_their_receipt_said_of_them(
    tmp_path: Path, there: tuple[Any, int | None], here: tuple[Any, int | None], device: Any, at_once: int | None
) -> None:
    """No sample is said to come from a device, or from batches, that it does not come from."""
    job = runs.write_output(runs.write_manifest(tmp_path / "in", 8), tmp_path / "out", 4)
    committed = runs.read_receipts(job.config.output)
    for receipt in committed.values():
        marked = dataclasses.replace(receipt, device=there[0], sampled_at_once=there[1])
        storage.publish_bytes(storage.join(job.config.output, f"{receipt.shard.name}_stats.json"), marked.to_json())
    ledger = Ledger(dataclasses.replace(job, redo={0: bytes([0, 1, 0, 0]), 1: bytes([1] * 4)}))
    generated = {
        index: dataclasses.replace(receipt, device=here[0], sampled_at_once=here[1])
        for index, receipt in committed.items()
    }
    whole = ledger.whole(generated[0])
    assert (whole.device, whole.sampled_at_once) == (device, at_once)
    assert Receipt.from_json(whole.to_json()) == whole
    assert ledger.whole(generated[1]) == generated[1]


def test_each_shard_keeps_its_own_marks(tmp_path: Path) -> None:
    """However many shards are repaired in part, what is held of them is one receipt for each device type."""
    job = runs.write_output(runs.write_manifest(tmp_path / "in", 8), tmp_path / "out", 2)
    devices = [OLD, NEW, OLD, NEW]
    for receipt, device in zip(runs.read_receipts(job.config.output).values(), devices, strict=True):
        url = storage.join(job.config.output, f"{receipt.shard.name}_stats.json")
        storage.publish_bytes(url, dataclasses.replace(receipt, device=device).to_json())
    ledger = Ledger(dataclasses.replace(job, redo=dict.fromkeys(range(4), bytes([0, 1]))))
    committed = runs.read_receipts(job.config.output)
    assert [ledger.whole(receipt) for receipt in committed.values()] == [*committed.values()]
    assert len({*map(id, ledger._older.values())}) == 2


def test_shards_that_are_scored_are_counted_though_their_receipts_name_no_files(tmp_path: Path) -> None:
    """Such a receipt is never published, and so nothing is told of it either."""
    job = runs.write_output(runs.write_manifest(tmp_path / "in", 8), tmp_path / "out", 4)
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    ledger = Ledger.of(job.shards)
    for receipt in runs.read_receipts(job.config.output).values():
        ledger.committed(ShardTask(receipt.shard), dataclasses.replace(receipt, files={}))
    assert (ledger.left, ledger.finished_rows, ledger.totals.done) == (0, 8, {0, 1})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
