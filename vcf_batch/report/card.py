"""The dataset card: ``README.md`` in the output, as Hugging Face and people read it."""

import hashlib
import importlib.resources
import re
import string

import pyarrow as pa

from vcf_batch import __version__, storage
from vcf_batch.config.limits import GATES
from vcf_batch.config.run_config import RunConfig
from vcf_batch.driver.progress import told_truncated
from vcf_batch.errors import DamageFound, UsageError
from vcf_batch.models import embedded
from vcf_batch.output import receipts, shards
from vcf_batch.output.output import Output
from vcf_batch.output_columns import COLUMNS, SETTINGS
from vcf_batch.report import card_header, figures
from vcf_batch.report.figures import SCORE_LABELS, Figures

CARD_NAME = "README.md"
MAX_CARD_BYTES = 1 << 20

TRIPLET_FILES = (
    "\n  `KEY.content.{0}` is what the prompt alone makes of the same noise, `KEY.style.{0}` the reference that\n"
    "  counts most, squashed to the size of the image."
)
"""Text of the card on further members of a tar."""

_SIGNATURE = re.compile(r"\n<!-- written by vcf-batch, unchanged: ([0-9a-f]{64}) -->\n")


class OthersCard(UsageError):
    """The card that is there was written or changed by somebody else."""


def write(output: Output, licence: str | None = None, force: bool = False) -> str:
    """Write the card into the output, and return its URL.

    Args:
        licence: identifier as Hugging Face knows it, such as ``cc-by-4.0``. None keeps the licence of a card
            that is replaced, else leaves the field open.
        force: replace a card that somebody else wrote or changed.

    Raises:
        OthersCard: such a card is there.
        UsageError: no shard is finished.
        DamageFound: a parquet is not what a run writes.
        StorageError: the storage failed.
    """
    url = storage.join(output.url, CARD_NAME)
    there = read(url)
    if there is not None and not is_ours(there):
        if not force:
            raise OthersCard(f"{url} was not written by this command, or was changed; --force replaces it")
        there = None
    if there is not None and licence is None:
        licence = card_header.licence_in(there)
    text = render(output, licence)
    signature = f"\n<!-- written by vcf-batch, unchanged: {hashlib.sha256(text.encode()).hexdigest()} -->\n"
    storage.publish_bytes(url, (text + signature).encode())
    return url


def render(output: Output, licence: str | None = None) -> str:
    """The card of an output: YAML for Hugging Face, then Markdown. For arguments and errors see :func:`write`."""
    found = figures.read(output)
    config, schema = output.config, _schema(output)
    settings = {name: getattr(config, name, None) for name in (*SETTINGS, "dtype")}
    told = {name: value for name, value in settings.items() if value not in (None, "")}
    template = string.Template((importlib.resources.files("vcf_batch.report") / "card_template.md").read_text("utf-8"))
    return template.substitute(
        header=card_header.header(output, schema, found.counts["success"], licence),
        name=_code(storage.name(output.url)),
        version=__version__,
        samples=f"{found.counts['success']:,}",
        size=f"{config.width} x {config.height}",
        rows=f"{output.plan.num_rows:,}",
        missing=_missing(found, output) + _selected(config) + _embedded(output),
        bytes=f"{found.bytes / 1e6:,.1f} MB",
        extension=config.image_format,
        triplet=TRIPLET_FILES.format(config.image_format) if config.triplets else "",
        columns="\n".join(_column(field) for field in schema),
        scores="\n".join(_score(found, name) for name in SCORE_LABELS),
        models="\n".join(
            f"| {name} | {_code(model['name'])} | {_code(model['identity'][:16])} |"
            for name, model in output.record.named_models.items()
        ),
        settings=", ".join(f"{name} {_code(str(value))}" for name, value in told.items()),
        fingerprint=output.record.fingerprint,
        devices=", ".join(_code(device) for device in sorted(found.devices)),
        licence=_code(licence) if licence else "Not stated. Who hands this on decides: `license` above.",
    )


def _schema(output: Output) -> pa.Schema:
    first = next(receipts.read(output.url), None)
    if first is None:  # It is just being replaced.
        raise UsageError(f"{output.url} has no finished shard to describe; try again")
    shard = first.shard
    try:
        with shards.open_parquet(shards.file_url(output.url, shard, "parquet")) as parquet:
            return parquet.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise DamageFound(
            f"{shards.file_name(shard, 'parquet')} cannot be read: {error}; see 'vcf-batch verify'"
        ) from error


def _missing(found: Figures, output: Output) -> str:
    failed, rejected = found.counts["failed"], found.counts["rejected"]
    damaged = sum(len(output.plan[int(name)]) for name in found.damaged)
    unfinished = output.plan.num_rows - found.rows - damaged
    left = f" {damaged:,} more are in damaged shards." if damaged else ""
    left += f" {unfinished:,} more are not generated yet." if unfinished else ""
    left += f" Cut off: {told_truncated(found.truncated)}." if found.truncated else ""
    return f"Without an image: {failed:,} rows that failed, {rejected:,} that were rejected.{left}"


def _selected(config: RunConfig) -> str:
    """Text on the selection by gates, without which the scores would mislead; empty for a run without gates."""
    gates = [
        f"{score} {'<=' if name.startswith('max_') else '>='} {getattr(config, name):g}"
        for name, score in GATES.items()
        if name in config.gates
    ]
    if not gates:
        return ""
    attempts = f"the first of up to {config.attempts} attempts at each row" if config.attempts > 1 else "images"
    return f"\n\nSelected: {attempts} with {' and '.join(gates)}. The scores below are those of the selection."


def _embedded(output: Output) -> str:
    """Text on the embedded model, which is no source of training data; empty where it was not used."""
    if not embedded.is_embedded(output.record.models["model"]):
        return ""
    shapes = ", ".join(embedded.SHAPES)
    return f"\n\nMade by an {embedded.EMBEDDED}, which draws {shapes}, and nothing else, whatever a prompt asks for."


def _column(field: pa.Field) -> str:
    meaning = COLUMNS[field.name].meaning if field.name in COLUMNS else "from the manifest"
    return f"| {_code(field.name)} | {_code(str(field.type))} | {meaning} |"


def _score(found: Figures, name: str) -> str:
    values = found.scores[name]
    shown = (values.mean, *map(values.quantile, (0.05, 0.5, 0.95))) if values.count else ()
    return f"| `{name}` | {values.count:,} | {' | '.join(f'{value:.3f}' for value in shown) or '- | - | - | -'} |"


def _code(text: str) -> str:
    """A name or value that neither Markdown nor HTML takes for its own."""
    return "`" + re.sub(r"[|`\s]+", " ", text) + "`"


def read(url: str) -> str | None:
    """The card at ``url``; None if there is none.

    Raises:
        StorageError: the storage failed.
    """
    try:
        with storage.refusals_as_storage_errors():
            return storage.read_bytes(url, limit=MAX_CARD_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return None


def is_ours(text: str) -> bool:
    """Whether :func:`write` wrote this card, and nobody has changed it."""
    body, mark, end = text.rpartition("\n<!-- ")
    signed = _SIGNATURE.fullmatch(mark + end)
    return signed is not None and signed[1] == hashlib.sha256(body.encode()).hexdigest()
