"""Hostile and broken input through the path that a user's run takes: what each of it does, and what it says.

The tables are the place for such cases. A bad row fails alone, with a message that names the remedy, and its neighbours
keep their bytes; what concerns the whole run refuses it before anything is written.
"""

import dataclasses
import io
import json
import math
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from PIL import Image

from support import pictures, runs, web
from vcf_batch.cli import main
from vcf_batch.errors import ModelError
from vcf_batch.images import limits
from vcf_batch.manifest import web_reading
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.setup import claim
from vcf_batch.worker.worker import Worker

pytestmark = pytest.mark.usefixtures("restored_torch")

LIMIT = 1_000_000
"""Pixels of a reference."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """A worker whose parts the tests reuse."""
    manifest = runs.write_manifest(tmp_path_factory.mktemp("first"), 1)
    return runs.load(manifest, tmp_path_factory.mktemp("first-output"), model)


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, web.running() as address:
        patch.setattr(web_reading, "WEB_PAUSE_SECONDS", 0.0)
        yield address


def generate(loaded: Worker, manifest: str, output: str, model: Path, **options: Any) -> None:
    """One shard, as a run generates it: everything that is settled before a worker starts, then the worker."""
    job = runs.settled(Path(manifest), Path(output), model, steps=1, batch_size=8, shard_size=1000, **options)
    claim.claim(job)
    reader = ReferenceReader(job.manifest.base, job.config.reference_root, job.config.max_pixels)
    components = dataclasses.replace(loaded.components, config=job.config, references=reader)
    runs.commit(Worker(components, job.manifest, job.fingerprint), last_attempt=True)


# Rows

JPEG, PNG, WEBP = (pictures.file(name) for name in ("JPEG", "PNG", "WEBP"))
UPRIGHT = Image.fromarray(pictures.noise(8, 16))
ROTATED = Image.Exif()
ROTATED[0x0112] = 6

PICTURES: dict[str, tuple[bytes, str | None]] = {
    "empty.png": (b"", "'empty.png': the image file is empty (0 bytes)"),
    "garbage.png": (bytes(range(1, 200)), "the file of 199 bytes is not an image in one of JPEG, PNG"),
    "page.png": (b"<!DOCTYPE html><html><body>404</body></html>", "it is a web page or XML text; replace it"),
    "drawing.svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "it is an SVG drawing; draw it"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "fetch it with 'git lfs pull'"),
    "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "is not an image in one of"),
    "jpeg-truncated.jpg": (JPEG[:-200], "damaged or truncated JPEG file of"),
    "jpeg-begins.jpg": (JPEG[:20], "damaged or truncated JPEG file of 20 bytes; replace it"),
    "jpeg-scans.jpg": (pictures.jpeg_scans(limits.MAX_JPEG_SCANS), "a JPEG of more than 100 scans; save it anew"),
    "png-truncated.png": (PNG[:-200], "damaged or truncated PNG file of"),
    "png-begins.png": (PNG[:12], "damaged or truncated PNG file of 12 bytes; replace it"),
    "webp-truncated.webp": (pictures.file("WEBP", lossless=True)[:-200], "damaged or truncated WebP file of"),
    "webp-begins.webp": (WEBP[:14], "damaged or truncated WebP file of 14 bytes; replace it"),
    "gif-truncated.gif": (pictures.file("GIF")[:-200], "damaged or truncated GIF file of"),
    "avif-truncated.avif": (pictures.file("AVIF")[:-200], "damaged or truncated AVIF file of"),
    "tiff-truncated.tif": (pictures.file("TIFF")[:200], "damaged or truncated TIFF file of"),
    "bmp-truncated.bmp": (pictures.file("BMP")[:-200], "damaged or truncated BMP file of"),
    "large.png": (pictures.png_header(1001, 1000), "1001 x 1000 = 1001000 pixels, over the limit of 1000000; shrink"),
    "bomb.png": (pictures.png_header(30_000, 30_000), "the image is larger than Pillow decodes"),
    "bomb-x.webp": (pictures.webp_header(16_000, 16_000, b"VP8X"), "over the limit of 1000000"),
    "bomb-l.webp": (pictures.webp_header(16_000, 16_000, b"VP8L"), "over the limit of 1000000"),
    "bomb-8.webp": (pictures.webp_header(16_000, 16_000, b"VP8 "), "over the limit of 1000000"),
    "bomb-tile.tif": (
        pictures.tiff_tile(4_000),
        "a tile of the image has 4000 x 4000 = 16000000 pixels, over the limit",
    ),
    "bomb-strips.tif": (pictures.tiff_strips(70_000), "a TIFF of 70000 strips or tiles, over the limit of 65536"),
    "bomb.avif": (pictures.avif_of_another_size(1_200), "a part of the image has 1200 x 1200 = 1440000 pixels, over"),
    "bomb.gif": (pictures.gif_frame(13_000, 13_000), "over the limit of 1000000"),
    "float.tif": (pictures.to_bytes(Image.new("F", (4, 4)), "TIFF"), "32-bit floating-point pixels"),
    "int32.tif": (pictures.to_bytes(Image.new("I", (4, 4)), "TIFF"), "32-bit integer pixels"),
    "jpeg-in-fact.png": (JPEG, None),
    "cmyk.jpg": (pictures.to_bytes(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), None),
    "16-bit.png": (pictures.to_bytes(Image.fromarray(np.full((8, 8), 51400, np.uint16)), "PNG"), None),
    "palette.png": (pictures.palette(transparency=1), None),
    "animated.gif": (pictures.animation("GIF"), None),
    "animated.webp": (pictures.animation("WEBP"), None),
    "1x1.png": (pictures.to_bytes(Image.new("RGB", (1, 1)), "PNG"), None),
    "1x30000.png": (pictures.to_bytes(Image.new("RGB", (1, 30_000)), "PNG"), None),
    "upright.png": (pictures.to_bytes(UPRIGHT, "PNG"), None),
    "rotated.png": (pictures.to_bytes(UPRIGHT.transpose(Image.Transpose.ROTATE_90), "PNG", exif=ROTATED), None),
    "sp ace é ::.png": (PNG, None),
}
"""What a reference holds, and the row's error; None where it is generated."""

ELSEWHERE = "lies outside the places that references may come from"
PLACES: dict[str, str | None] = {
    "file://{folder}/good.png": None,
    "{site}/refs/a.png": None,
    "{site}/refs/to-inside": None,
    "missing.png": "reference 'missing.png' does not exist",
    "good.png/under-a-file.png": "does not exist",
    "{long}.png": "does not exist",
    "circle": "does not exist",
    "good.png\0.png": "reference has a NUL character at position 8; remove it",
    "{long}{long}{long}{long}": "reference has 120000 bytes; the limit is 100000",
    "": "reference is an empty text; use null for none",
    ".": "is a folder, pipe or device, not a file",
    "pipe": "is a folder, pipe or device, not a file",
    "places.parquet": "is not an image in one of",
    "../output/run.json": ELSEWHERE,
    "../private/secret.png": ELSEWHERE,
    "link-out.png": "(it leads to",
    "/etc/passwd": "Allow its own with --reference-root '/etc'",
    "file:///etc/passwd": ELSEWHERE,
    "file://localhost/etc/passwd": "a file URL needs an absolute path",
    "local:///etc/passwd": "local:// needs a bucket or host name",
    "data:image/png;base64,iVBORw0KGgo=": "is a data URI; embed the bytes in a struct<bytes, path> column instead",
    "s3://bucket/a.png": ELSEWHERE,
    "zip://a.png::{site}/refs/a.zip": "chained URLs ('::') are not followed",
    "http://169.254.169.254/latest/meta-data/": ELSEWHERE,
    "http://[fd00:ec2::254]/latest/": ELSEWHERE,
    "{site}/private/a.png": ELSEWHERE,
    "{site}/refs/../private/a.png": "'.', '..' and backslashes are not allowed in web addresses",
    "{site}/refs/%2e%2E/private/a.png": "'.', '..' and backslashes are not allowed in web addresses",
    "{site}/refs/to-outside": "/private/a.png', where none may come from",
    "{site}/refs/to-host": "redirects to 'http://localhost:",
    "{site}/refs/to-metadata": "redirects to 'http://169.254.169.254/latest/meta-data/', where none may come from",
    "{site}/refs/to-file": "the web server answers 302, not 200",
    "{site}/refs/status-403": "the web server answers 403, not 200",
    "{site}/refs/gone.png": "does not exist",
    "{site}/refs/page.png": "it is a web page or XML text; replace it",
}
"""Where a reference is said to be, and the row's error."""

VALUES: dict[str, tuple[dict[str, Any], str | None]] = {
    "prompt of 1 MB": ({"prompt": "x" * 1_000_000}, "prompt has 1000000 bytes; the limit is 100000"),
    "prompt with NUL": ({"prompt": "a\0cat"}, "prompt has a NUL character at position 1; remove it"),
    "prompt not UTF-8": ({"prompt": b"caf\xe9"}, "prompt cannot be read: 'utf-8' codec can't decode byte 0xe9"),
    "prompt turned around": ({"prompt": "a \u202etac\u202c"}, None),
    "prompt in lines": ({"prompt": "a cat\r\n\tand a dog\r"}, None),
    "prompt of marks": ({"prompt": "\u200b\u0301\U0001f408\u200d\U0001f5a4"}, None),
    "prompt like a formula": ({"prompt": "=HYPERLINK(1)"}, None),
    "negative prompt with NUL": ({"negative_prompt": "\0"}, "negative_prompt has a NUL character at position 0"),
    "strength NaN": ({"strength": math.nan}, "strength is nan; it must be between 0 and 1000"),
    "strength negative": ({"strength": -0.1}, "strength is -0.1; it must be between 0 and 1000"),
    "guidance infinite": ({"guidance_scale": math.inf}, "guidance_scale is inf; it must be between 0 and 1000"),
    "guidance too large": ({"guidance_scale": 1001.0}, "guidance_scale is 1001.0; it must be between 0 and 1000"),
    "seed negative": ({"seed": -1}, f"seed is -1; it must be between 0 and {2**63 - 1}"),
    "fusion unknown": ({"fusion": "concatenate"}, "fusion is 'concatenate'; it must be one of naive, concat"),
    "fusion_lo NaN": ({"fusion_lo": math.nan}, "fusion_lo is nan; it must be between 0 and 1"),
    "range backwards": ({"fusion_lo": 0.9, "fusion_hi": 0.1}, "fusion_lo is 0.9, above fusion_hi, which is 0.1"),
    "weights negative": ({"reference_weights": [-1.0]}, "number 1 of reference_weights is -1.0; it must be between 0"),
    "weights for others": ({"reference_weights": [1.0, 2.0]}, "reference_weights has 2 values for 1 references"),
    "carried not UTF-8": ({"note": b"\xff"}, "note cannot be read: 'utf-8' codec can't decode byte 0xff"),
    "carried 2 MB": ({"note": "n" * 2_000_000}, "the carried columns have 2000000 bytes; the limit is 1000000"),
    "carried NaN": ({"box": [math.nan, math.inf]}, None),
    "carried beyond time": ({"at": 2**62}, "at cannot be read"),
    "negative reference missing": ({"negative_reference": "gone.png"}, "reference 'gone.png' does not exist"),
}
"""What else a row says, and its error."""

ROWS: dict[str, tuple[dict[str, Any], str | None]] = {
    **{name: ({"reference": name}, message) for name, (_, message) in PICTURES.items()},
    **{place: ({"reference": place}, message) for place, message in PLACES.items()},
    **VALUES,
}

Outcomes = tuple[dict[str, dict[str, Any]], list[tuple[dict[str, Any], dict[str, Any]]]]
NEIGHBOURS = 3
"""A good row stands among so many of the cases."""
GOOD = {"prompt": "two rings", "reference": "good.png"}
SCHEMA = pa.schema(
    {
        **dict.fromkeys(("prompt", "reference", "negative_reference", "negative_prompt", "fusion"), pa.string()),
        **dict.fromkeys(("strength", "guidance_scale", "fusion_lo", "fusion_hi"), pa.float64()),
        "seed": pa.int64(),
        "reference_weights": pa.list_(pa.float64()),
        "note": pa.string(),
        "box": pa.list_(pa.float64()),
        "at": pa.timestamp("ms"),
    }
)


def column(name: str, values: list[Any]) -> pa.Array:
    """An array of any values: of texts also those that are none."""
    if not pa.types.is_string(SCHEMA.field(name).type):
        return pa.array(values, SCHEMA.field(name).type)
    encoded = pa.array([value.encode() if isinstance(value, str) else value for value in values], pa.binary())
    return pa.Array.from_buffers(pa.string(), len(encoded), encoded.buffers())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.table({name: column(name, [row.get(name) for row in rows]) for name in SCHEMA.names}), path)
    return str(path)


@pytest.fixture(scope="module")
def outcomes(loaded: Worker, model: Path, site: str, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of a run over all rows of the tables: the row of each case; and of each neighbour beside its row in a run without
    any of the cases."""
    top = tmp_path_factory.mktemp("hostile")
    folder, private = top / "in", top / "private"
    folder.mkdir()
    private.mkdir()
    (folder / "good.png").write_bytes(runs.png(0))
    (private / "secret.png").write_bytes(runs.png(1))
    for name, (data, _) in PICTURES.items():
        (folder / name).write_bytes(data)
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "link-out.png").symlink_to(private / "secret.png")
    os.mkfifo(folder / "pipe")
    (top / "output").mkdir()

    known = {"folder": folder, "site": site, "long": "x" * 30_000}
    hostile: list[dict[str, Any]] = []
    for number, (row, _) in enumerate(ROWS.values()):
        place = row.get("reference", GOOD["reference"])
        hostile.append({**GOOD, "seed": 5, **row, "reference": place.format(**known)})
        if number % NEIGHBOURS == 0:
            hostile.append({**GOOD, "note": "neighbour", "seed": number})
    manifest = write_rows(folder / "places.parquet", hostile)
    # What a row is sampled with depends on whether it has a reference, which is the same in both runs.
    clean = [
        given if given.get("note") == "neighbour" else {**GOOD, "reference": "good.png" if row.references else None}
        for given, row in zip(hostile, Manifest.open(manifest).rows(0, len(hostile), 0), strict=True)
    ]
    # The mark names the sample, and would tell any two apart.
    roots = {"reference_root": (f"{site}/refs",), "max_pixels": LIMIT, "mark": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        generate(loaded, manifest, str(top / "output"), model, **roots)
    assert not [path for path in web.Site.hits if path.startswith("/private")]
    generate(loaded, write_rows(folder / "clean.parquet", clean), str(top / "clean"), model, **roots)
    both = list(zip(runs.rows_of(top / "output"), runs.rows_of(top / "clean"), strict=True))
    cases = [row for row, _ in both if row["note"] != "neighbour"]
    return dict(zip(ROWS, cases, strict=True)), [pair for pair in both if pair[0]["note"] == "neighbour"]


@pytest.mark.parametrize("case", ROWS)
def test_a_row_is_generated_or_fails_with_a_reason(outcomes: Outcomes, case: str) -> None:
    """A bad row fails alone, with a message that a person can act on and that is the same every time."""
    row, expected = outcomes[0][case], ROWS[case][1]
    assert row["status"] == ("success" if expected is None else "failed"), row["error_message"]
    if expected is not None:
        assert expected in row["error_message"]
        assert len(row["error_message"]) < 700
        assert " at 0x" not in row["error_message"]


def test_neighbours_of_bad_rows_keep_their_bytes(outcomes: Outcomes) -> None:
    """One bad row never costs another one: failed rows keep their slot in the batch."""
    assert len(outcomes[1]) > len(ROWS) // 4
    for beside_bad, beside_good in outcomes[1]:
        assert beside_bad["status"] == "success"
        assert beside_bad["sha256"] == beside_good["sha256"]


def test_orientation_is_applied(outcomes: Outcomes) -> None:
    """A picture and its rotated copy with an EXIF orientation are the same reference."""
    assert outcomes[0]["rotated.png"]["sha256"] == outcomes[0]["upright.png"]["sha256"]


def test_texts_arrive_as_they_were(outcomes: Outcomes) -> None:
    """Line breaks, marks and characters of other directions are the user's: they are neither changed nor dropped."""
    for case in ("prompt turned around", "prompt in lines", "prompt of marks", "prompt like a formula"):
        assert outcomes[0][case]["prompt"] == ROWS[case][0]["prompt"]


# Manifests

TABLE = pa.table({"prompt": ["a cat", "a dog", "a fox"]})


def parquet(table: pa.Table = TABLE, **columns: Any) -> bytes:
    """A file of a table and further columns."""
    for name, values in columns.items():
        table = table.append_column(name, [values])
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def ids(*values: str | None) -> bytes:
    return parquet(pa.table({"prompt": ["a cat"] * len(values), "sample_id": pa.array(values, pa.string())}))


GOOD_FILE = parquet()
DEEP = pa.int8()
for _ in range(120):
    DEEP = pa.list_(DEEP)
UNSAFE = "column 'sample_id': 1 row is unsafe (an id is 1 to 128 of the characters A-Z a-z 0-9 _ -), first: row 0 of "

MANIFESTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a Parquet file, or is cut short (0 bytes)"),
    "text": (b"prompt\na cat\n", "is not a Parquet file, or is cut short (13 bytes)"),
    "truncated": (GOOD_FILE[:-9], "is not a Parquet file, or is cut short"),
    "wrong magic": (GOOD_FILE[:-4] + b"PAR2", "is not a Parquet file, or is cut short"),
    "magic alone": (b"PAR1" * 3, "is not a Parquet file, or is cut short (12 bytes)"),
    "encrypted": (GOOD_FILE[:-4] + b"PARE", "is encrypted; write it without Parquet encryption"),
    "damaged footer": (GOOD_FILE[:-60] + bytes(52) + GOOD_FILE[-8:], "has a damaged footer: "),
    "damaged pages": (b"PAR1" + bytes(30) + GOOD_FILE[34:], "is damaged: "),
    "no rows": (parquet(TABLE.slice(0, 0)), "has no rows; there is nothing to generate"),
    "no columns": (parquet(pa.table({"caption": ["a"]})), "column 'prompt' is missing; the file has: caption"),
    "misspelt": (parquet(pa.table({"Prompt ": ["a"]})), "column 'prompt' is missing; rename 'Prompt '"),
    "numbers for prompts": (parquet(pa.table({"prompt": [1]})), "column 'prompt' is int64; it must be string"),
    "numbers for references": (parquet(reference=[1, 2, 3]), "column 'reference' is int64; it must be string, struct<"),
    "fractions for seeds": (parquet(seed=[0.5, 1, 2]), "column 'seed' is double; it must be int64"),
    "text for numbers": (parquet(strength=["1"] * 3), "column 'strength' is string; it must be a number"),
    "null prompt": (parquet(pa.table({"prompt": ["a", None]})), "column 'prompt': 1 row is null (every row needs a"),
    "blank prompt": (parquet(pa.table({"prompt": [" \n\u3000"]})), "column 'prompt': 1 row is empty"),
    "column of ours": (parquet(status=["x"] * 3), "column 'status' would collide with the output's own; rename it"),
    "1,001 columns": (parquet(**{f"c{n}": [0] * 3 for n in range(1000)}), "has 1,001 columns, fields of structs among"),
    "120 levels": (parquet(deep=pa.nulls(3, DEEP)), "has a damaged footer: Parquet schema too deeply nested"),
    "nowhere's time": (
        parquet(at=pa.nulls(3, pa.timestamp("s", "No/Where"))),
        "is in the unknown time zone 'No/Where'",
    ),
    "column that drives a terminal": (parquet(**{"\x1b[2Jseed": [1] * 3, "status": [1] * 3}), "would collide"),
    "ids twice": (
        ids("a", "b", "a"),
        "1 row is repeated (every id must be unique), first: row 2 of m.parquet ('a', as",
    ),
    "id null": (ids("a", None), "column 'sample_id': 1 row is null (every row needs a value), first: row 1 of"),
    "id empty": (ids(""), UNSAFE + "m.parquet ('')"),
    "id with a slash": (ids("a/b"), UNSAFE + "m.parquet ('a/b')"),
    "id upwards": (ids("../../etc/cron"), UNSAFE + "m.parquet ('../../etc/cron')"),
    "id of dots": (ids(".."), UNSAFE + "m.parquet ('..')"),
    "id with a dot": (ids("a.b"), UNSAFE + "m.parquet ('a.b')"),
    "id with a line break": (ids("a\n"), UNSAFE + r"m.parquet ('a\n')"),
    "id with an accent": (ids("caf\u00e9"), UNSAFE + "m.parquet ('caf\u00e9')"),
    "id composed of two": (ids("cafe\u0301"), UNSAFE + "m.parquet ('cafe\u0301')"),
    "id of 10 kB": (ids("x" * 10_000), UNSAFE + "m.parquet ('" + "x" * 56 + "...)"),
    "references elsewhere": (
        parquet(reference=["/etc/passwd", "http://169.254.169.254/", "a.png"]),
        "2 of the first 3 rows have references or LoRAs that may not be read; the first: reference '/etc/passwd' lies "
        "outside",
    ),
}
"""What a manifest holds, and why the run is refused."""


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refuse(tmp_path: Path, message: str, *arguments: object) -> Result:
    """The command is a mistake of the user's, who is told so; nothing is written."""
    result = call("generate", *arguments, "--address", "local")
    assert (result.exit_code, "Traceback" in result.output) == (2, False), result.output
    assert message in result.output
    assert "\x1b" not in result.output
    assert not (tmp_path / "out").exists()
    return result


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_breaks_the_contract_refuses_the_run(tmp_path: Path, case: str) -> None:
    data, message = MANIFESTS[case]
    (tmp_path / "m.parquet").write_bytes(data)
    refuse(tmp_path, message, tmp_path / "m.parquet", tmp_path / "out", "--model", "tiny")


def test_places_that_hold_no_manifest(tmp_path: Path) -> None:
    """Never waited on: pipes, devices and circular links."""
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "circle.parquet").symlink_to(tmp_path / "circle.parquet")
    os.mkfifo(tmp_path / "pipe.parquet")
    for place, message in {
        tmp_path / "nowhere": "does not exist; a manifest is a Parquet file, or a folder",
        tmp_path / "folder.parquet": "holds no file named *.parquet; a manifest is",
        tmp_path / "circle.parquet": "does not exist; a manifest is",
        tmp_path / "pipe.parquet": "holds no file named *.parquet",
        tmp_path: "holds no file named *.parquet; a manifest is",
        Path("/dev/zero"): "holds no file named *.parquet",
    }.items():
        refuse(tmp_path, message, place, tmp_path / "out")
    refuse(tmp_path, "Install the fsspec driver", "nosuch://user:secret@host/m.parquet", tmp_path / "out")


def test_a_circular_link_hides_no_other_file(tmp_path: Path) -> None:
    """An output does not look empty, nor a manifest absent, for what else lies in its folder."""
    (tmp_path / "good.parquet").write_bytes(GOOD_FILE)
    (tmp_path / "circle.parquet").symlink_to(tmp_path / "circle.parquet")
    assert Manifest.open(str(tmp_path)).num_rows == 3


def test_an_output_among_its_inputs_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "00000.parquet").write_bytes(GOOD_FILE)
    (tmp_path / "alias").symlink_to(tmp_path / "m")
    for manifest in (tmp_path / "m", tmp_path / "m" / "00000.parquet"):
        for output in (tmp_path / "m", tmp_path / "alias"):
            refuse(tmp_path, "is the manifest's own folder", manifest, output)
    refuse(tmp_path, "lies in the folder of the model", tmp_path / "m", model / "out", "--model", model)
    assert (tmp_path / "m" / "00000.parquet").read_bytes() == GOOD_FILE


# Settings

SETTINGS: dict[str, str] = {
    "a: [": "is not valid YAML in line 1: expected the node content",
    "- a\n- b\n": "must be a mapping of setting to value, not list",
    "just text": "must be a mapping of setting to value, not str",
    "seed: !!python/object/apply:os.getcwd []": "could not determine a constructor for the tag",
    "!!python/object/new:os.system [touch marker]": "could not determine a constructor for the tag",
    "\n seed: !env SECRET": "is not valid YAML in line 2: could not determine a constructor for the tag '!env'",
    "a: " + "[" * 5000: "is not valid YAML: maximum recursion depth exceeded",
    "seed: 2026-99-99": "is not valid YAML: month must be in 1..12",
    "seed: " + "9" * 5000: "is not valid YAML: Exceeds the limit",
    "\0": "is not valid YAML",
    "&a [*a, *a]": "must be a mapping",
    "seed: &a [*a, *a]": "seed is [[[...], [...]], [[...], [...]]]; it must be a whole",
    "strength: .nan": "strength is nan; it must be between 0 and 1000",
    "guidance_scale: .inf": "guidance_scale is inf; it must be between 0 and 1000",
    "steps: -1": "steps is -1; it must be between 1 and 1000",
    "seed: -1": "seed is -1; it must be between 0 and",
    "max_failed: .nan": "max_failed is nan; it must be between 0 and 1",
    "model: [tiny]": "model is ['tiny']; it must be a text",
    "reference_root: ['']": "reference_root is ''; give a value without NUL characters, or leave it out",
    "model: ''": "model is ''; give a value",
    'judge: "a\\0b"': "judge is 'a\\x00b'; give a value without NUL characters",
    "model: tiny\nreference_root: ['https://me:secret@host']": "--reference-root 'https://host' is not a usable folder",
    "? [a, b]\n: c": "is not valid YAML in line 1: found unhashable key",
    "output: here\nwidht: 64": "unknown setting 'widht'; did you mean width?",
}
"""A configuration file, and why the run is refused."""


@pytest.mark.parametrize("text", SETTINGS, ids=lambda text: text[:30])
def test_settings_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    """Nothing runs that the user did not bring: tags that build objects are refused."""
    (tmp_path / "m.parquet").write_bytes(GOOD_FILE)
    (tmp_path / "run.yaml").write_text(text)
    result = refuse(
        tmp_path, SETTINGS[text], tmp_path / "m.parquet", tmp_path / "out", "--config", tmp_path / "run.yaml"
    )
    assert "secret" not in result.output


# Models


class Evil:
    """What runs when its pickle is loaded: it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
PICKLED = "a .bin file of it is damaged, or a pickle of more than weights; nothing in it was run"
OWN_CODE = "wants to run code of its own"
MODULE = "import os\nos.mkdir({marker!r})\n"
CANNOT = "cannot load the model in {folder}: "
CONFIGURATION = "cannot load the configuration of {folder}: "

MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "pickle for the UNet": ({UNET: None, "unet/diffusion_pytorch_model.bin": torch.save}, PICKLED),
    "pickle of another age": ({UNET: None, "unet/diffusion_pytorch_model.bin": pickle.dump}, PICKLED),
    "pickle for the text encoder": (
        {"text_encoder/model.safetensors": None, "text_encoder/pytorch_model.bin": torch.save},
        PICKLED,
    ),
    "pickle for the judge": ({"judge/model.safetensors": None, "judge/pytorch_model.bin": torch.save}, PICKLED),
    "pickles alone": (
        {UNET: None, "unet/model.pt": torch.save},
        "has weights only as a pickle, which may run code when it is loaded: unet/model.pt. Convert it to safetensors",
    ),
    "module for the text encoder": (
        {"text_encoder/own.py": MODULE, "text_encoder/config.json": {"auto_map": {"AutoModel": "own.Model"}}},
        f"{OWN_CODE} ('auto_map' in text_encoder/config.json), which is never done",
    ),
    "module for the tokenizer": (
        {
            "judge/own.py": MODULE,
            "judge/tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}},
        },
        f"{OWN_CODE} ('auto_map' in judge/tokenizer_config.json)",
    ),
    "module for the UNet": (
        {"unet/own.py": MODULE, "model_index.json": {"unet": ["own", "Model"]}},
        f"{OWN_CODE} ('unet' in model_index.json)",
    ),
    "pipeline of its own": (
        {"pipeline.py": MODULE, "model_index.json": {"_class_name": ["pipeline", "Own"]}},
        f"{OWN_CODE} ('_class_name' in model_index.json)",
    ),
    "class of the standard library": (
        {"model_index.json": {"scheduler": ["subprocess", "Popen"]}},
        f"{OWN_CODE} ('scheduler' in model_index.json)",
    ),
    "kernel from the Hub": (
        {"judge/config.json": {"vision_config": {"attn_implementation": "someone/kernel"}}},
        f"{OWN_CODE} ('attn_implementation' in judge/config.json)",
    ),
    "truncated safetensors": ({UNET: 1000}, "damaged: it is cut short: its header has "),
    "safetensors of 7 bytes": ({VAE: 7}, ", as no safetensors file does; "),
    "safetensors with an endless header": ({VAE: b"\xff" * 8 + b"{}"}, "damaged: it is cut short: its header has "),
    "no weights": ({UNET: None}, CANNOT),
    "damaged configuration": ({"unet/config.json": "{{"}, "has a damaged unet/config.json: "),
    "endless configuration": (
        {"unet/config.json": b"[" * 100_000},
        "has a damaged unet/config.json: maximum recursion",
    ),
    "size that is none": (
        {"unet/config.json": {"block_out_channels": "wide"}},
        CONFIGURATION,
    ),
    "steps that are none": (
        {"model_index.json": {"default_steps": "many"}},
        CONFIGURATION,
    ),
    "strength that is none": (
        {"model_index.json": {"default_strength": math.nan}},
        "default_strength is nan; it must be between 0 and 1000",
    ),
}
"""Files of a model: removed, cut, replaced, changed, or a pickle that leaves a mark; and why the run is refused."""


def spoil(folder: Path, changes: dict[str, Any], marker: Path) -> None:
    for file, change in changes.items():
        path = folder / file
        if change is None:
            path.unlink()
        elif callable(change):
            with path.open("wb") as target:
                change(Evil(marker), target)
        elif isinstance(change, int):
            os.truncate(path, change)
        elif isinstance(change, dict):
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
        else:
            path.write_bytes(change if isinstance(change, bytes) else change.format(marker=str(marker)).encode())


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_a_model_is_refused_and_runs_nothing(tmp_path: Path, model: Path, case: str) -> None:
    """Nothing runs that the user did not bring: safetensors or weights_only loading, no remote code."""
    changes, message = MODELS[case]
    folder, marker = shutil.copytree(model, tmp_path / "model"), tmp_path / "marker"
    spoil(folder, changes, marker)
    with pytest.raises(ModelError) as refused:
        runs.load(runs.write_manifest(tmp_path / "in", 1), tmp_path / "out", folder)
    assert message.format(folder=folder) in str(refused.value)
    assert not marker.exists()


def test_weights_in_a_pickle_are_read(tmp_path: Path, model: Path) -> None:
    """Pickles are refused unless they hold weights alone."""
    folder = shutil.copytree(model, tmp_path / "model")
    torch.save(safetensors.torch.load_file(folder / UNET), (folder / UNET).with_suffix(".bin"))
    (folder / UNET).unlink()
    runs.load(runs.write_manifest(tmp_path / "in", 1), tmp_path / "out", folder)


# Secrets

SECRET = "hunter2"


def test_secrets_in_urls_are_in_no_output(
    loaded: Worker, model: Path, site: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Passwords and signatures are used where they work, and never written or printed."""
    signed = f"X-Amz-Signature={SECRET}"
    places = [
        f"{site}/refs/a.png?{signed}",
        f"{site}/refs/sp ace \u00e9.png?{signed}",
        f"{site}/refs/status-403?{signed}",
        f"{site}/refs/to-outside?{signed}",
        f"https://me:{SECRET}@host/a.png",
        f"s3://me:{SECRET}@bucket/a.png",
        f"s3://me:a/{SECRET}@bucket/a.png",
        f"missing.png?{signed}",
        "a.png",
        "a.png",
        f"{site}/refs/a.png?{SECRET}",
        f"{site}/refs/a.png#{SECRET}",
        f"{site}/refs/gone.png;jsessionid={SECRET}",
        f"{site}/refs/gone.png%3Fsig%3D{SECRET}",
    ]
    base = f"memory://me:{SECRET}@secrets"
    rows = [{**GOOD, "reference": place, "negative_reference": place} for place in places]
    write_rows(tmp_path / "m.parquet", rows)
    for name, data in {"m.parquet": (tmp_path / "m.parquet").read_bytes(), "a.png": runs.png(0)}.items():
        fsspec.filesystem("memory").pipe_file(f"/me:{SECRET}@secrets/{name}", data)
    roots = {"reference_root": (f"{site}/refs?token={SECRET}", f"memory://me:{SECRET}@elsewhere")}
    job = runs.settled(tmp_path / "m.parquet", tmp_path / "out", model, steps=1, **roots)
    job = dataclasses.replace(
        job, config=job.config.replace(manifest=f"{base}/m.parquet"), manifest=Manifest.open(base)
    )
    claim.claim(job)
    reader = ReferenceReader(job.manifest.base, job.config.reference_root, LIMIT)
    components = dataclasses.replace(loaded.components, config=job.config, references=reader)
    runs.commit(Worker(components, job.manifest, job.fingerprint), last_attempt=True)
    found = runs.rows_of(tmp_path / "out")
    assert [row["status"] for row in found] == ["success"] * 2 + ["failed"] * 6 + ["success"] * 4 + ["failed"] * 2
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert SECRET.encode() not in b"".join(written) + repr(found).encode()
    assert SECRET not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "memory://me:{secret}@nowhere/m.parquet", "out"),
        ("generate", "nosuch://me:{secret}@nowhere/m.parquet?sig={secret}", "out"),
        ("generate", "{folder}/m.parquet", "out", "--model", "memory://me:{secret}@nowhere/model"),
        ("generate", "{folder}/m.parquet", "out", "--model", "memory://me:{secret}@x/model", "--revision", "v1"),
        ("generate", "{folder}/m.parquet", "out", "--judge", "nosuch://me:{secret}@nowhere/judge"),
        ("generate", "{folder}/m.parquet", "out", "--reference-root", "https://me:{secret}@host/"),
        ("generate", "{folder}/m.parquet", "nosuch://me:{secret}@nowhere/out"),
        ("generate", "--config", "memory://me:{secret}@nowhere/run.yaml"),
        ("generate", "--config", "{folder}/run.yaml"),
        ("manifest", "{folder}/x.parquet", "--prompts", "memory://me:{secret}@nowhere/prompts.txt"),
        ("report", "memory://me:{secret}@nowhere/out", "--png", "{folder}/x.png"),
        ("verify", "memory://me:{secret}@nowhere/out"),
    ],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_secrets_in_urls_are_in_no_message(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Not in an error either, nor in the traceback that --debug shows with what lies beneath it."""
    (tmp_path / "m.parquet").write_bytes(GOOD_FILE)
    (tmp_path / "run.yaml").write_text(f"manifest: m\noutput: out\nreference_root: s3://me:{SECRET}@bucket/\n")
    result = call(*(argument.format(secret=SECRET, folder=tmp_path) for argument in arguments), "--debug")
    assert result.exit_code in (1, 2, 4)
    assert "Traceback" in result.output
    assert SECRET not in result.output + repr(result.exception)
