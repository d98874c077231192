"""Write docs/reference.md, commands and columns as the code has them, and docs/api.md: ``make reference``."""

import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from vcf_batch import errors
from vcf_batch.cli import COMMANDS_BY_STAGE
from vcf_batch.cli.command import Command
from vcf_batch.output_columns import COLUMNS
from vcf_batch.records import OVERRIDES

PAGE = Path(__file__).parent / "reference.md"


def reference() -> str:
    """The page."""
    return "\n".join([*_head(), *_columns(), *_exit_codes(), *_commands()])


def _head() -> Iterator[str]:
    yield "# Reference\n"
    yield "Written by `docs/make_reference.py` from the code; `make reference` writes it anew.\n"
    yield "The manifest's contract is [manifests/README.md](../manifests/README.md). These of its columns replace a"
    yield f"run's setting for one row: {', '.join(f'`{name}`' for name in OVERRIDES)}.\n"


def _columns() -> Iterator[str]:
    yield "## Columns of an output\n"
    yield "Each `00000.parquet` has these columns. The manifest's other columns follow. `from` says what decides a"
    yield "value: the manifest alone, the settings of the row, or what became of it. `reference` is a list of strings"
    yield "where the manifest has lists.\n"
    yield "Each `KEY.json` has the columns that are not null as keys: dates, times and decimals as strings, bytes as"
    yield "base64, durations as numbers in the column's unit, maps as arrays of `key` and `value`.\n"
    yield "| column | type | from | meaning |\n|---|---|---|---|"
    for column in COLUMNS.values():
        yield f"| `{column.name}` | `{_cell(str(column.type))}` | {column.origin} | {_cell(column.meaning)} |"


def _exit_codes() -> Iterator[str]:
    yield "\n## Errors and exit codes\n"
    yield "```text"
    yield inspect.cleandoc(errors.__doc__ or "").partition("::\n\n")[2].partition("\n\nA message")[0]
    yield "```"


def _commands() -> Iterator[str]:
    yield "\n## Commands"
    yield "\n| | |\n|---|---|"
    for stage, commands in COMMANDS_BY_STAGE.items():
        links = (f"[{name}](#{name.replace(' ', '-')})" for name, _ in _leaves(commands))
        yield f"| {stage.lower()} | {', '.join(links)} |"
    for name, command in (leaf for commands in COMMANDS_BY_STAGE.values() for leaf in _leaves(commands)):
        context = click.Context(command, info_name=f"vcf-batch {name}")
        yield f"\n### {name}\n"
        yield "```text\n" + " ".join(command.get_usage(context).split()).removeprefix("Usage: ") + "\n```\n"
        yield inspect.cleandoc(command.help or "") + "\n"
        if examples := getattr(command, "examples", ()):
            yield "```text\n" + "\n".join(f"{line}    # {purpose}" for line, purpose in examples) + "\n```\n"
        yield from _document(command)
        records = command.option_records(context) if isinstance(command, Command) else {}
        yield "| option | |\n|---|---|"
        for heading, options in records.items():
            if len(records) > 1:
                yield f"| **{heading}** | |"
            for written, text in options:
                if not written.endswith("--help"):
                    yield f"| `{_cell(written)}` | {_cell(text)} |"


def _document(command: click.Command) -> Iterator[str]:
    if isinstance(command, Command):
        yield "With `--json` it prints one document:\n"
        yield "| field | type | |\n|---|---|---|"
        for name, field in command.document.items():
            yield f"| `{name}` | {_cell(field.type)} | {_cell(field.meaning)} |"
        yield ""


def _leaves(commands: Iterable[click.Command]) -> Iterator[tuple[str, click.Command]]:
    """Each command with its name, such as ``plan``; those of a group instead of the group, such as ``model train``."""
    for command in commands:
        if isinstance(command, click.Group):
            yield from ((f"{command.name} {name}", each) for name, each in command.commands.items())
        else:
            yield str(command.name), command


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


if __name__ == "__main__":
    import make_api

    PAGE.write_text(reference() + "\n")
    make_api.PAGE.write_text(make_api.api())
