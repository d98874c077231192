"""What `import vcf_batch` gives: names that load what they need when they are used, and that editors know."""

import ast
import inspect
from dataclasses import MISSING
from pathlib import Path

import pytest

import vcf_batch
from vcf_batch.cli import main
from vcf_batch.config.mapping import SETTLED
from vcf_batch.config.run_config import DECIDED_BY_EVALUATION, RunConfig
from vcf_batch.training.training_config import TrainingConfig

NAMES = sorted({*vcf_batch.__all__} - {"__version__"})


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_there_and_described(name: str) -> None:
    assert getattr(vcf_batch, name).__doc__


def test_type_checkers_and_users_get_the_same_names() -> None:
    """The imports under TYPE_CHECKING name the module and the name there that are loaded."""
    tree = ast.parse(Path(vcf_batch.__file__).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    found = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert found == vcf_batch._HOMES and sorted(found) == NAMES


def test_signatures_have_every_setting_that_is_not_decided() -> None:
    """`help()` and editors show them; a setting that is added is among them by itself."""
    run, training = {*RunConfig.__dataclass_fields__} - SETTLED, {*TrainingConfig.__dataclass_fields__}
    preview = {*inspect.signature(vcf_batch.preview).parameters}
    assert preview - {"sweep"} == run, "its rows are those to draw"
    evaluate = {*inspect.signature(vcf_batch.evaluate).parameters}
    assert run - DECIDED_BY_EVALUATION <= evaluate
    assert not (DECIDED_BY_EVALUATION - {"pno_steps", "prompt_column"}) & evaluate
    given = inspect.signature(vcf_batch.train_aligner).parameters
    assert {*given} == training
    needed = {name for name, parameter in given.items() if parameter.default is inspect.Parameter.empty}
    assert needed == {name for name, field in TrainingConfig.__dataclass_fields__.items() if field.default is MISSING}


@pytest.mark.parametrize(
    ("command", "function", "names"),
    [
        (("preview",), vcf_batch.preview, {"shown": "rows"}),
        (
            ("model", "evaluate"),
            vcf_batch.evaluate,
            {name: name for name in ("pairs", "seeds", "pno_steps", "pno_samples")} | {"sweep": "strengths"},
        ),
    ],
    ids=["preview", "evaluate"],
)
def test_defaults_are_those_of_the_command(command: tuple[str, ...], function: object, names: dict[str, str]) -> None:
    found = main
    for part in command:
        found = found.commands[part]  # type: ignore[attr-defined,assignment]
    defaults = {each.name: each.default for each in found.params}
    signature = inspect.signature(function)  # type: ignore[arg-type]
    assert {name: defaults[option] for option, name in names.items()} == {
        name: signature.parameters[name].default for name in names.values()
    }
