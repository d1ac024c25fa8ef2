"""The operations that normalising takes, alone: no autograd, no state, no Python of a library.

Two products with a vector, a division, and in backward a dot product and a rank-one update, each
one call into torch on memory that is there already. What takes these operations one after another
is no faster on the same machine, so that a target below them is out of its reach.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import peers

BARE = "bare operations"


class Operations:
    """The operations for one weight.

    Args:
        weight: (m, ...), rows first.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        self.matrix = self.weight.flatten(1)
        rows, columns = self.matrix.shape
        self.u, self.x = self.matrix.new_ones(rows), self.matrix.new_ones(columns)
        self.divided = torch.empty_like(self.weight)
        self.into = torch.empty_like(self.matrix)

    def step(self) -> None:
        """The two products of a power step."""
        torch.mv(self.matrix.T, self.u, out=self.x)
        torch.mv(self.matrix, self.x)

    def divide(self) -> None:
        """The normalised weight."""
        torch.div(self.weight, 1.5, out=self.divided)

    def backward(self, grad: Tensor, in_place: bool) -> None:
        """The gradient of the original from that of the normalised weight."""
        grad = grad.view_as(self.matrix)
        torch.dot(grad.view(-1), self.matrix.view(-1))
        into = grad if in_place else self.into
        # What is added is too small to count, so that a network learns as it would.
        torch.addr(grad, self.u, self.x, alpha=1e-30, out=into)


def read_and_backward(layer: nn.Module, grad: Tensor) -> Callable[[], None]:
    """What `work.read_and_backward` times; `grad` is left as it is."""
    any_layer: Any = layer
    operations = Operations(any_layer.weight)

    def run() -> None:
        operations.step()
        operations.divide()
        operations.backward(grad, in_place=False)

    return run


def in_training(model: nn.Module, passes: int = 1, stepwise: bool = False) -> nn.Module:
    """A copy of an unconverted network whose layers take the operations beside their own.

    Args:
        model: the network; the results of the operations are not used.
        passes: forwards for each optimizer step.
        stepwise: with products and division in the first pass after a step only.
    """
    model = copy.deepcopy(model)
    for layer in peers.layers(model):
        _attach(layer, Operations(layer.weight), passes if stepwise else 1)
    return model


def _attach(layer: Any, operations: Operations, every: int) -> None:
    calls = 0

    def before(*_: object) -> None:
        nonlocal calls
        if calls % every == 0:
            operations.step()
            operations.divide()
        calls += 1

    def after(weight: Tensor) -> None:
        assert weight.grad is not None
        operations.backward(weight.grad, in_place=True)

    layer.register_forward_pre_hook(before)
    layer.weight.register_post_accumulate_grad_hook(after)
