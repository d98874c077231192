"""Samples drawn again are what is there; what is not is found."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from support import runs
from vcf_batch.commands import regenerate
from vcf_batch.commands.regenerate import TOLERANCE
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import RefusedError
from vcf_batch.output import commits
from vcf_batch.output.output import Output
from vcf_batch.setup import claim
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.worker import worker
from vcf_batch.worker.device import Device

pytestmark = pytest.mark.usefixtures("restored_torch")

ROWS = 10


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards over ten rows, of which row 3 failed."""
    folder = tmp_path_factory.mktemp("run")
    references = ["gone.png" if row == 3 else f"reference{row % 3}.png" for row in range(ROWS)]
    manifest = runs.write_manifest(folder / "in", ROWS, {"reference": references})
    settings: dict[str, Any] = {**runs.SIZE, "gpus_per_worker": 0, "shard_size": 6, "batch_size": 4}
    model = runs.save_model(folder / "model")
    config = RunConfig(manifest=str(manifest), output=str(folder / "out"), model=str(model), **settings)
    job = runs.settle(config)
    claim.claim(job)
    loaded = worker.load(job)
    for shard in job.shards:
        commits.commit(config.output, *runs.stage(loaded, ShardTask(shard), shard.name))
    return folder / "out"


def told(output: Path, count: int, seed: int = 0) -> list[str]:
    return [str(finding) for finding in regenerate.regenerate(Output(str(output)), count, seed)]


def test_samples_drawn_again_have_the_same_bytes(output: Path) -> None:
    """On the same type of device, the output is a function of the fingerprint."""
    largest = "the largest mean difference is 0 of 255"
    assert told(output, 3) == [f"note: samples: 3 drawn again, 3 with the same bytes; {largest}"]
    assert told(output, 99) == [f"note: samples: 9 drawn again, 9 with the same bytes; {largest}"]


def test_the_seed_chooses_the_samples(output: Path) -> None:
    opened = Output(str(output))
    chosen = [[places for _, places in regenerate._chosen(opened, 4, seed)] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert sum(map(len, chosen[2])) == 4


def test_samples_are_those_of_their_shards_where_another_shard_is_damaged(output: Path, tmp_path: Path) -> None:
    """A shard that verify did not look at may have no receipt that can be read."""
    copy = Path(shutil.copytree(output, tmp_path / "copy"))
    (copy / "00000_stats.json").write_text("no receipt")
    assert [(each.shard.index, places) for each, places in regenerate._chosen(Output(str(copy)), 99, 0)] == [
        (1, [0, 1, 2, 3])
    ]


def test_another_type_of_device_may_differ_a_little(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact on the same type of device and versions, else within a stated tolerance."""
    shift = {"pixels": 1.0}
    difference = regenerate._difference
    monkeypatch.setattr(regenerate, "_difference", lambda first, second: difference(first, second) + shift["pixels"])
    assert len(told(output, 2)) == 1
    shift["pixels"] = TOLERANCE + 1
    monkeypatch.setattr(Device, "description", {"type": "another"})
    lines = told(output, 2)
    assert len(lines) == 3
    assert "drawn again differs by 6 of 255 on the mean, on another type of device" in lines[0]
    assert "some were made on another type of device" in lines[2] and "more here)" in lines[2]


def test_an_image_that_the_settings_do_not_make_is_found(output: Path, tmp_path: Path) -> None:
    """The last resort where every hash was made to match."""
    output = shutil.copytree(output, tmp_path / "out")
    files = runs.Files(output, "00000")
    data = runs.png(7, 32)
    files.edit_everywhere(1, sha256=hashlib.sha256(data).hexdigest())
    files.replace("000000001.png", data)
    files.write()
    *lines, summary = told(output, 99)
    assert len(lines) == 1
    assert lines[0].startswith("00000: 000000001 drawn again differs by ")
    assert lines[0].endswith("on the type of device that made it; the image or a reference was changed")
    assert "9 drawn again, 8 with the same bytes" in summary


def test_a_reference_that_is_gone_is_no_damage(output: Path) -> None:
    (output.parent / "in" / "reference2.png").rename(output.parent / "in" / "aside.png")
    lines = told(output, 99)
    assert lines[0].startswith("note: 00000: 000000002 cannot be drawn again: reference 'reference2.png'")
    (output.parent / "in" / "aside.png").rename(output.parent / "in" / "reference2.png")


def test_another_model_is_refused(output: Path, tmp_path: Path) -> None:
    other = runs.save_model(tmp_path / "model")
    (other / "model_index.json").write_text((other / "model_index.json").read_text() + "\n")
    with pytest.raises(RefusedError, match="model_id"):
        list(regenerate.regenerate(Output(str(output), {"model": str(other)}), 1, 0))
    bare = shutil.copytree(output, tmp_path / "out", ignore=shutil.ignore_patterns("*_stats.json"))
    before = tree(bare)
    list(regenerate.regenerate(Output(str(bare), {"model": str(other)}), 1, 0))
    assert tree(bare) == before, "as long as nothing is finished, a run would replace run.json"


def test_nothing_is_written_into_the_output(output: Path) -> None:
    """It may be read-only, and somebody else's: not even a file comes and goes in it."""
    before = tree(output)
    told(output, 1)
    assert tree(output) == before


def tree(folder: Path) -> list[tuple[str, int, int]]:
    """Every file and folder with its size and the time it was changed."""
    found = [(path, path.stat()) for path in (folder, *sorted(folder.rglob("*")))]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found]
