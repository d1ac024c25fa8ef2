"""Compiled networks with all options side by side train as eager ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.combinations import (
    STRUCTURE,
    WORKING,
    Cell,
    inputs_for,
    layer_for,
    name_of,
    register,
)
from torch import Tensor, nn

import snparam
from snparam.estimators.estimate import ESTIMATORS


def is_certified(cell: Cell) -> bool:
    return ESTIMATORS[cell["sigma"]].side == "above"


def cells(norm: str, update: str) -> list[Cell]:
    """A cell for every use of one option, with the estimators and numbers of blocks in turn."""
    found: dict[str, list[Cell]] = {}
    for cell in WORKING:
        use = {k: v for k, v in cell.items() if k not in STRUCTURE}
        if (cell["norm"], cell["update"]) == (norm, update) and len(use) < 2:
            found.setdefault(name_of(use), []).append(cell)
    return [same[i * 5 % len(same)] for i, same in enumerate(found.values())]


class Branches(nn.Module):
    """Layers beside each other, each with options of its own, and far from converged."""

    def __init__(self, kind: str, all_options: list[Cell]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            register(layer_for(kind), kind, cell, init="random") for cell in all_options
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x).abs().square().mean() for layer in self.layers])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("norm", "kind", "update"),
    [
        ("matrix", "Linear", "forward"),
        ("matrix", "Linear", "step"),
        ("operator", "ConvTranspose1d", "forward"),
    ],
)
def test_layers_with_all_options_are_compiled_and_train_as_eager_ones(
    norm: str, kind: str, update: str
) -> None:
    torch._dynamo.reset()
    # A graph cannot certify, and says so (tests/estimators).
    chosen = [c for c in cells(norm, update) if update == "step" or not is_certified(c)]
    eager = Branches(kind, chosen)
    traced = copy.deepcopy(eager)
    compiled: Any = torch.compile(traced, fullgraph=True, backend="eager")
    x = inputs_for(kind)
    runs = [(eager, eager), (traced, compiled)]
    optimizers = [torch.optim.SGD(model.parameters(), 1e-3) for model, _ in runs]
    if update == "step":
        for model, _ in runs:
            snparam.update(model)
    for training in (True, True, False):
        outputs = []
        for (model, run), optimizer in zip(runs, optimizers, strict=True):
            model.train(training)
            outputs.append(run(x))
            outputs[-1].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(eager.state_dict().items(), traced.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n} {m}")
