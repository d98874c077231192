"""The Ray cluster that a run uses: one that is there, or a new local one."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator

import ray

from vcf_batch.errors import Interrupted, UsageError


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to Ray: to ``address``, else to the cluster this process runs in, else to a new local one."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"cannot use the Ray cluster {address or '(RAY_ADDRESS or a new local one)'}: {error}"
        ) from error
    except SystemExit:
        # While it starts, Ray has a handler of SIGTERM of its own, which raises this.
        raise Interrupted(signal.SIGTERM) from None
    try:
        yield
    finally:
        ray.shutdown()
