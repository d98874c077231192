"""Train the tiny family: ``python -m vcf_batch.tiny.train --stage all --out DIR``.

The stages, in order: ``probe``; ``vae`` and ``decoder`` (more of its decoder); ``clip`` (the towers that condition) and
``vision`` (more of its image tower); ``judge`` (the CLIP that scores); ``aligner``; ``unet``; ``pack``, which puts the
models together in DIR/weights. Each writes its model in diffusers layout into DIR and its checkpoint into
DIR/checkpoints. Running a stage a second time resumes it from its checkpoint.

``--family`` trains another family (:mod:`vcf_batch.tiny.families`): ``plain`` takes everything but the UNet from the
embedded weights, or from those of ``--parts``.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from vcf_batch.models.model_files import forget_paths
from vcf_batch.models.resolution import tiny_folder
from vcf_batch.tiny import families, networks, world
from vcf_batch.tiny.families import FAMILIES
from vcf_batch.tiny.fitting import Recipe, batch_indices, chunks
from vcf_batch.tiny.probe import HEADS, Probe, attribute_losses
from vcf_batch.tiny.workshop import SCENES, SEED, Workshop, ahead
from vcf_batch.vcf.aligner import ImageAligner, alignment_loss, info_nce_loss, tether_loss
from vcf_batch.vcf.pipeline import VCFPipeline

RECIPES = {
    "probe": Recipe(steps=1800, batch=64, lr=2e-3),
    "vae": Recipe(steps=3200, batch=32, lr=2e-3),
    "decoder": Recipe(steps=2000, batch=32, lr=5e-4),
    "clip": Recipe(steps=1000, batch=128, lr=1e-3),
    "vision": Recipe(steps=2000, batch=128, lr=1e-3),
    "judge": Recipe(steps=4000, batch=128, lr=1e-3),
    "unet": Recipe(steps=4800, batch=64, lr=8e-4, ema=0.998, warmup=200),
    "aligner": Recipe(steps=4000, batch=128, lr=2e-3),
}

LATENT_NOISE = 0.06
"""Largest deviation of the noise on the latents that the decoder is trained on; the latents' own is 1."""


def train_vae(shop: Workshop) -> None:
    """Train the autoencoder on absolute error and the probe's feature maps, with a weak KL term on the latents.

    Without the feature maps, thin regular lines are restored as grey. A mosaic then loses its joints, and so its style.
    """
    torch.manual_seed(SEED)
    probe = Probe.from_pretrained(shop.out / "probe").requires_grad_(False).to(shop.device)
    model = networks.vae().to(shop.device, memory_format=torch.channels_last)
    shop.begin(model, "vae")
    indices = batch_indices(shop.count, RECIPES["vae"].batch, SEED)

    def loss(step: int) -> Tensor:
        pictures = shop.pictures(indices(step)).contiguous(memory_format=torch.channels_last)
        posterior = model.encode(pictures).latent_dist
        restored = model.decode(posterior.sample()).sample.float()
        return likeness(probe, restored, pictures) + 3e-4 * posterior.kl().mean() / 1024

    shop.fit("vae", model, loss, RECIPES["vae"])
    with torch.no_grad():
        latents = model.encode(shop.pictures(slice(1024))).latent_dist.mean
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    model.save_pretrained(shop.out / "vae")


def train_decoder(shop: Workshop) -> None:
    """Train the autoencoder's decoder further. Its encoder is frozen, so the latents stay as they are.

    The latents have a little noise, as those that the UNet makes are never exactly the encoder's.
    """
    torch.manual_seed(SEED + 21)
    probe = Probe.from_pretrained(shop.out / "probe").requires_grad_(False).to(shop.device)
    model = AutoencoderKL.from_pretrained(shop.out / "vae").to(shop.device, memory_format=torch.channels_last)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    latents = scene_latents(shop)
    indices = batch_indices(shop.count, RECIPES["decoder"].batch, SEED + 21)

    def loss(step: int) -> Tensor:
        chosen = indices(step)
        generator = torch.Generator().manual_seed(SEED + step)
        noise = torch.randn(latents[chosen].shape, generator=generator)
        noise *= torch.rand(len(chosen), 1, 1, 1, generator=generator) * LATENT_NOISE
        given = (latents[chosen] + noise.to(shop.device)) / model.config.scaling_factor
        restored = model.decode(given.contiguous(memory_format=torch.channels_last)).sample.float()
        return likeness(probe, restored, shop.pictures(chosen).contiguous(memory_format=torch.channels_last))

    shop.fit("decoder", model, loss, RECIPES["decoder"])
    model.save_pretrained(shop.out / "vae")


def likeness(probe: Probe, restored: Tensor, pictures: Tensor) -> Tensor:
    """Absolute error of the pixels, of their differences to their neighbours, and of the probe's feature maps."""
    edges = sum(functional.l1_loss(restored.diff(dim=axis), pictures.diff(dim=axis)) for axis in (2, 3))
    seen = [
        functional.l1_loss(ours.float(), theirs.float())
        for ours, theirs in zip(probe.features(restored), probe.features(pictures), strict=True)
    ]
    return functional.l1_loss(restored, pictures) + 0.5 * edges + 0.5 * sum(seen) / len(seen)


class AttributeHeads(nn.Module):
    """Linear classifiers of the world's attributes from an embedding. They make contrastive training several times
    faster, and an embedding tell the direction of stripes and which colour of two is where."""

    def __init__(self, width: int) -> None:
        super().__init__()
        colors = len(world.COLORS)
        sizes = {**HEADS, "direction": len(world.DIRECTIONS), "first": colors, "second": colors}
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})

    def forward(self, embedding: Tensor, scenes: world.Scenes, named: Tensor | None = None) -> Tensor:
        """Mean classification loss over the attributes in ``named``.

        Args:
            named: bool ``[B, 8]`` in the order of TAUGHT; None is all attributes.
        """
        a, losses = scenes.attributes, []
        said = torch.ones(len(scenes), len(world.TAUGHT), dtype=torch.bool) if named is None else named
        tells = dict(zip(world.TAUGHT, said.unbind(1), strict=True))
        striped = a["pattern"] == world.PATTERNS.index("striped")
        ordered = torch.isin(a["pattern"], torch.tensor([world.PATTERNS.index(name) for name in world.ORDERED]))
        tells["direction"] = tells["direction"] & tells["pattern"] & striped
        tells["first"] = tells["second"] = tells["background"] & ordered
        logits = {name: head(embedding) for name, head in self.heads.items()}
        targets = {**a, "first": a["background"], "second": a["background2"]}
        for name, loss in attribute_losses(logits, targets).items():
            weight = tells[name].to(loss)
            losses.append((loss * weight).sum() / weight.sum().clamp(min=1))
        return torch.stack(losses).mean()


def train_towers(shop: Workshop, stage: str) -> CLIPModel:
    """Train a CLIP on its symmetric contrastive loss, with attribute classifiers on both towers."""
    seed = SEED + (0 if stage == "clip" else 77)
    torch.manual_seed(seed)
    clip = networks.clip(shop.tokenizer()) if stage == "clip" else networks.judge(shop.tokenizer())
    if stage == "clip":
        shop.begin(clip.text_model, "text_encoder")
        shop.begin(clip, "image_encoder")
        shop.begin_words(clip)
    width = clip.config.projection_dim
    model = nn.ModuleDict({"clip": clip, "see": AttributeHeads(width), "read": AttributeHeads(width)}).to(shop.device)
    indices = batch_indices(shop.count, RECIPES[stage].batch, seed)

    def worded(step: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen = indices(step)
        scenes = shop.scenes()[0].part(chosen)
        rng = random.Random(seed * 1_000_003 + step)
        named = [world.draw_named(rng, 0.6, world.TAUGHT) for _ in chosen]
        texts = [world.caption(scenes.named(i), names, rng) for i, names in enumerate(named)]
        said = torch.tensor([[name in names for name in world.TAUGHT] for names in named])
        return chosen, shop.tokenize(texts), said

    prepared = ahead(worded, shop.workers)

    def loss(step: int) -> Tensor:
        chosen, tokens, said = prepared(step)
        scenes = shop.scenes()[0].part(chosen)
        out = clip(input_ids=tokens.to(shop.device), pixel_values=shop.clip_pixels(chosen))
        image, text = out.image_embeds.float(), out.text_embeds.float()
        contrast = info_nce_loss(image[:, None], text[:, None], 1 / clip.logit_scale.exp().clamp(max=100))
        scale = width**0.5  # unit vectors are too short for a linear classifier at these learning rates
        readers = model["see"](image * scale, scenes) + model["read"](text * scale, scenes, said)
        return contrast + 2 * readers

    shop.fit(stage, model, loss, RECIPES[stage])
    return clip


def train_clip(shop: Workshop) -> None:
    """Train the conditioning towers, and save each in its own folder as Stable Diffusion does."""
    clip = train_towers(shop, "clip")
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict({k.removeprefix("text_model."): v for k, v in clip.state_dict().items() if "text_model" in k})
    text.save_pretrained(shop.out / "text_encoder")
    save_image_encoder(shop, clip)


def train_vision(shop: Workshop) -> None:
    """Train the image tower further while the text tower is frozen. The aligner can use only what this tower sees."""
    trained = torch.load(shop.out / "checkpoints" / "clip.pt", map_location=shop.device, weights_only=True)["model"]
    clip = networks.clip(shop.tokenizer())
    see = AttributeHeads(clip.config.projection_dim)
    model = nn.ModuleDict({"clip": clip, "see": see}).to(shop.device)
    model.load_state_dict({name: value for name, value in trained.items() if not name.startswith("read.")})
    clip.text_model.requires_grad_(False)
    clip.text_projection.requires_grad_(False)
    seed = SEED + 31
    indices = batch_indices(shop.count, RECIPES["vision"].batch, seed)

    def worded(step: int) -> tuple[Tensor, Tensor]:
        chosen = indices(step)
        rng = random.Random(seed * 1_000_003 + step)
        return chosen, shop.tokenize(world.captions(shop.scenes()[0].part(chosen), rng, 0.6, world.TAUGHT))

    prepared = ahead(worded, shop.workers)

    def loss(step: int) -> Tensor:
        chosen, tokens = prepared(step)
        scenes = shop.scenes()[0].part(chosen)
        out = clip(input_ids=tokens.to(shop.device), pixel_values=shop.clip_pixels(chosen))
        image, text = out.image_embeds.float(), out.text_embeds.float()
        contrast = info_nce_loss(image[:, None], text[:, None], 1 / clip.logit_scale.exp().clamp(max=100))
        return contrast + 2 * see(image * clip.config.projection_dim**0.5, scenes)

    shop.fit("vision", model, loss, RECIPES["vision"])
    save_image_encoder(shop, clip)


def save_image_encoder(shop: Workshop, clip: CLIPModel) -> None:
    vision = CLIPVisionModelWithProjection(clip.config.vision_config)
    vision.load_state_dict({k: v for k, v in clip.state_dict().items() if k.startswith(("vision_model", "visual_"))})
    vision.save_pretrained(shop.out / "image_encoder")


def train_judge(shop: Workshop) -> None:
    """Train the CLIP that scores."""
    train_towers(shop, "judge").save_pretrained(shop.out / "judge")
    shop.tokenizer().save_pretrained(shop.out / "judge")


def train_probe(shop: Workshop) -> None:
    """Train the attribute classifier."""
    torch.manual_seed(SEED + 5)
    model = Probe().to(shop.device, memory_format=torch.channels_last)
    indices = batch_indices(shop.count, RECIPES["probe"].batch, SEED + 5)

    def loss(step: int) -> Tensor:
        chosen = indices(step)
        logits = model(shop.pictures(chosen))
        losses = attribute_losses(logits, shop.scenes()[0].part(chosen).attributes)
        return torch.stack([loss.mean() for loss in losses.values()]).sum()

    shop.fit("probe", model, loss, RECIPES["probe"])
    model.save_pretrained(shop.out / "probe")


def frozen_text_encoder(shop: Workshop) -> CLIPTextModel:
    """The frozen text tower that conditions the UNet and the aligner."""
    tower = CLIPTextModel.from_pretrained(shop.out / "text_encoder", dtype=torch.float32)
    return tower.requires_grad_(False).to(shop.device)


def scene_latents(shop: Workshop) -> Tensor:
    """The latents of all training pictures, scaled for the UNet: ``[N, 4, 16, 16]``."""
    vae = AutoencoderKL.from_pretrained(shop.out / "vae").to(shop.device)
    with torch.no_grad():
        means = [vae.encode(shop.pictures(part)).latent_dist.mean for part in chunks(shop.count, 500)]
    return torch.cat(means) * vae.config.scaling_factor


def train_unet(shop: Workshop) -> None:
    """Train the UNet by v-prediction over all timesteps, on the scenes' cached latents.

    The conditioning is one, two or three captions of the same scene, joined along the token axis. A UNet trained on
    single captions only handles the longer sequences of `concat` badly. One row in ten is unconditional: the empty
    prompt, followed by zeros as in the padding of fusion. A family without joined captions has one caption, or the
    empty prompt alone: so Stable Diffusion is trained.
    """
    torch.manual_seed(SEED + 9)
    model = networks.unet().to(shop.device, memory_format=torch.channels_last)
    shop.begin(model, "unet")
    text_encoder = frozen_text_encoder(shop)
    alphas = networks.scheduler().alphas_cumprod.to(shop.device)
    latents = scene_latents(shop)
    recipe = RECIPES["unet"]
    indices = batch_indices(shop.count, recipe.batch, SEED + 9)

    with torch.no_grad():
        empty = text_encoder(shop.tokenize([""]).to(shop.device)).last_hidden_state

    def worded(step: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        chosen = indices(step)
        scenes = shop.scenes()[0].part(chosen)
        rng = random.Random((SEED + 9) * 1_000_003 + step)
        parts = rng.choices((1, 2, 3), (0.6, 0.25, 0.15))[0] if shop.family.joined_captions else 1
        dropped = torch.tensor([rng.random() < 0.1 for _ in chosen])
        return (
            chosen,
            dropped,
            [shop.tokenize(world.captions(scenes, rng, 0.5 / parts, world.TAUGHT)) for _ in range(parts)],
        )

    prepared = ahead(worded, shop.workers)

    def loss(step: int) -> Tensor:
        chosen, dropped, captions = prepared(step)
        dropped = dropped.to(shop.device)[:, None, None]
        with torch.no_grad():
            tokens = [text_encoder(caption.to(shop.device)).last_hidden_state for caption in captions]
            nothing = [empty, *(torch.zeros_like(empty) for _ in captions[1:])]
            tokens = [torch.where(dropped, *pair) for pair in zip(nothing, tokens, strict=True)]
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(step + SEED)).to(shop.device)
        timestep = torch.randint(1000, (len(chosen),), generator=torch.Generator().manual_seed(step)).to(shop.device)
        signal = alphas[timestep].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * clean
        predicted = model(noisy.contiguous(memory_format=torch.channels_last), timestep, torch.cat(tokens, 1)).sample
        return functional.mse_loss(predicted.float(), velocity)

    shop.fit("unet", model, loss, recipe)
    model.save_pretrained(shop.out / "unet", max_shard_size="12MB")


ALIGNERS: Mapping[str, tuple[float, Sequence[str]]] = {
    "aligner-paper": (0.0, world.TAUGHT),
    "aligner-tether": (1.0, world.TAUGHT),
    "aligner-looks": (0.0, world.LOOKS),
    "aligner": (1.0, world.LOOKS),
}
"""The weight of the tether, and what captions name, for the family's aligner and for those that show what each does."""


def train_aligner(shop: Workshop) -> None:
    """Train the aligner on the paper's loss and a tether, with captions of a picture's looks.

    The captions name pattern, palette, style, place and size, but not the object and its colour. So the aligner's
    tokens do not carry the object, and do not compete with the prompt about it. The wording of captions is always the
    same, because a picture does not show how its caption is worded. The tether keeps every image token close to the
    text tokens. Without it, image tokens that no text token needs drift away, and the logits of some hide the prompt.
    """
    _fit_aligner(shop, "aligner", _seen(shop))


def train_other_aligners(shop: Workshop) -> None:
    """Train the aligners of :data:`ALIGNERS` that lack the tether, the captions of looks, or both."""
    seen = _seen(shop)
    for name in ALIGNERS:
        if name != "aligner":
            _fit_aligner(shop, name, seen)


def _fit_aligner(shop: Workshop, name: str, seen: Tensor) -> None:
    weight, named = ALIGNERS[name]
    torch.manual_seed(SEED + 13)
    read = _read(shop, named)
    model = ImageAligner(networks.VISION_WIDTH, networks.TEXT_WIDTH).to(shop.device)
    recipe = RECIPES["aligner"]
    indices = batch_indices(shop.count, recipe.batch, SEED + 13)

    def loss(step: int) -> Tensor:
        chosen = indices(step)
        image_tokens, text_tokens = model(seen[chosen].to(shop.device).float()), read[chosen].to(shop.device).float()
        total = alignment_loss(image_tokens, text_tokens)
        return total + weight * tether_loss(image_tokens, text_tokens) if weight else total

    shop.fit(name, model, loss, recipe)
    model.save_pretrained(shop.out / name)


@torch.no_grad()
def _seen(shop: Workshop) -> Tensor:
    """What the image tower sees of the training pictures: float16 ``[N, 65, 192]``."""
    shop.scenes()  # They are rendered in float32, so before the block below.
    vision = CLIPVisionModelWithProjection.from_pretrained(shop.out / "image_encoder", dtype=torch.float32)
    vision = vision.to(shop.device)
    with torch.autocast(shop.device.type, dtype=torch.bfloat16, enabled=shop.autocast):
        parts = [
            vision(shop.clip_pixels(part), output_hidden_states=True).hidden_states[-2].half().cpu()
            for part in chunks(shop.count, 500)
        ]
    return torch.cat(parts)


@torch.no_grad()
def _read(shop: Workshop, named: Sequence[str]) -> Tensor:
    """Text tokens of captions that name these attributes, always in the same words: float16 ``[N, 48, 128]``."""
    text_encoder, scenes = frozen_text_encoder(shop), shop.scenes()[0]
    parts = []
    with torch.autocast(shop.device.type, dtype=torch.bfloat16, enabled=shop.autocast):
        for part in chunks(shop.count, 500):
            batch = scenes.part(part)
            texts = [world.caption(batch.named(index), named, None) for index in range(len(batch))]
            parts.append(text_encoder(shop.tokenize(texts).to(shop.device)).last_hidden_state.half().cpu())
    return torch.cat(parts)


def pack(shop: Workshop) -> None:
    """Combine the stages' models into one pipeline directory, in float16 and in files of at most 12 MB."""
    weights = shop.out / "weights"
    pipeline = VCFPipeline(
        vae=AutoencoderKL.from_pretrained(shop.out / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(shop.out / "text_encoder"),
        tokenizer=shop.tokenizer(),
        unet=UNet2DConditionModel.from_pretrained(shop.out / "unet"),
        scheduler=networks.scheduler(),
        feature_extractor=networks.image_processor(),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(shop.out / "image_encoder"),
        aligner=ImageAligner.from_pretrained(shop.out / "aligner"),
        default_steps=20,
        default_guidance_scale=3.0,
        default_strength=0.3,
    )
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(weights, max_shard_size="12MB")
    if (shop.out / "judge").exists():  # A family that is only measured needs none.
        CLIPModel.from_pretrained(shop.out / "judge").half().save_pretrained(weights / "judge")
        CLIPTokenizer.from_pretrained(shop.out / "judge").save_pretrained(weights / "judge")
        networks.image_processor().save_pretrained(weights / "judge")
    Probe.from_pretrained(shop.out / "probe").half().save_pretrained(weights / "probe")
    forget_paths(weights)


OTHER_ALIGNERS = "other-aligners"
"""A stage that is run by its name only: no model is made of what it trains."""

STAGES: dict[str, Callable[[Workshop], None]] = {
    "probe": train_probe,
    "vae": train_vae,
    "decoder": train_decoder,
    "clip": train_clip,
    "vision": train_vision,
    "judge": train_judge,
    "aligner": train_aligner,
    "unet": train_unet,
    "pack": pack,
    OTHER_ALIGNERS: train_other_aligners,
}
assert tuple(STAGES)[:-1] == families.STAGE_ORDER


@click.command()
@click.option("--stage", type=click.Choice([*STAGES, "all"]), default="all", show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where the models go.")
@click.option("--family", type=click.Choice([*FAMILIES]), default="embedded", show_default=True)
@click.option(
    "--parts",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Weights whose parts, all but the UNet, --out gets where it lacks them.  [default: the embedded ones for "
    "--family plain, none for others]",
)
@click.option("--minutes", type=float, default=600.0, show_default=True, help="Time limit of each stage.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--autocast/--no-autocast", default=torch.cuda.is_available(), help="Compute in bfloat16.")
@click.option(
    "--start",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Weights of an earlier family, which vae, clip and unet begin from.",
)
@click.option("--scenes", type=click.IntRange(min=1), default=SCENES, show_default=True, help="Pictures to train on.")
@click.option("--workers", default=0, show_default=True, help="Processes that word captions ahead; for a GPU.")
@click.option("--length", type=float, default=1.0, show_default=True, help="Factor of every recipe's steps.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps of the stage instead of the recipe's.")
@click.option("--batch", type=click.IntRange(min=1), help="Batch size of the stage instead of the recipe's.")
@click.option("--rate", type=float, help="Highest learning rate of the stage instead of the recipe's.")
def main(
    stage: str,
    out: Path,
    family: str,
    parts: Path | None,
    minutes: float,
    device: str,
    autocast: bool,
    start: Path | None,
    scenes: int,
    workers: int,
    length: float,
    steps: int | None,
    batch: int | None,
    rate: float | None,
) -> None:
    """Train a model family, one stage or all of its own."""
    recipe = "aligner" if stage == OTHER_ALIGNERS else stage
    changes: dict[str, Any] = {k: v for k, v in (("steps", steps), ("batch", batch), ("lr", rate)) if v}
    if changes and recipe not in RECIPES:
        raise click.UsageError(f"--steps, --batch and --rate are of one stage: {', '.join(RECIPES)}")
    for name, own in RECIPES.items():
        RECIPES[name] = replace(own, steps=max(1, round(own.steps * length)))
    if changes:
        RECIPES[recipe] = replace(RECIPES[recipe], **changes)
    shop = Workshop(out, torch.device(device), minutes * 60, autocast, start, workers, scenes, FAMILIES[family])
    if parts is None and family == "plain":
        parts = Path(tiny_folder())
    if parts is not None:
        shop.take(parts)
    for name in shop.family.stages if stage == "all" else [stage]:
        STAGES[name](shop)


if __name__ == "__main__":
    main()
