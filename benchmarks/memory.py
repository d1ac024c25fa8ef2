"""Peak memory of calls beyond what was there before them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra(run: Callable[[], object], device: str) -> int:
    """The most bytes that torch holds at once during two calls, less those it held before.

    Two, so that what a first call leaves behind for later ones counts in the second. Neither should
    be the first of its kind in the process, in which libraries make their workspaces. On a CUDA
    device the allocator counts. On a CPU the profiler records every allocation and release by
    torch's allocator, in order, and they are added up; the growth of the process (`VmHWM` of a
    fresh one) is the same to 1% for large tensors. Buffers that a BLAS library takes for itself are
    not in it.

    What `run` releases of what was there before lowers the count, so that a gradient of an earlier
    call should be dropped first.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
        run()
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    held = peak = 0
    events = [event for event in results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
