"""``verify`` finds whatever differs from what an export wrote."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from support import exports, runs
from vcf_batch.cli import main
from vcf_batch.commands.export.check import ExportCheck


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in tars with copies of references, and one in parquets. They are not changed."""
    folder = tmp_path_factory.mktemp("made")
    runs.write_output(runs.write_manifest(folder / "in", 12), folder / "out", 12)
    exports.make(folder / "energon", folder / "out", format="energon", references="copy", shard_bytes=20_000)
    exports.make(folder / "parquet", folder / "out", format="parquet", shard_bytes=10_000)
    return folder


def flipped(path: Path, place: int = 700) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def matched(folder: Path, name: str) -> None:
    """Make a receipt that fits the files, as someone does who knows how."""
    receipt = folder / f"{name}_stats.json"
    told = json.loads(receipt.read_text())
    for kind, suffix in (("tar", ".tar"), ("index", ".tar.idx"), ("parquet", ".parquet")):
        if kind in told["files"]:
            data = (folder / (name + suffix)).read_bytes()
            told["files"][kind] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    receipt.write_text(json.dumps(told))


def other_image(folder: Path) -> None:
    flipped(folder / "train/00000.tar")
    matched(folder / "train", "00000")


def repeated(folder: Path) -> None:
    for suffix in (".tar", ".tar.idx", ".parquet"):
        shutil.copy(folder / f"train/00000{suffix}", folder / f"train/00001{suffix}")
    receipt = json.loads((folder / "train/00000_stats.json").read_text()) | {"name": "00001"}
    (folder / "train/00001_stats.json").write_text(json.dumps(receipt))


def without_reference(folder: Path) -> None:
    next(folder.glob("references/*/*.png")).unlink()


def changed_record(folder: Path) -> None:
    told = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(told | {"splits": {"train": 3, "validation": 1}}))


@pytest.mark.parametrize(
    ("format", "damage", "told", "code"),
    [
        ("energon", lambda f: flipped(f / "train/00000.tar"), "train/00000: 00000.tar has the sha256 ", 5),
        ("parquet", lambda f: flipped(f / "train/00000.parquet"), "train/00000: 00000.parquet has the sha256 ", 5),
        ("energon", lambda f: flipped(f / "train/00000.tar.idx", 1), "train/00000: 00000.tar.idx has the sha256 ", 5),
        ("energon", other_image, "train/00000: the image of row '000000", 5),
        ("energon", lambda f: (f / "train/00000.tar").unlink(), "train/00000: 00000.tar is missing", 5),
        (
            "parquet",
            lambda f: (f / "train/00000_stats.json").unlink(),
            "it has no receipt, and a later",
            5,
        ),
        (
            "parquet",
            lambda f: (f / "train/00000_stats.json").write_text("{"),
            "it cannot be read: not a receipt",
            5,
        ),
        ("energon", repeated, "rows have a key that an earlier row has", 5),
        ("energon", without_reference, "which is not there, or not the image of its hash", 5),
        ("energon", lambda f: flipped(next(f.glob("references/*/*.png"))), ".png: it has the sha256 ", 5),
        ("energon", lambda f: (f / ".nv-meta/split.yaml").write_text("x"), ".nv-meta/split.yaml: it is not what", 5),
        ("parquet", lambda f: (f / "croissant.json").unlink(), "croissant.json: it is not written yet", 6),
        ("parquet", lambda f: (f / "README.md").write_text("Mine"), "note: README.md: it is not what export wrote", 0),
        ("parquet", lambda f: (f / "train/x").write_text(""), "note: train/x: no receipt stands for it", 0),
        ("parquet", changed_record, "train: it has ", 5),
    ],
)
def test_damage_is_found(
    made: Path, tmp_path: Path, format: str, damage: Callable[[Path], object], told: str, code: int
) -> None:
    """Each kind with its place and cause, and the exit code of ``verify``; a sound one has none."""
    shutil.copytree(made / format, tmp_path / "t")
    assert [*ExportCheck(str(tmp_path / "t")).findings()] == []
    damage(tmp_path / "t")
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "t")])
    assert told in result.output and result.exit_code == code, result.output


def test_an_export_that_is_not_finished_is_no_damage(made: Path, tmp_path: Path) -> None:
    """The last shard is missing: exit code 6, and the command that goes on."""
    shutil.copytree(made / "parquet", tmp_path / "t")
    max((tmp_path / "t/train").glob("*_stats.json")).unlink()
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "t")])
    assert result.exit_code == 6 and "rerun the command of the export" in result.output, result.output
