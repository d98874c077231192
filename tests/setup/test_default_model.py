"""Without ``--model``, a run is one of the embedded model, or it is refused before anything is written."""

import contextlib
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from click.testing import CliRunner, Result

from support import runs
from vcf_batch.cli import main
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import UsageError
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.models.embedded import SHAPES
from vcf_batch.output import run_file
from vcf_batch.setup import claim, default_model
from vcf_batch.setup.job import Job

REAL = ["a photo of a cat", "a harbour at dawn", "a red star", "an oil painting of an old man"]
"""Prompts of which the embedded model can draw one."""
COMMANDS = {"generate": ["out", "--address", "local"], "plan": ["out"], "preview": ["--out", "preview.png"]}


def write(folder: Path, prompts: Sequence[str | None]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string())}), folder / "manifest.parquet")
    return folder / "manifest.parquet"


def call(command: str, manifest: Path, *options: object) -> Result:
    return CliRunner().invoke(main, [command, str(manifest), *COMMANDS[command], *map(str, options)])


@pytest.mark.parametrize("command", COMMANDS)
def test_real_prompts_without_a_model_are_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """generate, plan and preview say what tiny is, how many prompts it cannot draw, and what to type instead. They
    exit with 2; nothing is written, and no Ray starts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", pytest.fail)
    result = call(command, write(tmp_path / "in", REAL * 3))
    assert (result.exit_code, "Traceback" in result.output) == (2, False), result.output
    assert "the default 'tiny' is an embedded test model that draws 10 shapes and nothing else: " in result.output
    assert ", ".join(SHAPES) in result.output
    assert "It cannot draw 9 of the first 12 prompts, such as 'a photo of a cat'." in result.output
    assert "--model MODEL" in result.output and "--model tiny " in result.output
    assert ("--fusion ip_adapter --ip-adapter ip-adapter-sd15") in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_refusal_needs_no_torch(tmp_path: Path) -> None:
    """It takes the time of reading a thousand prompts."""
    code = (
        "import sys; from click.testing import CliRunner; from vcf_batch.cli import main; "
        "code = CliRunner().invoke(main, ['generate', *sys.argv[1:]]).exit_code; print(code, 'torch' in sys.modules)"
    )
    arguments = [str(write(tmp_path / "in", REAL)), str(tmp_path / "out")]
    told = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["2", "False"]


def test_tiny_by_name_runs_whatever_the_prompts_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the command line and in a configuration file."""
    monkeypatch.chdir(tmp_path)
    manifest = write(tmp_path / "in", REAL)
    assert call("plan", manifest, "--model", "tiny", "--gpus-per-worker", 0).exit_code == 0
    (tmp_path / "run.yaml").write_text("model: tiny\n")
    assert call("plan", manifest, "--config", "run.yaml", "--gpus-per-worker", 0).exit_code == 0
    (tmp_path / "run.yaml").write_text("model: null\n")
    assert call("plan", manifest, "--config", "run.yaml", "--gpus-per-worker", 0).exit_code == 2
    drawn = call("preview", manifest, "--model", "tiny", "--rows", 1, "--steps", 1, "--gpus-per-worker", 0)
    assert drawn.exit_code == 0 and (tmp_path / "preview.png").exists()


TOLD = "tiny cannot draw 2 of the first 5, such as 'a cat', 'a shiny star': no shape that it draws, or a word"
FEW = ["a star", "a cat", "a ring", "a shiny star", "a heart"]


@pytest.mark.parametrize("options", [(), ("--model", "tiny")], ids=["without a model", "by name"])
def test_the_prompts_that_tiny_cannot_draw_are_told_where_they_are_few(options: Sequence[str], tmp_path: Path) -> None:
    """Their number and the first ones, in a line, before the run and in its plan. The run is not refused."""
    manifest = write(tmp_path / "in", FEW)
    planned = call("plan", manifest, *options, "--gpus-per-worker", 0)
    assert planned.exit_code == 0 and f"  prompts   {TOLD} " in planned.output


def test_three_prompts_at_most_are_told_and_each_once(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model of another name may know every word. A run that goes on tells nothing anew."""
    manifest, out = write(tmp_path / "in", [*FEW, *REAL, "a cat"]), tmp_path / "out"
    with caplog.at_level(logging.INFO, "vcf_batch"):
        begun = settled(manifest, out, model="tiny")
    (line,) = (message for message in caplog.messages if message.startswith("prompts: "))
    few = "'a cat', 'a shiny star', 'a photo of a cat'"
    assert line.startswith(f"prompts: tiny cannot draw 6 of the first 10, such as {few}: no shape")
    claim.claim(begun)
    runs.commit_pictures(begun, begun.shards[0])
    caplog.clear()
    with caplog.at_level(logging.INFO, "vcf_batch"):
        settled(manifest, out, model="tiny")
        settled(manifest, tmp_path / "other", model=str(model), height=32, width=32)
    assert not [message for message in caplog.messages if "cannot draw" in message]


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (["a star", "a cat"], "cannot draw 1 of the first 2 prompts"),
        (["a star", "a heart", "a cat"], None),
        (["a star"] * 501 + ["a cat"] * 5000, None),
        (["a cat"] * 500 + ["a star"] * 5000, "cannot draw 500 of the first 1,000 prompts"),
        (["", None, "a cat", "a heart", "a ring"], None),
        (["", None, "a cat"], "cannot draw 1 of the first 1 prompts"),
        (["x" * 2**20, ""], None),
    ],
    ids=["half", "fewer", "shapes first", "others first", "fewer of the usable", "all of the usable", "none usable"],
)
def test_half_of_the_first_thousand_prompts_decide(
    prompts: Sequence[str | None], told: str | None, tmp_path: Path
) -> None:
    """What comes later does not count, nor do rows without a usable prompt."""
    config = RunConfig(manifest=str(write(tmp_path, prompts)), output=str(tmp_path / "out"))
    manifest = Manifest.open(config.manifest)
    with pytest.raises(UsageError, match=told) if told else contextlib.nullcontext():
        default_model.check(config, None, lambda: manifest.prompts(default_model.JUDGED_ROWS))


def test_a_long_prompt_is_told_by_its_beginning(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"such as 'a{77}\.\.\.'\. Name"):
        settled(write(tmp_path / "in", ["a" * 500]), tmp_path / "out")


def settled(manifest: Path, output: Path, **options: object) -> Job:
    """A run as the driver settles it."""
    config = RunConfig(manifest=str(manifest), output=str(output), gpus_per_worker=0, shard_size=2, steps=1, **options)  # type: ignore[arg-type]
    return runs.settle(config, run_file.read(config.output))


def test_the_default_and_tiny_are_one_run(tmp_path: Path) -> None:
    """The fingerprint and run.json are the same, and name the model."""
    manifest = write(tmp_path / "in", ["a red star", "a blue ring"])
    default, named = settled(manifest, tmp_path / "out"), settled(manifest, tmp_path / "out", model="tiny")
    assert default.fingerprint == named.fingerprint
    assert claim.record_of(default).to_document() == claim.record_of(named).to_document()
    assert claim.record_of(default).config["model"] == claim.record_of(default).models["model"]["name"] == "tiny"


def test_a_run_of_tiny_goes_on_without_its_name(tmp_path: Path) -> None:
    """Whatever the prompts are, and as the very same run; but only once it has begun, which an empty record has not."""
    manifest, out = write(tmp_path / "in", REAL), tmp_path / "out"
    claim.claim(begun := settled(manifest, out, model="tiny"))
    with pytest.raises(UsageError, match="no model is named"):
        settled(manifest, out)
    runs.commit_pictures(begun, begun.shards[0])
    claim.claim(resumed := settled(manifest, out))
    assert resumed.fingerprint == begun.fingerprint
    assert json.loads((out / "run.json").read_text())["config"]["model"] == "tiny"


def test_a_run_of_the_default_goes_on_by_its_name_and_with_other_rows(tmp_path: Path) -> None:
    """A run that began without --model is that of --model tiny. Rows that are appended do not end it."""
    manifest, out = write(tmp_path / "in", ["a star", "a ring"]).parent, tmp_path / "out"
    claim.claim(begun := settled(manifest, out))
    runs.commit_pictures(begun, begun.shards[0])
    assert claim.claim(settled(manifest, out, model="tiny")) == ()
    write(tmp_path / "more", REAL).rename(manifest / "more.parquet")
    assert claim.claim(settled(manifest, out)) == (begun.fingerprint,)


def test_a_run_of_another_model_does_not_go_on_as_tiny(tmp_path: Path) -> None:
    manifest = runs.write_manifest(tmp_path / "in", 4, {"prompt": REAL})
    runs.write_output(manifest, tmp_path / "out", 2)
    with pytest.raises(UsageError, match="no model is named"):
        settled(manifest, tmp_path / "out")
