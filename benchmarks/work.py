"""The pieces of work that are timed, as functions without arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import snparam
from snparam.estimators.estimate import ESTIMATORS

Work = Callable[[], None]


def read_and_backward(layer: nn.Module, grad: Tensor) -> Work:
    """Return work that reads a layer's weight and goes backward from it, as a training step does.

    The parameter has no gradient before and after, so that none is accumulated.
    """
    any_layer: Any = layer
    (parameter,) = layer.parameters()

    def run() -> None:
        any_layer.weight.backward(grad)
        parameter.grad = None

    return run


def training_step(model: nn.Module, x: Tensor, passes: int = 1) -> Work:
    """Return work of `passes` forwards and backwards and one optimizer step."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)

    def run() -> None:
        for _ in range(passes):
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def move(matrix: Tensor, sigma: str, num_svs: int) -> Work:
    """Return work of one power step of an estimator on a matrix (m, n), always from the same u."""
    start = torch.randn(1, num_svs, len(matrix), device=matrix.device)

    def run() -> None:
        ESTIMATORS[sigma].move([matrix[None]], [start], 1, 0.0)

    return run


def inference(model: nn.Module, x: Tensor) -> Work:
    """Return work of one forward without gradients."""

    @torch.no_grad()
    def run() -> None:
        model(x)

    return run


def matrices_of(layers: list[Any]) -> Iterator[Tensor]:
    """Yield the weights of layers as matrices (m, n), with dimension 0 as rows."""
    for layer in layers:
        yield layer.weight.detach().flatten(1)


def conversion(model: nn.Module) -> Work:
    """Return work that converts a network and restores it."""

    def run() -> None:
        snparam.restore_model(snparam.convert_model(model, progress=False), bake=False)

    return run
