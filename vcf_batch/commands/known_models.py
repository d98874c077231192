"""List the models and IP-Adapters that are known by name, with what each needs."""

from collections.abc import Mapping, Sequence
from typing import Any

from vcf_batch.models import cache
from vcf_batch.models.names import ADAPTERS, ADAPTERS_ID, ADAPTERS_LICENCE, PRESETS
from vcf_batch.models.resolution import TINY


def describe() -> list[dict[str, Any]]:
    """One entry per name, tiny first.

    ``kind`` is ``model`` or ``ip_adapter``. ``gigabytes`` is the size of a model's weights as 32-bit numbers, or the
    published size of an adapter and its encoder; None where it is not known. ``needs`` is the way to generate with it,
    and ``cached`` whether this node's cache has all of it, in any revision.
    """
    kept = {(model.location, model.within) for model in cache.kept() if model.kind == "hub"}
    tiny = {
        "name": TINY,
        "kind": "model",
        "base": None,
        "image_encoder": None,
        "what": "embedded, 64 x 64 pixels; draws a small world of its own",
        "licence": "Apache-2.0",
        "gigabytes": None,
        "needs": None,
        "cached": True,
    }
    presets = [
        {
            "name": name,
            "kind": "model",
            "base": preset.base,
            "image_encoder": preset.image_encoder,
            "what": f"{preset.base}, with an aligner that reads {preset.image_encoder}",
            "licence": preset.licence,
            "gigabytes": preset.gigabytes,
            "needs": _either(name, preset.ip_adapter)
            + f"an aligner: 'vcf-batch model train --model {name} --data URL --out ALIGNER' trains it, "
            f"'vcf-batch model assemble --base {name} --aligner ALIGNER --out MODEL' puts the model together",
            "cached": (preset.base, "") in kept,
        }
        for name, preset in PRESETS.items()
    ]
    adapters = [
        {
            "name": name,
            "kind": "ip_adapter",
            "base": None,
            "image_encoder": f"{ADAPTERS_ID}:{adapter.encoder}",
            "what": f"{ADAPTERS_ID}:{adapter.file}, an IP-Adapter that gives {adapter.what}",
            "licence": ADAPTERS_LICENCE,
            "gigabytes": adapter.gigabytes,
            "needs": f"{PRESETS[adapter.base].base} or a fine-tune of it: --model {adapter.base} --fusion ip_adapter "
            f"--ip-adapter {name}",
            "cached": {(ADAPTERS_ID, adapter.file), (ADAPTERS_ID, adapter.encoder)} <= kept,
        }
        for name, adapter in ADAPTERS.items()
    ]
    return [tiny, *presets, *adapters]


def in_words(models: Sequence[Mapping[str, Any]]) -> str:
    """The entries of :func:`describe`, for people."""
    return "\n".join(
        f"{each['name']}: {each['what']}\n  {'; '.join(_facts(each))}\n  needs {each['needs'] or 'nothing else'}"
        for each in models
    )


def _facts(model: Mapping[str, Any]) -> list[str]:
    of = "as 32-bit numbers" if model["kind"] == "model" else "with its image encoder"
    size = [] if model["gigabytes"] is None else [f"{model['gigabytes']:g} GB {of}"]
    here = "embedded" if model["name"] == TINY else "in this node's cache"
    return [f"licence {model['licence']}", *size, here if model["cached"] else f"not {here}"]


def _either(name: str, ip_adapter: str | None) -> str:
    if ip_adapter is None:
        return ""
    return f"an IP-Adapter (--model {name} --fusion ip_adapter --ip-adapter {ip_adapter}), or "
