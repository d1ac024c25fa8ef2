"""Peak memory of a call beyond what was there before it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra(run: Callable[[], object], device: str) -> int:
    """The largest number of bytes that torch holds during a call, less those before.

    On a CUDA device, the allocator's own count. On a CPU, from the profiler's record of every
    allocation and release by torch's allocator, added up in order; temporary memory of the BLAS
    library is not in it.
    """
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
