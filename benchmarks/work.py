"""The pieces of work that are timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import snparam

Work = Callable[[], None]


def read_and_backward(layer: nn.Module, grad: Tensor) -> Work:
    """Read a layer's weight and go backward from it, as its forward and backward do.

    On a layer under torch's deprecated hook, the hook is called, as the forward would call it. The
    parameter has no gradient before or after.
    """
    any_layer: Any = layer
    (parameter,) = layer.parameters()
    hooks = list(layer._forward_pre_hooks.values())
    if "weight_orig" not in layer._parameters:
        hooks = []  # snparam's only tell it where a forward begins

    def run() -> None:
        for hook in hooks:
            hook(layer, ())
        any_layer.weight.backward(grad)
        parameter.grad = None

    return run


def training_step(
    model: nn.Module, x: Tensor, passes: int = 1, update_after_step: bool = False
) -> Work:
    """`passes` forwards and backwards, and one optimizer step."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    if update_after_step:
        snparam.update_after_step(optimizer, model)

    def run() -> None:
        for _ in range(passes):
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def inference(model: nn.Module, x: Tensor) -> Work:
    """One forward without gradients."""

    @torch.no_grad()
    def run() -> None:
        model(x)

    return run


def matrices_of(layers: list[Any]) -> Iterator[Tensor]:
    """The weights of layers as matrices (m, n), rows first."""
    for layer in layers:
        yield layer.weight.detach().flatten(1)
