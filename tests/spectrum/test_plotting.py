"""Pictures show the numbers they were given, are readable, and say what they need."""

import itertools
import re
import sys

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from snparam.spectrum.plotting import plot_confusion_matrix, plot_singular_values

NAMES = ["vit.embeddings.patch_embeddings.projection.weight"] + [
    f"vit.layers.{layer}.{part}.weight"
    for layer in range(3)
    for part in ("attention.q_proj", "attention.v_proj", "mlp.fc1", "mlp.fc2")
]


def history_of(count: int, steps: int = 7, blocks: int = 1, tracked: int = 3):
    generator = torch.Generator().manual_seed(count)
    return {
        name: torch.rand(steps, blocks, tracked, generator=generator).sort(descending=True).values
        for name in NAMES[:count]
    }


def panels(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


def overlapping(figure) -> list[tuple[str, str]]:
    """Pairs of texts, legends and neighbouring panels whose boxes overlap once drawn."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [figure._suptitle, figure._supxlabel, figure._supylabel]
    for axes in panels(figure):
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()  # ticks outside exist too, and are not drawn
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [tick.label1 for tick in ticks if tick.label1.get_visible()]
    named = [(text.get_text(), text) for text in texts if text is not None and text.get_text()]
    named += [("legend", legend) for legend in figure.legends]
    named += [(f"panel {axes.get_title()}", axes.patch) for axes in panels(figure)]
    boxes = [(name, artist.get_window_extent(renderer)) for name, artist in named]
    return [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(boxes, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]


@pytest.mark.parametrize("count", [1, 2, 5, 13])
def test_one_panel_per_weight_with_the_values_given(count):
    history = history_of(count)
    shown = panels(plot_singular_values(history))
    assert len(shown) == count
    for axes, (name, values) in zip(shown, history.items(), strict=True):
        assert name.endswith(axes.get_title().lstrip("…"))
        drawn = torch.tensor([line.get_ydata().tolist() for line in axes.get_lines()])
        torch.testing.assert_close(drawn, values[:, 0].T)
        assert axes.get_ylim()[0] == 0


def test_each_block_has_its_lines():
    (axes,) = panels(plot_singular_values(history_of(1, blocks=4, tracked=2)))
    assert len(axes.get_lines()) == 8


def test_the_steps_are_on_the_horizontal_axis():
    (axes,) = panels(plot_singular_values(history_of(1, steps=3), steps=[0, 10, 30]))
    assert axes.get_lines()[0].get_xdata().tolist() == [0, 10, 30]


def test_axes_and_lines_are_labelled():
    figure = plot_singular_values(history_of(2, tracked=2), title="a title")
    assert figure.get_suptitle() == "a title"
    assert figure.get_supxlabel() == "training step"
    assert "singular value" in figure.get_supylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["σ₁", "σ₂"]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 13])
def test_no_text_of_the_history_lies_over_another(count):
    assert overlapping(plot_singular_values(history_of(count))) == []


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_no_text_of_the_confusion_matrix_lies_over_another(classes):
    assert overlapping(plot_confusion_matrix(torch.eye(classes))) == []


def test_cells_carry_the_counts_and_the_colour_their_share():
    matrix = torch.tensor([[8, 2, 0], [0, 5, 0], [0, 0, 0]])
    axes = plot_confusion_matrix(matrix, ["cat", "dog", "owl"]).axes[0]
    cells = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "8", (1, 0): "2", (1, 1): "5"}  # (column, row)
    shares = torch.tensor(axes.images[0].get_array().tolist())
    torch.testing.assert_close(shares, torch.tensor([[0.8, 0.2, 0.0], [0, 1, 0], [0, 0, 0]]))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "owl"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


@pytest.mark.parametrize(
    "draw",
    [lambda: plot_singular_values(history_of(1)), lambda: plot_confusion_matrix(torch.eye(3))],
)
def test_a_missing_matplotlib_is_named_with_its_extra(monkeypatch, draw):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'snparam[plot]'")):
        draw()


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_singular_values({})
    with pytest.raises(ValueError, match=r"'a\.weight' has shape \(5, 3\)"):
        plot_singular_values({"a.weight": torch.ones(5, 3)})
    with pytest.raises(ValueError, match="steps=2"):
        plot_singular_values(history_of(1, steps=3), steps=[0, 1])
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        plot_confusion_matrix(torch.ones(2, 3))
    with pytest.raises(ValueError, match="2 labels for a confusion matrix of 3"):
        plot_confusion_matrix(torch.eye(3), ["a", "b"])
