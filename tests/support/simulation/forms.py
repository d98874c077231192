"""What the files of a simulated shard hold.

An *entry* is the outcome of a row: ``status``, and what is ``told`` of it: the error, or a digest instead of an image.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vcf_batch import images
from vcf_batch.config.row_settings import settings_of
from vcf_batch.output import shards
from vcf_batch.records import Sample, Scores, Shard
from vcf_batch.setup.job import Job, schema_of

FILE_BYTES = 2048


class Form(Protocol):
    """How entries are written, and read back."""

    def files(self, job: Job, shard: Shard, entries: Mapping[int, Any]) -> tuple[dict[str, bytes], dict[str, Any]]:
        """The files of a shard by kind, and further fields of its receipt. Without a sample there is no tar."""

    def entries(self, parquet: bytes, shard: Shard) -> dict[int, Any]:
        """The entries by row.

        Raises:
            ValueError: the file is damaged.
        """


class Digests:
    """Files that hold the entries alone. All are of one size, so that it does not tell two attempts apart."""

    def files(self, job: Job, shard: Shard, entries: Mapping[int, Any]) -> tuple[dict[str, bytes], dict[str, Any]]:
        samples = {row: entry for row, entry in entries.items() if entry["status"] == "success"}
        kinds = {"tar": samples, "parquet": entries}
        return {kind: json.dumps(own).encode().ljust(FILE_BYTES) for kind, own in kinds.items() if own}, {}

    def entries(self, parquet: bytes, shard: Shard) -> dict[int, Any]:
        return {int(row): entry for row, entry in json.loads(parquet).items()}


class Pictures:
    """The files of real shards, for those who read them: a picture of 32 x 32 pixels stands for each sample."""

    def __init__(self) -> None:
        self._told: dict[str, str] = {}
        """What is told of samples, by the hashes of their pictures."""

    def files(self, job: Job, shard: Shard, entries: Mapping[int, Any]) -> tuple[dict[str, bytes], dict[str, Any]]:
        manifest, ending = job.manifest, job.config.image_format
        with (
            tempfile.TemporaryDirectory() as scratch,
            shards.ShardWriter(scratch, shard, ending, schema_of(job.config, manifest)) as writer,
        ):
            for row in manifest.rows(shard.start, shard.stop, job.config.seed):
                used, entry = settings_of(row, job.config), entries[row.number]
                if entry["status"] != "success":
                    writer.add(Sample(row, "failed", used, error_message=entry["told"]))
                    continue
                pixels = np.random.default_rng(int(entry["told"], 16)).integers(0, 256, (32, 32, 3), dtype=np.uint8)
                drawn = images.encode(pixels, ending)
                self._told[hashlib.sha256(drawn).hexdigest()] = entry["told"]
                writer.add(Sample(row, "success", used, drawn, 32, 32, Scores(row.number / 16, None, None)))
            made = writer.finish()
            files = {}
            for kind in made.entries:
                with open({"tar": made.tar, "parquet": made.parquet}[kind], "rb") as file:
                    files[kind] = file.read()
        return files, {"means": made.means, "truncated": made.truncated, "histograms": made.histograms}

    def entries(self, parquet: bytes, shard: Shard) -> dict[int, Any]:
        try:
            table = pq.read_table(pa.BufferReader(parquet), columns=["status", "error_message", "sha256"])
        except pa.ArrowInvalid as error:
            raise ValueError(str(error)) from error
        return {
            row: {"status": each["status"], "told": each["error_message"] or self._told[each["sha256"]]}
            for row, each in enumerate(table.to_pylist(), shard.start)
        }
