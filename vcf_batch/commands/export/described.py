"""What describes an export to its readers: the card, Croissant, and Energon's ``.nv-meta``.

All of it follows from the record and the shards, so it can be written again and compared.
"""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import yaml
from huggingface_hub import DatasetCardData

from vcf_batch import storage
from vcf_batch.commands.export import croissant
from vcf_batch.commands.export.record import ExportRecord, shard_stem, whole_shards
from vcf_batch.commands.export.shard_files import SUFFIXES
from vcf_batch.errors import DamageFound
from vcf_batch.output import shards
from vcf_batch.report import card_header

CARD = "README.md"
_CROISSANT = "croissant.json"
_ENERGON = ".nv-meta"

_TEXT = """\
---
{header}
---

# {name}

{rows} synthetic images, each generated from a text prompt and, where it has one, a reference image. They are selected
from what runs of vcf-batch have written. Written by `vcf-batch export` of vcf-batch {version}.

| split | rows |
|---|---|
{splits}

Left out: {left_out}.

| made of | run | rows | model |
|---|---|---|---|
{sources}

## Files

{files}
* `SPLIT/00000_stats.json`: receipts with the hashes of the files beside them. `export.json`: what was selected, and
  how. `vcf-batch verify` compares everything with them.
* `croissant.json`: the columns, as [Croissant](https://docs.mlcommons.org/croissant/) describes them.

Each row has the fingerprint of its run (`run_fingerprint`) and its `key`.{references}

## Load it

```python
from datasets import load_dataset

dataset = load_dataset("PATH OR NAME OF THIS DATASET", split="{first}")
print(dataset[0])
```

## Licence

Not stated. Who hands this on decides: `license` above.
"""

_TAR_FILES = """\
* `SPLIT/00000.tar`: for each sample `KEY.{ending}`, `KEY.txt` (the prompt) and `KEY.json` (its row, without what is
  null){more}.
* `SPLIT/00000.parquet`: the rows."""
_PARQUET_FILES = "* `SPLIT/00000.parquet`: the rows, with the images as Hugging Face has them."
_COPIES = """ `reference` is the path of its
reference in this folder, named by its SHA-256."""


def files(target: str, record: ExportRecord) -> Iterator[tuple[str, bytes]]:
    """Path and content of each file that describes an export whose shards are all there.

    Raises:
        DamageFound: a parquet cannot be read.
        StorageError: the storage failed.
    """
    schema = _schema(target, record)
    if record.fields["format"] == "energon":
        yield from _energon(target, record)
    yield _CROISSANT, croissant.describe(record, schema)
    yield CARD, _card(record, schema).encode()


def _schema(target: str, record: ExportRecord) -> pa.Schema:
    url = storage.join(target, next(iter(record.splits)), shard_stem(0) + SUFFIXES["parquet"])
    try:
        with shards.open_parquet(url) as parquet:
            return parquet.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise DamageFound(f"{url} cannot be read: {error}; see 'vcf-batch verify {target}'") from error


def _card(record: ExportRecord, schema: pa.Schema) -> str:
    ending, images, format = record.image_format, record.fields["images"], record.fields["format"]
    suffix = SUFFIXES["parquet" if format == "parquet" else "tar"]
    data: dict[str, Any] = {"description": f"Export {record.fingerprint[:16]}"}
    if format != "parquet":
        first, *others = card_header.features(schema, ending, triplets=False)
        data["features"] = [first, *({"name": f"{each}.{ending}", "dtype": "image"} for each in images), *others]
    header = DatasetCardData(
        pretty_name=record.name,
        task_categories=["text-to-image", "image-to-image"],
        tags=["synthetic", "visual-concept-fusion", *(["webdataset"] if format != "parquet" else [])],
        size_categories=[card_header.size_category(record.rows)],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"{split}/*{suffix}"} for split in record.splits],
            }
        ],
        dataset_info=data if format != "parquet" else None,
    )
    more = "".join(f", `KEY.{each}.{ending}`" for each in images)
    left_out = [f"{count:,} {reason}" for reason, count in record.left_out.items()]
    return _TEXT.format(
        header="# license: yours to choose\n" + header.to_yaml(),
        name=record.name,
        rows=f"{record.rows:,}",
        version=record.vcf_batch,
        splits="\n".join(f"| `{split}` | {rows:,} |" for split, rows in record.splits.items()),
        left_out=", ".join(left_out) or "nothing",
        sources="\n".join(
            f"| {_code(each['name'])} | {_code(each['run_fingerprint'][:12])} | {each['rows']:,} | "
            f"{_code(each['models']['model']['name'])} |"
            for each in record.sources
        ),
        files=_PARQUET_FILES if format == "parquet" else _TAR_FILES.format(ending=ending, more=more),
        references=_COPIES if record.fields["references"] == "copy" else "",
        first=next(iter(record.splits)),
    )


def _code(text: str) -> str:
    """A name that neither Markdown nor HTML takes for its own."""
    return "`" + " ".join(text.replace("|", " ").replace("`", " ").split()) + "`"


def _energon(target: str, record: ExportRecord) -> Iterator[tuple[str, bytes]]:
    """The files by which Energon knows the number of samples of each tar, the splits, and what a sample is."""
    counts = {
        split: {
            f"{split}/{receipt.name}{SUFFIXES['tar']}": receipt.rows for receipt in whole_shards(target, record, split)
        }
        for split in record.splits
    }
    every = {name: rows for there in counts.values() for name, rows in there.items()}
    splits = {"split_parts": {split: [*there] for split, there in counts.items()}, "exclude": []}
    sample = {
        "sample_type": {"__module__": "megatron.energon", "__class__": "CaptioningSample"},
        "field_map": {"image": record.image_format, "caption": "txt"},
    }
    yield f"{_ENERGON}/.info.json", (json.dumps({"shard_counts": every}, indent=2) + "\n").encode()
    yield f"{_ENERGON}/split.yaml", yaml.safe_dump(splits, sort_keys=False).encode()
    yield f"{_ENERGON}/dataset.yaml", yaml.safe_dump(sample, sort_keys=False).encode()
