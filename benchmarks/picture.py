"""The picture of tightness against cost, a matplotlib figure made without pyplot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.tightness import BOUND, EVERY_SIZE, EXACT, Point, is_own

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The Okabe-Ito palette, which colour-blind readers can tell apart, and two greys.
# https://jfly.uni-koeln.de/color/
_COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#888888",
    "#8B5A2B", "#B0A000",
)  # fmt: skip

# What lies nearer to the norm than rounding lets anybody see is drawn here.
_FLOOR = 1e-15


def draw(found: Sequence[Point]) -> Figure:
    """Return a figure with a panel for each kind of weight, matrices above convolutions.

    Upwards is how far a number is from the norm, to the right what it costs. The settings of one
    method are joined by a line.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(point.weights for point in found))
    figure = Figure(figsize=(3.4 * len(names) + 3.4, 8.0), layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False, sharex="row", sharey="row")
    for row, is_matrix in zip(panels, (True, False), strict=True):
        own = [point for point in found if (point.norm_of == "matrix") is is_matrix]
        families = list(dict.fromkeys(point.family for point in own))
        for panel, name in zip(row, names, strict=True):
            for family, colour in zip(families, _COLOURS, strict=False):
                _draw_family(
                    panel, [p for p in own if (p.weights, p.family) == (name, family)], colour
                )
            shape = next("×".join(map(str, p.shape)) for p in own if p.weights == name)
            panel.set_title(f"{name}, {shape}", fontsize=10)
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.grid(visible=True, alpha=0.25)
            panel.tick_params(labelsize=8)
        row[-1].legend(
            row[-1].get_lines(), [_label(own, family) for family in families],
            loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False,
        )  # fmt: skip
    figure.suptitle(
        "Tightness against cost (filled: snparam; hollow: published by others)", fontsize=13
    )
    figure.supxlabel("time, in Gram products of the same weight in float64", fontsize=10)
    figure.supylabel(
        "|number / norm − 1|:  ▲ bounds, ▼ estimates, ● exact, ◆ of another matrix", fontsize=10
    )
    return figure


def _draw_family(panel: Any, points: Sequence[Point], colour: str) -> None:
    """Draw the settings of one method into a panel, filled where they are snparam's."""
    first = points[0]
    marker = {BOUND: "^", EXACT: "o", "estimate": "v"}.get(first.kind, "D")
    panel.plot(
        [point.cost.median for point in points],
        [max(abs(point.tightness - 1), _FLOOR) for point in points],
        color=colour, marker=marker, markersize=7, linewidth=1,
        markerfacecolor=colour if is_own(first) else "white",
    )  # fmt: skip


def _label(points: Sequence[Point], family: str) -> str:
    """Return the name of a method for the legend, with its settings in order."""
    own = [point for point in points if point.family == family]
    settings = list(dict.fromkeys(point.setting for point in own if point.setting))
    where = "" if own[0].norm_of in ("matrix", EVERY_SIZE) else f" ({own[0].norm_of.split()[-1]})"
    return f"{family}{where}" + (f"\n{'; '.join(settings)}" if settings else "")
