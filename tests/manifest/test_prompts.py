"""Prompts come out of a file as their owner wrote them: lines, columns and encodings."""

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vcf_batch.errors import UsageError
from vcf_batch.manifest import prompts

ODD = "a cat\u2028under\u2029a\x85tree\fin\vthe\x1csun\rlight"
"""A prompt with everything that str.splitlines takes for the end of a line, but for a line feed."""


def read(path: Path, data: bytes | str, column: str | None = None) -> list[str]:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return list(prompts.read(str(path), column))


def refusal(path: Path, data: bytes | str, column: str | None = None) -> str:
    with pytest.raises(UsageError) as refused:
        read(path, data, column)
    return str(refused.value)


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 1 << 20])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """With or without a carriage return before it, and wherever the file is cut into pieces while it is read."""
    monkeypatch.setattr(prompts, "_CHUNK_BYTES", piece)
    assert read(tmp_path / "p.txt", f"{ODD}\r\na dog 🐕\n\nthe last") == [ODD, "a dog 🐕", "", "the last"]
    assert read(tmp_path / "p.txt", "a dog\n") == ["a dog"]
    assert read(tmp_path / "p.txt", "") == []


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path, name: str) -> None:
    """At the beginning of a file, and where files were joined; in a header it is no part of a name."""
    text = {"p.txt": "a cat\n\ufeffa dog\n", "p.csv": "prompt\na cat\n\ufeffa dog\n"}.get(
        name, '{"prompt": "a cat"}\n\ufeff{"prompt": "a dog"}\n'
    )
    assert read(tmp_path / name, text.encode("utf-8-sig")) == ["a cat", "a dog"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("piece", [8, 1 << 20])
def test_a_byte_order_mark_tells_the_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, piece: int
) -> None:
    """As Windows writes a text that is called Unicode there."""
    text = f"{ODD}\r\na dog 🐕 Ċ\r\n"
    data = text.encode(encoding) if encoding in ("utf-16", "utf-32") else f"\ufeff{text}".encode(encoding)
    monkeypatch.setattr(prompts, "_CHUNK_BYTES", piece)
    assert read(tmp_path / "p.txt", data) == [ODD, "a dog 🐕 Ċ"]


@pytest.mark.parametrize("piece", [4, 1 << 20])
def test_a_text_that_is_not_utf_8_is_refused_with_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """File, byte, offset, line and remedy; also for half a character at the end."""
    monkeypatch.setattr(prompts, "_CHUNK_BYTES", piece)
    told = refusal(tmp_path / "p.txt", "ein Hund\nein Käfer\n".encode("latin-1"))
    assert f"{tmp_path}/p.txt is not UTF-8: byte 0xE4 at offset 14, in line 2." in told
    assert "iconv -f WINDOWS-1252 -t UTF-8" in told
    assert "byte 0xC3 at offset 5, in line 1" in refusal(tmp_path / "p.txt", b"a cat\xc3")
    assert "is not UTF-16-LE: byte 0x00 at offset 8, in line 2" in refusal(
        tmp_path / "p.txt", "\ufeffa\nb".encode("utf-16-le") + b"\x00\xd8c\0"
    )


def test_what_is_no_text_is_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NUL characters, packed files, lines without an end, folders and files that are not there."""
    path = tmp_path / "p.txt"
    told = refusal(path, "a cat\na dog\n".encode("utf-16-le"))
    assert "line 1 of" in told and "NUL" in told and "iconv -f UTF-16LE" in told
    assert "compressed with gzip; unpack it" in refusal(path, gzip.compress(b"a cat\n"))
    assert "zip archive or an Office document" in refusal(path, b"PK\x03\x04" + b"a" * 20)
    monkeypatch.setattr(prompts, "MAX_LINE", 10)
    assert "line 2 of" in refusal(path, "a cat\n" + "a" * 11)
    for place in (tmp_path, tmp_path / "nowhere.txt"):
        with pytest.raises(UsageError, match=f"cannot read prompts from {place}"):
            list(prompts.read(str(place)))


def test_a_csv_is_read_by_its_header(tmp_path: Path) -> None:
    """Quoted commas, line breaks and quotation marks belong to a prompt; .tsv has tabs."""
    text = f'id,prompt\r\n1,"a cat, black\r\nor ""white"""\r\n\r\n2,{ODD.replace(chr(13), "")}\r\n3,\r\n'
    assert read(tmp_path / "p.csv", text) == ['a cat, black\r\nor "white"', ODD.replace("\r", ""), ""]
    assert read(tmp_path / "p.CSV", text, "id") == ["1", "2", "3"]
    assert read(tmp_path / "p.tsv", "caption\tid\na cat, black\t1\n", "caption") == ["a cat, black"]


def test_a_csv_of_which_a_part_of_a_prompt_would_be_lost_is_refused(tmp_path: Path) -> None:
    """An unquoted comma, a quotation mark without its other one, and columns that are not there or there twice."""
    path = tmp_path / "p.csv"
    assert "line 3 of" in (told := refusal(path, "prompt,id\na,1\na cat, black,2\n")) and "double quotes" in told
    assert "has 1 fields, and the header 2" in refusal(path, "prompt,id\na cat\n")
    assert "is not CSV: unexpected end of data" in refusal(path, 'prompt\n"a cat\na dog\n')
    assert "has no column 'prompt'; it has 'a cat'. Name one with --prompt-column" in refusal(path, "a cat\na dog\n")
    assert "has 2 columns 'prompt'" in refusal(path, "prompt,prompt\na,b\n")
    assert "it has none" in refusal(path, "")


def test_json_lines_are_read_by_name(tmp_path: Path) -> None:
    """Blank lines are skipped, and a null is no prompt."""
    lines = [{"prompt": ODD, "text": "x"}, {"prompt": None, "text": "y"}, {"text": "🐕", "prompt": "a\nb"}]
    text = "\r\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    assert read(tmp_path / "p.jsonl", text) == [ODD, "", "a\nb"]
    assert read(tmp_path / "p.json", text, "text") == ["x", "y", "🐕"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[" * 100_000, "line 2 of"),
        ("{", "is not JSON"),
        ('["a cat"]', "no JSON object"),
        ('{"text": "a cat"}', "no column 'prompt'; it has 'text'"),
        ('{"prompt": 7}', "no text in 'prompt' but int"),
        (r'{"prompt": "a \ud83d cat"}', r"half a character in 'prompt' (U+D83D)"),
        (r'{"prompt": "a \u0000 cat"}', "NUL character in 'prompt'"),
    ],
)
def test_a_line_of_json_without_a_prompt_is_refused_with_its_number(tmp_path: Path, line: str, told: str) -> None:
    """Whatever the line is, the message names it."""
    message = refusal(tmp_path / "p.jsonl", '{"prompt": "a dog"}\n' + line)
    assert told in message and "line 2 of" in message


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_is_recognised_by_its_content(tmp_path: Path, kind: Any) -> None:
    """Whatever its name and however it stores strings; a null is no prompt."""
    texts = pa.array([ODD, None, "a dog", ODD]).cast(kind)
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "caption": texts}), tmp_path / "p.txt", row_group_size=3)
    assert list(prompts.read(str(tmp_path / "p.txt"), "caption")) == [ODD, "", "a dog", ODD]


def test_parquet_without_such_a_column_of_texts_is_refused(tmp_path: Path) -> None:
    """Another type, another name, bytes that are not UTF-8, and a file that is no Parquet."""
    path = tmp_path / "p.parquet"
    offsets = pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0]))
    broken = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xe9")])
    pq.write_table(pa.table({"id": [1], "prompt": broken}), path)
    wrong = {None: "row 0 of", "id": "is int64; prompts must be strings", "text": "it has 'id', 'prompt'"}
    for column, told in wrong.items():
        with pytest.raises(UsageError, match=told):
            list(prompts.read(str(path), column))
    assert "is not a Parquet file" in refusal(path, "a cat\n")


def test_a_text_has_no_columns(tmp_path: Path) -> None:
    """A column that is named for a text is a mistake, and not passed over."""
    assert "has no column 'prompt'" in refusal(tmp_path / "p.txt", "a cat\n", "prompt")
    assert read(tmp_path / "csv", "a cat, black\n") == ["a cat, black"]


def test_prompts_are_read_from_urls() -> None:
    """By the driver of any storage, with the suffix of the URL."""
    with fsspec.open("memory://prompts/p.csv", "wb") as file:
        file.write(b"\xef\xbb\xbfprompt\r\na cat\r\n")
    assert list(prompts.read("memory://prompts/p.csv")) == ["a cat"]
