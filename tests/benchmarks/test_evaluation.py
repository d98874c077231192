"""The evaluation of the method on the tiny family: what its readers see, how it chooses, and that it resumes."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from vcf_batch.metrics.bootstrap import Interval
from vcf_batch.tiny import world
from vcf_batch.tiny.second_probe import SecondProbe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def cases_of() -> Any:
    return importlib.import_module("evaluation_cases")


@pytest.fixture
def tables() -> Any:
    return importlib.import_module("evaluation_tables")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of three pictures."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number, scene in enumerate(world.render(world.sample_scenes(3, seed=8))):
        pixels = (scene.permute(1, 2, 0).numpy() * 255).astype("uint8")
        Image.fromarray(pixels).resize((200, 100)).save(folder / f"{number}.png")
    return folder


def test_the_corner_of_an_object_is_seen_without_a_network(cases_of: Any) -> None:
    cases = cases_of.of_corners(64, SecondProbe().eval())
    assert cases.read(cases.perfect)["corner"].float().mean() > 0.95
    assert cases.read(cases.perfect.flip(3))["corner"].float().mean() < 0.1
    assert cases.read(torch.zeros_like(cases.perfect))["corner"].float().mean() < 0.2


def test_photographs_are_found_by_palette_and_by_texture(cases_of: Any, photographs: Path) -> None:
    """Palettes do not know places, and textures no colours."""
    cases = cases_of.of_photographs(photographs, SecondProbe().eval())
    assert len(cases.prompts) == 3 * cases_of.PROMPTS_OF_A_PHOTOGRAPH
    for shown, found in ((cases.perfect.flip(2, 3), "palette"), (1 - cases.perfect, "texture")):
        assert cases.read(shown)[found].all()
    assert not cases.read(cases.perfect.roll(1, 0))["palette"].any()


def test_a_sketch_shows_edges_and_no_colour(cases_of: Any) -> None:
    flat = torch.zeros(1, 3, 8, 8)
    flat[:, 0, :, 4:] = 1.0
    drawn = cases_of.line_drawing(flat)
    assert drawn[0, :, 4, 3].tolist() == [0.0] * 3
    assert (drawn[..., :3] == 1).all() and (drawn[..., 4:] == 1).all()


def test_a_strength_is_chosen_by_what_is_kept_times_what_is_taken(tables: Any) -> None:
    """Neither the prompt nor the reference may be lost for the other."""

    def shares(kept: float, taken: float) -> dict[str, Interval]:
        values = {**dict.fromkeys(tables.PROMPT, kept), **dict.fromkeys(tables.REFERENCE, taken)}
        return {name: Interval(value, None, None) for name, value in values.items()}

    sweep = {
        tables.Method("plain", "aligner", "concat", strength): shares(*values)
        for strength, values in {0.01: (1.0, 0.2), 0.1: (0.7, 0.7), 1.0: (0.2, 1.0)}.items()
    }
    (chosen,) = tables.best(sweep)
    assert chosen.strength == 0.1
    assert "| **0.1** |" in tables.table(sweep, shares(1, 1), [chosen])


def test_the_first_sentence_says_what_is_measured_of_the_method_as_published_and_as_shipped(tables: Any) -> None:
    """By the UNets that there are; a UNet that was not measured is not spoken of."""
    shares = {name: Interval(0.5, None, None) for name in (*tables.PROMPT, *tables.REFERENCE)}
    rows = {
        tables.Method("embedded", aligner, "concat", 0.1): shares
        for aligner in ("aligner-paper", "aligner-looks", "aligner")
    }
    told = tables.sentence(rows)
    assert told.count("; ") == 1 and "with the paper's loss" in told and "with a tether and captions of looks" in told
    assert "Stable Diffusion" not in told and told.startswith("On the embedded UNet")
    both = tables.sentence({tables.Method("plain", "aligner-paper", "concat", 0.1): shares, **rows})
    assert both.startswith("On a UNet that was trained as Stable Diffusion is") and "; on the embedded UNet" in both


def test_strengths_are_chosen_on_pairs_that_are_not_reported(cases_of: Any) -> None:
    reported, others = (
        {each.tobytes() for each in cases_of.of_the_world("", world.sample_scenes(64, seed), SecondProbe()).references}
        for seed in (cases_of.REPORTED_SEED, cases_of.TUNING_SEED)
    )
    assert len(reported) == len(others) == 64 and not reported & others


def test_an_evaluation_with_other_settings_needs_another_folder(tmp_path: Path) -> None:
    evaluation = importlib.import_module("evaluation")
    evaluation.settle(tmp_path, {"pairs": 8})
    evaluation.settle(tmp_path, {"pairs": 8})
    with pytest.raises(Exception, match=r"other settings \(pairs\)"):
        evaluation.settle(tmp_path, {"pairs": 9})


@pytest.mark.slow
def test_an_evaluation_goes_on_where_it_was_stopped(
    tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has been measured is not generated again, and the tables are the same."""
    evaluation = importlib.import_module("evaluation")
    second_probe = importlib.import_module("vcf_batch.tiny.second_probe")
    monkeypatch.setattr(second_probe, "PROBE_SCENES", 64)
    monkeypatch.setattr(
        second_probe, "PROBE_RECIPE", importlib.import_module("vcf_batch.tiny.fitting").Recipe(2, 32, 1e-3)
    )
    out = tmp_path / "out"
    command = ["--out", str(out), "--family", "embedded", "--photographs", str(photographs), "--length", "0.0002"]
    command += ["--pairs", "4", "--tuning-pairs", "4", "--others", "2", "--steps", "1", "--scenes", "128"]
    made: list[str] = []
    generate = evaluation.Evaluation.generate

    def noted(self: Any, method: Any, cases: Any) -> torch.Tensor:
        if len(made) == 20:
            raise KeyboardInterrupt
        made.append(f"{cases.name} {method.name}")
        return generate(self, method, cases)

    def counted(self: Any, method: Any, cases: Any) -> torch.Tensor:
        made.append("")
        return generate(self, method, cases)

    monkeypatch.setattr(evaluation.Evaluation, "generate", noted)
    assert CliRunner().invoke(evaluation.main, command).exit_code != 0
    first = [name for name in made if not name.startswith("trial")]
    made.clear()
    monkeypatch.setattr(evaluation.Evaluation, "generate", counted)
    result = CliRunner().invoke(evaluation.main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    kept = [*(out / "measured").rglob("*.json")]
    assert len(made) == len(kept) - len(first) + 2  # Two are the estimate's.
    table = (out / "table.md").read_text()
    recalls = json.loads((out / "results.json").read_text())["recall"]
    assert recalls.keys() == importlib.import_module("vcf_batch.tiny.train").ALIGNERS.keys()
    made.clear()
    assert CliRunner().invoke(evaluation.main, command, catch_exceptions=False).exit_code == 0
    assert not made and (out / "table.md").read_text() == table
    assert (out / "sheets" / "photographs embedded.png").exists()
