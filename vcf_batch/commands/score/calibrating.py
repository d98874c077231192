"""``score --calibrate``: scores measured on pairs that share something and pairs that do not, of an output's own rows.

An image and what it was made from share it. The same image with what another row was made from does not: another
prompt, another reference, the twin of another row. Others that share the rest come first, so that the rest does not
tell: for a reference those with the same prompt, for a prompt or a twin those with the same reference. Hashes of keys
decide, without a random number, so the same output gives the same pairs.
"""

import functools
import hashlib
import heapq
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from vcf_batch import images
from vcf_batch.commands.score.scoring import require_manifest
from vcf_batch.config.limits import FALSE_ACCEPTS, MAX_PIXELS
from vcf_batch.config.strengths import reference_shares
from vcf_batch.errors import DamageFound, RefusedError, RowError, StorageError, UsageError, VcfBatchError
from vcf_batch.manifest.references import ReferenceReader
from vcf_batch.metrics.bootstrap import Bootstrap
from vcf_batch.metrics.run_scores import RunScores
from vcf_batch.metrics.separation import separation
from vcf_batch.metrics.shown import ImageScorer, Part, Seen, Shown
from vcf_batch.models.cache import fetch
from vcf_batch.output import shards
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Receipt
from vcf_batch.output.scores.calibration import CalibratedScore, Calibration, Threshold
from vcf_batch.records import Reference, Row, Shard
from vcf_batch.setup import claim, run_models
from vcf_batch.setup.run_models import Models
from vcf_batch.worker import worker
from vcf_batch.worker.device import Device
from vcf_batch.worker.scoring import scorers
from vcf_batch.worker.scoring.resolved_score import IMAGES_AT_ONCE, ResolvedScore, column_name

DRAWN = 256
"""Images that are drawn at most."""
OTHERS = 4
"""Pairs that do not share, for each image and each thing it is compared with."""
SHARDS_READ = 64
"""Shards that images are drawn from at most."""
LEAST_PAIRED = 8
"""Images with a partner without which nothing is measured."""


@dataclass(frozen=True)
class _Drawn:
    """An image that was drawn, as the output has it."""

    record: Mapping[str, Any]
    row: Row
    image: bytes
    twin: bytes | None

    @property
    def key(self) -> str:
        return str(self.record["key"])

    def value(self, against: str) -> Any:
        """What the image was made from: two rows with the same value share it."""
        if against == "reference":
            return self.row.references or None
        return self.row.prompt


_REST = {"prompt": "reference", "reference": "prompt", "twin": "reference"}
"""What the pairs of a comparison share besides, where that can be."""


def calibrate(output: Output, scores: Sequence[ResolvedScore], device: Device) -> Calibration:
    """Measure the scores of an output's run, and further ones.

    Args:
        output: the output, whose manifest and references have to be there.
        scores: further scores. Those of the image alone, and those by a function, are left out.
        device: the device to compute on.

    Raises:
        UsageError: there are too few images, or the manifest or a reference cannot be read.
        RefusedError: the judge is not the one of the run.
        ModelError, StorageError: a model cannot be loaded, or the storage failed.
    """
    drawn = _draw(output)
    models = run_models.resolve(output.config, claim.commits_of(output.config, output.record))
    measured: list[tuple[dict[str, str], dict[str, str], ImageScorer]] = []
    own = _own_scores(output, models, device)
    measured.append(({part: part for part in own.parts}, {part: models.identity_of(part) for part in own.parts}, own))
    for score in scores:
        if any(column.against for column in score.definition.columns):
            scorer = scorers.load(score, device.kind)
            names = {part: column_name(score.name, part) for part in scorer.parts}
            measured.append((names, dict.fromkeys(names.values(), score.definition.fingerprint), scorer))
    pairs = _Pairs(output, drawn)
    found: dict[str, CalibratedScore] = {}
    for names, identities, scorer in measured:
        for part, each in pairs.measure(scorer).items():
            found[names[part]] = _calibrated(scorer.parts[part], identities[names[part]], *each)
    if not found:
        raise UsageError(
            f"{output.url} has fewer than {LEAST_PAIRED} images with another prompt or reference to compare with; "
            "calibrate an output with more rows"
        )
    return Calibration(output.record.fingerprint, len(drawn), found)


def _own_scores(output: Output, models: Models, device: Device) -> RunScores:
    """The scores of the run, by the models that made them."""
    recorded = output.record.models
    for name in ("clip_score", "lpips"):
        there, now = (recorded.get(name) or {}).get("identity", "none"), models.identity_of(name)
        if there != now:
            raise RefusedError(
                f"the model of {name} is another one than that of the run, {there[:12]} there and {now[:12]} now; name "
                f"its new place with {'--judge' if name == 'clip_score' else '--lpips-weights'}"
            )
    scorer = worker.load_scorer(models, fetch(models.pipeline), device.kind, output.config.texture)
    return RunScores(scorer, output.config.triplets)


def _calibrated(
    part: Part, model: str, own: Sequence[float], others: Sequence[Sequence[float]], held: int, bootstrap: Bootstrap
) -> CalibratedScore:
    higher = bool(part.higher_is_better)
    auc, limits = separation(own, others, higher, bootstrap, FALSE_ACCEPTS)

    def accepted(limit: float) -> float:
        return sum(value >= limit if higher else value <= limit for value in own) / len(own)

    return CalibratedScore(
        against=str(part.against),
        higher_is_better=higher,
        model=model,
        shared=len(own),
        other=sum(map(len, others)),
        held=held,
        auc=auc.value,
        low=auc.low,
        high=auc.high,
        thresholds={
            f"{share:g}": None if limit is None else Threshold(limit, accepted(limit))
            for share, limit in limits.items()
        },
    )


def _lot(*words: str) -> bytes:
    return hashlib.sha256("\0".join(words).encode()).digest()


def _draw(output: Output) -> list[_Drawn]:
    """The images that are compared, in the order of the manifest."""
    require_manifest(output)
    whole = (found.shard for found in output.examine() if isinstance(found, Receipt) and found.counts["success"])
    chosen = heapq.nsmallest(SHARDS_READ, whole, key=lambda shard: _lot(shard.name))
    keys = heapq.nsmallest(DRAWN, (key for shard in sorted(chosen) for key in _keys(output, shard)), key=_lot)
    wanted = frozenset(keys)
    return [each for shard in sorted(chosen) for each in _read(output, shard, wanted)]


def _keys(output: Output, shard: Shard) -> list[str]:
    """Keys of the rows of a shard that have an image."""
    with shards.open_parquet(shards.file_url(output.url, shard, "parquet")) as parquet:
        table = parquet.read(["key", "status"], use_threads=False)
    pairs = zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True)
    return [key for key, status in pairs if status == "success"]


def _read(output: Output, shard: Shard, wanted: frozenset[str]) -> Iterator[_Drawn]:
    ending = output.config.image_format
    rows = {row.key: row for row in output.manifest_rows(shard.start, shard.stop) if row.key in wanted}
    if not rows:
        return
    try:
        with shards.open_parquet(shards.file_url(output.url, shard, "parquet")) as parquet:
            records = {record["key"]: record for record in parquet.read(use_threads=False).to_pylist()}
        for sample in shards.read_samples(shards.file_url(output.url, shard, "tar")):
            if (key := sample["__key__"]) in rows:
                yield _Drawn(records[key], rows[key], sample[ending], sample.get(f"content.{ending}"))
    except VcfBatchError:
        raise
    except (tarfile.TarError, pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise DamageFound(
            f"shard {shard.name} of {output.url} cannot be read: {error}; see 'vcf-batch verify'"
        ) from error


class _Pairs:
    """The pairs of the images that were drawn.

    Args:
        output: the output.
        drawn: its images.
    """

    def __init__(self, output: Output, drawn: Sequence[_Drawn]) -> None:
        self._drawn = drawn
        reader = ReferenceReader(output.need_manifest().base, output.config.reference_root, output.config.max_pixels)

        @functools.lru_cache(IMAGES_AT_ONCE)
        def read(reference: Reference) -> Image.Image:
            return reader.read(reference)

        self._read_reference = read

    def measure(self, scorer: ImageScorer) -> dict[str, tuple[list[float], list[list[float]], int, Bootstrap]]:
        """Score pairs.

        Returns:
            For each part of the scorer that has enough pairs: the scores of images with their own, those of each with
            others, the number of the latter that share the rest, and the resamples of the images.
        """
        found: dict[str, tuple[list[float], list[list[float]], int, Bootstrap]] = {}
        for against in dict.fromkeys(part.against for part in scorer.parts.values() if part.against):
            partners = {place: chosen for place in range(len(self._drawn)) if (chosen := self._others(place, against))}
            if len(partners) < LEAST_PAIRED:
                continue
            parts = [name for name, part in scorer.parts.items() if part.against == against]
            pairs = [(place, place) for place in partners]
            pairs += [(place, other) for place, others in partners.items() for other, _ in others]
            values = self._scores(scorer, pairs, against, parts)
            held = sum(is_held for others in partners.values() for _, is_held in others)
            prompts = [self._drawn[place].value("prompt") for place in partners]
            references = [self._drawn[place].value("reference") for place in partners]
            for part in parts:
                left = iter(values[part])
                own = [next(left) for _ in partners]
                others = [[next(left) for _ in chosen] for chosen in partners.values()]
                found[part] = own, others, held, Bootstrap(prompts, references)
        return found

    def _others(self, place: int, against: str) -> list[tuple[int, bool]]:
        """Rows to compare an image with instead of its own, and whether they share the rest."""
        mine, rest = self._drawn[place], _REST[against]
        if mine.value(against) is None or (against == "twin" and mine.twin is None):
            return []
        there = [
            (number, each.value(rest) == mine.value(rest))
            for number, each in enumerate(self._drawn)
            if each.value(against) not in (None, mine.value(against))
        ]
        there.sort(key=lambda each: (not each[1], _lot(mine.key, self._drawn[each[0]].key)))
        return there[:OTHERS]

    def _scores(
        self, scorer: ImageScorer, pairs: Sequence[tuple[int, int]], against: str, parts: Sequence[str]
    ) -> dict[str, list[float]]:
        """A score of each pair: the image of one row with what another was made from."""
        found: dict[str, list[float]] = {part: [] for part in parts}
        seen = Seen()
        for start in range(0, len(pairs), IMAGES_AT_ONCE):
            batch = pairs[start : start + IMAGES_AT_ONCE]
            shown = [self._shown(place, other, against) for place, other in batch]
            values = scorer.score(shown, [scorer.prepare(each.picture) for each in shown], seen)
            for part in parts:
                found[part] += [value for value in values[part] if isinstance(value, float)]
            assert all(len(each) == len(found[parts[0]]) for each in found.values())
        return found

    def _shown(self, place: int, other: int, against: str) -> Shown:
        mine, others = self._drawn[place], self._drawn[other]
        source = others if against == "reference" else mine
        references = source.row.references
        try:
            pictures = [self._read_reference(reference) for reference in references]
        except RowError as error:
            raise UsageError(
                f"row {source.key!r}: {error}. A calibration needs the references: put the image back"
            ) from error
        twin = (others if against == "twin" else mine).twin
        return Shown(
            _decoded(mine.image),
            (others if against == "prompt" else mine).row.prompt,
            pictures,
            reference_shares(source.record["reference_weights"], len(references)),
            None if twin is None else _decoded(twin),
            mine.record,
        )


def _decoded(data: bytes) -> NDArray[np.uint8]:
    try:
        return np.asarray(images.decode(data, MAX_PIXELS))
    except RowError as error:
        raise StorageError(f"an image of the output cannot be read: {error}; see 'vcf-batch verify'") from error
