"""Combine Stable Diffusion, an image encoder and an aligner, in memory or in one directory."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPImageProcessorPil

from vcf_batch import storage
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.models import model_files, resolution
from vcf_batch.models.cache import fetch
from vcf_batch.models.loading import load_errors
from vcf_batch.models.parts import MODEL_INDEX, Parts
from vcf_batch.storage import scratch
from vcf_batch.vcf.aligner import ImageAligner, load_vision_tower
from vcf_batch.vcf.pipeline import VCFPipeline


def load(parts: Parts, dtype: torch.dtype, **components: Any) -> VCFPipeline:
    """Load the pipeline on the CPU, with its image encoder.

    Args:
        parts: the models to load.
        dtype: data type of all weights that are loaded.
        components: parts that replace the base's own by name; None leaves a part out.

    Raises:
        ModelError: a part is missing, cannot be loaded, or does not fit the others.
        StorageError: the storage or the network failed.
    """
    folder = fetch(parts.base)
    if parts.image_encoder is not None:
        encoder = fetch(parts.image_encoder)
        with load_errors(f"the image encoder {parts.image_encoder.name}"):
            components["image_encoder"] = load_vision_tower(encoder, dtype)
            components["feature_extractor"] = CLIPImageProcessorPil.from_pretrained(encoder, local_files_only=True)
    with load_errors(f"the model {parts.base.name}"):
        return VCFPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, **components)


def assemble(parts: Parts, aligner: str, out: str, dtype: torch.dtype) -> None:
    """Write one pipeline directory with all parts, as ``--model`` takes it.

    Args:
        parts: the models for which the aligner was trained.
        aligner: folder or URL written by ``model train`` or ``ImageAligner.save_pretrained``, or a Hub id.
        out: folder or URL; it must not hold a model yet.
        dtype: data type of the weights that are written.

    Raises:
        ModelError: a part is missing, the parts do not fit each other, or weights of one are not finite.
        UsageError: ``out`` holds a model already.
        StorageError: the storage failed.
    """
    out = storage.absolute(out)
    if storage.exists(storage.join(out, MODEL_INDEX)):
        raise UsageError(f"{out} holds a model already; name another folder")
    folder = fetch(resolution.resolve(aligner))
    with load_errors(f"the aligner {aligner}"):
        trained = ImageAligner.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipeline = load(parts, dtype, aligner=trained)
    for part, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            name = f"the aligner {aligner}" if component is trained else f"the part {part} of {parts.base.name}"
            _refuse_not_finite(component, name, dtype)
    base = fetch(parts.base)
    networks = (each for each in pipeline.components.values() if isinstance(each, torch.nn.Module))
    weights = (tensor for network in networks for tensor in network.state_dict().values())
    with scratch.temporary(
        "the assembled model", sum(each.numel() * each.element_size() for each in weights)
    ) as folder:
        pipeline.save_pretrained(folder)
        model_files.forget_paths(Path(folder))
        files = {file: os.path.join(folder, file) for file in storage.list_tree(folder)}
        # Copy models that are not part of the pipeline: the judge and the probe of the tiny family.
        for file in model_files.chosen(list(storage.list_tree(base))):
            if "/" in file and file.split("/")[0] not in pipeline.config:
                files[file] = os.path.join(base, file)
        # The index of the parts is uploaded last, so that half a model is never taken for a whole one.
        for file in sorted(files, key=lambda name: (name == MODEL_INDEX, name)):
            storage.upload(files[file], storage.join(out, file))


def _refuse_not_finite(part: torch.nn.Module, name: str, dtype: torch.dtype) -> None:
    for weight, value in part.named_parameters():
        if not value.isfinite().all():
            raise ModelError(
                f"{name} has weights that are not finite: {weight}, in {dtype}. A training that diverged wrote them, "
                "or they are too large for this precision: use another checkpoint, or --dtype float32"
            )
