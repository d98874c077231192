"""The aligner against the authors' recorded vectors, its preprocessing, and its round trips."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vcf_batch.errors import ModelError
from vcf_batch.vcf.aligner import ImageAligner, alignment_loss, info_nce_loss, reconstruction_loss

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "vcf_golden.npz")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[name])


def authors_state() -> dict[str, torch.Tensor]:
    return {name.removeprefix("aligner_sd/"): golden(name) for name in GOLDEN if name.startswith("aligner_sd/")}


def test_output_equals_the_authors(tmp_path: Path) -> None:
    torch.save(authors_state(), tmp_path / "aligner.pt")
    aligner = ImageAligner.from_authors(tmp_path / "aligner.pt")
    torch.testing.assert_close(aligner(golden("aligner_x")), golden("aligner_y"), atol=1e-5, rtol=0)
    assert aligner.config.double_rescale and aligner.config.tokens == "all"


def test_output_has_the_form_that_is_asked_for() -> None:
    """As in models of diffusers; without a word, the tensor itself."""
    aligner = ImageAligner(24, 16)
    tokens = torch.randn(2, 3, 24)
    plain = aligner(tokens)
    assert isinstance(plain, torch.Tensor) and plain.shape == (2, 3, 16)
    assert torch.equal(aligner(tokens, return_dict=True).sample, plain)
    (alone,) = aligner(tokens, return_dict=False)
    assert torch.equal(alone, plain)


def test_losses_equal_the_authors() -> None:
    image, text = golden("img"), golden("txt")
    torch.testing.assert_close(info_nce_loss(image, text), golden("infonce"), atol=1e-5, rtol=0)
    torch.testing.assert_close(reconstruction_loss(image, text), golden("xattn_recon"), atol=1e-5, rtol=0)
    torch.testing.assert_close(alignment_loss(image, text), golden("combined"), atol=1e-5, rtol=0)


def test_gradients_of_the_losses_are_their_slopes() -> None:
    """The authors recorded the values alone; with the slopes of those values the gradients are pinned down too."""
    image, text = (golden(name)[:3, :4].double().requires_grad_() for name in ("img", "txt"))
    temperature = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    for loss, inputs in (
        (info_nce_loss, (image, text, temperature)),
        (reconstruction_loss, (image, text)),
        (lambda *given: alignment_loss(given[0], given[1], temperature=given[2]), (image, text, temperature)),
    ):
        assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_losses_have_gradients_for_aligner_and_temperature() -> None:
    aligner = ImageAligner(24, 16)
    temperature = torch.tensor(0.07, requires_grad=True)
    alignment_loss(aligner(torch.randn(5, 9, 24)), golden("txt"), temperature=temperature).backward()
    gradients = [parameter.grad for parameter in aligner.parameters()] + [temperature.grad]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    aligner, image, text = ImageAligner(24, 16), torch.randn(5, 9, 24), golden("txt")
    optimizer = torch.optim.AdamW(aligner.parameters(), lr=1e-2)
    first = alignment_loss(aligner(image), text).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = alignment_loss(aligner(image), text)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * first


def test_paper_size_is_about_2_4_million_parameters() -> None:
    with torch.device("meta"):
        aligner = ImageAligner(vision_dim=1280, text_dim=1024)
    assert sum(parameter.numel() for parameter in aligner.parameters()) == 2_363_904


@pytest.mark.parametrize(("tokens", "expected"), [("all", [0, 1, 2, 3]), ("patches", [1, 2, 3]), ("cls", [0])])
def test_token_choice(tokens: str, expected: list[int]) -> None:
    hidden = torch.arange(4.0).reshape(1, 4, 1).expand(2, 4, 24)
    chosen = ImageAligner(24, 16, tokens=tokens).select_tokens(hidden)
    assert chosen[0, :, 0].tolist() == expected


def test_unknown_token_choice_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'pooled'.*all, patches, cls"):
        ImageAligner(24, 16, tokens="pooled")


def test_save_and_load_keeps_weights_and_preprocessing(tmp_path: Path) -> None:
    aligner = ImageAligner(24, 16, tokens="patches", double_rescale=True)
    aligner.save_pretrained(tmp_path)
    loaded = ImageAligner.from_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    assert loaded.config.tokens == "patches" and loaded.config.double_rescale
    for name, value in aligner.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_tokens_of_one_norm(tmp_path: Path) -> None:
    """With a token norm every aligned token has it, in its own direction, after saving and loading too."""
    aligner, tokens = ImageAligner(24, 16, token_norm=3.0, default_strength=0.1), torch.randn(2, 5, 24)
    aligner.save_pretrained(tmp_path)
    loaded = ImageAligner.from_pretrained(tmp_path)
    assert loaded.config.default_strength == 0.1
    plain = loaded.proj(tokens)
    torch.testing.assert_close(loaded(tokens), 3 * plain / plain.norm(dim=-1, keepdim=True))


def test_preprocessing_squashes_without_cropping() -> None:
    """The left and right edge of a wide image are both still there."""
    pixels = np.zeros((20, 100, 3), dtype=np.uint8)
    pixels[:, :25, 0] = pixels[:, 75:, 2] = 255
    batch = ImageAligner(24, 16).preprocess([Image.fromarray(pixels)], 32, (0, 0, 0), (1, 1, 1))
    assert batch.shape == (1, 3, 32, 32) and batch.dtype == torch.float32
    assert batch[0, 0, 16, 1] == 1 and batch[0, 2, 16, 30] == 1 and batch[0, :, 16, 16].sum() == 0


def test_preprocessing_normalises_once_unless_the_checkpoint_needs_it_twice() -> None:
    white = [Image.new("L", (8, 8), 255), Image.new("RGB", (5, 9), "black")]
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    once = ImageAligner(24, 16).preprocess(white, 4, MEAN, STD)
    twice = ImageAligner(24, 16, double_rescale=True).preprocess(white, 4, MEAN, STD)
    torch.testing.assert_close(once[:, :, 0, 0], torch.stack([(1 - mean) / std, -mean / std]))
    torch.testing.assert_close(twice[:, :, 0, 0], torch.stack([(1 - mean) / std, (0.5 - mean) / std]))


class Payload:
    """Stands for code in a pickle."""


def test_authors_checkpoint_with_code_in_it_is_refused(tmp_path: Path) -> None:
    """Nothing runs that the user did not bring: weights_only loading."""
    torch.save({"proj.1.weight": Payload()}, tmp_path / "aligner.pt")
    with pytest.raises(ModelError, match="not a checkpoint of the authors' aligner"):
        ImageAligner.from_authors(tmp_path / "aligner.pt")


def test_other_state_dicts_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "aligner.pt")
    with pytest.raises(ModelError, match=r"proj.1.weight"):
        ImageAligner.from_authors(tmp_path / "aligner.pt")
    with pytest.raises(FileNotFoundError):
        ImageAligner.from_authors(tmp_path / "missing.pt")
