"""The models that a run needs, each in exactly one version."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vcf_batch import storage
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import ModelError, redact
from vcf_batch.models import adapters, resolution
from vcf_batch.models.names import ADAPTERS, PRESETS
from vcf_batch.models.resolution import ResolvedModel
from vcf_batch.records import TEXTURE, Lora
from vcf_batch.vcf.base.layout import empty_negative

DEFAULT_JUDGE = "openai/clip-vit-base-patch32"
OWN_JUDGE, OWN_PROBE, OWN_GUIDE, OWN_SAFETY = "judge", "probe", "image_encoder", "safety_checker"
"""Folders of a model that brings its own judge, network for the perceptual distance, PNO guide, safety checker."""
OWN = "own"
"""Name of the safety checker that comes with the model."""
TINY_PERCEPTUAL = "tiny-perceptual"

_COMMIT = re.compile(r"[0-9a-f]{40}(?![0-9a-f])")


@dataclass(frozen=True)
class RunLora:
    """A LoRA of the run: its file, in exactly one version, and the scale of its weights."""

    name: str
    file: ResolvedModel
    scale: float

    @property
    def identity(self) -> str:
        return _identity(self.file)


@dataclass(frozen=True)
class Models:
    """The models of a run, each in exactly one version."""

    pipeline: ResolvedModel
    judge: ResolvedModel | None
    """The CLIP that scores; None is the pipeline's own."""
    lpips: str
    """Network of the perceptual distance: ``tiny-perceptual``, ``alex``, ``vgg`` or ``none``."""
    lpips_identity: str
    lpips_source: str | None = None
    """Folder or URL of the published weights of ``alex`` and ``vgg``."""
    pno_guide: ResolvedModel | None = None
    """The CLIP that prompt-noise optimisation follows; None is the pipeline's own image encoder."""
    safety_checker: ResolvedModel | None = None
    """The safety checker; None is no checker, and the pipeline itself stands for its own."""
    ip_adapter: ResolvedModel | None = None
    """The weights of an IP-Adapter; None without one."""
    image_encoder: ResolvedModel | None = None
    """The image encoder of the IP-Adapter."""
    empty_negative: str | None = None
    """What stands for an empty negative prompt: see :func:`vcf_batch.vcf.base.layout.empty_negative`."""
    loras: tuple[RunLora, ...] = ()
    """The LoRAs that the run names, in the order of their names. Those of rows are files like references."""

    @property
    def judge_identity(self) -> str:
        return f"{self.pipeline.identity}/{OWN_JUDGE}" if self.judge is None else self.judge.identity

    def identity_of(self, score: str) -> str:
        """Identity of what computes a score of the run; empty if no model does."""
        if score in ("lpips", "style_similarity"):
            return self.lpips_identity
        return "" if score == TEXTURE else self.judge_identity

    @property
    def guide_identity(self) -> str:
        return f"{self.pipeline.identity}/{OWN_GUIDE}" if self.pno_guide is None else self.pno_guide.identity

    @property
    def safety_identity(self) -> str | None:
        if self.safety_checker == self.pipeline:
            return f"{self.pipeline.identity}/{OWN_SAFETY}"
        return self.safety_checker.identity if self.safety_checker else None

    @property
    def ip_adapter_identity(self) -> str | None:
        if self.ip_adapter is None or self.image_encoder is None:
            return None
        return " ".join(map(_identity, (self.ip_adapter, self.image_encoder)))

    @property
    def lora_identity(self) -> str | None:
        """Names, files and scales of the run's LoRAs; None without any."""
        return " ".join(f"{each.name}={each.identity}:{each.scale:.12g}" for each in self.loras) or None

    def describe(self, guided: bool) -> dict[str, Any]:
        """Name and version of the model, of the PNO guide if there is one, and of the source of each score.

        The model has also ``empty_negative``, where :attr:`empty_negative` is known.
        """
        own = redact(self.pipeline.name)
        judge = {"name": redact(self.judge.name) if self.judge else f"{own}/{OWN_JUDGE}"}
        judge["identity"] = self.judge_identity
        guide = {"name": redact(self.pno_guide.name) if self.pno_guide else f"{own}/{OWN_GUIDE}"}
        guide["identity"] = self.guide_identity
        lpips = {"name": f"lpips-{self.lpips}" if self.lpips_source else self.lpips, "identity": self.lpips_identity}
        return {
            "model": {"name": own, "identity": self.pipeline.identity}
            | ({"empty_negative": self.empty_negative} if self.empty_negative else {}),
            "clip_score": judge,
            "clip_reference": judge,
            "lpips": None if self.lpips == "none" else lpips,
            "pno_guide": guide if guided else None,
            "ip_adapter": self.ip_adapter and {"name": _told(self.ip_adapter), "identity": self.ip_adapter_identity},
            "nsfw": self.safety_checker
            and {"name": redact(self.safety_checker.name), "identity": self.safety_identity},
            **({"lora": {each.name: _described(each) for each in self.loras}} if self.loras else {}),
        }


def _identity(file: ResolvedModel) -> str:
    """The identity of a file. A commit of the Hub covers every file of a repository."""
    return f"{file.identity}/{file.within}" if file.kind == "hub" else file.identity


def _described(lora: RunLora) -> dict[str, Any]:
    return {"name": redact(lora.file.name), "identity": lora.identity, "scale": lora.scale}


def _told(adapter: ResolvedModel) -> str:
    """The name of an adapter, with its file if the name does not tell it."""
    name = redact(adapter.name)
    return name if name in ADAPTERS or name.endswith(adapter.within) else f"{name}:{adapter.within}"


def hub_commits(identities: Mapping[str, str]) -> dict[str, str]:
    """The commits on the Hub among the identities of models, by the models' names."""
    found = {name: _COMMIT.match(identity) for name, identity in identities.items()}
    return {name: commit[0] for name, commit in found.items() if commit}


@dataclass(frozen=True)
class BegunCommits:
    """The commits on the Hub that a run or a score has begun with, by the names of its models without secrets."""

    commits: Mapping[str, str]

    def commit(self, name: str) -> str | None:
        """None for what is no model of the Hub, or was not begun with."""
        is_here = storage.is_local(name) and storage.exists(storage.absolute(name.partition(":")[0]))
        return None if is_here else self.commits.get(redact(name))

    def resolve(self, name: str) -> ResolvedModel:
        return resolution.resolve(name, self.commit(name))


def resolve(config: RunConfig, commits: Mapping[str, str] = MappingProxyType({})) -> Models:
    """Find the exact versions of the models that a run needs.

    Args:
        config: the run, with absolute paths.
        commits: the commits of models on the Hub that a run has begun with, by their names:
            :func:`vcf_batch.setup.claim.commits_of`. Other names stand for their newest commit.

    Raises:
        ModelError: one of them is not there.
    """
    begun = BegunCommits(commits)
    pipeline = _resolve_pipeline(config, begun)
    own_judge = config.judge is None and resolution.read_config(pipeline, f"{OWN_JUDGE}/config.json") is not None
    own_probe = resolution.read_config(pipeline, f"{OWN_PROBE}/config.json") is not None
    adapter = None
    if config.ip_adapter is not None:
        adapter = adapters.resolve_adapter(config.ip_adapter, begun.commit(config.ip_adapter))
    lpips, source = config.lpips, config.lpips_weights
    if lpips == "auto":
        lpips = "alex" if source else TINY_PERCEPTUAL if own_probe else "none"
    identity = lpips
    if lpips == TINY_PERCEPTUAL:
        identity = f"{pipeline.identity}/{OWN_PROBE}"
    elif lpips in ("alex", "vgg"):
        assert source is not None
        source = storage.absolute(source)
        identity = lpips_identity_of(lpips, source)
    return Models(
        pipeline=pipeline,
        judge=None if own_judge else _resolve_judge(config, pipeline, begun),
        lpips=lpips,
        lpips_identity=identity,
        lpips_source=source if lpips in ("alex", "vgg") else None,
        pno_guide=None if config.pno_guide is None else begun.resolve(config.pno_guide),
        safety_checker=_resolve_safety(config, pipeline, begun),
        ip_adapter=adapter,
        image_encoder=adapter and _resolve_encoder(config, adapter, begun),
        empty_negative=empty_negative(resolution.read_config(pipeline, "model_index.json") or {}),
        loras=tuple(_resolve_lora(name, lora, begun) for name, lora in config.loras.items()),
    )


def _resolve_lora(name: str, lora: Lora, begun: BegunCommits) -> RunLora:
    try:
        file = resolution.resolve_file(lora.source, begun.commit(lora.source))
    except ModelError as error:
        raise ModelError(f"LoRA {name} cannot be used: {error}") from error
    return RunLora(name, dataclasses.replace(file, name=lora.source), lora.scale or 0.0)


def _resolve_pipeline(config: RunConfig, begun: BegunCommits) -> ResolvedModel:
    """The model that generates. A preset needs no aligner for an IP-Adapter, and then stands for its base."""
    model = config.model or resolution.TINY
    if config.ip_adapter is not None and model in PRESETS and not storage.exists(storage.absolute(model)):
        model = PRESETS[model].base
    return resolution.resolve(model, begun.commit(model) or config.revision)


def _resolve_judge(config: RunConfig, pipeline: ResolvedModel, begun: BegunCommits) -> ResolvedModel:
    if config.judge is not None:
        return begun.resolve(config.judge)
    try:
        return begun.resolve(DEFAULT_JUDGE)
    except ModelError as error:
        raise ModelError(
            f"{redact(pipeline.name)} has no CLIP of its own that scores, and the default one is not there ({error}); "
            "name another with --judge"
        ) from error


def _resolve_encoder(config: RunConfig, adapter: ResolvedModel, begun: BegunCommits) -> ResolvedModel:
    if config.image_encoder is None:
        return adapters.encoder_beside(adapter)
    try:
        return begun.resolve(config.image_encoder)
    except ModelError as error:
        raise ModelError(
            f"the image encoder of the IP-Adapter cannot be used ({error}); name another with --image-encoder, or "
            "leave it out for the one beside the adapter"
        ) from error


def _resolve_safety(config: RunConfig, pipeline: ResolvedModel, begun: BegunCommits) -> ResolvedModel | None:
    if config.safety_checker != OWN:
        return None if config.safety_checker is None else begun.resolve(config.safety_checker)
    if resolution.read_config(pipeline, f"{OWN_SAFETY}/config.json") is None:
        raise ModelError(
            f"{redact(pipeline.name)} has no safety checker of its own: name one with --safety-checker, such as "
            "CompVis/stable-diffusion-safety-checker"
        )
    return pipeline


def lpips_identity_of(network: str, source: str) -> str:
    """Hex SHA-256 of the two weight files' contents."""
    # Imported here, because it brings torch, which only these networks need.
    from vcf_batch.metrics.lpips import weight_files

    try:
        digests = [storage.digest(url).sha256 for url in weight_files(network, source)]
    except OSError as error:
        raise ModelError(f"cannot read the LPIPS weights in {source}: {error}") from error
    return hashlib.sha256("".join(digests).encode()).hexdigest()
