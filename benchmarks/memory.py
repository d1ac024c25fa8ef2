"""Memory that calls take beyond what was there before them."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]


def peak_extra(run: Run, device: str) -> int:
    """Return the most bytes that torch holds at once during two calls, less those before them.

    Two, so that what a first call leaves behind for later ones counts in the second. Neither should
    be the first of its kind in the process, in which libraries make their workspaces. On a CUDA
    device the allocator counts. On a CPU the profiler records every allocation and release by
    torch's allocator, in order, and they are added up; the growth of the process (`VmHWM` of a
    fresh one) is the same to 1% for large tensors. Buffers that a BLAS library takes for itself are
    not in it.

    What `run` releases of what was there before lowers the count, so that a gradient of an earlier
    call should be dropped first.
    """

    def twice() -> None:
        run()
        run()

    return _extra(twice, device)[0]


def left_behind(make: Run, device: str) -> int:
    """Return the bytes that torch holds for what a call returns, beyond those held before it."""
    made: list[object] = []

    def run() -> None:
        made.append(make())
        gc.collect()

    gc.collect()
    return _extra(run, device)[1]


def _extra(run: Callable[[], None], device: str) -> tuple[int, int]:
    """Return the bytes held beyond those before a call: at its worst, and at its end."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        peak, end = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return peak - before, end - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    held = highest = 0
    events = [event for event in results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest, held
