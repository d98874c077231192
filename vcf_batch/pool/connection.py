"""The Ray cluster that a run uses: one that is there, or a new local one."""

import contextlib
import logging
import os
from collections.abc import Iterator

import ray

from vcf_batch.errors import UsageError


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep Ray from taking SIGTERM while it starts: what its handler raises may be swallowed in a hook of a fork."""
    take = ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = take


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to Ray: to ``address``, else to the cluster this process runs in, else to a new local one."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with _own_sigterm():
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"cannot use the Ray cluster {address or '(RAY_ADDRESS or a new local one)'}: {error}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
