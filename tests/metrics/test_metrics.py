"""Judge, perceptual distance and scorer, against independent computations on tiny random networks."""

import errno
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from support.scorers import FILES, SHAPES, save_lpips
from vcf_batch import images, storage
from vcf_batch.errors import ModelError, StorageError
from vcf_batch.metrics import scorer as scorer_module
from vcf_batch.metrics.clip_score import ClipJudge, cosine
from vcf_batch.metrics.lpips import LPIPS, Backbone, PerceptualDistance, weight_files
from vcf_batch.metrics.scorer import Scorer
from vcf_batch.records import Scores

TOKENS, SIZE = 12, 32


def picture(seed: int, height: int = 40, width: int = 48) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def output(seed: int, size: int = 40) -> np.ndarray:
    return np.asarray(picture(seed, size, size))


# The judge


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights whose tokens are single letters, saved as the Hub keeps one."""
    path = tmp_path_factory.mktemp("judge")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    torch.manual_seed(0)
    shape = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    vision = CLIPVisionConfig(hidden_size=24, image_size=SIZE, patch_size=8, **shape)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def judge(folder: Path) -> ClipJudge:
    return ClipJudge.from_pretrained(str(folder))


def test_embeddings_are_clips_own(judge: ClipJudge) -> None:
    """The same as CLIP's own forward pass on an image preprocessed by hand: resize, centre crop, scale, normalise."""
    image = picture(0, height=64, width=96)
    resized = image.resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    pixels = (torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
    start, end = judge.tokenizer.bos_token_id, judge.tokenizer.eos_token_id
    vocabulary = judge.tokenizer.get_vocab()
    ids = torch.tensor([[start, vocabulary["a</w>"], vocabulary["c"], vocabulary["d</w>"], end]])
    with torch.inference_mode():
        expected = judge.model(input_ids=ids, pixel_values=pixels)
    texts, images = judge.embed_texts(["a cd"]), judge.embed_images([image])
    torch.testing.assert_close(texts, expected.text_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(images, expected.image_embeds, atol=1e-5, rtol=0)
    logit = expected.logits_per_image / judge.model.logit_scale.exp()
    torch.testing.assert_close(cosine(images, texts), logit[0], atol=1e-5, rtol=0)


def test_batches_equal_singles_and_are_normalised(judge: ClipJudge) -> None:
    texts = ["a", "a longer text", "", "b c"]
    pictures = [picture(0), output(1), picture(2, 100, 33)]
    both: tuple[tuple[Callable[[Any], Tensor], Sequence[Any]], ...] = (
        (judge.embed_texts, texts),
        (judge.embed_images, pictures),
    )
    for embed, inputs in both:
        batch = embed(inputs)
        assert batch.shape == (len(inputs), 8)
        assert batch.dtype == torch.float32
        torch.testing.assert_close(batch.norm(dim=1), torch.ones(len(inputs)))
        torch.testing.assert_close(batch, torch.cat([embed([one]) for one in inputs]), atol=1e-6, rtol=0)
        assert embed([]).shape == (0, 8)


def test_large_batches_are_cut(judge: ClipJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, texts = [picture(seed) for seed in range(5)], list("abcde")
    expected = judge.embed_images(pictures), judge.embed_texts(texts)
    monkeypatch.setattr("vcf_batch.metrics.clip_score._CHUNK", 2)
    torch.testing.assert_close(judge.embed_images(pictures), expected[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(judge.embed_texts(texts), expected[1], atol=1e-6, rtol=0)


def test_long_prompts_are_cut_at_the_models_length(judge: ClipJudge) -> None:
    kept = " ".join("a" * (TOKENS - 2))
    assert torch.equal(judge.embed_texts([kept + " b c d"]), judge.embed_texts([kept]))


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (700, 10)])
def test_very_long_images_cost_no_memory(judge: ClipJudge, size: tuple[int, int]) -> None:
    """The middle decides, as for any centre crop, and is all that gets resized."""
    rows = np.linspace(0, 255, max(size)).astype(np.uint8)[:, None, None].repeat(min(size), 1).repeat(3, 2)
    image = Image.fromarray(rows if size[1] > size[0] else rows.transpose(1, 0, 2).copy())
    middle = Image.new("RGB", (32, 32), (127, 127, 127))
    assert float(cosine(judge.embed_images([image]), judge.embed_images([middle]))) > 0.99
    assert max(images.trimmed(image).size) == 8 * min(size)


def test_cosine_is_raw() -> None:
    a = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]), dim=1)
    b = F.normalize(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, -1.0]]), dim=1)
    torch.testing.assert_close(cosine(a, b), torch.tensor([1.0, -1.0, 0.0]))


def _without(name: str):
    return lambda path: [file.unlink() for file in path.glob(name)]


def _without_a_weight(path: Path) -> None:
    weights = safetensors.torch.load_file(path / "model.safetensors")
    del weights["visual_projection.weight"]
    safetensors.torch.save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _without_a_crop(path: Path) -> None:
    settings = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps(settings | {"do_center_crop": False}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("model.safetensors"), "cannot load"),
        (_without("config.json"), "cannot load"),
        (_without("preprocessor_config.json"), "cannot load"),
        (_without("*tok*"), "tokenizer|cannot load"),
        (_without_a_weight, "lacks 1 weights, among them visual_projection.weight"),
        (_without_a_crop, "resizes without a crop"),
    ],
    ids=["weights", "config", "preprocessing", "tokenizer", "one-weight", "no-crop"],
)
def test_incomplete_judges_are_refused(folder: Path, tmp_path: Path, damage, message: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        ClipJudge.from_pretrained(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [(OSError(errno.EIO, "I/O error"), StorageError), (MemoryError(), MemoryError), (OSError("no vocab"), ModelError)],
)
def test_trouble_of_the_machine_is_not_the_models(
    folder: Path, official: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, expected: type[Exception]
) -> None:
    """Trouble of storage or a node fails the attempt; only what the model lacks ends the run."""

    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(CLIPModel, "from_pretrained", fail)
    with pytest.raises(expected):
        ClipJudge.from_pretrained(str(folder))
    monkeypatch.setattr(storage, "read_bytes", fail)
    with pytest.raises(expected):
        LPIPS.from_pretrained("alex", str(official))


# The perceptual distance


def reference_lpips(maps_a: Sequence[Tensor], maps_b: Sequence[Tensor], heads: Sequence[np.ndarray]) -> np.ndarray:
    """Equation 1 of arXiv 1801.03924 pixel by pixel, in float64 numpy."""
    total = np.zeros(len(maps_a[0]))
    for map_a, map_b, head in zip(maps_a, maps_b, heads, strict=True):
        a, b = map_a.double().numpy(), map_b.double().numpy()
        batch, _, height, width = a.shape
        for n in range(batch):
            for y in range(height):
                for x in range(width):
                    unit_a = a[n, :, y, x] / (np.sqrt((a[n, :, y, x] ** 2).sum()) + 1e-10)
                    unit_b = b[n, :, y, x] / (np.sqrt((b[n, :, y, x] ** 2).sum()) + 1e-10)
                    total[n] += (head * (unit_a - unit_b) ** 2).sum() / (height * width)
    return total


def reference_features(network: str, weights: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """AlexNet and VGG16 written once more, with functions."""

    def conv(number: int, **options: int) -> Tensor:
        return F.relu(F.conv2d(x, weights[f"features.{number}.weight"], weights[f"features.{number}.bias"], **options))

    x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
        1, 3, 1, 1
    )
    maps = []
    if network == "alex":
        x = conv(0, stride=4, padding=2)
        maps.append(x)
        x = F.max_pool2d(x, 3, 2)
        x = conv(3, padding=2)
        maps.append(x)
        x = F.max_pool2d(x, 3, 2)
        for number in (6, 8, 10):
            x = conv(number, padding=1)
            maps.append(x)
        return maps
    for block in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
        x = F.max_pool2d(x, 2) if maps else x
        for number in block:
            x = conv(number, padding=1)
        maps.append(x)
    return maps


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lpips(tmp_path_factory.mktemp("lpips"))


@pytest.fixture(scope="module", params=["alex", "vgg"])
def network(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def lpips(network: str, official: Path) -> LPIPS:
    return LPIPS.from_pretrained(network, str(official))


def signed(seed: int, batch: int = 3, size: int = 40) -> Tensor:
    return torch.rand(batch, 3, size, size + 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_lpips_is_the_published_computation(network: str, lpips: LPIPS, official: Path) -> None:
    a, b = signed(1, batch=2), signed(2, batch=2)
    weights = torch.load(official / FILES[network], weights_only=True)
    heads = torch.load(official / f"{network}.pth", weights_only=True)
    expected = reference_lpips(
        reference_features(network, weights, a),
        reference_features(network, weights, b),
        [heads[f"lin{number}.model.1.weight"].flatten().double().numpy() for number in range(5)],
    )
    np.testing.assert_allclose(lpips(a, b).numpy(), expected, rtol=1e-4)


def test_distance_properties(lpips: LPIPS) -> None:
    a, b = signed(1), signed(2)
    distance = lpips(a, b)
    assert distance.shape == (3,)
    assert distance.dtype == torch.float32
    assert (distance > 0.01).all()
    assert torch.equal(lpips(a, a), torch.zeros(3))
    torch.testing.assert_close(lpips(b, a), distance)
    torch.testing.assert_close(torch.cat([lpips(a[n : n + 1], b[n : n + 1]) for n in range(3)]), distance)
    near = lpips(a, a + 0.05 * (b - a))
    assert (near < distance).all()


def test_black_images_are_finite(lpips: LPIPS) -> None:
    black = -torch.ones(1, 3, 40, 40)
    assert lpips(black, signed(1, 1)[..., :40]).isfinite().all()


def test_sizes(lpips: LPIPS, network: str) -> None:
    least = {"alex": 31, "vgg": 16}[network]
    small = signed(1, 1, least)
    assert lpips(small, -small).isfinite().all()
    with pytest.raises(ValueError, match=f"it needs {least} along each side"):
        lpips(small[:, :, 1:], small[:, :, 1:])
    for a, b in ((signed(1), signed(1)[:2]), (signed(1)[:, :1], signed(1)[:, :1]), (signed(1)[0], signed(1)[0])):
        with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
            lpips(a, b)


def test_safetensors_and_other_urls(official: Path, tmp_path: Path, lpips: LPIPS, network: str) -> None:
    for file in (FILES[network], f"{network}.pth"):
        state = torch.load(official / file, weights_only=True)
        safetensors.torch.save_file(state, tmp_path / file.replace(".pth", ".safetensors"))
    again = LPIPS.from_pretrained(network, f"file://{tmp_path}")
    assert torch.equal(again(signed(1), signed(2)), lpips(signed(1), signed(2)))
    assert weight_files(network, "https://example.org/lpips/") == (
        f"https://example.org/lpips/{FILES[network]}",
        f"https://example.org/lpips/{network}.pth",
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (FILES["alex"], None, "holds no alexnet-owt-7be5be79.pth.*--lpips none"),
        ("alex.pth", None, "holds no alex.pth"),
        (FILES["alex"], {"features.0.weight": torch.zeros(64, 3, 11, 11)}, "is not torchvision's alexnet"),
        ("alex.pth", {"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, "lin1.model.1.weight must be"),
        ("alex.pth", {"lin0.model.1.weight": torch.zeros(1, 63, 1, 1)}, r"lin0.model.1.weight must be \[1, 64, 1, 1\]"),
        ("alex.pth", {"lin0.model.1.weight": -torch.ones(1, 64, 1, 1)}, "not negative"),
        ("alex.pth", {"lin0.model.1.weight": "text"}, "safe to load"),
        ("alex.pth", [1, 2], "safe to load"),
        ("alex.pth", b"garbage", "safe to load"),
        ("alex.pth", b"", "safe to load"),
    ],
)
def test_unusable_weights_are_refused(official: Path, tmp_path: Path, name: str, content, message: str) -> None:
    for file in (FILES["alex"], "alex.pth"):
        (tmp_path / file).symlink_to(official / file)
    (tmp_path / name).unlink()
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(ModelError, match=message):
        LPIPS.from_pretrained("alex", str(tmp_path))


class _Evil:
    """Unpickles by creating a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def test_what_a_weight_file_would_run_is_not_run(official: Path, tmp_path: Path) -> None:
    """Nothing runs that the user did not bring: safetensors or weights_only loading."""
    (tmp_path / "alex.pth").symlink_to(official / "alex.pth")
    torch.save({"features.0.weight": _Evil(tmp_path / "mark")}, tmp_path / FILES["alex"])
    with pytest.raises(ModelError, match="safe to load"):
        LPIPS.from_pretrained("alex", str(tmp_path))
    assert not (tmp_path / "mark").exists()
    torch.load(tmp_path / FILES["alex"], weights_only=False)
    assert (tmp_path / "mark").exists()


def test_backbones_keep_torchvisions_keys(network: str) -> None:
    state = Backbone(network).state_dict()
    assert set(state) == {f"features.{number}.{part}" for number in SHAPES[network] for part in ("weight", "bias")}


class _Features(nn.Module):
    """Two convolutions of random weights: stands where the embedded probe stands."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList([nn.Conv2d(3, 6, 3, stride=2), nn.Conv2d(6, 10, 3, stride=2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for block in self.blocks:
            x = block(x).tanh()
            maps.append(x)
        return maps


@pytest.fixture(scope="module")
def perceptual() -> PerceptualDistance:
    return PerceptualDistance(_Features())


def test_without_weights_channels_count_alike(perceptual: PerceptualDistance) -> None:
    a, b = signed(1, size=16), signed(2, size=16)
    with torch.inference_mode():
        maps_a, maps_b = perceptual.features(a), perceptual.features(b)
    expected = reference_lpips(maps_a, maps_b, [np.full(6, 1 / 6), np.full(10, 1 / 10)])
    np.testing.assert_allclose(perceptual(a, b).numpy(), expected, rtol=1e-5)
    by_hand = sum(
        (F.normalize(x) - F.normalize(y)).square().mean((1, 2, 3)) for x, y in zip(maps_a, maps_b, strict=True)
    )
    torch.testing.assert_close(perceptual(a, b), by_hand)


# The scorer


@pytest.fixture
def scorer(judge: ClipJudge, perceptual: PerceptualDistance) -> Scorer:
    return Scorer(judge, perceptual)


def score_batch(scorer: Scorer, prompts: Any, outputs: Any, references: Any, weights: Any = None) -> list[Scores]:
    return scorer.score(scorer.targets(prompts, references, weights), outputs)


def test_scores_are_what_their_parts_say(scorer: Scorer, judge: ClipJudge, perceptual: PerceptualDistance) -> None:
    prompts = ["a", "b c", "a"]
    outputs = [output(1), output(2), output(3)]
    references = [[picture(4)], [], [picture(4), picture(5, 64, 20)]]
    scores = score_batch(scorer, prompts, outputs, references)
    assert [type(score) for score in scores] == [Scores] * 3
    for score, prompt, made, own in zip(scores, prompts, outputs, references, strict=True):
        embedded = judge.embed_images([made])
        assert score.clip_score == pytest.approx(float(cosine(embedded, judge.embed_texts([prompt]))), abs=1e-5)
        if not own:
            assert score.clip_reference is None
            assert score.lpips is None
            continue
        cosines = [float(cosine(embedded, judge.embed_images([image]))) for image in own]
        assert score.clip_reference == pytest.approx(np.mean(cosines), abs=1e-5)
        a = torch.from_numpy(made.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        resized = [np.array(image.resize((40, 40), Image.Resampling.BILINEAR)) for image in own]
        distances = [perceptual(a, torch.from_numpy(b).permute(2, 0, 1)[None] / 127.5 - 1).item() for b in resized]
        assert score.lpips == pytest.approx(np.mean(distances), rel=1e-4)


def test_references_count_in_the_mean_what_they_are_given(scorer: Scorer) -> None:
    pair = [picture(2), picture(3)]
    first, second = score_batch(scorer, ["a", "a"], [output(1)] * 2, [pair[:1], pair[1:]])
    even, alone, uneven = score_batch(scorer, ["a"] * 3, [output(1)] * 3, [pair] * 3, [None, [1, 0], [3, 1]])
    for name in ("clip_reference", "lpips"):
        low, high = getattr(first, name), getattr(second, name)
        assert getattr(even, name) == pytest.approx((low + high) / 2, rel=1e-4)
        assert getattr(alone, name) == pytest.approx(low, rel=1e-4)
        assert getattr(uneven, name) == pytest.approx(0.75 * low + 0.25 * high, rel=1e-4)


def test_an_output_equal_to_its_reference(scorer: Scorer) -> None:
    (score,) = score_batch(scorer, ["a"], [output(1)], [[Image.fromarray(output(1))]])
    assert score.clip_reference == pytest.approx(1, abs=1e-5)
    assert score.lpips == 0


def test_without_a_perceptual_distance(judge: ClipJudge) -> None:
    (score,) = score_batch(Scorer(judge), ["a"], [output(1)], [[picture(2)]])
    assert score.lpips is None
    assert score.clip_reference is not None


def test_unequal_batches_are_refused(scorer: Scorer) -> None:
    with pytest.raises(ValueError, match="1 outputs, targets of 2"):
        score_batch(scorer, ["a", "b"], [output(1)], [[], []])


def test_each_distinct_input_is_embedded_once_a_shard(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text and reference embeddings are computed once per distinct input per shard; equal pixels are one input."""
    texts: list[str] = []
    pictures: list[int] = []
    embed_texts, embed_images = scorer.judge.embed_texts, scorer.judge.embed_images

    def counted_texts(new: Sequence[str]) -> Tensor:
        texts.extend(new)
        return embed_texts(new)

    def counted_images(new: Sequence[Any]) -> Tensor:
        pictures.append(len(new))
        return embed_images(new)

    monkeypatch.setattr(scorer.judge, "embed_texts", counted_texts)
    monkeypatch.setattr(scorer.judge, "embed_images", counted_images)
    shared = picture(4)
    for seed in range(3):
        score_batch(scorer, ["a", "a", "b"], [output(seed)] * 3, [[shared], [shared.copy()], [picture(5)]])
    assert texts == ["a", "b"]
    assert pictures == [3, 2, 3, 3]  # three outputs, the two references, and outputs alone
    score_batch(scorer.new_shard(), ["a"], [output(1)], [[shared]])
    assert texts == ["a", "b", "a"]
    assert pictures[-2:] == [1, 1]


def test_references_of_skipped_batches_do_not_pile_up(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of which every row has failed leave a bounded number of bytes waiting, and change no score."""
    pictures = [picture(10 + number) for number in range(9)]

    def scores(limit: int) -> tuple[list[Scores], int]:
        monkeypatch.setattr(scorer_module, "WAITING_BYTES", limit)
        own, most = scorer.new_shard(), 0
        for skipped in pictures[:-1]:
            own.targets(["skipped", "too"], [[skipped], [pictures[0]]])
            waiting = {id(entry.embeddings): entry.embeddings.waiting for entry in own._references.values()}
            most = max(most, sum(len(images) for images in waiting.values()))
        return own.score(own.targets(["kept"], [[pictures[-1], *pictures[:2]]]), [output(1)]), most

    unbounded, all_of_them = scores(1 << 28)
    bounded, few = scores(2 * 40 * 48 * 3)
    assert (all_of_them, few) == (8, 2)
    assert bounded == unbounded


def test_scores_do_not_depend_on_earlier_shards(judge: ClipJudge, perceptual: PerceptualDistance) -> None:
    """The output is a function of fingerprint and device type, not of what a worker did before."""
    fresh, used = Scorer(judge, perceptual), Scorer(judge, perceptual)
    batch = (["a", "b c d"], [output(1), output(2)], [[picture(4)], [picture(5), picture(6)]])
    score_batch(used, ["b c d", "x", "y"], [output(3)] * 3, [[picture(5)], [picture(9)], []])
    assert score_batch(used.new_shard(), *batch) == score_batch(fresh, *batch)


def test_memory_is_bounded_and_chunks_change_nothing(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the manifest."""
    batch = (["a"] * 6, [output(seed) for seed in range(6)], [[picture(10 + seed)] for seed in range(6)])
    expected = score_batch(scorer, *batch)
    monkeypatch.setattr(scorer_module, "REFERENCES_KEPT", 2)
    monkeypatch.setattr(scorer_module, "PIXELS_AT_ONCE", 2 * 40 * 40)
    scorer = scorer.new_shard()
    for _ in range(2):
        for score, other in zip(score_batch(scorer, *batch), expected, strict=True):
            assert score.lpips == pytest.approx(other.lpips, rel=1e-5)
            assert score.clip_reference == pytest.approx(other.clip_reference, abs=1e-6)
        assert len(scorer._references) == 2
