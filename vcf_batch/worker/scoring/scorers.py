"""The scorer of a score on this node, with its models."""

from vcf_batch.metrics.aesthetic import AestheticHead
from vcf_batch.metrics.clip_score import ClipJudge
from vcf_batch.metrics.clip_scorers import ClipCosines, ClipEmbeddings
from vcf_batch.metrics.dino import DinoPatches
from vcf_batch.metrics.lpips import LPIPS
from vcf_batch.metrics.own_function import OwnFunction
from vcf_batch.metrics.pixelwise import Pixelwise
from vcf_batch.metrics.shown import ImageScorer
from vcf_batch.models.cache import fetch
from vcf_batch.worker.scoring.resolved_score import ResolvedScore


def load(score: ResolvedScore, device: str) -> ImageScorer:
    """Fetch the models of a score and load its scorer.

    Args:
        score: the score.
        device: ``cuda`` or ``cpu``.

    Raises:
        ModelError: a model is not there, unsafe, incomplete, or of another kind.
        UsageError: the function cannot be imported.
        StorageError: storage or network failed.
    """
    kind, models = score.kind, score.models
    if kind == "texture":
        return Pixelwise.texture(device)
    if kind == "python":
        return OwnFunction.load(score.place, score.folder)
    if kind in ("lpips-alex", "lpips-vgg"):
        return Pixelwise.lpips(LPIPS.from_pretrained(kind.removeprefix("lpips-"), score.place, device))
    if kind == "dino":
        return DinoPatches.from_pretrained(fetch(models["model"]), device)
    if kind == "aesthetic":
        clip = ClipJudge.from_pretrained(fetch(models["clip"]), device, "--aesthetic-clip")
        return AestheticHead.from_file(fetch(models["head"]), clip)
    if kind == "embedding":
        return ClipEmbeddings(ClipJudge.from_pretrained(fetch(models["model"]), device, "--with duplicates="))
    return ClipCosines(ClipJudge.from_pretrained(fetch(models["model"]), device, "--with clip="))
