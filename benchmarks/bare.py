"""The operations that normalising takes, alone: how far below torch's cost anything can get.

Two products with a vector, a division, and in backward a dot product and a rank-one update, each
one call into torch. They are timed in two ways:

- `BARE`, beside the network: no autograd, no state, no Python of a library, on memory that is there
  already. What takes these operations one after another is no faster on the same machine.
- `LEAST`, in the network: one autograd Function in Python makes the weight that is used, and takes
  its gradient. It checks nothing, keeps no state and has no rules. What is written in Python for
  any network is no faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers

BARE, LEAST = "bare operations", "least function"


class Operations:
    """The operations for one weight. What they find is not used: the weight stays as it is.

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

    def forward(self) -> None:
        """The two products of a power step, and the normalised weight."""
        torch.mv(self.matrix.T, self.u, out=self.x)
        torch.mv(self.matrix, self.x)
        torch.div(self.weight, 1.0, out=self.divided)

    def backward(self, grad: Tensor, out: Tensor | None) -> Tensor:
        """The gradient of the original from that of the normalised weight.

        Args:
            grad: the latter, of the weight's shape.
            out: where to write it, (m, n), or None for new memory.
        """
        matrix = grad.view_as(self.matrix)
        torch.dot(matrix.view(-1), self.matrix.view(-1))
        # What is added is too small to count, so that a network learns as it would.
        return torch.addr(matrix, self.u, self.x, alpha=1e-30, out=out).view_as(grad)


def read_and_backward(layer: nn.Module, grad: Tensor) -> Callable[[], None]:
    """What `work.read_and_backward` times; `grad` is left as it is."""
    any_layer: Any = layer
    operations = Operations(any_layer.weight)

    def run() -> None:
        operations.forward()
        operations.backward(grad, operations.into)

    return run


def in_training(model: nn.Module, passes: int = 1, stepwise: bool = False) -> nn.Module:
    """A copy of an unconverted network whose layers take the operations beside their own.

    Args:
        model: the network.
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
            operations.forward()
        calls += 1

    def after(weight: Tensor) -> None:
        grad = weight.grad
        assert grad is not None
        operations.backward(grad, grad.view_as(operations.matrix))

    layer.register_forward_pre_hook(before)
    layer.weight.register_post_accumulate_grad_hook(after)


def least(
    model: nn.Module, passes: int = 1, stepwise: bool = False, in_place: bool = True
) -> nn.Module:
    """A copy of a network, or a layer, whose weights are what one autograd Function makes of them.

    Args:
        model: the network.
        passes: forwards for each optimizer step.
        stepwise: with products and division in the first pass after a step only.
        in_place: whether gradients are overwritten, as nobody else holds them in training.
    """
    model = copy.deepcopy(model)
    for layer in peers.layers(model):
        operations = Operations(layer.weight)
        weight = _read_by_function(operations, passes if stepwise else 1, in_place)
        layer.__class__ = type(type(layer).__name__, (type(layer),), {"weight": weight})
    return model


def _read_by_function(operations: Operations, every: int, in_place: bool) -> property:
    calls = 0

    def weight(layer: nn.Module) -> Tensor:
        nonlocal calls
        first = calls % every == 0
        calls += 1
        original = layer._parameters["weight"]
        found: Tensor = _apply(original, operations, first, in_place)  # type: ignore[no-untyped-call]
        return found

    return property(weight)


class _Least(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, _weight: Tensor, operations: Operations, first: bool, in_place: bool
    ) -> Tensor:
        ctx.operations, ctx.in_place = operations, in_place
        if first:
            operations.forward()
        return operations.divided.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out = grad.view_as(ctx.operations.matrix) if ctx.in_place else None
        return ctx.operations.backward(grad, out), None, None, None


# Past Function.apply, which first looks for transforms.
_apply = super(torch.autograd.Function, _Least).apply
