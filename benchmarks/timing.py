"""Interleaved timing: every round runs every contender once, in an order that rotates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UP = 3


@dataclass(frozen=True)
class Times:
    """Seconds of each contender in each round, by name; rounds are comparable one by one."""

    rounds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def ratio(
        self, above: Callable[[dict[str, float]], float], below: Callable[[dict[str, float]], float]
    ) -> tuple[float, float, float]:
        """Median and quartiles, over rounds, of one function of a round's times by another."""
        names = list(self.rounds)
        each = []
        for values in zip(*self.rounds.values(), strict=True):
            times = dict(zip(names, values, strict=True))
            each.append(above(times) / max(below(times), 1e-12))
        low, middle, high = statistics.quantiles(each, n=4)
        return middle, low, high


def interleaved(
    contenders: dict[str, Callable[[], object]], rounds: int, device: str, repeat: int = 1
) -> Times:
    """Time each contender `rounds` times, each time the mean of `repeat` calls in a row."""
    for run in contenders.values():
        for _ in range(WARM_UP):
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(_once(contenders[name], device, repeat))
    return Times(times)


def _once(run: Callable[[], object], device: str, repeat: int) -> float:
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(repeat):
            run()
        return (time.perf_counter() - start) / repeat
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeat):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeat
