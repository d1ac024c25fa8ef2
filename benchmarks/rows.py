"""How a run is set up, and the rows that it makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .timing import WARM_UP, Spread, Times, interleaved


@dataclass(frozen=True)
class Setup:
    """How to measure.

    Attributes:
        device: "cpu" or "cuda".
        rounds: interleaved rounds of a row whose work is short.
        quick: tiny shapes, to see that it runs.
        most_seconds: after which a row begins no further round.
    """

    device: str
    rounds: int
    quick: bool
    most_seconds: float = math.inf

    def times(
        self, runs: Mapping[str, Callable[[], object]], fewer: int = 1, warm_up: int = WARM_UP
    ) -> Times:
        """Time contenders against each other, in so many times `fewer` rounds if work is long."""
        rounds = max(min(self.rounds, 5), self.rounds // fewer)
        return interleaved(runs, rounds, self.device, warm_up, self.most_seconds)


@dataclass(frozen=True)
class Row:
    """A measured ratio.

    Attributes:
        case: what was measured.
        against: what the ratio compares with.
        ratio: the median over rounds, with its quartiles.
        reach: what is to be reached, or None where the row is for looking only.
        faster: whether the ratio is the other's cost by snparam's, to be at least `reach`; else it
            is snparam's by the other's, to be at most `reach`.
        medians: by contender, in `unit`.
        unit: "seconds" or "bytes".
        note: what was checked on the way.
    """

    case: str
    against: str
    ratio: Spread
    reach: float | None
    faster: bool
    medians: dict[str, float]
    unit: str = "seconds"
    note: str = ""

    @property
    def verdict(self) -> str:
        """`met`, `short`, `unclear` (lost in noise), or nothing where nothing is to be reached."""
        if self.reach is None:
            return ""
        if math.isnan(self.ratio.median):
            return "unclear"
        reached = (
            self.ratio.median >= self.reach if self.faster else self.ratio.median <= self.reach
        )
        return "met" if reached else "short"
