"""What is counted without being computed."""

import importlib
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

RESULTS = Path(__file__).parents[2] / "benchmarks" / "RESULTS.md"


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RESULTS.parent))


def test_what_is_kept_on_the_meta_device_is_what_is_kept_on_a_cpu() -> None:
    assert kept("cpu") == kept("meta") > 0
    assert kept("meta", count=2) == pytest.approx(2 * kept("meta"), rel=0.05)


def kept(device: str, count: int = 1) -> int:
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=32,
            layers_per_block=1,
        ).requires_grad_(False)
        latents, text = (torch.zeros(count, *shape, requires_grad=True) for shape in ((4, 8, 8), (7, 32)))
        found: int = importlib.import_module("counts").kept(unet, lambda: unet(latents, torch.tensor(500), text))
    return found


@pytest.mark.slow  # the test above counts what is kept
def test_the_figures_of_stable_diffusion_xl_are_those_of_the_page() -> None:
    row = importlib.import_module("counts").Counted("sdxl").row()
    assert f"| sdxl | {' | '.join(row)} |" in RESULTS.read_text()
