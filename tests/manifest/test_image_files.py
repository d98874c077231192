"""References are found by what they are and not by what they are called, and what is left out is told."""

import os
import threading
from pathlib import Path

import fsspec
import pytest

from support import pictures, runs
from vcf_batch import storage
from vcf_batch.errors import StorageError, UsageError
from vcf_batch.manifest import image_files
from vcf_batch.manifest.image_files import find
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.records import Reference

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_images_are_found_whatever_their_names(tmp_path: Path) -> None:
    """And every one that is found can be read as a reference of the manifest."""
    jpeg = pictures.file("JPEG")
    names = ["photo.jpg?id=1", "IMG_1.HEIC", "a.jfif", "b.jpe", "nosuffix", "deep er/c.JPG", "é 日 🐕#1%20.txt"]
    formats = {f"{kind}.bin": pictures.file(kind) for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")}
    write(tmp_path / "refs", dict.fromkeys(names, jpeg) | formats)
    found = find(str(tmp_path / "refs"), str(tmp_path / "m.parquet"))
    assert found.uris == sorted(f"refs/{name}" for name in [*names, *formats])
    assert found.skipped == {}
    reader = ReferenceReader(str(tmp_path), (), max_pixels=1 << 20)
    assert {reader.read(Reference(uri=uri)).size for uri in found.uris} == {(40, 24)}


def test_what_is_left_out_is_counted_by_reason_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reason with its remedy and the first names; the manifest itself is not counted."""
    monkeypatch.setattr(image_files, "_FILES_AT_ONCE", 2)
    files = {
        "real.jpg": HEIC,
        "notes.txt": b"BMW builds cars, and this is a text",
        "page.png": b"<!DOCTYPE html><html>404</html>",
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "more.txt": b"x",
        "line\nbreak": b"x",
        "empty.png": b"",
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
        "camera.NEF": pictures.file("TIFF"),
        "m.parquet": b"PAR1",
        "a.png": runs.png(0),
    }
    found = find(str(write(tmp_path, files)), str(tmp_path / "m.parquet"))
    assert found.uris == ["a.png"]
    assert found.told() == [
        "skipped: 1 files (a Git LFS pointer, not the image it stands for; fetch it with 'git lfs pull'): pointer.png",
        "skipped: 1 files (a HEIC picture; convert it with 'heif-convert IN OUT.png'): real.jpg",
        "skipped: 1 files (a camera's raw picture; convert it with 'magick IN OUT.png'): camera.NEF",
        "skipped: 1 files (empty): empty.png",
        "skipped: 5 files (no image): drawing.svg, line\\nbreak, more.txt, ...",
    ]


def test_links_that_are_not_followed_are_told(tmp_path: Path) -> None:
    """A link to a folder, one to nothing, and a pipe. A link to an image is an image."""
    write(tmp_path / "refs", {"a.png": runs.png(0)})
    write(tmp_path / "other", {"b.png": runs.png(1)})
    (tmp_path / "refs" / "folder").symlink_to(tmp_path / "other")
    (tmp_path / "refs" / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "refs" / "image").symlink_to(tmp_path / "other" / "b.png")
    os.mkfifo(tmp_path / "refs" / "pipe")
    found = find(str(tmp_path / "refs"), str(tmp_path / "m.parquet"))
    assert found.uris == ["refs/a.png", "refs/image"]
    (told,) = found.told()
    assert "3 files (a link to a folder or to nothing, or no file; name the folder itself): folder, gone, pipe" in told


def test_a_name_that_is_not_utf_8_is_left_out_and_named(tmp_path: Path) -> None:
    """A manifest cannot have such a name, and the other files are found."""
    write(tmp_path, {"a.png": runs.png(0)})
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        file.write(runs.png(0))
    found = find(str(tmp_path), str(tmp_path / "m.parquet"))
    assert (found.uris, found.skipped) == (["a.png"], {"name is not UTF-8; rename them": ["caf\\xe9.png"]})
    assert found.told() == ["skipped: 1 files (name is not UTF-8; rename them): caf\\xe9.png"]


def test_a_folder_without_images_is_not_taken_for_one_that_is_missing(tmp_path: Path) -> None:
    """Missing, a file, empty, and with other files only: each is told as what it is."""
    write(tmp_path, {"refs/a.txt": b"text"})
    (tmp_path / "empty").mkdir()
    for name, told in (
        ("nowhere", f"there is no folder of images {tmp_path}/nowhere"),
        ("refs/a.txt", "a.txt is a file; name the folder that holds the images"),
        ("empty", "empty holds no image .* It is empty"),
        ("refs", r"refs holds no image .*\n  skipped: 1 files \(no image\): a.txt"),
    ):
        with pytest.raises(UsageError, match=told):
            find(str(tmp_path / name), str(tmp_path / "m.parquet"))


def test_a_file_that_may_not_be_read_costs_no_other_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one that is deleted meanwhile. A storage that fails ends the command."""
    write(tmp_path, {name: runs.png(0) for name in "abc"})
    errors: dict[str, Exception] = {"a": PermissionError("refused"), "b": FileNotFoundError("gone")}
    real = storage.read_start

    def read(url: str, count: int) -> bytes:
        if error := errors.get(storage.name(url)):
            raise error
        return real(url, count)

    monkeypatch.setattr(storage, "read_start", read)
    found = find(str(tmp_path), str(tmp_path / "m.parquet"))
    assert (found.uris, found.skipped) == (
        ["c"],
        {"gone meanwhile": ["b"], "permission denied; check their permissions": ["a"]},
    )
    errors["c"] = StorageError("down")
    with pytest.raises(StorageError, match="down"):
        find(str(tmp_path), str(tmp_path / "m.parquet"))


def test_many_files_of_a_url_are_read_at_a_time_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each the first bytes only; the images are sorted by name, and relative within the manifest's bucket."""
    fs = fsspec.filesystem("memory")
    for number in range(20):
        fs.pipe_file(f"/bucket/refs/{number:02d}", runs.png(0) if number % 2 else b"text")
    fs.pipe_file("/bucket/refs/empty", b"")
    together = threading.Barrier(4, timeout=10)
    real = fs.cat_file

    def cat_file(path: str, start: int, end: int) -> bytes:
        assert (start, end) == (0, 512)
        together.wait()
        return real(path, start=start, end=end)

    monkeypatch.setattr(fs, "cat_file", cat_file)
    found = find("memory://bucket/refs/", "memory://bucket/m.parquet")
    assert found.uris == [f"refs/{number:02d}" for number in range(1, 20, 2)]
    assert {reason: len(names) for reason, names in found.skipped.items()} == {"no image": 10, "empty": 1}
    monkeypatch.undo()
    elsewhere = find("memory://bucket/refs", "memory://other/m.parquet")
    assert elsewhere.uris[0] == "memory://bucket/refs/01"
    with pytest.raises(UsageError, match="there is no folder"):
        find("memory://bucket/nowhere", "memory://bucket/m.parquet")
