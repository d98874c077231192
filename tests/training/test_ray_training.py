"""Training through Ray Train: from the command line to a model that generates, and whatever dies on the way."""

import csv
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from support import runs
from support.captioned import write_tar

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import torch

from vcf_batch import storage
from vcf_batch.cli import main
from vcf_batch.config.strengths import EVALUATED_STRENGTHS
from vcf_batch.models import resolution
from vcf_batch.training.fit import Place, fit
from vcf_batch.training.training_config import TrainingConfig
from vcf_batch.training.training_job import TrainingJob, read_log
from vcf_batch.vcf.aligner import ImageAligner

ROOT = Path(__file__).parents[2]
PAIRS = 72


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """This process is the driver of two CPUs."""
    with tempfile.TemporaryDirectory(prefix="vb", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of noise, each with letters of its own for a caption."""
    folder = tmp_path_factory.mktemp("data")
    members: dict[str, bytes | str] = {}
    for number in range(PAIRS):
        members[f"{number:09d}.png"] = runs.png(number)
        members[f"{number:09d}.txt"] = " ".join("abcdefghijkl"[number * step % 12] for step in (1, 5, 7))
    write_tar(folder / "00000.tar", members)
    return folder


def command(name: str, **options: object) -> list[str]:
    return [
        *name.split(),
        *(part for option, value in options.items() for part in (f"--{option.replace('_', '-')}", str(value))),
    ]


def training(model: object, data: object, out: object, **options: object) -> list[str]:
    settings = {"model": model, "data": data, "out": out, "batch_size": 16, "epochs": 3, "learning_rate": 0.01}
    settings |= {"validation_pairs": 8, "num_workers": 2, "transfer_pairs": 0}
    return command("model train", **{**settings, **options})


def call(arguments: list[str]) -> Result:
    return CliRunner().invoke(main, arguments)


def test_a_user_trains_assembles_and_generates(cluster: None, model: Path, data: Path, tmp_path: Path) -> None:
    """Train on two workers, then assemble, then generate with the result; rerunning trains nothing again."""
    out = tmp_path / "aligner"
    arguments = training(model, data, out)
    result = call(arguments)
    assert result.exit_code == 0, result.output
    assert re.search(r"12 steps over 64 pairs; best at step \d+: validation loss .*among 8 pairs", result.output)
    log = read_log(str(out))
    assert [row["step"] for row in log] == [0, 4, 8, 12]
    best = min(log[1:], key=lambda row: row["validation_loss"])
    assert best["validation_loss"] < log[0]["validation_loss"]
    ImageAligner.from_pretrained(out)
    kept = {path.name for path in (out / "checkpoints").iterdir() if path.is_dir()}
    assert kept == {f"step-{int(step):08d}" for step in (best["step"], 12)}, "the best checkpoint, and the last"

    written = (out / "log.csv").stat().st_mtime_ns
    again = call(arguments)
    assert again.exit_code == 0 and "12 steps over 64 pairs" in again.output
    assert (out / "log.csv").stat().st_mtime_ns == written
    other = call(training(model, data, out, epochs=4))
    assert other.exit_code == 4
    assert "epochs: 3 there, 4 now" in other.output

    assembled = call(command("model assemble", base=model, aligner=out, out=tmp_path / "assembled"))
    assert assembled.exit_code == 0, assembled.output
    manifest = runs.write_manifest(tmp_path / "in", 3)
    size = {"height": 32, "width": 32, "steps": 2, "num_workers": 1}
    options = command("generate", model=tmp_path / "assembled", **size)
    generated = call([*options, str(manifest), str(tmp_path / "images")])
    assert generated.exit_code == 0, generated.output
    assert [row["status"] for row in runs.rows_of(tmp_path / "images")] == ["success"] * 3


@pytest.mark.slow
def test_the_aligner_with_the_best_pictures_brings_its_strength(
    cluster: None, model: Path, data: Path, tmp_path: Path
) -> None:
    """Chosen by the pictures of two workers; the aligner has the best strength, and a run of its model takes it."""
    out = tmp_path / "aligner"
    result = call([*training(model, data, out, transfer_pairs=3, select_by="transfer", epochs=2), "--tune-strength"])
    assert result.exit_code == 0, result.output
    log = read_log(str(out))
    best = max(log[1:], key=lambda row: row["transfer"])
    assert f"best at step {best['step']:.0f}: " in result.output
    assert f"pictures at strength {best['strength']:g}: prompt kept {best['prompt_kept']:.0%}, " in result.output
    strength = ImageAligner.from_pretrained(out).config.default_strength
    assert strength == best["strength"] and strength in EVALUATED_STRENGTHS
    assert len(list((out / "transfer").iterdir())) == len(list((out / "tensorboard").iterdir())) == 3

    assembled = call(command("model assemble", base=model, aligner=out, out=tmp_path / "assembled"))
    assert assembled.exit_code == 0, assembled.output
    manifest = runs.write_manifest(tmp_path / "in", 2)
    options = command("generate", model=tmp_path / "assembled", height=32, width=32, steps=2, num_workers=1)
    generated = call([*options, str(manifest), str(tmp_path / "images")])
    assert generated.exit_code == 0, generated.output
    assert {row["strength"] for row in runs.rows_of(tmp_path / "images")} == {strength}
    other = call(training(model, data, out, transfer_pairs=3, epochs=2))
    assert other.exit_code == 4 and "select_by: " in other.output and "tune_strength: " in other.output

    # One worker measures what two do: the aligner's first weights are the same.
    settings: dict[str, Any] = {
        "batch_size": 16,
        "validation_pairs": 8,
        "transfer_pairs": 3,
        "tune_strength": True,
        "dtype": "float32",
    }
    job = TrainingJob.plan(TrainingConfig(model=str(model), data=str(data), out=str(tmp_path / "alone"), **settings))
    place = Place(_stop, lambda done, broken: None, print, lambda module: module, torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt):
        fit(job, place, None)
    for one, two in zip(table(tmp_path / "alone" / "transfer.csv")[:5], table(out / "transfer.csv"), strict=False):
        expected = {name: float(value) for name, value in two.items()}
        assert {name: float(value) for name, value in one.items()} == pytest.approx(expected, abs=1e-4)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_batch_is_shared_evenly(cluster: None, model: Path, data: Path, tmp_path: Path) -> None:
    result = call(training(model, data, tmp_path / "out", batch_size=15))
    assert result.exit_code == 2
    assert "--batch-size 15 is shared by all workers, so it must be a multiple of --num-workers 2" in result.output


@pytest.mark.slow
def test_data_that_cannot_be_used_ends_the_training_at_once(cluster: None, model: Path, tmp_path: Path) -> None:
    """What the user has to mend is not tried again, and says what is wrong without a traceback."""
    members = {f"{number}.{kind}": b"x" for number in range(40) for kind in ("jpg", "txt")}
    result = call(training(model, write_tar(tmp_path / "x.tar", members), tmp_path / "out"))
    assert result.exit_code == 2, result.output
    assert re.search(
        r"of the first \d+ validation pairs cannot be used, more than half; the last: .*x\.tar", result.output
    )
    assert "Traceback" not in result.output


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "vcf_batch", *arguments, "--address", "local"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came: {seen}")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_the_same_command_resumes(number: signal.Signals, model: Path, data: Path, tmp_path: Path) -> None:
    """A driver that is killed or stopped in the middle loses at most the steps since the last checkpoint."""
    out = tmp_path / "out"
    arguments = training(model, data, out, epochs=60, validate_every=4)
    process = start(arguments)
    read_until(process, "step 12 of 240")
    process.send_signal(number)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number], rest
    assert not (out / "config.json").exists(), "what is not finished does not exist"
    steps_before = len(read_log(str(out)))

    resumed = start(arguments)
    first = read_until(resumed, " of 240: validation loss")
    step = int(re.findall(r"step (\d+) of 240", first)[0])
    assert step >= 8, "it does not begin again"
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    log = read_log(str(out))
    assert [row["step"] for row in log] == list(range(0, 241, 4)) and len(log) > steps_before
    ImageAligner.from_pretrained(out)


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(model: Path, data: Path, tmp_path: Path) -> None:
    """Ray Train starts the workers again, and the training goes on from its last checkpoint."""
    process = start(training(model, data, tmp_path / "out", epochs=60, validate_every=4))
    read_until(process, "step 12 of 240")
    workers = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"ray::RayTrainWorker" in path.read_bytes() and _descends(int(path.parent.name), process.pid)
    ]
    os.kill(workers[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert [row["step"] for row in read_log(str(tmp_path / "out"))] == list(range(0, 241, 4))


def _descends(process: int, ancestor: int) -> bool:
    while process > 1:
        if process == ancestor:
            return True
        stat = Path(f"/proc/{process}/stat").read_text()
        process = int(stat.rpartition(")")[2].split()[1])
    return False


@pytest.mark.slow
def test_everything_in_object_storage(s3: str, model: Path, data: Path) -> None:
    """Data, checkpoints, log, cache, aligner and assembled model at S3 URLs; a killed driver is resumed there too."""
    for folder, name in ((model, "model"), (data, "data")):
        for file in storage.list_tree(str(folder)):
            storage.upload(str(folder / file), storage.join(s3, name, file))
    out = storage.join(s3, "aligner")
    settings = {"epochs": 60, "validate_every": 4, "cache_features": storage.join(s3, "cache")}
    arguments = training(f"{s3}/model", f"{s3}/data/*.tar", out, **settings)
    process = start(arguments)
    read_until(process, "step 12 of 240")
    process.kill()
    process.communicate()
    resumed = start(arguments)
    first = read_until(resumed, " of 240: validation loss")
    assert int(re.findall(r"step (\d+) of 240", first)[0]) >= 8, "it does not begin again"
    output, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, output
    assert [row["step"] for row in read_log(out)] == list(range(0, 241, 4))

    assembled = call(command("model assemble", base=f"{s3}/model", aligner=out, out=f"{s3}/assembled"))
    assert assembled.exit_code == 0, assembled.output
    assert resolution.resolve(f"{s3}/assembled").kind == "url"
