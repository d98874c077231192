"""Measurements of time and memory for the benchmarks."""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
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
    begun = mark()
    work()
    return between(begun, mark())


def mark() -> Any:
    """The present moment, for :func:`between`: on a GPU that at which the work queued so far is done."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: Any, second: Any) -> float:
    """Seconds between two moments of :func:`mark`. Waits for the second."""
    if isinstance(second, float):
        return second - float(first)
    second.synchronize()
    return float(first.elapsed_time(second)) / 1000


@contextlib.contextmanager
def marked_sampling(pipeline: Any, images: Tensor | None = None) -> Iterator[list[tuple[Any, Any]]]:
    """Within the block the beginning and the end of every sampling of a pipeline are noted.

    Args:
        pipeline: the :class:`vcf_batch.vcf.pipeline.VCFPipeline`, whose ``prepare`` is wrapped.
        images: what is returned in the place of the sampled images, ``[N, 3, H, W]`` on their device.

    Yields:
        The moments, as :func:`mark` gives them, in the order of the samplings.
    """
    moments: list[tuple[Any, Any]] = []
    prepare = pipeline.prepare

    def prepared(*args: Any, **inputs: Any) -> tuple[Any, Tensor, Any]:
        sample, noise, conditioning = prepare(*args, **inputs)

        def marked(*given: Any) -> Tensor:
            begin = mark()
            found: Tensor = sample(*given)
            moments.append((begin, mark()))
            return found if images is None else images[: len(found)].clone()

        return marked, noise, conditioning

    pipeline.prepare = prepared
    try:
        yield moments
    finally:
        del pipeline.prepare


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
