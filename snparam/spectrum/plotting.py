"""Plots of singular values and confusion matrices, as matplotlib figures made from tensors.

Figures are built without pyplot, so no window opens, no global state changes and no backend is
chosen for the caller: ``plot_singular_values(history).savefig("singular_values.png")``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_confusion_matrix", "plot_singular_values"]

# The first colours of the Okabe-Ito palette, which colour-blind readers can tell apart.
# https://jfly.uni-koeln.de/color/
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def plot_singular_values(
    history: Mapping[str, torch.Tensor],
    *,
    steps: Sequence[int] | None = None,
    title: str = "Tracked singular values over training",
    columns: int | None = None,
) -> Figure:
    """Draw the tracked singular values of each weight over training, one panel per weight.

    The vertical axes are independent, and start at zero: what matters is how far a weight's σ
    moved relative to itself, and how far σ₂ stays below σ₁.

    Args:
        history: qualified weight name -> (steps, b, k): for each recorded step the k tracked
            values, largest first, of the b blocks of that weight, as
            ``torch.stack([singular_values(model)[name] for each step])`` gives them. Each value
            of each block is drawn as a line.
        steps: the training step of each record; 0, 1, 2, ... where not given.
        title: the heading of the figure.
        columns: panels per row; where not given, about as many as there are rows of panels.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the history is empty, a tensor is not of shape (steps, b, k), or the number
            of steps differs between weights or from that of `steps`.
    """
    figure_type = _figure_type()
    if not history:
        raise ValueError(
            "there is nothing to draw: the history has no weights; "
            "record singular_values(model) during training, after convert_model(model)"
        )
    length = len(next(iter(history.values()))) if steps is None else len(steps)
    for name, values in history.items():
        if values.ndim != 3 or len(values) != length:
            raise ValueError(
                f"the history of {name!r} has shape {tuple(values.shape)}; "
                f"expected (steps={length}, blocks, singular values)"
            )
    positions = list(range(length)) if steps is None else list(steps)

    columns = columns or min(len(history), max(1, round(math.sqrt(len(history)))))
    rows = math.ceil(len(history) / columns)
    figure = figure_type(
        figsize=(max(5.6, 3.2 * columns + 1.6), 2.2 * rows + 1.6), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    panels = axes.flatten().tolist()
    for panel, (name, values) in zip(panels, history.items(), strict=False):
        _draw_history(panel, name, positions, values.detach().to("cpu", torch.float64))
    for panel in panels[len(history) :]:
        panel.set_visible(False)
    for column in range(columns):  # sharex labels the last row alone, where panels may be missing
        lowest = max(row for row in range(rows) if row * columns + column < len(history))
        axes[lowest][column].tick_params(labelbottom=True)

    figure.suptitle(title, fontsize=13)
    figure.supxlabel("training step", fontsize=11)
    figure.supylabel("singular value of the original weight", fontsize=11)
    max_values = max(values.shape[2] for values in history.values())
    widest = next(i for i, values in enumerate(history.values()) if values.shape[2] == max_values)
    # The legend is beside the panels: on one it would cover lines, above them the title.
    figure.legend(
        panels[widest].get_lines()[:max_values],
        [f"σ{_subscript(i + 1)}" for i in range(max_values)],
        loc="outside right center",
    )
    return figure


def _draw_history(panel: Axes, name: str, steps: list[int], values: torch.Tensor) -> None:
    """Draw the history of one weight, values (steps, b, k) at training steps, into a panel."""
    _, blocks, tracked = values.shape
    opacity = max(0.25, 1 / blocks)  # of many lines, the bundle is to be seen
    for block in range(blocks):
        for i in range(tracked):
            panel.plot(
                steps,
                values[:, block, i].tolist(),
                color=_COLOURS[i % len(_COLOURS)],
                linewidth=1.4,
                alpha=opacity,
                marker="o" if len(steps) == 1 else None,  # a single point is invisible as a line
            )
    panel.set_title(_shortened(name), fontsize=8)
    panel.set_ylim(bottom=0)
    panel.margins(x=0.02)
    panel.tick_params(labelsize=8)
    panel.grid(visible=True, alpha=0.25)


def plot_confusion_matrix(
    matrix: torch.Tensor,
    labels: Sequence[str] | None = None,
    *,
    title: str = "Confusion matrix",
) -> Figure:
    """Draw a confusion matrix, the count in each cell and the share of its row as the colour.

    Args:
        matrix: (classes, classes), non-negative counts; rows are the true classes, columns the
            predicted ones.
        labels: one name per class; 0, 1, 2, ... where not given.
        title: the heading of the figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the matrix is empty or not square, or the number of labels differs from its
            size.
    """
    figure_type = _figure_type()
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ValueError(
            f"a confusion matrix has shape (classes, classes); got {tuple(matrix.shape)}"
        )
    classes = matrix.shape[0]
    labels = [str(i) for i in range(classes)] if labels is None else list(labels)
    if len(labels) != classes:
        raise ValueError(f"{len(labels)} labels for a confusion matrix of {classes} classes")

    counts = matrix.detach().to("cpu", torch.float64)
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)  # a class without samples stays 0
    side = 0.5 * classes + 1.6
    figure = figure_type(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.tolist(), cmap="Blues", vmin=0, vmax=1)
    for row in range(classes):
        for column in range(classes):
            if counts[row, column] > 0:  # an empty cell reads better than a zero
                axes.text(
                    column,
                    row,
                    f"{counts[row, column].item():g}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if shares[row, column] > 0.5 else "black",
                )
    axes.set_xticks(range(classes), labels)
    axes.set_yticks(range(classes), labels)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046)
    return figure


def _figure_type() -> type[Figure]:
    """Return matplotlib's ``Figure``, or raise an ``ImportError`` that says how to install it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'snparam[plot]'") from error
    return Figure


def _shortened(name: str, limit: int = 38) -> str:
    """Return a qualified name shortened to fit over a panel.

    An ellipsis replaces whole leading segments; the last segment is never cut.
    """
    if len(name) <= limit:
        return name
    segments = name.split(".")
    while len(segments) > 1 and len(".".join(segments)) >= limit:
        del segments[0]
    return "…" + ".".join(segments)


def _subscript(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))
