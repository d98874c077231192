"""The report's page: whole in one file, safe whatever the prompts are, and usable in a browser."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from support import browser, runs
from vcf_batch.cli import main
from vcf_batch.errors import DamageFound
from vcf_batch.output.output import Output
from vcf_batch.report import page, thumbnails

ROWS = 24
EVIL = "</script><img src=x onerror=\"document.title='owned'\"><!-- <script> $data ${x} \u2028 & 'é'"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows in three shards, one with a prompt that attacks the page, one failed, in a folder with an evil name."""
    folder = tmp_path_factory.mktemp("page")
    prompts = [EVIL if row == 3 else f"prompt {row}" for row in range(ROWS)]
    manifest = runs.write_manifest(folder / "in", ROWS, {"prompt": prompts})
    runs.write_output(manifest, folder / "<b>out", 8, failed={7})
    return folder / "<b>out"


@pytest.fixture(scope="module")
def written(output: Path) -> Path:
    """The page, as the command writes it."""
    result = CliRunner().invoke(main, ["report", str(output)])
    assert result.exit_code == 0, result.output
    assert result.output == f"{output / 'index.html'}\n"
    return output / "index.html"


@pytest.fixture(scope="module")
def data(written: Path) -> dict[str, Any]:
    """What the page shows."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', written.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_every_sample_stands_beside_its_reference(data: dict[str, Any], output: Path) -> None:
    samples = {sample["number"]: sample for sample in data["samples"]}
    assert samples.keys() == set(range(ROWS)) - {7}
    for number, sample in samples.items():
        shown = {name: sample[name] for name in ("output", "reference")}
        pictures = {
            name: None if place is None else Image.open(io.BytesIO(base64.b64decode(data["pictures"][place][23:])))
            for name, place in shown.items()
        }
        expected = {"output": runs.png(number, 32), "reference": runs.png(number % 3) if number % 5 != 4 else None}
        for name, file in expected.items():
            if file is None:
                assert pictures[name] is None
            else:
                assert np.array_equal(np.asarray(pictures[name]), np.asarray(Image.open(io.BytesIO(file))))


def test_the_page_adds_up(data: dict[str, Any]) -> None:
    assert (data["rows"], data["done"], data["counts"]) == (24, 24, {"success": 23, "rejected": 0, "failed": 1})
    assert data["causes"] == [{"status": "failed", "text": "no", "count": 1, "key": "000000007", "example": "no"}]
    assert data["scores"][0]["count"] == sum(data["scores"][0]["bars"]) == len(data["points"]) == 23
    assert data["scores"][2]["count"] == 0
    assert next(sample for sample in data["samples"] if "best clip_score" in sample["groups"])["number"] == 16


def test_the_page_names_the_strength_that_was_used(data: dict[str, Any]) -> None:
    """No setting is left at 'the default'."""
    assert data["configuration"]["Settings"]["strength"] == "1.0"
    assert {sample["setting"] for sample in data["samples"]} == {"concat 1", "text only"}


def test_the_page_names_the_model_and_the_embedded_one_by_what_it_is(data: dict[str, Any], tmp_path: Path) -> None:
    """Below the heading, and among the models."""
    assert (data["model"], data["configuration"]["Models"]["model"]) == ("m", f"m ({'0' * 16})")
    runs.write_output(runs.write_manifest(tmp_path / "in", 4), tmp_path / "out", 4, model="tiny")
    rendered = page.render(Output(str(tmp_path / "out")))
    assert '"model":"tiny (embedded test model)"' in rendered
    assert f'"model":"tiny ({"0" * 16}), embedded test model"' in rendered


def test_prompts_are_never_markup(written: Path, data: dict[str, Any]) -> None:
    """The data stays inside its element, and no script but the page's own may run."""
    text = written.read_text()
    assert next(sample for sample in data["samples"] if sample["number"] == 3)["prompt"] == EVIL
    assert text.count("<script") == text.count("</script>") == 2
    assert "<img" not in text
    assert "<b>" not in text
    assert "script-src 'sha256-" in text
    assert "innerHTML" not in text


def test_the_page_needs_no_other_file(written: Path) -> None:
    text = re.sub(r'<script type="application/json".*?</script>', "", written.read_text(), flags=re.DOTALL)
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\(|fetch\(", text)
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]


def test_the_page_stays_small() -> None:
    """A page has so many thumbnails at most, and each is small even where nothing compresses."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    assert len(thumbnails.thumbnail(noise)) <= thumbnails.MAX_THUMBNAIL_BYTES
    assert len(thumbnails.thumbnail(noise.resize((thumbnails.EDGE, thumbnails.EDGE)))) <= thumbnails.MAX_THUMBNAIL_BYTES
    samples = page.figures.RANDOM + 2 * page.figures.EXTREMES * len(page.SCORE_LABELS)
    assert samples * 2 * thumbnails.MAX_THUMBNAIL_BYTES * 4 / 3 < 2.2e6


def test_a_run_without_its_manifest_is_shown_without_references(output: Path, tmp_path: Path) -> None:
    opened = Output(str(output), {"manifest": str(tmp_path / "gone.parquet")})
    assert '"reference":0' not in page.render(opened)


def test_a_tar_that_lost_a_sample_is_damage(tmp_path: Path) -> None:
    manifest = runs.write_manifest(tmp_path / "in", 4)
    runs.write_output(manifest, tmp_path / "out", 4)
    tar = tmp_path / "out" / "00000.tar"
    tar.write_bytes(b"\0" * tar.stat().st_size)
    with pytest.raises(DamageFound, match="has no sample 000000000"):
        page.render(Output(str(tmp_path / "out")))


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no chromium on this machine")
def test_filter_and_sort_work_in_a_browser(written: Path) -> None:
    """No complaint, no request, no foreign script; the controls do what they say, by keyboard too."""
    shown = "[...document.querySelectorAll('figure')].map(card => +card.id.slice(4))"

    def choose(name: str, value: str) -> list[int]:
        where = f"document.querySelector('#controls').elements['{name}']"
        tab.evaluate(f"{where}.value = '{value}'; {where}.dispatchEvent(new Event('input', {{bubbles: true}}))")
        return tab.evaluate(shown)

    with browser.page() as tab:
        for dark, width in ((False, 1280), (True, 360)):
            tab.open(written, width=width, dark=dark)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.open(written)
        everything = sorted(set(range(ROWS)) - {7})
        assert tab.evaluate(shown) == everything
        assert choose("order", "best") == everything[::-1]
        assert choose("text", "PROMPT 1") == [21, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 1]
        assert choose("setting", "text only") == [19, 14]
        assert choose("text", "owned") == []
        assert choose("setting", "") == [3]
        assert tab.evaluate("document.querySelector('.prompt').textContent") == EVIL
        choose("text", "")
        tab.evaluate("document.querySelector('[name=group]').focus()")
        tab.press("ArrowRight")
        assert tab.evaluate("document.querySelector('[name=group]:checked').value") == "best"
        assert tab.evaluate(shown) == everything[:-9:-1]
        assert tab.evaluate("document.querySelector('#model').textContent") == "by m"
        assert tab.evaluate("document.title") == "<b>out: vcf-batch report"
        assert tab.evaluate("document.querySelectorAll('svg rect').length") > 3
        assert tab.problems == []
