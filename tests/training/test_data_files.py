"""Which files a name stands for: braces, patterns, folders, outputs of this project, and what is none of these."""

import functools
import json
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from braceexpand import braceexpand
from hypothesis import given
from hypothesis import strategies as st

from support import runs
from vcf_batch.errors import DamageFound, UsageError
from vcf_batch.output.run_file import AnotherVersion
from vcf_batch.training.data_files import braces, file_name, find, kind_of


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def found(url: object) -> list[str]:
    """The files' paths below the folder that the test made."""
    return [re.sub(r".*/data/", "", file) for file in find(str(url)).sizes]


def refusal(url: object) -> str:
    with pytest.raises(UsageError) as caught:
        find(str(url))
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["{000..012}.tar", "{8..11}", "{3..1}", "{0..8..2}", "{a,b}/{0..1}", "{a,b{1,2}}", "{a..c}", "plain", "{x}", "{}"],
)
def test_braces_are_those_of_webdataset(text: str) -> None:
    """The names are those that the package braceexpand gives, which webdataset uses."""
    assert sorted(set(braces(text))) == sorted(set(braceexpand(text)))


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 6))
def test_any_range_of_braces(first: int, last: int, digits: int) -> None:
    text = f"a{{{first:0{digits}}..{last:0{digits}}}}b"
    assert list(braces(text)) == list(braceexpand(text))


def test_braces_name_files_in_their_order(tmp_path: Path) -> None:
    """A file that is missing is named; braces that belong to a name stay."""
    folder = files(tmp_path / "data", *(f"{number:05d}.tar" for number in range(3)), "{a,b}.tar")
    assert found(folder / "{00002..00000}.tar") == ["00002.tar", "00001.tar", "00000.tar"]
    assert found(folder / "{a,b}.tar") == ["{a,b}.tar"]
    assert "00003.tar: there is no such file or folder" in refusal(folder / "{00000..00003}.tar")
    assert "stand for more than 1,000,000 names" in refusal(folder / "{0..9999999}.tar")


def test_patterns_are_those_of_a_shell(tmp_path: Path) -> None:
    """``*``, ``?`` and ``[0-9]`` in names of files and of folders, ``**`` for folders at any depth."""
    folder = files(tmp_path / "data", "a/00.tar", "a/01.tar", "b/c/02.tar", "b/_staging/03.tar", "b/.h.tar", "a/x.txt")
    assert found(folder / "a/0?.tar") == ["a/00.tar", "a/01.tar"]
    assert found(folder / "a/0[1-9].tar") == ["a/01.tar"]
    assert [file.rpartition("/")[2] for file in found(folder / "*/*.tar")] == ["00.tar", "01.tar"]
    assert [file.rpartition("/")[2] for file in found(folder / "**/*.tar")] == ["00.tar", "01.tar", "02.tar"]
    assert [file.rpartition("/")[2] for file in found(folder / "{a,b/c}/*.tar")] == ["00.tar", "01.tar", "02.tar"]
    assert "no file matches" in refusal(folder / "z*.tar")
    assert "holds no .tar or .parquet file but 1 .txt" in refusal(folder / "a/*.txt")


def test_a_name_may_hold_the_signs_of_a_pattern(tmp_path: Path) -> None:
    folder = files(tmp_path / "data", "set [1]/0.tar", "set [1]/what?.tar", "set 1/1.tar")
    assert found(folder / "set [1]" / "what?.tar") == ["set [1]/what?.tar"]
    assert len(found(folder / "set [1]" / "*.tar")) == 2
    assert found(folder / "set [1]") == ["set [1]/0.tar", "set [1]/what?.tar"]


def test_patterns_at_a_url() -> None:
    for name in ("p/a/0.tar", "p/a/1.tar", "p/b/2.tar"):
        with fsspec.open(f"memory://{name}", "wb") as file:
            file.write(b"x")
    assert [*find("memory://p/a/*.tar").sizes] == ["memory://p/a/0.tar", "memory://p/a/1.tar"]
    assert [*find("memory://p/{a,b}/[0-9].tar").sizes][-1] == "memory://p/b/2.tar"
    assert len(find("memory://p/*/*.tar").sizes) == 3


def test_endings_in_capitals_and_hidden_files(tmp_path: Path) -> None:
    """``.TAR`` is a tar; what lies in a folder that begins with a dot or ``_`` is nobody's data, at any depth."""
    folder = files(tmp_path / "data", "A.TAR", "b.Tar.Gz", "x/_staging/c.tar", "x/.git/d.tar", "._e.tar", "f.zip")
    assert found(folder) == ["A.TAR", "b.Tar.Gz"]
    assert find(str(folder)).remarks == [f"{folder}: 1 files are not read, the first is f.zip"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pipe:cat a.tar", "is a command, and none is run"),
        ("nowhere", "there is no such file or folder"),
        ("images", "holds no .tar or .parquet file but 2 .jpg, 1 .txt"),
        ("some.txt", "is a file of another kind"),
        ("empty", "holds no .tar or .parquet file, and no other file"),
        ("a.tar.zst", "is a file of another kind"),
    ],
)
def test_what_is_not_supported_is_named_with_what_is(name: str, message: str, tmp_path: Path) -> None:
    """Neither a missing folder nor a kind of file that is not read is blamed on the data."""
    files(tmp_path / "data", "images/0.jpg", "images/1.jpg", "images/2.txt", "a.tar.zst", "some.txt")
    (tmp_path / "data" / "empty").mkdir()
    told = refusal(name if name.startswith("pipe:") else tmp_path / "data" / name)
    assert message in told and "training data are WebDataset tars" in told


def test_of_an_output_the_committed_tars_are_read(tmp_path: Path) -> None:
    """A tar without a receipt, or staged, or beside the shards is no training data; a damaged shard is refused."""
    manifest = runs.write_manifest(tmp_path / "in", 10)
    out = Path(runs.write_output(manifest, tmp_path / "data" / "out", 4).config.output)
    (out / "00001_stats.json").unlink()
    files(tmp_path / "data", "out/stray.tar", "out/_staging/00002.tar", "out/sub/x.tar", "beside.tar")
    assert found(out) == ["out/00000.tar", "out/00002.tar"]
    assert find(str(out)).remarks == [f"{out}: 1 of 3 shards are not generated yet"]
    assert found(tmp_path / "data") == ["beside.tar", "out/00000.tar", "out/00002.tar"]
    assert found(out / "00001.tar") == ["out/00001.tar"], "what is named itself is meant"
    (out / "00000.tar").write_bytes(b"cut")
    assert "has 1 damaged shards, the first 00000: " in refusal(out)


@pytest.mark.parametrize("content", ['{"lr": 1}', "no JSON", "", '{"fields": 1}', "[]"])
def test_a_run_json_of_somebody_makes_no_output(content: str, tmp_path: Path) -> None:
    """img2dataset names its files as this project does; a run.json beside them may be anything."""
    folder = files(tmp_path / "data", "00000.tar", "00001.tar", "00000_stats.json", "00000.parquet")
    (folder / "00000_stats.json").write_text('{"count": 10, "successes": 10, "status_dict": {"success": 10}}')
    (folder / "run.json").write_text(content)
    assert found(folder) == ["00000.tar", "00001.tar"]
    assert not find(str(folder)).remarks


@pytest.mark.parametrize("damage", [b"", b'{"layout": 4, "fingerprint": "a', b"\0" * 100])
def test_a_damaged_run_json_is_never_somebody_s(damage: bytes, tmp_path: Path) -> None:
    """What is committed is not known then, and tars that are not committed are never read unasked."""
    out = Path(runs.write_output(runs.write_manifest(tmp_path / "in", 4), tmp_path / "data" / "out", 4).config.output)
    (out / "run.json").write_bytes(damage)
    with pytest.raises(DamageFound):
        find(str(out))


def test_an_output_of_another_version_is_refused_with_what_reads_it(tmp_path: Path) -> None:
    """A folder of another layout is not read as a folder of tars; its message names the pattern that does."""
    out = Path(runs.write_output(runs.write_manifest(tmp_path / "in", 4), tmp_path / "data" / "out", 4).config.output)
    (out / "run.json").write_text(json.dumps(json.loads((out / "run.json").read_text()) | {"layout": 3}))
    with pytest.raises(
        AnotherVersion, match=r"has layout 3, .*\. The pattern '(\S*/out/\*\.tar)' reads its tars"
    ) as told:
        find(str(tmp_path / "data"))
    assert found(re.search(r"pattern '(.*)'", str(told.value))[1]) == ["out/00000.tar"]  # type: ignore[index]


def test_web_addresses_are_named_one_by_one_or_by_braces(tmp_path: Path) -> None:
    """``?`` begins a query there: it is no pattern, no part of the ending, and no part of the data's identity."""
    files(tmp_path, "0.tar", "1.tar")
    site = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietSite, directory=str(tmp_path)))
    threading.Thread(target=site.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{site.server_port}"
    try:
        assert [*find(f"{url}/{{0..1}}.tar?sig=a").sizes] == [f"{url}/0.tar?sig=a", f"{url}/1.tar?sig=a"]
        assert file_name(f"{url}/0.tar?sig=a") == "0.tar" and kind_of(f"{url}/0.tar?sig=a") == "tar"
        assert "there is no such file or folder" in refusal(f"{url}/*.tar")
    finally:
        site.shutdown()
        site.server_close()


class QuietSite(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass
