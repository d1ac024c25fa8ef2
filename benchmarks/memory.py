"""Measurement of the memory that a call takes beyond what was held before it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]


def peak_extra(run: Run, device: str) -> int:
    """Return the most bytes that torch holds at once during two calls, less those held before.

    There are two calls so that what the first leaves for later ones counts during the second. Call
    `run` once before, because libraries allocate their workspaces in the first call of a process.

    On a CUDA device the allocator's own statistics are used. On a CPU the profiler records every
    allocation and release by torch's allocator in order, and they are added up; for large tensors
    that agrees to 1% with the growth of a fresh process (`VmHWM`). Buffers that a BLAS library
    allocates itself do not count.

    Memory held before that `run` releases lowers the result, so drop the gradients of an earlier
    call first.
    """

    def twice() -> None:
        run()
        run()

    return _extra(twice, device)[0]


def left_behind(make: Run, device: str) -> int:
    """Return the bytes that torch holds after a call, its result kept, beyond those held before."""
    made: list[object] = []

    def run() -> None:
        made.append(make())
        gc.collect()

    gc.collect()
    return _extra(run, device)[1]


def _extra(run: Callable[[], None], device: str) -> tuple[int, int]:
    """Return the bytes held beyond those before a call: their peak, and those at its end."""
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
