"""The images of a batch on their way from sampling to the CPU."""

import numpy as np
import torch
from hypothesis import given
from hypothesis.extra import numpy as hnp

from vcf_batch import images
from vcf_batch.worker.batches import Pictures


@given(values=hnp.arrays(np.float32, (2, 3, 4, 5), elements={"min_value": -0.5, "max_value": 1.5}))
def test_pictures_have_the_pixels_that_images_give(values: np.ndarray) -> None:
    """To the bit, whatever computes them; values beyond black and white are clipped."""
    finite, pixels = Pictures(torch.from_numpy(values)).arrived()
    assert finite == [True, True]
    assert np.array_equal(pixels, images.from_unit(values.transpose(0, 2, 3, 1)))


def test_a_picture_with_a_value_that_is_not_finite_is_told() -> None:
    values = torch.full((3, 3, 2, 2), 0.5)
    values[1, 2, 0, 1] = torch.nan
    finite, pixels = Pictures(values).arrived()
    assert finite == [True, False, True]
    assert pixels[0].shape == (2, 2, 3) and (pixels[0] == 128).all()
