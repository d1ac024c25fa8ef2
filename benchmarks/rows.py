"""The setup of a run, and the rows that the run makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .timing import WARM_UP, Spread, Times, interleaved


@dataclass(frozen=True)
class Setup:
    """The settings of a run.

    Attributes:
        device: "cpu" or "cuda".
        rounds: number of interleaved rounds of a row with short work.
        quick: whether to measure tiny shapes, which only shows that everything runs.
        most_seconds: seconds after which a row begins no further round.
    """

    device: str
    rounds: int
    quick: bool
    most_seconds: float = math.inf

    def times(
        self, runs: Mapping[str, Callable[[], object]], fewer: int = 1, warm_up: int = WARM_UP
    ) -> Times:
        """Return the times of contenders, measured in interleaved rounds.

        Args:
            runs: the work of each contender, by name.
            fewer: factor by which long work has fewer rounds; at least 5 are left, where the setup
                has them.
            warm_up: number of calls of each before the first round.
        """
        rounds = max(min(self.rounds, 5), self.rounds // fewer)
        return interleaved(runs, rounds, self.device, warm_up, self.most_seconds)


@dataclass(frozen=True)
class Row:
    """A measured ratio and its target.

    Attributes:
        case: what was measured.
        against: what snparam is compared with.
        ratio: the median over rounds, with its quartiles.
        reach: the target, or None where there is none.
        faster: True where the ratio is the peer's cost over snparam's, which is to be at least
            `reach`; False where it is snparam's over the peer's, to be at most `reach`.
        medians: median cost of each contender, in `unit`.
        unit: "seconds" or "bytes".
        note: what the case has checked besides, or "".
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
        """`met`, `short`, `unclear` (smaller than the noise), or "" where there is no target."""
        if self.reach is None:
            return ""
        if math.isnan(self.ratio.median):
            return "unclear"
        reached = (
            self.ratio.median >= self.reach if self.faster else self.ratio.median <= self.reach
        )
        return "met" if reached else "short"
