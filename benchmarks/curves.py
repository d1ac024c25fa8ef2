"""The second view, a picture: cost against layer size, num_svs and number of layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks import models, peers, work
from benchmarks.rows import Setup

from .peers import HOOK, OURS, OURS_STEPWISE, PLAIN, SEQUENTIAL, TORCH
from .timing import interleaved

# One look for each contender, the same in every panel.
_LOOKS = {
    OURS: ("C0", "-", "o"),
    OURS_STEPWISE: ("C0", "--", "s"),
    TORCH: ("C1", "-", "^"),
    HOOK: ("C2", "-", "v"),
    SEQUENTIAL: ("C3", "-", "D"),
}


@dataclass(frozen=True)
class Curves:
    """One panel.

    Attributes:
        title: what is done.
        along: what grows.
        at: its values.
        seconds: by contender, one for each value.
    """

    title: str
    along: str
    at: list[int]
    seconds: dict[str, list[float]]


def measure(setup: Setup) -> Iterator[Curves]:
    """All three panels."""
    yield by_size(setup)
    yield by_values(setup)
    yield by_layers(setup)


def by_size(setup: Setup) -> Curves:
    """Read and backward of a weight, against its size."""
    at = [8, 16] if setup.quick else [32, 64, 128, 256, 512, 1024, 2048, 4096]
    seconds: dict[str, list[float]] = {OURS: [], TORCH: [], HOOK: []}
    for size in at:
        source = models.layer((size, size)).to(setup.device)
        grad = torch.randn(size, size, device=setup.device)
        runs = {
            OURS: work.read_and_backward(peers.ours()(source), grad),
            TORCH: work.read_and_backward(peers.torch_parametrization(source), grad),
            HOOK: work.read_and_backward(peers.torch_hook(source), grad),
        }
        times = interleaved(runs, setup.fewer(2), setup.device)
        for name, found in seconds.items():
            found.append(times.median(name))
    return Curves("read + backward of an n × n weight", "n", at, seconds)


def by_values(setup: Setup) -> Curves:
    """Read and backward of one weight, against the number of singular values."""
    shape = (12, 20) if setup.quick else (2048, 512)
    at = [1, 2] if setup.quick else [1, 2, 4, 8, 16, 32]
    seconds: dict[str, list[float]] = {OURS: [], SEQUENTIAL: []}
    for count in at:
        source = models.layer(shape).to(setup.device)
        grad = torch.randn(shape, device=setup.device)
        runs = {
            OURS: work.read_and_backward(peers.ours(count)(source), grad),
            SEQUENTIAL: work.read_and_backward(peers.sequential(count)(source), grad),
        }
        times = interleaved(runs, setup.fewer(2), setup.device)
        for name, found in seconds.items():
            found.append(times.median(name))
    title = f"read + backward of a {shape[0]} × {shape[1]} weight"
    return Curves(title, "num_svs", at, seconds)


def by_layers(setup: Setup) -> Curves:
    """Time that a training step of small layers takes longer, against their number."""
    at = [1, 2] if setup.quick else [1, 2, 4, 8, 16, 32, 64]
    seconds: dict[str, list[float]] = {OURS: [], OURS_STEPWISE: [], TORCH: []}
    x = torch.randn(8, 64, device=setup.device)
    for depth in at:
        source = models.stack(depth).to(setup.device)
        stepwise = peers.ours(update="step")(source)
        runs = {
            PLAIN: work.training_step(peers.plain(source), x),
            OURS: work.training_step(peers.ours()(source), x),
            OURS_STEPWISE: work.training_step(stepwise, x, update_after_step=True),
            TORCH: work.training_step(peers.torch_parametrization(source), x),
        }
        times = interleaved(runs, setup.fewer(2), setup.device)
        for name, found in seconds.items():
            found.append(median(times.added(name, PLAIN)))
    return Curves("added to a training step of 64 × 64 layers", "layers", at, seconds)


def draw(panels: list[Curves], path: Path) -> None:
    """Draw the panels side by side; each is in units of snparam's cost at its left end.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        unit = panel.seconds[OURS][0]
        for name, seconds in panel.seconds.items():
            colour, line, marker = _LOOKS[name]
            # What is lost in noise (nothing added) has no place on a log axis.
            heights = [value / unit if value > 0 < unit else float("nan") for value in seconds]
            axes.plot(panel.at, heights, line, color=colour, marker=marker, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(panel.at, [str(value) for value in panel.at])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        low, high = axes.get_ylim()
        if high / low > 30:  # else a decade has too few ticks to read
            axes.yaxis.set_minor_formatter(lambda _value, _position: "")
        axes.set(title=panel.title, xlabel=panel.along)
        axes.set_ylabel(f"time; snparam at {panel.along} = {panel.at[0]} is 1")
        axes.grid(visible=True, which="both", alpha=0.25)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
