"""Interleaved timing: every round runs every contender, in an order that rotates by one."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

WARM_UP = 3

# Seconds that a sample takes at least, by repeated calls: in shorter ones, the clock and the caches
# that the previous contender left weigh as much as what is measured.
SHORTEST_SAMPLE = 5e-3
MOST_REPEATS = 100


class Spread(NamedTuple):
    """A median over rounds, and the lower and upper quartile."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Times:
    """Seconds of each contender in each round, by name; compare times of the same round."""

    rounds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median seconds of one contender."""
        return statistics.median(self.rounds[name])

    def medians(self) -> dict[str, float]:
        """Return the median seconds of each contender."""
        return {name: self.median(name) for name in self.rounds}

    def added(self, name: str, base: str) -> list[float]:
        """Return by how many seconds a contender took longer than another, in each round."""
        return [a - b for a, b in zip(self.rounds[name], self.rounds[base], strict=True)]

    def ratio(self, above: str, below: str) -> Spread:
        """Return median and quartiles of the ratio of two contenders in the same round."""
        pairs = zip(self.rounds[above], self.rounds[below], strict=True)
        return spread([a / b for a, b in pairs])

    def ratio_of_added(self, above: str, below: str, base: str) -> Spread:
        """Return the time that one contender adds to `base`, over the time that another adds.

        The medians of the differences within a round are divided: a difference of two long steps
        is noisy, and a ratio of two such differences has no mean. The quartiles are those of the
        differences of `above`, over the same divisor. The median is NaN where one of the two is not
        above zero, because what is measured is then smaller than the noise.
        """
        unit = statistics.median(self.added(below, base))
        if unit <= 0:
            return Spread(math.nan, math.nan, math.nan)
        found = spread([extra / unit for extra in self.added(above, base)])
        return found if found.median > 0 else found._replace(median=math.nan)


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles of one or more values."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str,
    warm_up: int = WARM_UP,
    most_seconds: float = math.inf,
) -> Times:
    """Time every contender in every round.

    Each round begins with the next contender. A sample is the mean over a number of calls in a row,
    the same for all contenders: as many as the fastest needs to reach `SHORTEST_SAMPLE`, but at
    most `MOST_REPEATS`.

    Args:
        contenders: the work of each, by name.
        rounds: number of rounds.
        device: "cpu" or "cuda".
        warm_up: number of calls of each before the first round.
        most_seconds: seconds, warming up included, after which no round but the first begins.
    """
    began = time.perf_counter()
    for run in contenders.values():
        for _ in range(warm_up):
            run()
    shortest = min(_sample(run, device, 1) for run in contenders.values())
    repeat = min(MOST_REPEATS, max(1, math.ceil(SHORTEST_SAMPLE / max(shortest, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        if number and time.perf_counter() - began > most_seconds:
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(_sample(contenders[name], device, repeat))
    return Times(times)


def _sample(run: Callable[[], object], device: str, repeat: int) -> float:
    """Return seconds per call over `repeat` calls in a row, measured by events on a CUDA device."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(repeat):
            run()
        return (time.perf_counter() - start) / repeat
    make_event: Any = torch.cuda.Event
    begin, end = make_event(enable_timing=True), make_event(enable_timing=True)
    torch.cuda.synchronize()  # queued work would hide the cost of launching
    begin.record()
    for _ in range(repeat):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeat
