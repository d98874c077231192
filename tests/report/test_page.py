"""The report's page: whole in one file, safe whatever the prompts are, and usable in a browser."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from support import browser, pages, runs
from vcf_batch.cli import main
from vcf_batch.errors import DamageFound
from vcf_batch.output.output import Output
from vcf_batch.records import Scores
from vcf_batch.report import page

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
    return pages.data_of(written.read_text())


def decoded(data: dict[str, Any], place: int) -> Image.Image:
    """A picture of the page."""
    return Image.open(io.BytesIO(base64.b64decode(data["pictures"][place][0].removeprefix("data:image/webp;base64,"))))


def test_every_sample_stands_beside_its_reference(data: dict[str, Any], output: Path) -> None:
    samples = {sample["number"]: sample for sample in data["samples"]}
    assert samples.keys() == set(range(ROWS)) - {7}
    for number, sample in samples.items():
        pictures = {name: decoded(data, place) for name, place in sample["pictures"].items()}
        expected = {"output": runs.png(number, 32), "reference": runs.png(number % 3) if number % 5 != 4 else None}
        for name, file in expected.items():
            if file is None:
                assert name not in pictures
            else:
                assert np.array_equal(np.asarray(pictures[name]), np.asarray(Image.open(io.BytesIO(file))))


def test_the_page_adds_up(data: dict[str, Any]) -> None:
    assert (data["rows"], data["done"], data["counts"]) == (24, 24, {"success": 23, "rejected": 0, "failed": 1})
    assert data["causes"] == [{"status": "failed", "text": "no", "count": 1, "key": "000000007", "example": "no"}]
    assert data["scores"][0]["count"] == sum(data["scores"][0]["bars"]) == data["drawn"] == 23
    assert data["points"] == []
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


def test_a_run_without_its_manifest_is_shown_without_references(output: Path, tmp_path: Path) -> None:
    opened = Output(str(output), {"manifest": str(tmp_path / "gone.parquet")})
    data = pages.data_of(page.render(opened))
    assert not any("reference" in sample["pictures"] for sample in data["samples"])


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


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no chromium on this machine")
def test_samples_open_and_are_flagged_in_a_browser(written: Path) -> None:
    """By keyboard alone: Enter opens a picture, arrows go on, f flags, Esc goes back to where the focus was; flags stay
    when the page is opened again, and are listed as 'repair --keys' takes them."""
    key = "document.querySelector('#viewer-key').textContent"
    focused = "document.activeElement.closest('figure')?.id ?? document.activeElement.id"
    with browser.page() as tab:
        for dark, width in ((False, 1280), (True, 360)):
            tab.open(written, width=width, dark=dark)
            tab.evaluate("document.querySelector('#row-2 .pair').focus()")
            tab.press("Enter")
            assert tab.evaluate("document.querySelector('#viewer').matches(':modal')")
            assert tab.evaluate("document.querySelector('#viewer').getBoundingClientRect().width") <= width
            for _ in range(9):
                tab.press("Tab")
                inside = "document.activeElement === document.body || document.activeElement.closest('dialog') !== null"
                assert tab.evaluate(inside)
            assert tab.evaluate(key) == "000000002"
            tab.press("Escape")
        tab.evaluate("document.querySelector('#row-2 .pair').focus()")
        tab.press("Enter")
        for expected in ("000000003", "000000004"):
            tab.press("ArrowRight")
            assert tab.evaluate(key) == expected
        assert tab.evaluate("document.querySelector('#viewer-beside').textContent") == "Text only: it has no reference."
        tab.press("f")
        tab.press("ArrowLeft")
        assert tab.evaluate("document.querySelector('#viewer-prompt').textContent") == EVIL
        assert tab.evaluate("document.querySelectorAll('#viewer-beside img').length") == 1
        tab.press("Escape")
        assert tab.evaluate("document.querySelector('#viewer').open") is False
        assert tab.evaluate(focused) == "row-3"
        tab.press("f")
        tab.evaluate("document.querySelector('[name=text]').focus()")
        tab.press("f")
        tab.open(written)
        assert tab.evaluate("document.querySelector('#flags-keys').value") == "000000003\n000000004"
        assert tab.evaluate("document.querySelector('#flags-count').textContent") == "2 samples flagged."
        assert tab.evaluate("document.querySelector('#flags-repair').textContent").endswith(" --keys b-out-flagged.txt")
        assert tab.evaluate("document.querySelectorAll('#gallery [aria-pressed=true]').length") == 2
        tab.evaluate("document.querySelector('[name=group][value=flagged]').click()")
        assert tab.evaluate("document.querySelectorAll('#gallery figure').length") == 2
        tab.evaluate("document.querySelector('#row-3 .flag').focus()")
        tab.press("Enter")
        assert tab.evaluate("document.querySelector('#shown').textContent").startswith("1 sample, flagged")
        assert tab.evaluate(focused) == "row-4", "the focus stays in what is left"
        assert tab.problems == []


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no chromium on this machine")
def test_dots_show_their_samples_in_a_browser(tmp_path: Path) -> None:
    """One Tab reaches the plot, arrows go from dot to dot, and Enter opens the sample of one."""
    manifest = runs.write_manifest(tmp_path / "in", 80)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runs, "Scores", lambda score, *_: Scores(score, score / 2, None))
        runs.write_output(manifest, tmp_path / "out", 40)
    (tmp_path / "page.html").write_text(page.render(Output(str(tmp_path / "out"))))
    shown = "document.querySelector('#readout .key').textContent"
    with browser.page() as tab:
        tab.open(tmp_path / "page.html")
        assert tab.evaluate("document.querySelectorAll('.dots circle').length") == 80
        assert tab.evaluate("document.querySelectorAll('.dots [tabindex=\"0\"]').length") == 1
        tab.evaluate("document.querySelector('#highlight, #across').focus()")
        tab.press("Tab")
        assert tab.evaluate("document.activeElement.tagName") == "circle"
        for name, expected in (("ArrowRight", 1), ("End", 79), ("ArrowDown", 78), ("ArrowLeft", 77)):
            tab.press(name)
            assert tab.evaluate(shown) == f"{expected:09d}"
            assert tab.evaluate("document.querySelectorAll('#readout img').length") == 1
        tab.press("Enter")
        assert tab.evaluate("document.querySelector('#viewer-key').textContent") == "000000077"
        tab.press("Escape")
        assert tab.evaluate("document.activeElement.dataset.key") == "000000077"
        assert tab.problems == []
