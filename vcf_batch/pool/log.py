"""What a run tells while it goes on: lines for people, or one JSON object a line for programs."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

FIELDS = ("shard", "worker", "node", "rows", "seconds")
"""What events may say besides; in their record's ``extra``."""

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
    """Say how this process tells what happens.

    Args:
        log_format: ``text``, or ``json``, which has a line for each finished shard besides.
        stream: None is standard error.
    """
    as_json = log_format == "json"
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(_JsonLines() if as_json else logging.Formatter("%(message)s"))
    _package.handlers = [handler]
    _package.setLevel(logging.DEBUG if as_json else logging.INFO)
