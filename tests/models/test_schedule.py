"""What sampling takes from the configuration of a checkpoint's scheduler."""

import pytest
from diffusers.schedulers import KarrasDiffusionSchedulers

from vcf_batch.config.limits import SCHEDULERS
from vcf_batch.errors import ModelError
from vcf_batch.models.schedule import CLASSES, PINNED, check_schedule


def test_the_schedulers_of_stable_diffusion_are_known() -> None:
    """All that diffusers exchanges for one another, but the one whose UNet takes other inputs."""
    assert {each.name for each in KarrasDiffusionSchedulers} - CLASSES == {"EDMEulerScheduler"}
    assert PINNED.keys() == set(SCHEDULERS)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_refusal_names_model_value_and_remedy_in_one_short_line(scheduler: str) -> None:
    with pytest.raises(ModelError) as refused:
        check_schedule(scheduler, {"prediction_type": "x" * 10_000}, "some/model")
    message = str(refused.value)
    assert 'takes "epsilon", "v_prediction", "sample": use a model' in message
    assert "some/model" in message and len(message) < 400
    check_schedule(scheduler, {}, "some/model")
