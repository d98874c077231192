"""Scorers of an output give what the models say, computed here in another way; and refuse what they cannot use."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import BitImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, Dinov2Model

from support import runs, scorers
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.metrics.aesthetic import AestheticHead
from vcf_batch.metrics.clip_score import ClipJudge
from vcf_batch.metrics.clip_scorers import ClipCosines, ClipEmbeddings
from vcf_batch.metrics.dino import DinoPatches
from vcf_batch.metrics.lpips import LPIPS
from vcf_batch.metrics.own_function import OwnFunction
from vcf_batch.metrics.pixelwise import Pixelwise
from vcf_batch.metrics.scorer import Scorer
from vcf_batch.metrics.shown import ImageScorer, Seen, Shown


def image(seed: int, size: int = 40) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


REFERENCES = [image(10, 56), image(11, 24)]
SHOWN = [
    Shown(np.asarray(image(0)), "a red disc", REFERENCES, (0.25, 0.75), np.asarray(image(5)), {"key": "a"}),
    Shown(np.asarray(image(1)), "a blue star", REFERENCES[:1], (1.0,), None, {"key": "b"}),
    Shown(np.asarray(image(2)), "a red disc", (), (), np.asarray(image(6)), {"key": "c"}),
]
"""Two references with shares, one of them again, and none."""


def values(scorer: ImageScorer, shown: Sequence[Shown] = SHOWN) -> Mapping[str, Sequence[Any]]:
    return scorer.score(shown, [scorer.prepare(each.picture) for each in shown], Seen())


def test_clip_cosines_are_those_of_a_run(tmp_path: Path) -> None:
    """What a CLIP says of prompts and references is what ``clip_score`` and ``clip_reference`` are by that judge."""
    judge = ClipJudge.from_pretrained(str(scorers.save_clip(tmp_path)))
    run = Scorer(judge)
    targets = run.targets(
        [each.prompt for each in SHOWN],
        [[*each.references] for each in SHOWN],
        [each.shares or None for each in SHOWN],
    )
    expected = run.score(targets, [each.picture for each in SHOWN])
    found = values(ClipCosines(judge))
    assert found["to_prompt"] == pytest.approx([each.clip_score for each in expected], abs=1e-6)
    assert found["to_reference"][:2] == pytest.approx([each.clip_reference for each in expected[:2]], abs=1e-6)
    assert found["to_reference"][2] is None


def test_embeddings_have_length_1_and_those_of_several_references_are_their_weighted_mean(tmp_path: Path) -> None:
    judge = ClipJudge.from_pretrained(str(scorers.save_clip(tmp_path)))
    found: dict[str, list[Any]] = {
        name: [None if value is None else np.frombuffer(value, "<f2") for value in column]
        for name, column in values(ClipEmbeddings(judge)).items()
    }
    images = judge.embed_images([each.picture for each in SHOWN]).numpy()
    one, other = judge.embed_images(REFERENCES).numpy()
    mean = 0.25 * one + 0.75 * other
    assert np.stack(found["image"]) == pytest.approx(images, abs=1e-3)
    assert np.linalg.norm(np.stack(found["image"]).astype(float), axis=1) == pytest.approx(1, abs=1e-3)
    assert found["reference"][0] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-3)
    assert found["reference"][1] == pytest.approx(one, abs=1e-3) and found["reference"][2] is None


def test_a_distinct_input_is_encoded_once_in_a_shard(tmp_path: Path) -> None:
    """Prompts and references that come again, in the same batch or a later one, are remembered."""
    judge = ClipJudge.from_pretrained(str(scorers.save_clip(tmp_path)))
    scorer, seen = ClipCosines(judge), Seen()
    prepared = [scorer.prepare(each.picture) for each in SHOWN]
    first = scorer.score(SHOWN, prepared, seen)
    judge.embed_texts = judge.embed_images = None  # type: ignore[method-assign, assignment]
    assert scorer.score(SHOWN, prepared, seen) == first


def test_lpips_and_texture_compare_at_the_pictures_size(tmp_path: Path) -> None:
    """LPIPS is that of the network for each reference squashed to the picture, averaged with the shares."""
    network = LPIPS.from_pretrained("alex", str(scorers.save_lpips(tmp_path)))

    def signed(picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1

    def distance(number: int, reference: Image.Image) -> float:
        own = Image.fromarray(SHOWN[number].picture)
        return float(network(signed(own), signed(reference.resize(own.size, Image.Resampling.BILINEAR))))

    found = values(Pixelwise.lpips(network))[""]
    expected = 0.25 * distance(0, REFERENCES[0]) + 0.75 * distance(0, REFERENCES[1])
    assert found[:2] == pytest.approx([expected, distance(1, REFERENCES[0])], rel=1e-5)
    assert found[2] is None
    itself = [Shown(each.picture, "", [Image.fromarray(each.picture)], (1.0,)) for each in SHOWN]
    assert values(Pixelwise.texture("cpu"), itself)[""] == pytest.approx([1.0] * 3, abs=1e-5)


def test_dino_compares_patches(tmp_path: Path) -> None:
    """Patch by patch with the reference; with the twin after each channel has mean 0 and deviation 1 (AdaIN)."""
    scorer = DinoPatches.from_pretrained(str(scorers.save_dino(tmp_path)))
    model, processor = Dinov2Model.from_pretrained(tmp_path), BitImageProcessorPil.from_pretrained(tmp_path)

    def patches(picture: Image.Image) -> np.ndarray:
        with torch.no_grad():
            tokens = model(**processor(picture, return_tensors="pt")).last_hidden_state
        return tokens[0, 1:].double().numpy()

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))

    def plain(tokens: np.ndarray) -> np.ndarray:
        return (tokens - tokens.mean(0)) / tokens.std(0)

    own = [patches(Image.fromarray(each.picture)) for each in SHOWN]
    other = [patches(reference) for reference in REFERENCES]
    found = values(scorer)
    expected = [0.25 * cosine(own[0], other[0]) + 0.75 * cosine(own[0], other[1]), cosine(own[1], other[0])]
    assert found["to_reference"][:2] == pytest.approx(expected, abs=1e-5)
    twin = patches(Image.fromarray(np.asarray(SHOWN[0].twin)))
    assert found["to_twin"][0] == pytest.approx(cosine(plain(own[0]), plain(twin)), abs=1e-3)
    assert found["to_reference"][2] is None and found["to_twin"][1] is None
    # Another style of the same patches changes nothing.
    same = values(scorer, [Shown(SHOWN[0].picture, "", (), (), SHOWN[0].picture)])
    assert same["to_twin"] == pytest.approx([1.0], abs=1e-4)


@pytest.mark.parametrize("ending", ["pth", "safetensors", "linear"])
def test_an_aesthetic_head_is_one_affine_map(tmp_path: Path, ending: str) -> None:
    """LAION's layers, which have no activations, and a single layer, give what the layers give."""
    clip = ClipJudge.from_pretrained(str(scorers.save_clip(tmp_path / "clip")))
    head, path = scorers.build_head(), scorers.save_head(tmp_path)
    state = torch.load(path, weights_only=True)
    if ending == "linear":
        head = torch.nn.Sequential(torch.nn.Linear(8, 1))
        state = {name.removeprefix("0."): tensor for name, tensor in head.state_dict().items()}
    if ending == "pth":
        torch.save(state, path)
    else:
        path = tmp_path / "head.safetensors"
        safetensors.torch.save_file(state, path)
    with torch.no_grad():
        expected = head.double()(clip.embed_images([each.picture for each in SHOWN]).double())[:, 0]
    found = values(AestheticHead.from_file(str(path), clip))[""]
    assert found == pytest.approx(expected.tolist(), abs=1e-9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layers.0.weight": torch.zeros(1, 8), "layers.0.bias": torch.zeros(1)}, "a linear head has weight and bias"),
        ({"weight": torch.zeros(2, 8), "bias": torch.zeros(2)}, "ends in one number"),
        ({"weight": torch.zeros(1, 9), "bias": torch.zeros(1)}, "takes 9 numbers, and the embedding of its CLIP has 8"),
        (runs.Killed(), "cannot load"),
    ],
)
def test_unusable_heads_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    """Other layers, another width, and a pickle of more than tensors, which is not run."""
    clip = ClipJudge.from_pretrained(str(scorers.save_clip(tmp_path / "clip")))
    torch.save(content, tmp_path / "head.pth")
    with pytest.raises(ModelError, match=message):
        AestheticHead.from_file(str(tmp_path / "head.pth"), clip)


def test_another_model_is_no_dino(tmp_path: Path) -> None:
    """A folder with another model, or without preprocessing, is refused by name."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**shape, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="the DINOv2"):
        DinoPatches.from_pretrained(str(tmp_path))


def test_a_function_gives_named_numbers() -> None:
    """It sees images and rows; what is not finite is no value."""
    own = OwnFunction(
        "m:f", lambda images, rows: {"mean": [np.nan, 1, None], "keys": [ord(row["key"]) for row in rows]}
    )
    assert values(own) == {"mean": [None, 1.0, None], "keys": [97.0, 98.0, 99.0]}
    assert {*own.parts} == {"mean", "keys"}


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"a": [1, 2]}], "2 values named 'a' for 3 images"),
        ([{"A b": [1, 2, 3]}], "a name has small letters"),
        ([[1, 2, 3]], "a dictionary from names"),
        ([{"a": ["x", 2, 3]}], "a dictionary from names"),
        ([{}], "gives nothing"),
        ([{"a": [1, 2, 3]}, {"b": [1, 2, 3]}], "gives b, and gave a before"),
    ],
)
def test_what_a_function_may_not_give_is_named(answers: list[Any], message: str) -> None:
    """The function is named with what it gave, and what it has to give."""
    left = iter(answers)
    own = OwnFunction("m:f", lambda images, rows: next(left))
    for _ in answers[1:]:
        values(own)
    with pytest.raises(UsageError, match=message):
        values(own)


def test_a_function_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    """A module that is not there, a name that is not in it, and a function that fails."""
    (tmp_path / "own_scores_here.py").write_text("number = 1\n")
    for name, message in {
        "no_such_module_here:f": "cannot be imported: ModuleNotFoundError",
        "own_scores_here:f": "cannot be imported: AttributeError",
        "own_scores_here:number": "is a int; give a function",
    }.items():
        with pytest.raises(UsageError, match=message):
            OwnFunction.load(name, str(tmp_path))
    with pytest.raises(UsageError, match="the function m:f fails: ZeroDivisionError"):
        values(OwnFunction("m:f", lambda images, rows: 1 / 0))
