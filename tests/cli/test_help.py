"""Help texts: examples that parse, headings, widths; and hints at what a wrong name may have meant."""

import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cli.test_cli import COMMANDS, call
from vcf_batch.cli import main
from vcf_batch.cli.command import Command
from vcf_batch.cli.model import model
from vcf_batch.cli.option_groups import OPTION_GROUPS
from vcf_batch.cli.run import generate
from vcf_batch.config.mapping import DIFFUSERS_NAMES


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_it_understands(name: str) -> None:
    command = COMMANDS[name]
    assert isinstance(command, Command) and command.examples
    for line, purpose in command.examples:
        program, *words = shlex.split(line)
        assert program == "vcf-batch" and words[: len(name.split())] == name.split()
        command.make_context(name, words[len(name.split()) :])  # raises if an option is wrong
        assert purpose[0].isupper() and not purpose.endswith((".", ":"))


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("width", [60, 120])
def test_a_help_text_fits_the_terminal(name: str, width: int) -> None:
    result = CliRunner().invoke(COMMANDS[name], ["--help"], terminal_width=width)
    assert result.exit_code == 0
    choices = [line for line in result.output.splitlines() if len(line) > width]
    assert not [line for line in choices if "[" not in line], "too long, and no list of choices"


@pytest.mark.parametrize("group", [main, model])
def test_a_list_of_commands_cuts_no_sentence_off(group: click.Group) -> None:
    text = " ".join(CliRunner().invoke(group, ["--help"], terminal_width=60).output.split())
    for command in group.commands.values():
        first = str(command.help).strip().partition("\n\n")[0]
        assert command.hidden or " ".join(first.split()) in text


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_can_be_copied_as_it_is_shown(name: str) -> None:
    """Where it is too long for the terminal, the shell goes on after each line, and gives the same words."""
    command = COMMANDS[name]
    assert isinstance(command, Command)
    shown = CliRunner().invoke(command, ["--help"], terminal_width=60).output
    shown = shown.partition("\nExamples:\n")[2].partition("\n\n")[0].replace("\\\n", " ")
    lines = [shlex.split(line) for line in shown.splitlines() if line.startswith("    ")]
    assert lines == [shlex.split(line) for line, _ in command.examples]


def test_every_option_of_a_run_has_a_heading() -> None:
    named = [name for names in OPTION_GROUPS.values() for name in names]
    options = {
        str(each.name) for each in generate.get_params(click.Context(generate)) if isinstance(each, click.Option)
    }
    assert len(named) == len({*named}) and {*named} == options
    text = call("generate", "--help").output
    assert [line[:-1] for line in text.splitlines() if line.endswith(":") and line[0] != " "] == [
        "Examples",
        *OPTION_GROUPS,
    ]


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("--num-inference-steps", "--steps"), ("--stepz", "--steps"), ("--ip-adapter-scale", "--strength")],
)
def test_a_wrong_option_is_told_what_it_may_have_meant(wrong: str, meant: str) -> None:
    result = call("generate", "in.parquet", "out", wrong, "3")
    assert result.exit_code == 2
    assert f"No such option '{wrong}'. Did you mean {meant}" in result.output


@pytest.mark.parametrize(("wrong", "meant"), [("num_inference_steps", "steps"), ("guidance_scal", "guidance_scale")])
def test_a_wrong_setting_is_told_what_it_may_have_meant(tmp_path: Path, wrong: str, meant: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{wrong}: 3\n")
    result = call("generate", "in.parquet", "out", "--config", file)
    assert result.exit_code == 2
    assert f"unknown setting '{wrong}'; did you mean {meant}" in result.output


def test_names_of_diffusers_lead_to_settings() -> None:
    settings = {str(parameter.name) for parameter in generate.params}
    assert {*DIFFUSERS_NAMES.values()} <= settings and not DIFFUSERS_NAMES.keys() & settings
