"""``_scores/calibration.json``: how well scores tell pairs that share something from pairs that do not."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vcf_batch import __version__, storage
from vcf_batch.errors import UsageError
from vcf_batch.output.scores.definition import CALIBRATION_NAME, SCORES_FOLDER

MAX_CALIBRATION_BYTES = 1 << 22
CALIBRATION_LAYOUT = 1


@dataclass(frozen=True, slots=True)
class Threshold:
    """A limit on a score."""

    limit: float
    """What a score has to reach, or may not exceed where lower is better."""
    accepted: float
    """Share of the pairs that share something, which keep the limit."""


@dataclass(frozen=True, slots=True)
class CalibratedScore:
    """A score, measured on pairs."""

    against: str
    """What an image is compared with: ``prompt``, ``reference`` or ``twin``."""
    higher_is_better: bool
    model: str
    """Identity of the models that score; a threshold is worth nothing by others."""
    shared: int
    """Number of images with what they were made from."""
    other: int
    """Number of images with what another image was made from."""
    held: int
    """Number of the latter that share what the score is not about: the prompt, or the reference."""
    auc: float
    """Probability that a pair of the first kind has the better score than one of the second, 0.5 by chance."""
    low: float | None
    high: float | None
    """The interval of :attr:`auc`; None where there is too little to tell."""
    thresholds: Mapping[str, Threshold | None]
    """Threshold by the share of pairs of the second kind that keep it; None where there are too few of them."""


@dataclass(frozen=True)
class Calibration:
    """The scores of an output, calibrated."""

    run_fingerprint: str
    rows: int
    """Number of images that were drawn."""
    scores: Mapping[str, CalibratedScore] = field(default_factory=dict)
    """By column."""

    def to_json(self) -> bytes:
        """The calibration as indented UTF-8 JSON."""
        document = {"layout": CALIBRATION_LAYOUT, "vcf_batch": __version__, **asdict(self)}
        return (json.dumps(document, indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Calibration":
        """Read back :meth:`to_json`.

        Raises:
            ValueError: the bytes are no calibration.
        """
        try:
            there = json.loads(data)
            scores = {name: _score(each) for name, each in there["scores"].items()}
            found = cls(there["run_fingerprint"], there["rows"], scores)
            numbers = [
                number
                for each in scores.values()
                for number in (each.auc, *(limit.limit for limit in each.thresholds.values() if limit))
            ]
            if there["layout"] != CALIBRATION_LAYOUT or not all(type(number) in (float, int) for number in numbers):
                raise ValueError(f"its layout is {there['layout']!r}, or its limits are no numbers")
            return found
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a calibration: {error}") from error


def _score(there: dict[str, Any]) -> CalibratedScore:
    limits = {share: limit and Threshold(**limit) for share, limit in there["thresholds"].items()}
    return CalibratedScore(**{**there, "thresholds": limits})


def read(url: str) -> Calibration:
    """Read a calibration.

    Raises:
        UsageError: there is none, or another file.
        StorageError: the storage failed.
    """
    try:
        return Calibration.from_json(storage.read_bytes(url, MAX_CALIBRATION_BYTES))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the calibration {url} cannot be read: {error}; 'vcf-batch score OUTPUT --calibrate' writes "
            f"OUTPUT/{SCORES_FOLDER}/{CALIBRATION_NAME}"
        ) from error


def of_output(output_url: str) -> Calibration | None:
    """The calibration in an output; None if there is none.

    Raises:
        UsageError: it cannot be read.
        StorageError: the storage failed.
    """
    url = place(output_url)
    with storage.refusals_as_storage_errors():
        return read(url) if storage.exists(url) else None


def place(output_url: str) -> str:
    """The file of an output's calibration."""
    return storage.join(output_url, SCORES_FOLDER, CALIBRATION_NAME)
