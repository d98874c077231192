"""The log of a run: lines for people, or one JSON object a line for programs."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

FIELDS = ("shard", "worker", "node", "rows", "seconds")
"""Further fields that an event may have, in its record's ``extra``."""

_package = logging.getLogger("vcf_batch")


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "note"),
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        return json.dumps(line)


def configure(log_format: str, stream: TextIO | None = None) -> None:
    """Set the format of this process's log.

    Args:
        log_format: ``text``, or ``json``, which also has a line for each finished shard.
        stream: stream of the log; None is standard error.
    """
    as_json = log_format == "json"
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(_JsonLines() if as_json else logging.Formatter("%(message)s"))
    _package.handlers = [handler]
    _package.setLevel(logging.DEBUG if as_json else logging.INFO)
