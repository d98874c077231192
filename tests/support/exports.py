"""Exports of small outputs, and what is in them."""

import hashlib
import itertools
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from support.runs import Killed
from vcf_batch import storage
from vcf_batch.commands.export import split as splits
from vcf_batch.commands.export.exporting import Exported, export
from vcf_batch.commands.export.settings import ExportSettings

CHANGES = ("upload", "publish_bytes", "remove")
"""Functions of the storage by which an export changes its target."""


def make(target: Path | str, *outputs: Path, split: str = "train=0.7,validation=0.3", **options: Any) -> Exported:
    """An export of outputs; ``options`` are fields of :class:`ExportSettings`."""
    settings = ExportSettings(shares=splits.parse(split), **options)
    return export([*map(str, outputs)], str(target), settings)


def tree(folder: Path) -> dict[str, bytes]:
    """Relative path to bytes of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(folder: Path, split: str = "*") -> list[dict[str, Any]]:
    """The rows of all parquets of a split, in order."""
    return [row for path in sorted(folder.glob(f"{split}/*.parquet")) for row in pq.read_table(path).to_pylist()]


def images(folder: Path) -> dict[str, bytes]:
    """Name to content of every image in the tars of a folder, or of the folders in it."""
    found: dict[str, bytes] = {}
    for path in sorted([*folder.glob("*.tar"), *folder.glob("*/*.tar")]):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    found[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def killed_after(steps: int, before: bool, target: Path, *outputs: Path, **options: Any) -> bool:
    """Let an export die at a change of its target, once it has made some; whether it died.

    Args:
        steps: number of changes that are made before.
        before: whether it dies before the change has its effect, or after it.
    """
    left = itertools.count()

    def dying(call: Any) -> Any:
        def change(*arguments: Any, **given: Any) -> Any:
            is_last = next(left) == steps
            if is_last and before:
                raise Killed
            result = call(*arguments, **given)
            if is_last:
                raise Killed
            return result

        return change

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(storage, name, dying(getattr(storage, name)))
        try:
            make(target, *outputs, **options)
        except Killed:
            return True
    return False
