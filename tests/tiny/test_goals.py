"""The goals of the tiny family, and the probe that reads them."""

from pathlib import Path

import pytest
import torch

from vcf_batch.models.resolution import tiny_folder
from vcf_batch.tiny import goals, second_probe, world
from vcf_batch.tiny.fitting import Recipe
from vcf_batch.tiny.probe import HEADS


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a second probe of two steps is written."""
    monkeypatch.setattr(second_probe, "PROBE_SCENES", 64)
    monkeypatch.setattr(second_probe, "PROBE_RECIPE", Recipe(steps=2, batch=32, lr=1e-3))
    return tmp_path / "second.safetensors"


def test_the_second_probe_is_trained_once_and_read_from_its_file_afterwards(file: Path) -> None:
    pictures = torch.zeros(2, 3, world.SIZE, world.SIZE)
    first = second_probe.second_probe(file)(pictures)
    written = file.stat().st_mtime_ns
    again = second_probe.second_probe(file)(pictures)
    assert file.stat().st_mtime_ns == written
    assert first.keys() == HEADS.keys() | {"direction"}
    for name, logits in first.items():
        assert torch.equal(logits, again[name])


def test_gradients_are_told_from_gradients_upside_down(file: Path) -> None:
    """Without a network. All other patterns are left out."""
    scenes = world.sample_scenes(400, seed=1)
    pictures, probe = world.render(scenes), second_probe.second_probe(file)
    upright, turned = (second_probe.shown(probe, shown, scenes)["gradients"] for shown in (pictures, pictures.flip(2)))
    assert len(upright) == (scenes.attributes["pattern"] == world.PATTERNS.index("gradient")).sum()
    assert upright.float().mean() > 0.97
    assert turned.float().mean() < 0.03


def test_a_family_is_measured_beside_its_goals(file: Path, tmp_path: Path) -> None:
    probe = second_probe.second_probe(file)
    rows = goals.measure(Path(tiny_folder()), probe, count=9, sheets=tmp_path / "sheets", renders=64)
    assert tuple(rows) == goals.ROWS
    assert rows[goals.OBJECT_NAMED].keys() == {"shape", "color"}
    assert all(goals.WANTED_SHARES[row].keys() <= rows[row].keys() for row in goals.WANTED_SHARES)
    assert len(list((tmp_path / "sheets").glob("*.png"))) == 4
    text = goals.table({"tiny": rows})
    assert "| concat at its default | goal |" in text
    assert "| concat at its default | tiny |" in text
