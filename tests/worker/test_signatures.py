"""What belongs together travels whole through a worker."""

import ast
from pathlib import Path

import vcf_batch

LIMIT = 6


def test_no_function_on_a_rows_way_takes_more_than_six_parameters() -> None:
    """A job, a task, the rows of a shard: handed on whole, not field by field."""
    package = Path(vcf_batch.__file__).parent
    files = [*package.glob("worker/*.py"), *(package / "output" / name for name in ("shards.py", "kept_samples.py"))]
    functions = [
        (f"{file.name}: {node.name}", {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)})
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert len(functions) > 50
    assert [name for name, parameters in functions if len(parameters - {"self", "cls"}) > LIMIT] == []
