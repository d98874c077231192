"""Logs for programs: one JSON object a line, with what each event is about."""

import io
import json
import logging
from datetime import datetime

import pytest

from vcf_batch.driver.progress import Progress, configure_log


def test_each_line_is_an_object_that_says_what_it_is_about() -> None:
    stream = io.StringIO()
    configure_log("json", stream=stream)
    try:
        with Progress(10, 0) as shown:
            where = {"shard": "00001", "worker": "host:1", "node": "n"}
            shown.note("shard 00001 is finished", "shard_finished", logging.DEBUG, **where, rows=4, seconds=2.5)
        logging.getLogger("vcf_batch.output.lease").warning("held by %s", "somebody")
    finally:
        configure_log("text")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert datetime.fromisoformat(first.pop("time")).tzinfo
    assert first == {
        "level": "debug",
        "event": "shard_finished",
        "message": "shard 00001 is finished",
        **where,
        "rows": 4,
        "seconds": 2.5,
    }
    assert (second["level"], second["event"], second["message"]) == ("warning", "note", "held by somebody")


@pytest.mark.parametrize(
    ("log_format", "verbosity", "shown"),
    [
        ("text", "quiet", ["warning"]),
        ("text", "normal", ["progress", "warning"]),
        ("text", "verbose", ["shard", "progress", "warning"]),
        ("json", "quiet", ["warning"]),
        ("json", "normal", ["shard", "progress", "warning"]),
    ],
)
def test_verbosity_decides_on_what_is_logged(log_format: str, verbosity: str, shown: list[str]) -> None:
    stream = io.StringIO()
    configure_log(log_format, verbosity, stream)
    try:
        logger = logging.getLogger("vcf_batch.driver")
        logger.debug("shard")
        logger.info("progress")
        logger.warning("warning")
    finally:
        configure_log("text")
    lines = stream.getvalue().splitlines()
    assert [json.loads(line)["message"] if log_format == "json" else line for line in lines] == shown
