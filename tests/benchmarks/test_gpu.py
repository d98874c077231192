"""The benchmark of what needs a GPU runs where there is none, at tiny shapes, and loses no row that it has measured."""

import importlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

pytestmark = pytest.mark.usefixtures("restored_torch")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMPILED = ("compiled/batch", "compiled/single", "fp8/compiled")
REPEATED = ("job/dpm-webp", "job/dpm-png-vgg", "job/ddim-webp", "pno/5", "pno/20", "batches/32", "batches/64")
"""Measurements that differ from another one in a number or a name only."""


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path.parent / "compiled"))  # restored afterwards


def run(*options: str) -> Result:
    """Run the command in its smoke mode."""
    result = CliRunner().invoke(importlib.import_module("gpu").main, ["--smoke", *options])
    assert isinstance(result.exception, SystemExit | None), result.output
    return result


def written(folder: Path) -> list[dict[str, Any]]:
    """The rows of the JSON in a folder."""
    assert [path.name for path in folder.iterdir()] == ["gpu.json"], "nothing half-written is left"
    rows: list[dict[str, Any]] = json.loads((folder / "gpu.json").read_text())["rows"]
    return rows


def measured(folder: Path, names: list[str], *options: str) -> list[dict[str, Any]]:
    """The rows of measurements that all succeed, however slow the machine is."""
    chosen = [option for name in names for option in ("--only", name)]
    result = run("--minutes", "60", "--out", str(folder), *options, *chosen)
    assert result.exit_code == 0, result.output
    assert "failed" not in result.stdout and "not measured" not in result.stdout
    rows, printed = written(folder), [line for line in result.stdout.splitlines() if line.startswith("| ")][1:]
    assert all(line.count("|") == 4 for line in printed)
    assert [line.split("|")[1].strip() for line in printed] == [row["what"] for row in rows]
    assert list(dict.fromkeys(row["measurement"] for row in rows)) == names, "each in its order"
    return rows


def names() -> list[str]:
    """The names of all measurements, in their order."""
    return [one.name for one in importlib.import_module("gpu_rows").MEASUREMENTS]


def test_every_row_can_be_measured(tmp_path: Path) -> None:
    """All but compiled networks and repetitions: each has a value and its seconds, on the table and in the JSON."""
    rows = measured(tmp_path, [name for name in names() if name not in COMPILED + REPEATED])
    assert all(row["shown"] and row["seconds"] >= 0 and row["error"] is None for row in rows)
    kernels = [row["values"]["name"] for row in rows if row["what"].startswith("kernel ")]
    assert len(kernels) == 20
    about = json.loads((tmp_path / "gpu.json").read_text())
    assert about["versions"]["torch"] and about["command"] and about["failed"] == []


def test_stable_diffusion_xl_can_be_measured(tmp_path: Path) -> None:
    """The rows that depend on the family most; the slow test has the others."""
    rows = measured(tmp_path, ["correctness/networks", "stock/single"], "--family", "sdxl")
    assert all(row["shown"] and row["error"] is None for row in rows)
    assert json.loads((tmp_path / "gpu.json").read_text())["family"] == "sdxl"


@pytest.mark.slow
def test_every_row_of_stable_diffusion_xl_can_be_measured(tmp_path: Path) -> None:
    """No row of it has a goal in seconds, as nobody has set one."""
    rows = measured(tmp_path, [name for name in names() if name not in COMPILED + REPEATED], "--family", "sdxl")
    assert {row["goal"] for row in rows if row["what"].endswith("s/image")} == {""}


@pytest.mark.slow
def test_repeated_rows_can_be_measured(tmp_path: Path) -> None:
    assert len(measured(tmp_path, [name for name in names() if name in REPEATED])) == 15


@pytest.mark.slow
def test_compiled_rows_can_be_measured(tmp_path: Path) -> None:
    assert len(measured(tmp_path, [name for name in names() if name in COMPILED])) == 8


# What fails, and what takes too long


class _Models:
    """Models whose measurements take no time. ``folder`` has the JSON."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def estimate(self, measurement: Any) -> float:
        seconds: float = measurement.seconds
        return seconds


@pytest.fixture
def record(tmp_path: Path) -> Any:
    return importlib.import_module("gpu_record").Record(str(tmp_path), {"command": "test"})


def _measurement(name: str, work: Any = None, seconds: float = 0) -> Any:
    parts = importlib.import_module("gpu_record")

    def figures(models: Any) -> Iterator[Any]:
        yield parts.Figure(f"{name}, first", "1")
        if work:
            work(models)
        yield parts.Figure(f"{name}, second", "2")

    return parts.Measurement(name, figures, seconds)


def test_a_row_that_fails_costs_only_itself(record: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows before a failure are kept, the next measurements are done, and the JSON has the traceback."""

    def fail(models: Any) -> None:
        raise ValueError("no | luck")

    record.measure([_measurement("a", fail), _measurement("b")], _Models(tmp_path), time.monotonic() + 60)
    assert [row["what"] for row in written(tmp_path)] == ["a, first", "the rest of a", "b, first", "b, second"]
    assert "raise ValueError" in written(tmp_path)[1]["error"]
    assert record.failed == ["a"]
    assert "| the rest of a | | failed: ValueError: no / luck |" in capsys.readouterr().out


def test_a_failure_gives_exit_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command fails with the name of what failed, after the measurements that follow."""

    def fail(models: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(
        importlib.import_module("gpu_rows"), "MEASUREMENTS", (_measurement("a/a", fail), _measurement("b/b"))
    )
    result = run("--out", str(tmp_path))
    assert result.exit_code == 1 and result.output.rstrip().endswith("failed: a/a")
    assert [row["what"] for row in written(tmp_path)][-1] == "b/b, second"


def test_a_required_figure_that_is_missed_gives_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of its measurement is done, and a goal that is not required fails nothing."""
    parts = importlib.import_module("gpu_record")

    def figures(models: Any) -> Iterator[Any]:
        yield parts.below("wanted", 2.0, 1.0)
        yield parts.below("needed", float("nan"), 1.0, required=True)
        yield parts.below("after", 0.5, 1.0, required=True)

    monkeypatch.setattr(importlib.import_module("gpu_rows"), "MEASUREMENTS", (parts.Measurement("a/a", figures, 0),))
    result = run()
    assert result.exit_code == 1 and result.output.rstrip().endswith("failed: needed")
    assert "| needed | <= 1 | nan (missed) |" in result.output and "| after |" in result.output


def test_models_that_cannot_be_built_cost_only_the_rows_that_need_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Building is tried once; ceilings and kernels are measured before and after it."""
    full_size, built = importlib.import_module("full_size"), []

    def fail(*args: Any) -> None:
        built.append(args)
        raise MemoryError("too large")

    monkeypatch.setattr(full_size, "pipeline", fail)
    wanted = ("device/matmul", "correctness/models", "eager/rule", "fp8/product")
    result = run("--out", str(tmp_path), *(option for name in wanted for option in ("--only", name)))
    assert result.exit_code == 1
    assert "failed: correctness/models, eager/rule" in result.output
    rows = written(tmp_path)
    assert {row["measurement"] for row in rows if row["error"] is None} == {"device/matmul", "fp8/product"}
    assert all("too large" in row["error"] for row in rows if row["error"] is not None)
    assert len(built) == 1


def test_a_device_that_cannot_be_set_up_is_told_and_measured_without_the_rule(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = importlib.import_module("gpu_bench").Device

    def fail(config: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(device, "set_up", fail)
    result = run("--out", str(tmp_path), "--only", "device/versions", "--only", "eager/rule")
    assert result.exit_code == 1 and result.output.rstrip().endswith("failed: device/versions")
    assert written(tmp_path)[-1]["values"]["kernel"] == "flash2"


def test_the_json_is_there_after_each_row(record: Any, tmp_path: Path) -> None:
    """Whatever ends the run, the rows so far are on disk, each file a whole one."""
    seen: list[int] = []

    def look(models: Any) -> None:
        seen.append(len(written(tmp_path)))

    assert written(tmp_path) == []
    record.measure([_measurement("a", look), _measurement("b", look)], _Models(tmp_path), time.monotonic() + 60)
    assert seen == [1, 3]


def test_rows_that_do_not_fit_into_the_time_are_named_and_later_ones_run(
    record: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measurements = [_measurement("long", seconds=61), _measurement("short", seconds=1)]
    record.measure(measurements, _Models(tmp_path), time.monotonic() + 60)
    assert [row["what"] for row in written(tmp_path)] == ["long", "short, first", "short, second"]
    assert "| long | | not measured: out of time |" in capsys.readouterr().out
    assert record.failed == []


def test_a_row_that_takes_longer_than_there_is_time_is_stopped(record: Any, tmp_path: Path) -> None:
    """The whole ends in time, even if an estimate was wrong."""

    def hang(models: Any) -> None:
        try:
            time.sleep(60)
        except Exception:
            pytest.fail("nothing takes the end of the time for a failure")

    begin = time.monotonic()
    record.measure([_measurement("a", hang), _measurement("b", seconds=1)], _Models(tmp_path), begin + 0.2)
    assert time.monotonic() - begin < 30
    assert [(row["what"], row["shown"]) for row in written(tmp_path)][1:] == [
        ("the rest of a", "not measured: out of time"),
        ("b", "not measured: out of time"),
    ]
    assert record.failed == []


def test_the_estimates_of_all_rows_are_near_the_time_of_the_whole() -> None:
    """Nine minutes, with the import of libraries, at the speed that is assumed until an image has been measured."""
    bench, rows = importlib.import_module("gpu_bench"), importlib.import_module("gpu_rows")
    models = SimpleNamespace(smoke=False, per_image={}, family="sd21")
    estimates = {one.name: bench.Bench.estimate(models, one) for one in rows.MEASUREMENTS}
    until_pno = list(estimates)[: list(estimates).index("pno/50") + 1]
    assert sum(estimates[name] for name in until_pno) < 8.5 * 60 - 30


def test_settings_are_restored(tmp_path: Path) -> None:
    """What one measurement changes does not reach the next: kernels, processors, layout."""
    import torch

    bench = importlib.import_module("gpu_bench").Bench(smoke=True)
    before = bench.draw(2, 2)
    processors = bench.pipeline.unet.attn_processors
    importlib.import_module("gpu_sampling").stock_batch(bench).close()
    list(importlib.import_module("gpu_sampling").stock_batch(bench))
    list(importlib.import_module("gpu_compiled").eight_bit_linears(bench))
    assert torch.are_deterministic_algorithms_enabled()
    assert bench.pipeline.unet.attn_processors == processors
    assert torch.equal(bench.draw(2, 2), before)


def test_a_name_that_is_no_measurement_is_refused() -> None:
    result = run("--only", "egaer")
    assert result.exit_code == 2 and "--only is egaer; it must be one of" in result.output
