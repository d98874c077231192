"""The report's page has room for pictures of any size and number, and for texts of any length."""

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support import pages, runs
from vcf_batch.output.output import Output
from vcf_batch.report import figures, page, thumbnails
from vcf_batch.report.pictures import fitting, reading, shares


@pytest.mark.parametrize("size", [16, 100, 160, 300])
@pytest.mark.parametrize("most", [300, 1300, 7000, 10**6])
def test_a_picture_is_as_large_as_fits(size: int, most: int) -> None:
    """It has at most so many bytes even where nothing compresses, and is the next one that the ladder has."""
    noise = Image.open(io.BytesIO(runs.png(0, size)))
    found = fitting.fitted(noise, most)
    assert found and (found.width, found.height) == (size, size)
    shown = Image.open(io.BytesIO(found.data))
    assert len(found.data) <= most
    assert max(shown.size) == size or len(fitting.fitted(noise, 2 * most).data) > most  # type: ignore[union-attr]
    assert fitting.fitted(noise, 10) is None


def test_a_picture_is_reduced_to_the_largest_edge_of_the_page() -> None:
    found = fitting.fitted(Image.new("RGB", (3000, 1500)), 10**6)
    assert found and (found.width, found.height) == (3000, 1500)
    assert Image.open(io.BytesIO(found.data)).size == (fitting.LARGEST_EDGE, fitting.LARGEST_EDGE // 2)


def test_thumbnails_stay_small() -> None:
    """Each is small even where nothing compresses. Notebooks and the comparison of two outputs show many."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    assert len(thumbnails.thumbnail(noise)) <= thumbnails.MAX_THUMBNAIL_BYTES
    assert len(thumbnails.thumbnail(noise.resize((thumbnails.EDGE, thumbnails.EDGE)))) <= thumbnails.MAX_THUMBNAIL_BYTES


def test_shares_never_add_up_to_more_than_there_is() -> None:
    """Whatever the number of pictures, none of them has more than its share, and no kind is left out early."""
    counts = (0, 1, 7, 112, 1000)
    for most, dots, outputs, twins in itertools.product((0, 10_000, 1_800_000, 2_900_000), counts, counts, counts):
        pictures = {"output": outputs, "reference": outputs // 2, "content": twins, "style": twins}
        found = shares.shares(most, dots, pictures)
        sizes = {**pictures, "dot": dots}
        total = sum(count * shares.embedded_bytes(found[name]) for name, count in sizes.items() if found[name])
        assert total <= most, (most, sizes)
        if most > 1_000_000 and max(counts) not in sizes.values():
            assert min(found.values()) > 600


def write_large(folder: Path, rows: int, size: int) -> Path:
    """An output of triplets that do not compress well, with a reference of their own each, and with the longest
    prompts, keys and categories, which JSON makes six times as long."""
    noise = Image.open(io.BytesIO(runs.png(0, size // 4 + rows + 100)))

    def picture(seed: int, _: int, image_format: str) -> bytes:
        cut = noise.crop((seed, 0, seed + size // 4, size // 4)).resize((size, size), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        cut.save(buffer, "jpeg", quality=80)
        return buffer.getvalue()

    columns = {
        "prompt": ["<" * 2000] * rows,
        "reference": [f"own{row}.jpg" for row in range(rows)],
        "sample_id": [f"{row:0128d}" for row in range(rows)],
        **{f"category{place}": [f"{row % 20}" + "<" * 100 for row in range(rows)] for place in range(8)},
    }
    manifest = runs.write_manifest(folder / "in", rows, columns)
    for row in range(rows):
        (folder / "in" / f"own{row}.jpg").write_bytes(picture(row, size, "jpg"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runs, "picture", picture)
        runs.write_output(manifest, folder / "out", rows // 2, image_format="jpg", triplets=True)
    return folder / "out"


@pytest.mark.parametrize(
    ("rows", "size"),
    # The long one is the short one with the pictures of Stable Diffusion XL.
    [(64, 128), pytest.param(480, 1024, marks=pytest.mark.slow)],
)
def test_a_page_keeps_its_budget(tmp_path: Path, rows: int, size: int) -> None:
    """Every sample has its pictures, and every dot has one, each with the size that it is reduced from."""
    text = page.render(Output(str(write_large(tmp_path, rows, size))))
    assert 500_000 < len(text.encode()) <= page.PAGE_BYTES
    data = pages.data_of(text)
    assert data["cut"] == []
    assert len(data["samples"]) + len(data["points"]) > min(rows, page.figures.POINTS) * 0.9
    for sample in data["samples"]:
        assert sample["pictures"].keys() == {"output", "reference", "content", "style"}
        assert all(data["pictures"][place][1:] == [size, size] for place in sample["pictures"].values())
    assert all(data["pictures"][point[4]][1:] == [size, size] for point in data["points"])


def test_few_tars_are_read_for_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of shown samples are all read. A dot whose tar is not read has no picture."""
    opened: list[str] = []
    from_tar = reading.from_tar

    def noted(url: str, *rest: Any) -> Any:
        opened.append(url)
        return from_tar(url, *rest)

    monkeypatch.setattr(reading, "from_tar", noted)
    monkeypatch.setattr(reading, "MOST_TARS", 30)
    monkeypatch.setattr(figures, "RANDOM", 4)
    runs.write_output(runs.write_manifest(tmp_path / "in", 120), tmp_path / "out", 1)
    data = pages.data_of(page.render(Output(str(tmp_path / "out"))))
    assert len(opened) == len(set(opened)) == 30
    assert all("output" in sample["pictures"] for sample in data["samples"])
    assert sum(point[4] is not None for point in data["points"]) == 30 - len(data["samples"]) > 0


def test_texts_that_would_fill_the_page_are_cut_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dots go first, then tables, samples last, and the page keeps its budget."""
    monkeypatch.setattr(page, "PAGE_TEXT_BYTES", 200_000)
    monkeypatch.setattr(page, "PAGE_BYTES", 300_000)
    text = page.render(Output(str(write_large(tmp_path, 64, 96))))
    data = pages.data_of(text)
    assert len(text.encode()) <= 300_000
    assert data["cut"][:2] == ["points", "categories"] and data["points"] == [] and data["samples"]
