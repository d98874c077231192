"""The command line: options, files of options, exit codes."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

import click
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

import vcf_batch
from support import runs
from vcf_batch import pool
from vcf_batch.cli import COMMANDS_BY_STAGE, main
from vcf_batch.cli.model import train
from vcf_batch.cli.run import generate
from vcf_batch.config.run_config import RunConfig
from vcf_batch.driver.ledger import Summary
from vcf_batch.errors import Interrupted, RefusedError, StorageError
from vcf_batch.training.training_config import NOT_TRAINED, TrainingConfig

NOT_SETTINGS = {"config", "dump_config", "deadline", "push", "debug", "as_json"}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def deadlines() -> list[float | None]:
    """The deadlines that runs were started with."""
    return []


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch, deadlines: list[float | None]) -> list[RunConfig]:
    """The configurations that runs were started with; no run takes place."""
    found: list[RunConfig] = []

    def record(config: RunConfig, choose_redo: object, deadline: float | None) -> Summary:
        found.append(config)
        deadlines.append(deadline)
        return Summary(config.output, 10, {"success": 9, "rejected": 0, "failed": 1}, 0, 1.0)

    monkeypatch.setattr(pool, "run", record)
    return found


def ends_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Result:
    def fail(config: RunConfig, choose_redo: object, deadline: object) -> Summary:
        raise error

    monkeypatch.setattr(pool, "run", fail)
    return call("generate", "in.parquet", "out")


def test_options_are_the_settings() -> None:
    names = {parameter.name for parameter in generate.params}
    settled_only = {"default_strengths"}
    assert names - NOT_SETTINGS == {field.name for field in dataclasses.fields(RunConfig)} - settled_only


def test_options_of_a_training_are_its_settings() -> None:
    fields = {field.name: field for field in dataclasses.fields(TrainingConfig)}
    parameters = {parameter.name: parameter for parameter in train.params}
    assert parameters.keys() - NOT_SETTINGS == fields.keys()
    assert fields.keys() > NOT_TRAINED
    for name in fields.keys() - {"model", "data", "out"}:
        assert parameters[name].default == fields[name].default


def leaves(command: click.Command, name: str = "") -> Iterator[tuple[str, click.Command]]:
    """All commands with their names, such as ``model train``; old names are left out."""
    if isinstance(command, click.Group):
        for part, each in command.commands.items():
            yield from leaves(each, f"{name} {part}".strip())
    elif not command.hidden:
        yield name, command


COMMANDS = dict(leaves(main))


def test_every_command_has_a_stage() -> None:
    """The help text lists all commands, by stage, each with a whole sentence."""
    listed = [command.name for commands in COMMANDS_BY_STAGE.values() for command in commands]
    assert sorted(cast(list[str], listed)) == sorted({name.split()[0] for name in COMMANDS})
    text = call("--help").output
    for name in listed:
        assert re.search(rf"^  {name} +[A-Z].*[^.]\.$", text, re.MULTILINE), f"{name} in {text}"
    assert text.index("manifest") < text.index("generate") < text.index("status") < text.index("verify")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    """In whole sentences, in which a number is called by its name."""
    command = COMMANDS[name]
    text = call(*name.split(), "--help").output
    assert " so many " not in " ".join(text.split())
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        if isinstance(parameter, click.Option):
            assert parameter.help
            assert all(flag in text for flag in parameter.opts)
        else:
            assert parameter.human_readable_name in text


def test_version() -> None:
    assert call("--version").output == f"vcf-batch, version {vcf_batch.__version__}\n"


def test_defaults_are_those_of_the_configuration(configured: list[RunConfig]) -> None:
    call("generate", "in.parquet", "out")
    assert configured == [RunConfig(manifest="in.parquet", output="out")]


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(
    configured: list[RunConfig], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("manifest: in.parquet\noutput: out\nsteps: 20\nguidance-scale: 3\nnum_workers: 4\nseed: 1\n")
    call("generate", "--config", file, "--steps", 30, "--num-workers", "auto", "--reference-root", "/a")
    assert configured == [
        RunConfig(manifest="in.parquet", output="out", steps=30, guidance_scale=3, seed=1, reference_root=("/a",))
    ]


def test_what_is_settled_is_no_option(configured: list[RunConfig], tmp_path: Path) -> None:
    """Strengths have one option: what run.json says of them beside it is refused in a configuration file."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "manifest: in.parquet\noutput: out\ndefault_strengths: {naive: 0.3, concat: 1, cross_attention: 0.3}\n"
    )
    result = call("generate", "--config", file)
    assert result.exit_code == 2 and "default_strengths in" in result.output and "is no option" in result.output
    file.write_text("steeps: 3\n")
    assert "default_strengths" not in call("generate", "--config", file).output
    assert not configured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("in.parquet",), "output is missing"),
        (("in.parquet", "out", "--strength", "-1"), "strength is -1.0"),
        (("in.parquet", "out", "--fusion", "blend"), "'blend' is not one of"),
        (("in.parquet", "out", "--num-workers", "many"), "'many' is not a valid integer"),
        (("in.parquet", "out", "--config", "/no/such.yaml"), "cannot read the configuration file /no/such.yaml"),
        (("/no/such.parquet", "out"), "/no/such.parquet does not exist"),
    ],
)
def test_wrong_use_exits_with_2(arguments: tuple[str, ...], message: str) -> None:
    result = call("generate", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_too_many_failed_rows_exit_with_3(configured: list[RunConfig]) -> None:
    assert call("generate", "in.parquet", "out", "--max-failed", 0.1).exit_code == 0
    result = call("generate", "in.parquet", "out", "--max-failed", 0.05)
    assert result.exit_code == 3
    assert "10 rows: 9 success, 0 rejected, 1 failed" in result.output
    assert "To look at it: vcf-batch report out\n" in result.output
    assert "error_message" in result.output
    assert "To generate the failed rows again: vcf-batch repair out\n" in result.output


@pytest.mark.parametrize(
    ("error", "code"),
    [(StorageError("gone"), 1), (RefusedError("another run"), 4), (Interrupted(2), 130), (Interrupted(15), 143)],
)
def test_errors_have_exit_codes(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    result = ends_with(monkeypatch, error)
    assert result.exit_code == code
    assert "Traceback" not in result.output
    if isinstance(error, Interrupted):
        assert "rerun the same command" in result.output


def test_a_run_is_a_document(configured: list[RunConfig]) -> None:
    result = call("generate", "in.parquet", "out", "--json", "--max-failed", "0.1")
    assert result.exit_code == 0
    rows = {"total": 10, "resumed": 0, "success": 9, "rejected": 0, "failed": 1}
    assert json.loads(result.stdout) == {"output": "out", "rows": rows, "prompts_truncated": 0, "seconds": 1.0}


def test_a_log_for_programs_tells_how_a_run_ended(configured: list[RunConfig]) -> None:
    """Nothing but objects is printed, and the last of them has the exit code if that is not 0."""
    ok, failed = (
        call("generate", "in.parquet", "out", "--log-format", "json", "--max-failed", share) for share in (0.1, 0)
    )
    assert (ok.exit_code, failed.exit_code, ok.stdout, failed.stdout) == (0, 3, "", "")
    (told,) = map(json.loads, ok.stderr.splitlines())
    assert (told["event"], told["level"], told["rows"]) == ("run_finished", "info", 10)
    _, error = map(json.loads, failed.stderr.splitlines())
    assert (error["event"], error["level"], error["exit_code"]) == ("error", "error", 3)
    assert error["message"].startswith("Error: 1 of 10 rows failed")


def test_an_error_is_an_object_in_a_log_for_programs() -> None:
    result = call("generate", "in.parquet", "out", "--log-format", "json", "--strength", "-1")
    (told,) = map(json.loads, result.stderr.splitlines())
    assert (result.exit_code, told["event"], told["exit_code"]) == (2, "error", 2)


@pytest.mark.parametrize(("option", "verbosity"), [("-q", "quiet"), ("--verbose", "verbose")])
def test_how_much_is_logged_is_a_setting(configured: list[RunConfig], option: str, verbosity: str) -> None:
    call("generate", "in.parquet", "out", option)
    assert configured == [RunConfig(manifest="in.parquet", output="out", verbosity=verbosity)]


@pytest.mark.parametrize(("text", "seconds"), [("7h30m", 27000), ("90m", 5400), ("0m", 0), ("", 3600)])
def test_a_deadline_is_a_time_or_a_span(
    configured: list[RunConfig], deadlines: list[float | None], text: str, seconds: float
) -> None:
    text = text or (datetime.now() + timedelta(hours=1)).isoformat()
    call("generate", "in.parquet", "out", "--deadline", text)
    (deadline,) = deadlines
    assert deadline is not None and abs(deadline - time.time() - seconds) < 600


@pytest.mark.parametrize("text", ["", "soon", "7x", "h", "2026-13-01", "-5m"])
def test_what_is_no_time_is_refused(text: str) -> None:
    result = call("generate", "in.parquet", "out", "--deadline", text)
    assert result.exit_code == 2 and "is no time: give one such as" in result.output


def test_an_unexpected_error_is_one_line_and_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    result = ends_with(monkeypatch, RuntimeError("broken\nin two lines"))
    assert result.exit_code == 1
    assert result.output == "Unexpected RuntimeError: broken in two lines\nRerun with --debug for the traceback.\n"
    assert "RuntimeError: broken" in call("generate", "in.parquet", "out", "--debug").output


def test_manifest_builds_the_cross_product(tmp_path: Path) -> None:
    """It tells what was paired, what was left out and why, and that noises are fixed."""
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\u2028in a tree\r\n\n  a dog  \na dog\n".encode())
    images = tmp_path / "data" / "references"
    images.mkdir(parents=True)
    for name in ("b.jpg?id=1", "a"):
        (images / name).write_bytes(runs.png(0))
    (images / "notes.png").write_text("not an image")
    out = tmp_path / "data" / "manifest.parquet"
    result = call("manifest", out, "--prompts", tmp_path / "prompts.txt", "--references", images, "--seeds", 2)
    assert result.output.splitlines() == [
        f"{out}: 8 rows",
        "prompts: 2 (duplicates left out: 1, blank: 1)",
        "references: 2",
        "skipped: 1 files (no image): notes.png",
        "seeds: 0 to 1 in the rows of each pair; 'generate --seed' does not change them",
    ]
    rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    assert {row["prompt"] for row in rows} == {"a cat\u2028in a tree", "a dog"}
    assert {row["reference"] for row in rows} == {"references/a", "references/b.jpg?id=1"}
    assert {row["seed"] for row in rows} == {0, 1}


def test_manifest_without_references_is_text_only(tmp_path: Path) -> None:
    """And without --seeds no seed is written."""
    (tmp_path / "prompts.txt").write_text("a cat\na cat\n")
    result = call("manifest", tmp_path / "m.parquet", "--prompts", tmp_path / "prompts.txt", "--keep-duplicates")
    assert result.output.splitlines() == [
        f"{tmp_path / 'm.parquet'}: 2 rows",
        "prompts: 2 (duplicates kept: 1, blank: 0)",
        "references: none; the rows are text only",
        "seeds: none is written; 'generate --seed' and the row's key decide each",
    ]
    assert pq.read_table(tmp_path / "m.parquet").to_pylist() == [{"prompt": "a cat", "reference": None}] * 2


def test_manifest_reads_a_column_of_prompts(tmp_path: Path) -> None:
    """Named by --prompt-column, or called prompt."""
    (tmp_path / "p.csv").write_text('id,caption\n1,"a cat, black"\n')
    target = tmp_path / "m.parquet"
    assert call("manifest", target, "--prompts", tmp_path / "p.csv", "--prompt-column", "caption").exit_code == 0
    assert pq.read_table(target)["prompt"].to_pylist() == ["a cat, black"]
    result = call("manifest", target, "--prompts", tmp_path / "p.csv")
    assert (result.exit_code, "no column 'prompt'; it has 'id', 'caption'" in result.output) == (2, True)


def test_manifest_says_what_is_wrong(tmp_path: Path) -> None:
    """A mistake of the user ends with 2 and without a traceback, and nothing is written."""
    prompts = tmp_path / "prompts.txt"
    result = call("manifest", tmp_path / "m.parquet", "--prompts", prompts)
    assert (result.exit_code, f"cannot read prompts from {prompts}" in result.output) == (2, True)
    prompts.write_bytes("ein Käfer\n".encode("latin-1"))
    result = call("manifest", tmp_path / "m.parquet", "--prompts", prompts)
    assert (result.exit_code, "is not UTF-8: byte 0xE4 at offset 5" in result.output) == (2, True)
    prompts.write_text("a cat\n")
    result = call("manifest", tmp_path / "m.parquet", "--prompts", prompts, "--references", tmp_path)
    assert (result.exit_code, "holds no image" in result.output) == (2, True)
    result = call("manifest", tmp_path / "m.parquet", "--prompts", prompts, "--references", tmp_path / "nowhere")
    assert (result.exit_code, "there is no folder of images" in result.output) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize("job", ["generate", "train_aligner"])
def test_a_job_is_its_command(job: str, tmp_path: Path) -> None:
    """A file of jobs/ is the entry point of the command that its docstring names, from any folder."""
    path = Path(__file__).parents[2] / "jobs" / f"{job}.py"
    [name] = re.findall(r"the command ``vcf-batch (.*?)``", path.read_text())
    told = subprocess.run([sys.executable, path, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stdout.startswith(f"Usage: jobs/{job}.py")
    assert cast(str, COMMANDS[name].help).splitlines()[0] in told.stdout


def test_a_name_that_the_terminal_cannot_show_ends_no_command(tmp_path: Path) -> None:
    """It is written with escapes, whatever the encoding of standard output is."""
    (tmp_path / "prompts.txt").write_text("a cat")
    result = subprocess.run(
        [sys.executable, "-m", "vcf_batch", "manifest", str(tmp_path / "neu😀.parquet"), "--prompts", "prompts.txt"],
        cwd=tmp_path,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
    )
    assert result.returncode == 0, result.stderr
    assert b"neu\\U0001f600.parquet: 1 rows" in result.stdout
