"""Roles of the tiny family: the pairs that they are fitted to, their table, and the manifest that shows them."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from vcf_batch.models.resolution import resolve, tiny_folder
from vcf_batch.setup.model_check import stored_roles
from vcf_batch.tiny import demo, pairs, world
from vcf_batch.tiny.probe import Probe, agreement
from vcf_batch.vcf.pipeline import VCFPipeline

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"


@pytest.fixture
def roles(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("roles")


def test_pairs_differ_in_one_attribute() -> None:
    made = list(pairs.differing(3))
    assert [name for name, _, _ in made] == [name for name in pairs.ATTRIBUTES for _ in range(3)]
    pixels = {name: [np.asarray(each, int) for each in both] for name, *both in made}
    assert all((first != second).any() for first, second in pixels.values())
    assert len({first.tobytes() for first, _ in pixels.values()}) == 1, "the same scene in another attribute"


def test_the_projections_of_tiny_are_those_of_its_aligner() -> None:
    """Whoever trains the aligner anew has to fit the roles anew: ``vcf-batch model fit-roles``."""
    assert stored_roles(resolve("tiny")) == {"style", "palette"}
    pipeline = VCFPipeline.from_pretrained("tiny")
    shown = [picture for _, *both in pairs.differing(12) for picture in both]
    tokens = pipeline.encode_references(shown)
    mean = pipeline.aligner.projections["style"].mean.float()
    spread = (tokens - tokens.mean(0)).norm(dim=-1).mean()
    assert (tokens.mean(0) - mean).norm(dim=-1).mean() < 0.35 * spread


def test_three_references_each_say_their_part(roles: Any) -> None:
    prompts, references, wanted = roles.drawn_apart(4)
    drawn = pairs.draw(4)
    assert prompts == [pair.prompt for pair in drawn] and all(len(each) == 3 for each in references)
    one = wanted.named(3)
    parts = [one["shape"], one["style"], one["background"], one["position"]]
    given = [drawn[3].wanted["shape"], drawn[3].wanted["style"], drawn[0].wanted["background"]]
    assert parts == [*given, drawn[1].wanted["position"]]


def test_a_goal_that_is_missed_is_named(roles: Any) -> None:
    alone = dict.fromkeys(roles.READ, 0.2) | {"shape": 0.9, "color": 0.8}
    good = alone | {"style": 0.7, "background": 0.3, "pattern": 0.9}
    bad = alone | {"style": 0.69, "background": 0.31, "shape": 0.8}
    assert roles.misses("style", {"text only": alone, "style": good}) == []
    assert roles.misses("style", {"text only": alone, "style": bad}) == [
        "style 69% < 70%",
        "shape 80% < 81%",
        "background 31% > 30%",
    ]
    lines = roles.table({"text only": alone, "style": good}).splitlines()
    assert lines[-1].endswith("| met |") and "**70%**" in lines[-1]


def test_the_manifests_are_what_their_command_writes(tmp_path: Path) -> None:
    CliRunner().invoke(demo.main, [str(tmp_path)], catch_exceptions=False)
    for name in ("demo.parquet", "roles.parquet"):
        assert pq.read_table(tmp_path / name).equals(pq.read_table(MANIFESTS / name))
    assert (tmp_path / demo.LEFT_HALF).read_bytes() == (MANIFESTS / demo.LEFT_HALF).read_bytes()
    rows = pq.read_table(MANIFESTS / "roles.parquet").to_pylist()
    assert rows[4]["reference_roles"] == ["style", "palette", "layout"] and len(rows) == 24


@pytest.mark.slow
def test_roles_of_tiny_take_what_they_should(roles: Any) -> None:
    """A small version of ``python benchmarks/roles.py``, read by the model's own probe."""
    pipeline = VCFPipeline.from_pretrained("tiny")
    pipeline.set_progress_bar_config(disable=True)
    probe = Probe.from_pretrained(Path(tiny_folder(), "probe"), dtype=torch.float32)
    drawn = pairs.draw(24)
    wanted = world.compose([pair.wanted for pair in drawn], seed=0)
    for role, names in roles.WANTED.items():
        made = pipeline.generate(
            [pair.prompt for pair in drawn],
            [pair.reference for pair in drawn],
            seeds=range(24),
            reference_roles=[role] * 24,
        )
        seen = {name: right.float().mean().item() for name, right in agreement(probe, made, wanted).items()}
        assert all(seen[name] > 0.5 for name in names), (role, seen)
