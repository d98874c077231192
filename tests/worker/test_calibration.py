"""Timing a worker, and the batch size it is fastest with."""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from support import runs
from vcf_batch.errors import OutOfDeviceMemory
from vcf_batch.records import Row
from vcf_batch.worker import calibration
from vcf_batch.worker.components import Components
from vcf_batch.worker.worker import Worker

pytestmark = pytest.mark.usefixtures("restored_torch")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """Row 2 has two references; so has row 3, which contradicts itself."""
    folder = tmp_path_factory.mktemp("calibration")
    pair = ["reference0.png", "reference1.png"]
    references = [[], ["reference0.png"], pair, pair, [], ["gone.png"], [], [], [], []]
    columns: dict[str, list[Any]] = {"reference": references, "fusion_lo": [None, None, None, 2.0, *[None] * 6]}
    manifest = runs.write_manifest(folder / "in", 10, columns)
    return runs.load(manifest, folder / "out", runs.save_model(folder / "model"))


def test_a_worker_is_timed_on_rows_of_the_manifest(loaded: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is generated at the run's batch size, with all its steps, after one that warms up."""
    monkeypatch.setattr(calibration, "SECONDS", 1e-9)
    sampled: list[tuple[int, int]] = []
    generate = loaded.components.pipeline.generate_from_tokens

    def seen(*args: Any, **settings: Any) -> torch.Tensor:
        sampled.append((len(settings["seeds"]), settings["sampling"].steps))
        return generate(*args, **settings)

    monkeypatch.setattr(loaded.components.pipeline, "generate_from_tokens", seen)
    components = dataclasses.replace(loaded.components, config=loaded.components.config.replace(batch_size=2))
    rows = [row for row in loaded.manifest.rows(4, 10, 0) if not row.references]
    assert 0 < calibration.seconds_per_image(components, rows) < 60
    assert sampled == [(2, 1), (2, 1), (1, 1), (2, 4), (2, 4), (1, 4)]


@pytest.mark.parametrize(
    ("seconds", "limit", "best"),
    [
        ({1: 1.0, 2: 0.8, 4: 0.7, 8: 0.69, 16: 0.1}, 64, 4),  # 8 gains too little
        ({1: 1.0, 2: 0.8, 4: 0.7}, 64, 4),  # 8 does not fit
        ({1: 1.0, 2: 0.8, 4: 0.7, 8: 0.5}, 7, 4),
        ({1: 1.0, 2: 1.0}, 64, 1),
    ],
)
def test_the_batch_size_grows_while_that_pays(
    loaded: Worker, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], limit: int, best: int
) -> None:
    """Doubled until memory is out or throughput gains less than 5 %."""

    def timed(components: Components, rows: Sequence[Row]) -> float:
        size = cast(int, components.config.batch_size)
        assert len(rows) == 2 * size
        assert {len(row.references) for row in rows} == {2}, "the most demanding row that is sound"
        if size not in seconds:
            raise OutOfDeviceMemory("too large")
        return seconds[size]

    monkeypatch.setattr(calibration, "seconds_per_image", timed)
    assert calibration.fastest_batch_size(loaded.components, loaded.manifest, limit) == best


def test_a_real_worker_finds_its_batch_size(loaded: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SECONDS", 1e-9)
    assert calibration.fastest_batch_size(loaded.components, loaded.manifest, 4) in (1, 2, 4)


def test_where_not_even_one_sample_fits_the_error_says_so(loaded: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory, as ordered")

    monkeypatch.setattr(loaded.components.pipeline, "generate_from_tokens", full)
    with pytest.raises(OutOfDeviceMemory, match="with 1 images"):
        calibration.fastest_batch_size(loaded.components, loaded.manifest, 4)
