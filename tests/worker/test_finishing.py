"""Images that are none: what the model has to give before a row fails, with a pipeline whose decoder is damaged."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support import runs
from support.runs import another, commit
from vcf_batch import sharding
from vcf_batch.output import sample_records, shards
from vcf_batch.vcf.fusion import Fusion
from vcf_batch.worker import calibration
from vcf_batch.worker.finishing import NOT_FINITE, ONE_COLOUR
from vcf_batch.worker.worker import Worker

pytestmark = pytest.mark.usefixtures("restored_torch")

ROWS = 6
REFERENCES = {"reference": ["reference0.png"] * ROWS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_manifest(tmp_path_factory.mktemp("manifest"), ROWS, REFERENCES)


@pytest.fixture(scope="module")
def loaded(model: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return runs.load(manifest, tmp_path_factory.mktemp("output"), model)


@pytest.fixture(scope="module")
def guided(model: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """A worker with the CLIP that prompt-noise optimisation follows."""
    return runs.load(manifest, tmp_path_factory.mktemp("output"), model, pno_steps=1)


Damage = Callable[[Worker, str], None]


@pytest.fixture
def damage() -> Iterator[Damage]:
    """Damages the last layer of a worker's decoder until the end of the test."""
    whole = []

    def once(subject: Worker, kind: str) -> None:
        layer = subject.components.pipeline.vae.decoder.conv_out
        whole.append((layer, {name: value.clone() for name, value in layer.state_dict().items()}))
        with torch.no_grad():
            if kind == "zeroed":
                layer.weight.zero_()
                layer.bias.zero_()
            elif kind == "saturated":
                layer.bias.fill_(1e4)
            elif kind == "infinite":
                layer.bias[1] = torch.inf
            elif kind == "partly infinite":
                layer.weight[0] *= 1e38
                layer.weight[0] *= 30  # sums overflow, in some pixels
            else:
                layer.bias[2] = torch.nan

    yield once
    for layer, state in whole:
        layer.load_state_dict(state)


DAMAGES = [
    ("zeroed", ONE_COLOUR),
    ("saturated", ONE_COLOUR),
    ("infinite", NOT_FINITE),
    ("partly infinite", NOT_FINITE),
    ("not a number", NOT_FINITE),
]


@pytest.mark.parametrize(("kind", "reason"), DAMAGES)
def test_what_a_damaged_decoder_gives_is_never_a_success(
    loaded: Worker, manifest: Path, tmp_path: Path, damage: Damage, kind: str, reason: str
) -> None:
    """A picture of one colour fails its row, as values that are not finite do before they are clamped to white."""
    damage(loaded, kind)
    receipt = commit(another(loaded, manifest, tmp_path / "out"))
    assert receipt.counts == {"success": 0, "rejected": 0, "failed": ROWS}
    assert receipt.sampled == 0
    rows = runs.rows_of(tmp_path / "out")
    assert {(row["status"], row["error_message"], row["sha256"], row["clip_score"]) for row in rows} == {
        ("failed", reason, None, None)
    }
    assert not (tmp_path / "out" / "00000.tar").exists()


@pytest.mark.parametrize(("kind", "reason"), DAMAGES)
def test_prompt_noise_optimisation_hides_no_damage(
    guided: Worker, manifest: Path, tmp_path: Path, damage: Damage, kind: str, reason: str
) -> None:
    damage(guided, kind)
    commit(another(guided, manifest, tmp_path / "out"))
    rows = runs.rows_of(tmp_path / "out")
    assert {(row["status"], row["error_message"]) for row in rows} == {("failed", reason)}


def give(subject: Worker, monkeypatch: pytest.MonkeyPatch, fault: Callable[[dict[str, Any]], list[bool]]) -> None:
    """Let the pipeline give one colour for those samples of a batch that ``fault`` picks from its arguments."""
    generate = subject.components.pipeline.generate_from_tokens

    def faulty(**settings: Any) -> torch.Tensor:
        pictures = generate(**settings)
        pictures[torch.tensor(fault(settings))] = 0.2
        return pictures

    monkeypatch.setattr(subject.components.pipeline, "generate_from_tokens", faulty)


def test_a_row_of_one_colour_changes_no_other_row(
    loaded: Worker, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(another(loaded, manifest, tmp_path / "whole"))
    whole = runs.rows_of(tmp_path / "whole")
    give(loaded, monkeypatch, lambda settings: [seed == whole[1]["seed"] for seed in settings["seeds"]])
    commit(another(loaded, manifest, tmp_path / "out"))
    rows = runs.rows_of(tmp_path / "out")
    assert [row["status"] for row in rows] == ["success", "failed", *["success"] * 4]
    assert [row for row in rows if row["status"] == "success"] == [whole[number] for number in (0, 2, 3, 4, 5)]


def test_a_gated_row_of_one_colour_gets_another_draw(
    loaded: Worker, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails if every draw is of one colour; the record has each draw."""
    first = [row.seed for row in loaded.manifest.rows(0, ROWS, 0)]
    own = {sharding.draw_seed(first[2], draw) for draw in range(3)}
    give(loaded, monkeypatch, lambda settings: [seed in first or seed in own for seed in settings["seeds"]])
    receipt = commit(another(loaded, manifest, tmp_path / "out", min_clip_score=-1.0, attempts=3))
    rows = runs.rows_of(tmp_path / "out")
    assert [(row["status"], len(row["attempts"])) for row in rows] == [
        *[("success", 2)] * 2,
        ("failed", 3),
        *[("success", 2)] * 3,
    ]
    assert rows[2]["error_message"] == ONE_COLOUR
    assert rows[0]["seed"] == sharding.draw_seed(first[0], 1)
    assert rows[0]["attempts"][0]["clip_score"] is None
    assert receipt.sampled == 5


def test_a_twin_of_one_colour_fails_the_row(
    loaded: Worker, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(loaded, monkeypatch, lambda settings: [fusion == Fusion() for fusion in settings["fusions"]])
    commit(another(loaded, manifest, tmp_path / "out", triplets=True))
    assert {(row["status"], row["error_message"]) for row in runs.rows_of(tmp_path / "out")} == {("failed", ONE_COLOUR)}


def test_padding_is_not_judged(loaded: Worker, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that stay in a repair keep their bytes, whatever is sampled in their places."""
    commit(another(loaded, manifest, tmp_path / "whole"))
    images = {sample["__key__"]: sample["png"] for sample in shards.read_samples(str(tmp_path / "whole" / "00000.tar"))}
    subject, existing = another(loaded, manifest, tmp_path / "out"), {}
    for row, record in zip(subject.manifest.rows(0, ROWS, 0), runs.rows_of(tmp_path / "whole"), strict=True):
        if row.number != 3:
            existing[row.number] = sample_records.sample_of(row, record, images[row.key])
    generated = next(iter(subject.manifest.rows(3, 4, 0))).seed
    give(loaded, monkeypatch, lambda settings: [seed != generated for seed in settings["seeds"]])
    commit(subject, existing=existing)
    assert runs.data_files(tmp_path / "out") == runs.data_files(tmp_path / "whole")


def test_a_damaged_decoder_can_be_timed(loaded: Worker, damage: Damage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured images are discarded unjudged."""
    monkeypatch.setattr(calibration, "SECONDS", 1e-9)
    damage(loaded, "zeroed")
    assert calibration.seconds_per_image(loaded.components, [*loaded.manifest.rows(0, 2, 0)]) > 0
