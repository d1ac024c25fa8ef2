"""The geometry of torch's convolutions, as far as their forwards are torch's own."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from snparam.matrices import torch_private
from snparam.matrices.convolutions import PADDING_MODES, Geometry

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_convolution(module: nn.Module) -> bool:
    """Return whether a module is one of torch's convolutions, or of a subclass of one."""
    return isinstance(module, (*_PLAIN, *_TRANSPOSED))


def geometry_of(module: nn.Module) -> Geometry | None:
    """Return the geometry of one of torch's six convolutions, or None for any other module.

    A subclass has one if it inherits torch's forward, and a converted layer has the one that it had
    before. Where a class or an instance has a forward of its own, what the module computes is not
    known, and the result is None.
    """
    if not is_convolution(module) or "forward" in vars(module):
        return None
    kind: Any = type_before_parametrizations(module)
    transposed = isinstance(module, _TRANSPOSED)
    bases = _TRANSPOSED if transposed else _PLAIN
    if getattr(kind, "forward", None) not in [base.forward for base in bases]:
        return None
    if not transposed and kind._conv_forward not in torch_private.conv_forwards():
        return None
    layer: Any = module
    axes = len(layer.kernel_size)
    stride, dilation = _per_axis(layer.stride, axes), _per_axis(layer.dilation, axes)
    padding = _padding(layer.padding, layer.kernel_size, dilation)
    if layer.padding_mode not in PADDING_MODES or any(min(pair) < 0 for pair in padding):
        return None
    return Geometry(
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=layer.groups,
        transposed=transposed,
        output_padding=_per_axis(layer.output_padding, axes) if transposed else (),
        padding_mode=layer.padding_mode,
    )


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    """Return a number for each axis; torch takes one number, alone or in a tuple, for all axes."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _padding(
    padding: Any, kernel_size: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Return the entries (before, after) that torch adds to each axis.

    Where `"same"` adds an odd number of entries, the last one comes after, as in
    `torch.nn.functional.conv2d`.
    """
    if padding == "valid":
        return ((0, 0),) * len(kernel_size)
    if padding == "same":
        totals = [step * (taps - 1) for step, taps in zip(dilation, kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((number, number) for number in _per_axis(padding, len(kernel_size)))


def output_channels(module: nn.Module) -> int:
    """Return the number of output channels of one of torch's convolutions."""
    channels: int = module.out_channels  # type: ignore[assignment]
    return channels
