"""Captioned data sets, as tars and Parquet files, and what is read from them."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vcf_batch.training.tar_samples import CaptionedImage


def write_tar(path: Path, members: Mapping[str, bytes | str], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_captioned(folder: Path, files: int = 2, pairs: int = 3, kind: str = "tar") -> Path:
    """A data set whose captions are ``file.pair``."""
    for file in range(files):
        names = [f"{file}.{pair}" for pair in range(pairs)]
        if kind == "tar":
            members = {f"{file}{p}.{ext}": v for p, n in enumerate(names) for ext, v in (("jpg", n), ("txt", n))}
            write_tar(folder / f"{file:05d}.tar", members)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            images = [{"bytes": name.encode(), "path": None} for name in names]
            table = pa.table({"image": images, "caption": names})
            pq.write_table(table, folder / f"{file:05d}.parquet", row_group_size=2)
    return folder


def texts(pairs: Iterable[CaptionedImage]) -> list[str]:
    return [pair.captions[0] for pair in pairs]
