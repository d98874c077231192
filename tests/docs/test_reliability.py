"""The tables of docs/reliability.md."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_line_names_tests_that_exist() -> None:
    """The table of faults and inputs stands with the test that proves each line."""
    page = (TESTS.parent / "docs" / "reliability.md").read_text()
    proofs = [line.rstrip("| ").split(" | ")[-1] for line in page.splitlines() if line.startswith("| ")]
    assert len(proofs) > 60
    for proof in proofs:
        tests = [found for found in re.findall(r"`([^`]+)`", proof) if found.startswith("test") or ".py" in found]
        assert tests or proof == "test" or proof.startswith("the same"), proof
        for test in tests:
            module, _, name = test.removeprefix("tests/").partition("[")[0].rpartition("::")
            if name.endswith(".py"):
                assert (TESTS / name).exists(), test
            else:
                assert name in defined(module or "end_to_end/test_hostile.py"), test


def defined(module: str) -> set[str]:
    return {node.name for node in ast.parse((TESTS / module).read_text()).body if isinstance(node, ast.FunctionDef)}
