"""The YAML header of a dataset card, as Hugging Face reads it: with the type of every field that a sample has.

Without these types, ``datasets`` takes those of the first samples: a column that is null in all of them cannot be read
later on.
"""

import hashlib
from typing import Any

import pyarrow as pa
from huggingface_hub import DatasetCard, DatasetCardData

from vcf_batch import storage
from vcf_batch.output import receipts
from vcf_batch.output.output import Output
from vcf_batch.output.row_json import json_type
from vcf_batch.records import TRIPLET

_SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}


def header(output: Output, schema: pa.Schema, samples: int, licence: str | None) -> str:
    """The YAML of an output's card, without the lines that enclose it.

    Args:
        schema: that of the output's parquets.
        samples: number of images.
        licence: identifier as Hugging Face knows it; None leaves the field open.
    """
    data = DatasetCardData(
        license=licence,
        pretty_name=storage.name(output.url),
        task_categories=["text-to-image", "image-to-image"],
        tags=["synthetic", "webdataset", "visual-concept-fusion"],
        size_categories=[size_category(samples)],
        # Without this field, the parquets would be taken for more of the same data.
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}],
        # `datasets` keeps what it has loaded by this field and by patterns, and does not look at the files again.
        dataset_info={
            "description": f"Samples {_digest(output)}",
            "features": features(schema, output.config.image_format, output.config.triplets),
        },
    )
    text = data.to_yaml()
    return text if licence else "# license: yours to choose\n" + text


def size_category(samples: int) -> str:
    """The number of samples in the words of Hugging Face."""
    return next((name for below, name in _SIZES.items() if samples < below), "n>10M")


def _digest(output: Output) -> str:
    """A name of the samples that are finished: other samples have another one."""
    digest = hashlib.sha256()
    for receipt in receipts.read(output.url):
        digest.update("".join(entry.sha256 for entry in receipt.files.values()).encode())
    return digest.hexdigest()[:16]


def licence_in(card: str) -> str | None:
    """The licence that a card names."""
    return DatasetCard(card, ignore_metadata_errors=True).data.get("license")


def features(schema: pa.Schema, image_format: str, triplets: bool) -> list[dict[str, Any]]:
    """The fields of a sample and their types, as ``datasets`` writes them in YAML: images, prompt, the row, the key."""
    images = [image_format, *(f"{name}.{image_format}" for name in TRIPLET if triplets)]
    row = [_feature(field.name, json_type(field.type)) for field in schema]
    return [
        *({"name": name, "dtype": "image"} for name in images),
        {"name": "txt", "dtype": "string"},
        {"name": "json", "struct": row},
        *({"name": name, "dtype": "string"} for name in ("__key__", "__url__")),
    ]


def _feature(name: str, kind: pa.DataType) -> dict[str, Any]:
    return {"name": name, **_type(kind)}


def _type(kind: pa.DataType) -> dict[str, Any]:
    """The type of JSON values."""
    if pa.types.is_struct(kind):
        return {"struct": [_feature(field.name, field.type) for field in kind]}
    if pa.types.is_list(kind):
        item = _type(kind.value_type)
        return {"list": next(iter(item.values())) if item.keys() <= {"dtype", "struct"} else item}
    # The names of Arrow, except these.
    names = {"halffloat": "float16", "float": "float32", "double": "float64"}
    return {"dtype": names.get(str(kind), str(kind))}
