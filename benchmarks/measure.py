"""Measurements of time and memory for the benchmarks."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def alternate(works: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each work over ``rounds`` rounds, after a warm-up round.

    The works take turns, so that a busy machine slows all of them equally.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            found[name].append(_once(work))
    return {name: statistics.median(own[1:]) for name, own in found.items()}


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a work over ``repeats`` calls, without warm-up."""
    return statistics.median(_once(work) for _ in range(repeats))


def _once(work: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    work()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1000


def peak_memory(work: Callable[[], Any]) -> float:
    """Peak of torch's allocations during a call, less those before it, in MiB. Measured on the GPU if there is one."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # Single allocations are counted. The memory of the process is no measure, because malloc keeps freed memory.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes)) / 2**20
