"""The simulation of runs on many GPUs: its command works, adds up, and sends the requests that a real server gets."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from support.simulation.costs import Costs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHARES = ("starting", "waiting", "lost", "end")


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def command(*options: str) -> str:
    """What the command prints."""
    result = CliRunner().invoke(importlib.import_module("scale").main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def simulated(*options: str) -> list[dict[str, Any]]:
    """The figures of some scenarios."""
    return [json.loads(line) for line in command("run", "--json", *options).splitlines()]


def test_scenarios_are_simulated_and_add_up() -> None:
    """Lost nodes cost time and work, and every share of the GPU time that is not sampling has a reason."""
    losses = ("--lost-per-hour", "0", "--lost-per-hour", "2", "--set", "gpus_per_node=1")
    calm, lossy = simulated("--gpus", "16", "--rows", "64000", *losses)
    for found in (calm, lossy):
        assert found["idle"] == pytest.approx(sum(found[share] for share in SHARES))
        assert found["hours"] * 3600 * 16 >= 64_000 * found["image_seconds"]
        assert found["requests"]["driver COPY"] == 64 * (1 + 20), "a parquet, and a tar of twenty parts"
    assert calm["rows_redone"] == calm["lost_nodes"] == 0
    assert lossy["rows_redone"] > 0 and lossy["lost_nodes"] > 0 and lossy["hours"] > calm["hours"]


def test_a_table_has_a_line_for_each_scenario() -> None:
    lines = command("run", "--gpus", "1", "--gpus", "2", "--rows", "2000", "--shard-size", "500").splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1


def test_limits_fall_with_the_size_of_a_shard() -> None:
    rows = [line.split("|") for line in command("limits", "--image-seconds", "0.45").splitlines()[2:]]
    for column in (5, 6, 7):
        most = [int(row[column].replace(",", "")) for row in rows]
        assert most == sorted(most) and most[0] < most[-1]


def test_every_cost_has_a_source() -> None:
    lines = command("costs").splitlines()[2:]
    assert lines and all("| measured" in line or "| assumed" in line for line in lines)


def test_a_hundred_gpus_do_not_wait_for_commits_to_an_object_store() -> None:
    """A commit of a thousand images of a megabyte takes eight seconds there; another one is due every 4.5 seconds."""
    (found,) = simulated("--gpus", "100", "--rows", "400000")
    number, seconds = Costs().commit(1000)
    assert number == 34 and found["commit_seconds"] == pytest.approx(seconds - 2 * Costs().request_seconds, rel=0.05)
    assert found["waiting"] < 0.02


def test_a_killed_driver_is_replaced_and_finds_the_receipts() -> None:
    few, many = (
        simulated("--gpus", "8", "--rows", "16000", "--killed-at", "0.5", "--finished", str(number))[0]
        for number in (100, 1100)
    )
    for found in (few, many):
        assert len(found["first_shards"]) == 2
        assert 28 < found["first_shards"][1] < 120, "the lease of a driver on another machine expires first"
    assert many["first_shards"][1] > few["first_shards"][1]


def test_the_requests_of_a_commit_are_those_that_a_real_server_gets() -> None:
    """What a simulation counts, s3fs sends."""
    pytest.importorskip("s3fs")
    printed = [line.split("|") for line in command("storage", "--shards", "20").splitlines() if "| 20 |" in line]
    real = {row[1].strip(): float(row[3]) for row in printed}
    costs = ("--set", "image_bytes=1", "--set", "reference_requests=0")
    (found,) = simulated("--gpus", "8", "--rows", "4000", "--shard-size", "10", "--image-seconds", "0.1", *costs)
    # The lease, run.json and the progress file need some requests more.
    assert real["commit"] < found["driver_requests"] * found["hours"] * 3600 / 400 < real["commit"] + 1
    assert real["commit"] == Costs().commit(10)[0]
    assert real["resume"] == pytest.approx(1.0, abs=0.15), "and a listing or two"
    assert real["reference"] == Costs().reference_requests
