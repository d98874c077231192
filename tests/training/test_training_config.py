"""Values of a training are checked before anything starts."""

from typing import Any

import pytest
from click.testing import CliRunner

import vcf_batch
from vcf_batch.cli import main
from vcf_batch.errors import UsageError
from vcf_batch.training.training_config import TrainingConfig


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(model="m", data="d", out="o", **changes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e-40, 1e30])
@pytest.mark.parametrize(
    "name", ["learning_rate", "weight_decay", "gradient_norm", "info_nce_weight", "tether", "temperature"]
)
def test_numbers_that_no_training_survives_are_refused(name: str, value: float) -> None:
    """Not a number, infinite, negative, or beyond what float32 can do: told with the limits."""
    if value == 1e-40 and name in ("weight_decay", "info_nce_weight", "tether"):
        return  # These may be 0.
    with pytest.raises(UsageError, match=rf"--{name.replace('_', '-')} is .*; it must be a number from \S+ to \S+"):
        config(**{name: value})


@pytest.mark.parametrize("name", ["limit", "validation_pairs", "epochs", "batch_size", "validate_every"])
def test_counts_are_checked(name: str) -> None:
    for value in (0, -1, 2**70):
        with pytest.raises(UsageError, match="it must be a whole number from 1 to 1,000,000,000,000"):
            config(**{name: value})


@pytest.mark.parametrize("arguments", [("--learning-rate", "nan"), ("--learning-rate", "inf"), ("--seed", str(2**70))])
def test_the_command_refuses_them_before_it_looks_for_data(arguments: tuple[str, str]) -> None:
    """Exit code 2 with the option's name, and no Ray, no model and no traceback."""
    result = CliRunner().invoke(main, ["model", "train", "--model", "m", "--data", "d", "--out", "o", *arguments])
    assert result.exit_code == 2 and f"{arguments[0]} is {arguments[1]}" in result.output


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"epoch": 1}, "unknown setting 'epoch'; did you mean epochs?"),
        ({"epochs": "1"}, "epochs is '1'; it must be a whole number"),
        ({"tokens": "some"}, "--tokens is 'some'; it must be one of all, patches, cls"),
        ({"dtype": "int8"}, "--dtype is 'int8'; it must be one of auto"),
        ({"model": None}, "model is missing"),
    ],
)
def test_python_is_told_what_a_training_does_not_take(given: dict[str, Any], reason: str) -> None:
    """Before Ray is started or anything is read."""
    with pytest.raises(UsageError, match=reason):
        vcf_batch.train_aligner("data", "out", **{"model": "tiny"} | given)
