"""The samples of a committed shard that stay while its other rows are generated anew."""

import hashlib
import itertools
import tarfile
from collections.abc import Callable, Iterator, Mapping

import pyarrow as pa

from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import StorageError, VcfBatchError
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.output import sample_records, shards
from vcf_batch.output_columns import COLUMNS
from vcf_batch.records import TRIPLET, RowMask, Sample, Shard


class KeptSamples(Mapping[int, Sample]):
    """The samples of one committed shard that stay, by row number.

    A sample is read from the output when it is asked for. Ask for each once, in the order of the rows.

    Args:
        config: the run, with every default settled.
        manifest: the manifest of the run.
        shard: a committed shard of the run.
        redo: which of its rows are generated anew; None means all of them.
        note_progress: called for each sample that is read, whether it stays or not.
    """

    def __init__(
        self,
        config: RunConfig,
        manifest: Manifest,
        shard: Shard,
        redo: RowMask | None,
        note_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._shard = shard
        self._redo = bytes([True]) * len(shard) if redo is None else redo
        self._samples = _committed(config, manifest, shard)
        self._note_progress = note_progress

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and not self._redo[number - self._shard.start]

    def __getitem__(self, number: int) -> Sample:
        """Read on up to the sample of a row.

        Raises:
            KeyError: the row is generated anew, or an earlier call has passed it.
            StorageError: the shard cannot be read, or is damaged.
        """
        if number not in self:
            raise KeyError(number)
        for sample in self._samples:
            self._note_progress()
            if sample.row.number == number:
                return sample
        raise KeyError(number)

    def __iter__(self) -> Iterator[int]:
        return (number for number in range(self._shard.start, self._shard.stop) if number in self)

    def __len__(self) -> int:
        return self._redo.count(False)


def _committed(config: RunConfig, manifest: Manifest, shard: Shard) -> Iterator[Sample]:
    """Every sample of a committed shard, in order.

    Raises:
        StorageError: the shard cannot be read, or is damaged.
    """
    try:
        yield from _read(config, manifest, shard)
    except VcfBatchError:
        raise
    # A damaged file may hold anything.
    except (tarfile.TarError, pa.ArrowException, OSError, ValueError, LookupError, OverflowError) as error:
        raise _damaged(shard, f"{type(error).__name__}: {error}") from error


def _damaged(shard: Shard, how: str) -> StorageError:
    return StorageError(
        f"shard {shard.name} is damaged, which was found while it was repaired ({how}); rerun the command, without "
        "--trust-receipts: it generates the shard whole"
    )


def _read(config: RunConfig, manifest: Manifest, shard: Shard) -> Iterator[Sample]:
    rows = manifest.iter_rows(shard.start, shard.stop, config.seed)
    samples = shards.read_samples(shards.file_url(config.output, shard, "tar"))
    with shards.open_parquet(shards.file_url(config.output, shard, "parquet")) as parquet:
        columns = [name for name in parquet.schema_arrow.names if name in COLUMNS]
        for batch in parquet.iter_batches(shards.ROWS_AT_ONCE, columns=columns, use_threads=False):
            for row, record in zip(itertools.islice(rows, batch.num_rows), batch.to_pylist(), strict=True):
                image, triplet = None, {}
                if record["status"] == "success":
                    if (sample := next(samples, None)) is None:
                        raise _damaged(shard, f"its tar ends before row {row.number}")
                    image = sample[config.image_format]
                    if config.triplets:
                        triplet = {name: sample[f"{name}.{config.image_format}"] for name in TRIPLET}
                    if hashlib.sha256(image).hexdigest() != record["sha256"]:
                        raise _damaged(shard, f"row {row.number} has another sha256")
                yield sample_records.sample_of(row, record, image, triplet)
