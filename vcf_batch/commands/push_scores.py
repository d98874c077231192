"""The scores of an output on their way to another storage, after its shards."""

from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from vcf_batch import storage
from vcf_batch.errors import UsageError
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import RECEIPT_SUFFIX, Damaged, Receipt
from vcf_batch.output.scores.definition import CALIBRATION_NAME, SCORES_FOLDER, ScoreDefinition
from vcf_batch.output.scores.store import PARQUET, ScoreStore
from vcf_batch.output.shards import side_by_side
from vcf_batch.records import FileEntry, Shard
from vcf_batch.storage import scratch


class Target(Protocol):
    """A folder that files are copied to, as :class:`vcf_batch.storage.hub_commits.HubCommits` describes it."""

    compares_contents: bool

    def has(self, name: str) -> bool: ...
    def holds(self, name: str, entry: FileEntry) -> bool: ...
    def holds_bytes(self, name: str, data: bytes) -> bool: ...
    def remove(self, name: str) -> None: ...
    def put(self, path: str, name: str) -> None: ...
    def put_bytes(self, name: str, data: bytes) -> None: ...


Open = Callable[[str], AbstractContextManager[Target]]
"""Function that opens the folder of a URL."""


@dataclass
class PushedScores:
    """What became of the scores of a push."""

    copied: int = 0
    """Number of shards whose scores were copied, summed over the scores."""
    damaged: dict[str, str] = field(default_factory=dict)
    """The scores of shards that are left out because they are damaged, by their places, each with the reason."""


def push_scores(output: Output, target: str, shards: Container[int], open_folder: Open) -> PushedScores:
    """Copy definitions, the scores of shards, and the calibration.

    As in ``score``, the definition comes before the scores of shards, and each receipt behind its file. Where the
    target has a score of the name by other models or settings, its receipts go first. Scores that the target alone has
    stay.

    Args:
        output: the output.
        target: the folder or URL that its shards were copied to.
        shards: indices of these shards.
        open_folder: opens a folder of the target.

    Raises:
        DamageFound: a definition is damaged.
        UsageError: the calibration cannot be read.
        StorageError: one of the storages failed.
    """
    store, pushed = ScoreStore(output.url), PushedScores()
    for definition in store.definitions():
        place = storage.join(target, SCORES_FOLDER)
        with open_folder(place) as folder:
            name, data = f"{definition.name}.json", definition.to_json()
            is_other = folder.has(name) and not folder.holds_bytes(name, data)
        with open_folder(storage.join(place, definition.name)) as folder:
            receipts = (shard.name + RECEIPT_SUFFIX for shard in output.plan if is_other)
            for receipt in filter(folder.has, receipts):
                folder.remove(receipt)
        with open_folder(place) as folder:
            if not folder.holds_bytes(name, data):
                folder.put_bytes(name, data)
        with open_folder(storage.join(place, definition.name)) as folder:
            _ScoreCopies(output, store, definition, folder, pushed).copy(shards)
    _push_calibration(output, target, open_folder)
    return pushed


def _push_calibration(output: Output, target: str, open_folder: Open) -> None:
    url = storage.join(output.url, SCORES_FOLDER, CALIBRATION_NAME)
    try:
        with storage.refusals_as_storage_errors():
            data = storage.read_bytes(url)
    except FileNotFoundError:
        return
    except storage.NotAFileError as error:
        raise UsageError(f"the calibration {url} cannot be read: {error}; delete it, and calibrate again") from error
    with open_folder(storage.join(target, SCORES_FOLDER)) as folder:
        if not folder.holds_bytes(CALIBRATION_NAME, data):
            folder.put_bytes(CALIBRATION_NAME, data)


class _ScoreCopies:
    """The copies of a score's files."""

    def __init__(
        self, output: Output, store: ScoreStore, definition: ScoreDefinition, folder: Target, pushed: PushedScores
    ) -> None:
        self._output, self._store, self._definition = output, store, definition
        self._folder, self._pushed = folder, pushed
        self._receipts: dict[int, str] = {}
        """SHA-256 of the file that was copied for each shard whose receipt comes at the end."""

    def copy(self, shards: Container[int]) -> None:
        """Copy the scores of shards; on the Hub, which takes few commits, all files before all receipts."""
        whole = [*self._whole(shards)] if self._folder.compares_contents else self._whole(shards)
        copied = (
            ((receipt, self._copied(receipt)) for receipt in whole)
            if self._folder.compares_contents
            else side_by_side(self._copied, whole)
        )
        for receipt, reason in copied:
            if reason is not None:
                self._pushed.damaged[f"{SCORES_FOLDER}/{self._definition.name}/{receipt.shard.name}"] = reason
        for receipt in whole if self._folder.compares_contents else ():
            self._publish_if_same(receipt)

    def _whole(self, shards: Container[int]) -> Iterator[Receipt]:
        for found in self._output.examine():
            if isinstance(found, Receipt) and found.shard.index in shards:
                yield found

    def _copied(self, receipt: Receipt) -> str | None:
        """Copy the scores of a shard, unless it has none or the target has them; why that is impossible."""
        shard = receipt.shard
        found = self._store.found(self._definition, shard, receipt.parquet_hash)
        if found is None or isinstance(found, Damaged):
            return found and found.reason
        name, told = shard.name + PARQUET, shard.name + RECEIPT_SUFFIX
        if self._folder.has(told):
            if self._folder.holds(name, found.parquet) and self._folder.holds_bytes(told, found.to_json()):
                return None
            self._folder.remove(told)
        place = f"{SCORES_FOLDER}/{self._definition.name}/{name}"
        try:
            with scratch.folder() as local, storage.refusals_as_storage_errors():
                path = storage.join(local, name)
                storage.download(storage.join(self._output.url, place), path)
                if storage.digest(path) != found.parquet:
                    return f"{place} does not match its receipt"
                self._folder.put(path, name)
        except FileNotFoundError:
            return f"{place} is missing"
        self._pushed.copied += 1
        if self._folder.compares_contents:
            self._receipts[shard.index] = found.parquet.sha256
        else:
            self._folder.put_bytes(told, found.to_json())
        return None

    def _publish_if_same(self, receipt: Receipt) -> None:
        """Copy a receipt, unless ``score`` has replaced it since."""
        shard: Shard = receipt.shard
        sha256 = self._receipts.pop(shard.index, None)
        found = self._store.found(self._definition, shard, receipt.parquet_hash) if sha256 else None
        if found is not None and not isinstance(found, Damaged) and found.parquet.sha256 == sha256:
            self._folder.put_bytes(shard.name + RECEIPT_SUFFIX, found.to_json())
