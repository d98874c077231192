"""A shard read again, and what is wrong with it even at a second look."""

import functools
from collections.abc import Mapping, Set
from typing import NamedTuple

import pyarrow as pa

from vcf_batch import storage
from vcf_batch.commands.verifying.shard import check_shard
from vcf_batch.errors import DamageFound, Unfinished, VcfBatchError
from vcf_batch.output import progress_file, receipts
from vcf_batch.output.output import Output
from vcf_batch.output.shards import file_name
from vcf_batch.records import Shard

NOT_GENERATED = "it has no receipt: it is not generated yet"


class CheckedShard(NamedTuple):
    """What was found of a shard."""

    result: pa.Array | DamageFound | Unfinished
    """The keys of the shard's rows, binary, or what is wrong with it."""
    manifest_error: VcfBatchError | None
    """Why the manifest cannot be used by now; else None."""


class ShardReader:
    """Reader of shards for ``verify``. Picklable, and threads may share it.

    Args:
        output: the output.
        sizes: bytes of the output's files, by name.
    """

    def __init__(self, output: Output, sizes: Mapping[str, int]) -> None:
        self._output, self._sizes = output, sizes
        self._second_look = _SecondLook(output)

    def __call__(self, shard: Shard) -> CheckedShard:
        """Read a shard of the output's plan.

        Raises:
            StorageError: the storage failed.
        """
        try:
            result = check_shard(self._output, shard, self._sizes)
        except (DamageFound, Unfinished):
            # A driver may have replaced the shard between the listing, the receipt and the files.
            result = self._second_look(shard)
        return CheckedShard(result, self._output.manifest_error)


class _SecondLook:
    """The second look at a shard in which something is wrong, before it is reported.

    A shard without a receipt is unfinished. It is damaged if the run's last driver counted it as finished: a driver
    that replaces shards does not count them before.

    Args:
        output: the output that the shard belongs to.
    """

    def __init__(self, output: Output) -> None:
        self._output = output

    def __call__(self, shard: Shard) -> pa.Array | DamageFound | Unfinished:
        """The keys of the shard's rows, or what is wrong with it still."""
        name = shard.name + receipts.RECEIPT_SUFFIX
        # One listing for all: there may be many shards that are not generated yet.
        if name in self._later_sizes or shard.index in self._counted:
            sizes = receipts.sizes_now(self._output.url, shard.name)
            if name not in sizes and shard.index in self._counted:
                return DamageFound("it has no receipt, although its run counted it as finished" + _strays(shard, sizes))
            try:
                return check_shard(self._output, shard, sizes)
            except (DamageFound, Unfinished) as fault:
                return fault
        return Unfinished(NOT_GENERATED + _strays(shard, self._later_sizes))

    @functools.cached_property
    def _later_sizes(self) -> Mapping[str, int]:
        with storage.refusals_as_storage_errors():
            return storage.list_files(self._output.url)

    @functools.cached_property
    def _counted(self) -> Set[int]:
        """Indices of the shards that the last driver counted as finished, read after the listing."""
        told = progress_file.read(self._output.url)
        return told.totals.done if told and told.fingerprint in self._output.fingerprints else set()


def _strays(shard: Shard, sizes: Mapping[str, int]) -> str:
    """What is told about the files of a shard that has no receipt; empty if there are none."""
    names = [name for kind in receipts.FILE_SUFFIXES if (name := file_name(shard, kind)) in sizes]
    if not names:
        return ""
    return f". No receipt stands for {' and '.join(names)}: no part of the dataset, deleted by the next start"
