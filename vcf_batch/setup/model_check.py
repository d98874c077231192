"""The checks of a run's models before a worker starts: they fit each other, and can do what the run asks for."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from safetensors import SafetensorError, deserialize

from vcf_batch.config.limits import ALIGNED_FUSIONS, IP_ADAPTER, MIN_EDGE
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import ModelError, UsageError, redact
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.models import adapter_layout, resolution
from vcf_batch.models.lora import header
from vcf_batch.models.parts import REFERENCE_PARTS
from vcf_batch.models.prompt_tokens import require_vocabulary
from vcf_batch.models.resolution import ResolvedModel
from vcf_batch.models.schedule import SCHEDULER_CONFIG, check_schedule
from vcf_batch.setup.job import is_guided, roles_of
from vcf_batch.setup.run_models import OWN_GUIDE, Models
from vcf_batch.vcf.base.layout import Layout, layout_of
from vcf_batch.vcf.roles.role import BY_NAME, ROLE_FILE, layers_of

MAX_ROLE_BYTES = 1 << 28

UNET_INPUTS = (
    "time_cond_proj_dim",
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim_type",
)
"""Keys of a UNet's configuration that stand for a further input."""


def check(config: RunConfig, manifest: Manifest, resolved: Models, fusions: Set[str]) -> None:
    """Refuse what no worker could generate. Only configurations and the headers of adapters are read.

    Args:
        config: the run, with absolute paths.
        manifest: the manifest of the run.
        resolved: the models of the run.
        fusions: the fusions that rows ask for: :func:`vcf_batch.setup.job.fusions_of`.

    Raises:
        ModelError: the model says nothing about its UNet or VAE, its UNet is of another kind, its tokenizer has no
            vocabulary, or the scheduler does not sample as the model's own says; or it cannot take the references that
            the manifest has, or cannot guide; or the IP-Adapter or a LoRA does not fit.
        UsageError: references are asked for, and the manifest has none; or the PNO guide is the judge; or an option
            would change nothing.
        StorageError: the storage failed.
    """
    model = config.model or resolved.pipeline.name
    index, unet, vae = (
        resolution.read_config(resolved.pipeline, file)
        for file in ("model_index.json", "unet/config.json", "vae/config.json")
    )
    if not (index and unet and vae):
        raise ModelError(
            f"{model} is not a Stable Diffusion model in diffusers layout: it needs model_index.json, "
            "unet/config.json and vae/config.json"
        )
    layout = layout_of(index, model)
    _check_unet(model, layout, unet, vae)
    if config.sampling.told_sizes and not layout.tells_sizes:
        raise UsageError(
            f"{config.sampling.told_sizes[0]} is given, and {model} is not told sizes: leave it out, or use a Stable "
            "Diffusion XL"
        )
    require_vocabulary(resolved.pipeline, layout.tokenizers)
    check_schedule(config.scheduler, resolution.read_config(resolved.pipeline, SCHEDULER_CONFIG) or {}, model)
    _check_fusions(config, fusions)
    _check_references(model, config, manifest, index, fusions)
    _check_roles(config, manifest, resolved, unet, fusions)
    if is_guided(config, manifest):
        _check_guide(resolved, index)
    _check_quality(config, resolved, manifest)
    if resolved.judge is not None:
        _check_judge(resolved.judge)
    for each in (
        resolved.pipeline,
        resolved.judge,
        resolved.pno_guide,
        resolved.safety_checker,
        resolved.image_encoder,
    ):
        if each is not None:
            resolution.check_whole(each)
    if resolved.ip_adapter is not None and resolved.image_encoder is not None:
        adapter_layout.check_files(resolved.ip_adapter, resolved.image_encoder, unet)
    for lora in resolved.loras:
        header.check_file(lora.file, f"LoRA {lora.name}", unet, any(index.get("text_encoder_2") or ()))


def _check_unet(model: str, layout: Layout, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Refuse a UNet that takes more than noise, timestep and text, before its first batch fails or goes wrong."""
    latent = vae.get("latent_channels", 4)
    for name in ("in_channels", "out_channels"):
        if unet.get(name, 4) != latent:
            raise ModelError(
                f"{name} is {unet[name]!r:.60} in unet/config.json of {model}, and its VAE's latents have "
                f"{latent!r:.60} channels; use a model that needs text alone, not one for inpainting or editing"
            )
    for name in UNET_INPUTS:
        if unet.get(name) != layout.unet.get(name):
            raise ModelError(
                f"{name} is {unet[name]!r:.60} in unet/config.json of {model}, so its UNet needs another input; use "
                "a Stable Diffusion 1, 2 or XL that is not distilled"
            )


def _check_fusions(config: RunConfig, fusions: Set[str]) -> None:
    """Refuse a fusion without its weights, and options of a fusion that no row has."""
    if IP_ADAPTER in fusions and config.ip_adapter is None:
        raise UsageError(
            "rows of the manifest have ip_adapter in the column 'fusion', but no IP-Adapter is named: name its weights "
            "with --ip-adapter, such as ip-adapter-sd15 ('vcf-batch model list' has all names)"
        )
    if IP_ADAPTER not in fusions and config.ip_adapter is not None:
        raise UsageError(
            f"ip_adapter is {redact(config.ip_adapter)}, but no row uses it, as fusion is {config.fusion}: add "
            "--fusion ip_adapter, or leave --ip-adapter out"
        )
    if fusions <= {IP_ADAPTER} and config.image_tokens is not None:
        raise UsageError(
            f"image_tokens is {config.image_tokens}, which is about the tokens of an aligner, and every row has the "
            "fusion ip_adapter: leave it out"
        )


def _check_references(
    model: str, config: RunConfig, manifest: Manifest, index: Mapping[str, Any], fusions: Set[str]
) -> None:
    """Refuse references that the model cannot take, and options about references that the manifest does not have."""
    # model_index.json gives the library and the class of each part, or two nulls.
    lacking = [name for name in REFERENCE_PARTS if not any(index.get(name) or ())]
    aligned = sorted(fusions & {*ALIGNED_FUSIONS})
    if lacking and aligned and (manifest.has_any("reference") or manifest.has_any("negative_reference")):
        raise ModelError(
            f"{model} has no {lacking[0]}, which the fusion {aligned[0]} needs, and rows of the manifest have "
            "references: use the published weights of an IP-Adapter for all of them (--fusion ip_adapter --ip-adapter "
            "WEIGHTS), or a model with a trained aligner, as VCFPipeline.save_pretrained writes it, or remove the "
            "column 'reference'"
        )
    if config.unconditional == "negative" and not manifest.has_any("negative_reference"):
        raise UsageError(
            "unconditional is 'negative', but the manifest has no negative references: give them in a column "
            "'negative_reference', or choose zeros or blank"
        )
    if config.pno_steps and not manifest.has_any("reference"):
        raise UsageError(
            f"pno_steps is {config.pno_steps}, but the manifest has no references to follow: give them in a column "
            "'reference', or leave pno_steps at 0"
        )


def _check_roles(
    config: RunConfig, manifest: Manifest, resolved: Models, unet: Mapping[str, Any], fusions: Set[str]
) -> None:
    """Refuse roles without references, without a projection that they need, or with a UNet that has nothing to choose.

    Raises:
        ModelError, UsageError: see :func:`check`.
    """
    if config.role != "all" and not manifest.has_any("reference"):
        raise UsageError(
            f"role is {config.role}, but the manifest has no references: give them in a column 'reference', or leave "
            "the role out"
        )
    roles = roles_of(config, manifest) - {"all"}
    if roles or manifest.has_any("reference_masks"):
        layers_of(unet, MIN_EDGE, MIN_EDGE)
    projected = sorted(role for role in roles if BY_NAME[role].projected)
    if projected and "concat" in fusions and (lacking := {*projected} - stored_roles(resolved.pipeline)):
        raise ModelError(
            f"the role {min(lacking)} needs a projection, and {config.model or resolved.pipeline.name} has none: fit "
            "one with 'vcf-batch model fit-roles', or use the roles all and layout"
        )


def stored_roles(model: ResolvedModel) -> set[str]:
    """The roles that a model has projections for.

    Raises:
        ModelError: the file of the projections is damaged, or was fitted to another aligner.
        StorageError: the storage failed.
    """
    data = resolution.read_file(model, f"aligner/{ROLE_FILE}", MAX_ROLE_BYTES)
    if data is None:
        return set()
    aligner = resolution.read_config(model, "aligner/config.json") or {}
    try:
        shapes = {name: tuple(tensor["shape"]) for name, tensor in deserialize(data)}
        found = {name.partition(".")[0] for name in shapes}
        for role in found:
            _check_projection([shapes[f"{role}.{name}"] for name in ("mean", "down", "up")], aligner.get("text_dim"))
    except KeyError as error:
        raise _damaged_roles(model, f"it lacks {error.args[0]}") from error
    except (SafetensorError, ValueError) as error:
        raise _damaged_roles(model, error) from error
    return found


def _check_projection(shapes: Sequence[Sequence[int]], width: int | None) -> None:
    """Refuse a projection whose tensors do not fit: see :class:`vcf_batch.vcf.roles.projections.Projection`.

    Args:
        shapes: those of its mean, ``down`` and ``up``.
        width: width of the aligner's tokens; None if its configuration does not say it.

    Raises:
        ValueError: the shapes do not fit each other, or the width.
    """
    mean, down, up = shapes
    if len(mean) != 2 or len(down) != 2 or [*down] != [*up][::-1] or mean[1] != down[1]:
        raise ValueError(f"its tensors have the shapes {[*mean]}, {[*down]} and {[*up]}, which do not fit each other")
    if width is not None and mean[1] != width:
        raise ValueError(f"it is for tokens of width {mean[1]}, and the aligner's have {width}")


def _damaged_roles(model: ResolvedModel, reason: object) -> ModelError:
    return ModelError(
        f"aligner/{ROLE_FILE} of {redact(model.name)} cannot be used: {reason}. Move it away, and fit the roles again "
        "with 'vcf-batch model fit-roles'"
    )


def _check_guide(resolved: Models, index: Mapping[str, Any]) -> None:
    """Check the guide before its weights are loaded; workers compare the weights of guide and judge."""
    if resolved.pno_guide is None and not any(index.get(OWN_GUIDE) or ()):
        raise ModelError(
            f"{resolved.pipeline.name} has no image encoder of its own to guide prompt-noise optimisation: name a CLIP "
            "with --pno-guide"
        )
    if resolved.pno_guide is None and "Projection" not in index[OWN_GUIDE][1]:
        raise ModelError(
            f"the image encoder of {resolved.pipeline.name} is a {index[OWN_GUIDE][1]}, whose images "
            "cannot be compared without a projection: name a PNO guide with --pno-guide"
        )
    if resolved.guide_identity == resolved.judge_identity:
        assert resolved.pno_guide
        raise UsageError(
            f"{resolved.pno_guide.name} is both the PNO guide and the judge, so PNO would raise its "
            "own marks: name another guide with --pno-guide, or another judge with --judge"
        )


def _check_judge(judge: ResolvedModel) -> None:
    """Refuse a judge that cannot read prompts."""
    config = resolution.read_config(judge, "config.json")
    if config is None or "text_config" not in config:
        lacking = "no config.json" if config is None else "no text tower (no text_config in its config.json)"
        raise ModelError(
            f"the judge {redact(judge.name)} has {lacking}, and it has to score images against prompts: name a whole "
            "CLIP with --judge, such as openai/clip-vit-base-patch32"
        )


def _told(limit: float | str) -> str:
    """The limit of a gate in words: a number, or a share of false accepts such as ``far=0.05``."""
    return limit if isinstance(limit, str) else f"{limit:g}"


def _check_quality(config: RunConfig, resolved: Models, manifest: Manifest) -> None:
    """Refuse gates that no sample can miss, and triplets without a reference: both are mistakes."""
    for name in sorted(config.gates.keys() & {"max_lpips", "min_style_similarity"}):
        if resolved.lpips == "none":
            raise UsageError(
                f"{name} is {_told(config.gates[name])}, but there is no perceptual network to measure it: name one "
                "with --lpips, or leave the gate out"
            )
    if config.best_by in ("lpips", "style_similarity") and resolved.lpips == "none":
        raise UsageError(
            f"best_by is {config.best_by}, but there is no perceptual network to measure it: name one with --lpips, or "
            "another score"
        )
    if manifest.has_any("reference"):
        return
    if config.triplets:
        raise UsageError(
            "triplets need a reference in each row, and the manifest has none: give them in a column 'reference', or "
            "leave --triplets out"
        )
    for name in sorted(config.gates.keys() - {"min_clip_score"}):
        raise UsageError(
            f"{name} is {_told(config.gates[name])}, but the manifest has no references to compare with: give them "
            "in a column 'reference', or leave the gate out"
        )
