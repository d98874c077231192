"""The documents of ``--json``. Each command compares what it prints with its fields, here and in all other tests."""

from typing import Any

import pytest

from cli.test_cli import COMMANDS
from vcf_batch.cli.command import Command
from vcf_batch.cli.documents import DOCUMENTS, faults


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_fields_of_its_document(name: str) -> None:
    command = COMMANDS[name]
    assert isinstance(command, Command) and command.document is DOCUMENTS[name]
    assert any(parameter.name == "as_json" for parameter in command.params)


def test_no_document_is_that_of_no_command() -> None:
    assert DOCUMENTS.keys() == COMMANDS.keys()


WHOLE: dict[str, Any] = {
    "target": "out",
    "copied": 1,
    "there": 2,
    "damaged": {},
    "unfinished": 0,
    "scores": {"copied": 0, "damaged": {}},
}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"copied": True}, ["copied is True, and not integer"]),
        ({"target": None}, ["target is None, and not string"]),
        ({"speed": 1}, ["speed is not among its fields"]),
        ({"scores": {"copied": 0}}, ["scores.damaged is missing"]),
        ({"scores": None}, ["scores is not among its fields", "scores.copied is missing", "scores.damaged is missing"]),
    ],
)
def test_what_differs_from_the_fields_is_found(changes: dict[str, Any], found: list[str]) -> None:
    assert faults(WHOLE | changes, DOCUMENTS["push"]) == found


def test_a_field_that_may_be_left_out_may_be_left_out() -> None:
    assert not faults({"page": "index.html"}, DOCUMENTS["report"])
