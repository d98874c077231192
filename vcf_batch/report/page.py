"""The report as one HTML page that needs no other file, no network and no server.

Values from the output are embedded as JSON and shown as text, never as markup. The page's content security policy
allows no script but its own.

The page has a budget of :data:`PAGE_BYTES`. Texts come first, and have a budget of their own. What they leave is shared
among the pictures (:mod:`vcf_batch.report.pictures.shares`), and each is embedded as large as its share allows.
"""

import base64
import hashlib
import html
import importlib.resources
import json
import shlex
import string
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from vcf_batch import storage
from vcf_batch.driver.progress import told_truncated
from vcf_batch.errors import redact
from vcf_batch.models import embedded
from vcf_batch.output.output import Output
from vcf_batch.output.scores import calibration
from vcf_batch.output.scores.definition import ScoreColumn
from vcf_batch.output.scores.store import ScoreStore
from vcf_batch.output_columns import COLUMNS
from vcf_batch.report import calibration_table, figures
from vcf_batch.report.figures import SCORE_LABELS, Chosen, Figures, Histogram, setting_of
from vcf_batch.report.pictures import reading
from vcf_batch.report.pictures.fitting import FittedPicture
from vcf_batch.report.pictures.reading import PagePictures
from vcf_batch.report.pictures.shares import DATA_PREFIX, PICTURE_WEIGHTS

PAGE_NAME = "index.html"

PROMPT_LENGTH = 600
"""Most characters shown of a prompt or message."""

PAGE_CAUSES = 50
"""Most causes of failure on the page."""

DOT_PROMPT_LENGTH = 120
"""Most characters of the prompt of a dot that is no shown sample."""

PAGE_BYTES = 3_000_000
"""Most bytes of the page."""

PAGE_TEXT_BYTES = 1_200_000
"""Most bytes of everything in the page but pictures."""

_CUT = ("points", "categories", "calibration", "causes", "samples")
"""Lists that are cut, in this order, where texts take more."""

_PLACE = 99999
"""Stands for the place of a picture while texts are measured."""


def render(output: Output) -> str:
    """The report of an output as HTML, of at most :data:`PAGE_BYTES` for an output of any size.

    Raises:
        UsageError: no shard is finished.
        DamageFound: a file does not match its receipt.
        StorageError: the storage failed.
    """
    found = figures.read(output)
    groups = _groups(found)
    chosen = {row.number: row.record for rows in groups.values() for row in rows}
    data = _texts(output, found, chosen)
    for sample in data["samples"]:
        number = sample["number"]
        sample["groups"] = [group for group, rows in groups.items() if any(row.number == number for row in rows)]
        sample["pictures"] = dict.fromkeys(PICTURE_WEIGHTS, _PLACE)
    title = storage.name(output.url)
    _cut(title, data)
    most = PAGE_BYTES - len(_fill(title, data).encode())
    shown = {sample["number"]: chosen[sample["number"]] for sample in data["samples"]}
    dots = {number: key for number, key, *_ in data["points"]}
    _embed(data, reading.read(output, shown, dots, most))
    page = _fill(title, data)
    assert len(page.encode()) <= PAGE_BYTES, "texts alone take more than the page may have"
    return page


def _texts(output: Output, found: Figures, chosen: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that the page shows but pictures."""
    store, calibrated = ScoreStore(output.url), calibration.of_output(output.url)
    return {
        "name": storage.name(output.url),
        "address": redact(output.url),
        "argument": shlex.quote(redact(output.url)),
        "fingerprint": output.record.fingerprint,
        "ending": output.config.image_format,
        "model": embedded.label(output.record.models["model"]),
        "rows": output.plan.num_rows,
        "done": found.rows,
        "counts": found.counts,
        "scores": [
            *(_score(found, name) for name in SCORE_LABELS),
            *(
                _added(found, column)
                for score in store.definitions()
                for column in score.columns
                if column.type == "number"
            ),
        ],
        "calibration": [] if calibrated is None else calibration_table.table(calibrated),
        "categories": found.categories.tables(),
        "duplicates": found.duplicates,
        "samples": [_sample(output, number, chosen[number], found.added) for number in sorted(chosen)],
        "drawn": len(found.points.rows),
        "points": [_point(row, found.added) for row in found.points.rows if row.number not in chosen],
        "causes": _causes(found),
        "time": _time(found),
        "configuration": _configuration(found, output),
        "cut": [],
        "pictures": [],
    }


def _cut(title: str, data: dict[str, Any]) -> None:
    """Halve the lists that may be long until texts fit, and note which they are."""
    for name in _CUT:
        while data[name] and len(_fill(title, data).encode()) > PAGE_TEXT_BYTES:
            data[name] = data[name][: len(data[name]) // 2]
            data["cut"] = [*dict.fromkeys([*data["cut"], name])]


def _embed(data: dict[str, Any], found: PagePictures) -> None:
    """Put the pictures into the page's data, each once."""
    places: dict[FittedPicture, int] = {}

    def place(picture: FittedPicture | None) -> int | None:
        return None if picture is None else places.setdefault(picture, len(places))

    for sample in data["samples"]:
        own = found.samples[sample["number"]]
        sample["pictures"] = {name: place(own[name]) for name in PICTURE_WEIGHTS if name in own}
    data["points"] = [[*point[:4], place(found.dots.get(point[0])), *point[5:]] for point in data["points"]]
    data["pictures"] = [
        [DATA_PREFIX + base64.b64encode(picture.data).decode(), picture.width, picture.height] for picture in places
    ]


def _groups(found: Figures) -> dict[str, list[Chosen]]:
    """The rows of the gallery, by the reason for showing them."""
    groups = {"random": found.random.rows}
    for name in SCORE_LABELS:
        groups |= {f"best {name}": found.best[name].rows, f"worst {name}": found.worst[name].rows}
    return groups


def _score(found: Figures, name: str) -> dict[str, Any]:
    score = SCORE_LABELS[name]
    about = {"name": name, "label": score.label, "meaning": COLUMNS[name].meaning, "higher": score.higher_is_better}
    return about | {"added": False} | _distribution(found.scores[name])


def _added(found: Figures, column: ScoreColumn) -> dict[str, Any]:
    """A score that was added to the output. The page has no best and no worst samples by it."""
    name = column.name
    about = {"name": name, "label": name, "meaning": column.meaning, "higher": column.higher_is_better, "added": True}
    return about | _distribution(found.added[name])


def _distribution(histogram: Histogram) -> dict[str, Any]:
    if not histogram.count:
        return {"count": 0}
    start, width, bars = histogram.bars()
    return {
        "count": histogram.count,
        "mean": _rounded(histogram.mean),
        "low": _rounded(histogram.low),
        "high": _rounded(histogram.high),
        "quantiles": [_rounded(histogram.quantile(share)) for share in (0.05, 0.5, 0.95)],
        "start": _rounded(start),
        "width": _rounded(width),
        "bars": bars,
    }


def _point(row: Chosen, added: Iterable[str]) -> list[Any]:
    """Number, key, setting, prompt, place of the picture, and scores of a row that is no shown sample."""
    return [
        row.number,
        row.record["key"],
        setting_of(row.record),
        _shortened(row.record["prompt"], DOT_PROMPT_LENGTH),
        _PLACE,
        *(_rounded(row.record[name]) for name in (*SCORE_LABELS, *added)),
    ]


def _sample(output: Output, number: int, record: Mapping[str, Any], added: Iterable[str]) -> dict[str, Any]:
    references = record["reference"] if isinstance(record["reference"], list) else [record["reference"]]
    return {
        "number": number,
        "key": record["key"],
        "shard": output.plan[output.plan.index_of(number)].name,
        "prompt": _shortened(record["prompt"]),
        "seed": str(record["seed"]),  # as text, because JavaScript's numbers cannot hold it
        "setting": setting_of(record),
        "references": len(references) if record["reference"] else 0,
        "scores": {name: _rounded(record[name]) for name in (*SCORE_LABELS, *added)},
    }


def _causes(found: Figures) -> list[dict[str, Any]]:
    causes = sorted(found.causes.values(), key=lambda cause: -cause.count)[:PAGE_CAUSES]
    return [
        {
            "status": cause.status,
            "text": cause.text,
            "count": cause.count,
            "key": cause.example_key,
            "example": _shortened(cause.example),
        }
        for cause in causes
    ]


def _time(found: Figures) -> dict[str, Any] | None:
    """Times in seconds since 1970, rows per second, and worker seconds; None if the receipts hold no times."""
    if found.intervals.end <= found.intervals.begin:
        return None
    start, rates = found.intervals.rates()
    return {
        "begin": found.intervals.begin,
        "end": found.intervals.end,
        "start": start,
        "seconds": found.intervals.seconds,
        "rates": [float(f"{rate:.4g}") for rate in rates],
        "worker_seconds": round(found.worker_seconds, 1),
        "phases": [[name.replace("_", " "), round(seconds, 1)] for name, seconds in found.phases.most_common()],
    }


def _configuration(found: Figures, output: Output) -> dict[str, dict[str, str]]:
    """The names and values that stand below each heading."""
    record = output.record
    run: dict[str, Any] = {
        "fingerprint": record.fingerprint[:16],
        "manifest": record.manifest.url,
        "shards": f"{len(found.done):,} of {record.shards:,} finished, {found.retried:,} of them after a retry",
        "size": f"{found.bytes / 1e6:,.1f} MB",
        "computed on": ", ".join(f"{device} ({rows:,} rows)" for device, rows in found.devices.most_common()),
    }
    if found.truncated:
        run["cut off"] = told_truncated(found.truncated)
    if found.intervals.end > 0:
        run["last shard"] = datetime.fromtimestamp(found.intervals.end, UTC).strftime("%Y-%m-%d %H:%M UTC")
    models = {name: f"{model['name']} ({model['identity'][:16]})" for name, model in record.named_models.items()}
    if embedded.is_embedded(record.models["model"]):
        models["model"] += f", {embedded.EMBEDDED}"
    settings = {name: value for name, value in record.config.items() if value not in (None, "", [])}
    parts = {"Run": run, "Models": models, "Settings": settings, "Versions": record.versions}
    return {
        heading: {name: _shortened(_text(value)) for name, value in part.items()} for heading, part in parts.items()
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _shortened(text: str, length: int = PROMPT_LENGTH) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _fill(title: str, data: Mapping[str, Any]) -> str:
    files = importlib.resources.files("vcf_batch.report")
    page, style, script = ((files / f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    encoded = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return string.Template(page).substitute(
        title=html.escape(title),
        style=style,
        # A script element ends at its first "</script", and "<!--" changes how it is read.
        data=encoded.replace("<", "\\u003c"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
