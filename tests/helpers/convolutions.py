"""Drawn convolutions of all kinds, with small inputs, and their matrices column by column."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.parametrized import drawing_from

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# torch says once in a process that it pads even kernels by an operation of its own.
ignores_same = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel lengths")

MODES = ("zeros", "circular", "reflect", "replicate")
_LONGEST = {1: 12, 2: 6, 3: 4}  # inputs, so that the matrices stay small


@st.composite
def layers(draw: Any, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution of torch's, without bias, and the size of an input that it can take."""
    axes = draw(st.integers(1, 3))

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    size = tuple(draw(st.integers(1, _LONGEST[axes])) for _ in range(axes))
    groups = draw(st.integers(1, 2))
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel, stride, dilation = per_axis(1, 4 if axes == 1 else 3), per_axis(1, 3), per_axis(1, 3)
    options: dict[str, Any] = {"dilation": dilation, "groups": groups, "bias": False}
    seed = draw(st.integers(0, 1000))
    if draw(st.booleans()):
        padding = per_axis(0, 2)
        longer = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        # Enough input for an output of at least one entry.
        size = tuple(
            max(n, -(-(1 + 2 * p - d * (k - 1) - o - 1) // s) + 1)
            for n, p, d, k, o, s in zip(
                size, padding, dilation, kernel, longer, stride, strict=True
            )
        )
        options |= {"stride": stride, "padding": padding, "output_padding": longer}
        kind: Any = TRANSPOSED[axes - 1]
    else:
        mode = draw(st.sampled_from(MODES))
        if draw(st.booleans()):
            padding_option: Any = "same"
            stride = (1,) * axes
            padding = tuple(-(-d * (k - 1) // 2) for k, d in zip(kernel, dilation, strict=True))
        else:
            padding_option = padding = per_axis(0, 3)
        # Enough input for the padding to repeat, and for an output of at least one entry.
        needed = {"circular": 0, "reflect": 1}.get(mode, -3)
        size = tuple(
            max(n, p + needed, d * (k - 1) + 1 - 2 * p)
            for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)
        )
        options |= {"stride": stride, "padding": padding_option, "padding_mode": mode}
        kind = PLAIN[axes - 1]
    with drawing_from(seed):
        layer = kind(*channels, kernel, **options)
        layer.weight = nn.Parameter(torch.randn(layer.weight.shape, dtype=dtype))
    return layer, size


def inputs_of(layer: Any, size: tuple[int, ...], batch: int = 1) -> Tensor:
    """Zeros that a convolution takes."""
    return torch.zeros(batch, layer.in_channels, *size, dtype=layer.weight.dtype)


def explicit_matrix(layer: Any, size: tuple[int, ...]) -> Tensor:
    """The matrix (M, N) of a convolution without bias, column by column."""
    entries = layer.in_channels * math.prod(size)
    impulses = torch.eye(entries, dtype=layer.weight.dtype)
    with torch.no_grad():
        images = layer(impulses.view(entries, layer.in_channels, *size))
    return images.reshape(entries, -1).T


def exact_norm(layer: Any, size: tuple[int, ...]) -> float:
    """The norm of a convolution on inputs of a size, by a decomposition in float64."""
    matrix = explicit_matrix(layer, size)
    wide = torch.complex128 if matrix.is_complex() else torch.float64
    return float(torch.linalg.matrix_norm(matrix.to(wide), 2))
