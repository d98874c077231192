"""The tables of docs/reliability.md."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "reliability.md"
HOSTILE = "end_to_end/test_hostile.py"
"""The module of what is cited without one."""


def proofs() -> Iterator[tuple[str, str]]:
    """Every line of the tables but their heads, and its last cell."""
    lines = PAGE.read_text().splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("|") and not line.startswith("|-") and not following.startswith("|-"):
            yield line, line.rstrip("| ").rpartition(" | ")[2]


def citations(text: str) -> list[str]:
    """Files and tests among what stands in backticks."""
    return [found for found in re.findall(r"`([^`]+)`", text) if re.match(r"test_|[\w/]+\.py\b", found)]


@functools.cache
def defined(module: str) -> set[str]:
    """Tests that a module below tests/ defines; a file that is not there is an error."""
    return {node.name for node in ast.parse((TESTS / module).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_line_names_a_test() -> None:
    """The table of faults and inputs stands with the test that proves each line, which may be the line's before."""
    lines = [*proofs()]
    assert len(lines) > 60
    assert citations(lines[0][1])
    for line, proof in lines:
        assert citations(proof) or proof.startswith("the same"), line


def test_every_line_says_what_it_rests_on() -> None:
    """In the tables that have a column for it."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.count(" | ") == 3]
    assert lines[0][2] == "rests on"
    bases = [cells[2].split(", ") for cells in lines if cells[2] != "rests on"]
    assert len(bases) > 40
    assert all({*each} <= {"example", "exploration", "simulation", "chaos"} and each for each in bases)
    assert {basis for each in bases for basis in each} == {"example", "exploration", "simulation", "chaos"}


def test_what_is_cited_exists() -> None:
    """In the tables and between them: files, and tests in them."""
    for cited in citations(PAGE.read_text()):
        path, _, name = cited.partition("[")[0].removeprefix("tests/").partition("::")
        if path.endswith(".py"):
            assert (TESTS / path).is_file(), cited
        else:
            path, name = HOSTILE, path
        assert not name or name in defined(path), cited
