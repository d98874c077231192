"""Names of version 0.1: hidden, with the options, outputs and exit codes they had, and a line with the new name."""

from pathlib import Path

import click
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from support import runs
from vcf_batch.cli import main, model
from vcf_batch.cli.aliases import ALIASES
from vcf_batch.training import ray_training
from vcf_batch.training.ray_training import TrainingSummary
from vcf_batch.training.training_config import TrainingConfig

RENAMED = [
    ("train-aligner", "model train", model.train),
    ("assemble", "model assemble", model.assemble),
    ("evaluate", "model evaluate", model.evaluate),
]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_old_names_are_in_no_help_text() -> None:
    listed = call("--help").output
    for alias in ALIASES:
        assert alias.hidden
        assert f"  {alias.name} " not in listed
        assert call(alias.name, "--help").exit_code == 0


@pytest.mark.parametrize(("old", "new", "command"), RENAMED, ids=lambda value: str(value))
def test_an_old_name_is_the_new_command(old: str, new: str, command: click.Command) -> None:
    """The same options, the same end; one line more on standard error."""
    [alias] = [alias for alias in ALIASES if alias.name == old]
    assert alias.params == command.params
    needed = [
        (f"--{each.name}".replace("_", "-"), "/nowhere/at all")
        for each in command.params
        if isinstance(each, click.Option) and each.required
    ]
    arguments = [part for pair in needed for part in pair]
    if command is model.evaluate:
        arguments += ["--prompts", "/nowhere"]
    before, after = call(old, *arguments), call(*new.split(), *arguments)
    assert (before.exit_code, before.stdout) == (after.exit_code, after.stdout) == (2, "")
    assert before.stderr == f"'vcf-batch {old}' will go in version 0.3: use 'vcf-batch {new}'\n" + after.stderr


def test_train_aligner_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[TrainingConfig] = []
    validation = {"step": 2, "validation_loss": 1.0, "recall_at_1": 0.5, "recall_at_5": 1.0, "validation_pairs": 4}

    def record(config: TrainingConfig) -> TrainingSummary:
        begun.append(config)
        return TrainingSummary(config.out, 2, 8, validation, validation, 1.0)

    monkeypatch.setattr(ray_training, "run", record)
    arguments = ("--model", "tiny", "--data", "captions", "--out", "aligner", "--epochs", 3)
    before, after = call("train-aligner", *arguments), call("model", "train", *arguments)
    assert begun == [TrainingConfig(model="tiny", data="captions", out="aligner", epochs=3)] * 2
    assert before.exit_code == after.exit_code == 0
    assert before.stdout == after.stdout
    assert "use 'vcf-batch model train'" in before.stderr and after.stderr == ""


def test_assemble_assembles(tmp_path: Path) -> None:
    """The embedded model, put together from itself."""
    aligner = Path(model.__file__).parents[1] / "tiny/weights/aligner"
    arguments = ("--base", "tiny", "--aligner", aligner, "--out")
    before, after = call("assemble", *arguments, tmp_path / "a"), call("model", "assemble", *arguments, tmp_path / "b")
    assert (before.stdout, after.stdout) == (f"{tmp_path / 'a'}\n", f"{tmp_path / 'b'}\n")
    assert "use 'vcf-batch model assemble'" in before.stderr
    written = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert written
    for path in written:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_contact_sheet_is_the_picture_of_a_report(tmp_path: Path) -> None:
    output = tmp_path / "out"
    runs.write_output(runs.write_manifest(tmp_path / "in", 10), output, 4)
    result = call("contact-sheet", output)
    assert (result.exit_code, result.stdout) == (0, f"{output / 'contact_sheet.png'}\n")
    assert result.stderr == (
        "'vcf-batch contact-sheet OUTPUT' will go in version 0.3: use 'vcf-batch report OUTPUT --png FILE'\n"
    )
    assert call("contact-sheet", output, "--rows", 2, "--out", tmp_path / "two.png").exit_code == 0
    call("report", output, "--png", tmp_path / "new.png")
    call("report", output, "--png", tmp_path / "new-two.png", "--rows", 2)
    pairs = (("out/contact_sheet.png", "new.png"), ("two.png", "new-two.png"))
    for before, after in pairs:
        assert (tmp_path / before).read_bytes() == (tmp_path / after).read_bytes()
    assert Image.open(tmp_path / "two.png").height < Image.open(tmp_path / "new.png").height
    assert call("contact-sheet", tmp_path / "nowhere").exit_code == 2


def test_a_manifest_may_be_named_with_out(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    target = tmp_path / "m.parquet"
    result = call("manifest", "--prompts", tmp_path / "prompts.txt", "--out", target)
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, f"{target}: 1 rows")
    assert result.stderr == "'--out FILE' will go in version 0.3: use 'vcf-batch manifest FILE'\n"
    assert pq.read_table(target).num_rows == 1
    for named in ((), (target, "--out", target)):
        result = call("manifest", "--prompts", tmp_path / "prompts.txt", *named)
        assert (result.exit_code, "name the manifest to write once" in result.stderr) == (2, True)
