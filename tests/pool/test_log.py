"""Logs for programs: one JSON object a line, with what each event is about."""

import io
import json
import logging
from datetime import datetime

from vcf_batch.driver.progress import Progress
from vcf_batch.pool import log


def test_each_line_is_an_object_that_says_what_it_is_about() -> None:
    stream = io.StringIO()
    log.configure("json", stream)
    try:
        with Progress(10, 0) as shown:
            where = {"shard": "00001", "worker": "host:1", "node": "n"}
            shown.note("shard 00001 is finished", "shard_finished", logging.DEBUG, **where, rows=4, seconds=2.5)
        logging.getLogger("vcf_batch.output.lease").warning("held by %s", "somebody")
    finally:
        log.configure("text")
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
