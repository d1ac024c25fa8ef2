"""One matrix on a CPU, eagerly: a step in as few operations as there can be.

The same mathematics as `linalg` has for stacks of matrices anywhere. On a CPU a number can be read
at no cost, so that norms are numbers and not tensors of one element.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from snparam.matrices.views import View

# Vectors of a length between 1e-4 and 1e4, or its square, are left as long as they are. Products of
# a few such lengths are normal numbers, with all their digits, in float32.
_LEAST_SQUARE, _MOST_SQUARE = 1e-8, 1e8

# From this many entries on, memory comes from the system and goes back to it: glibc's malloc begins
# to do so at 128 KiB.
LARGE = 1 << 15

_DTYPES = (torch.float32, torch.float64)

# Names of this file's own: what is looked up in torch's modules, between large products that have
# pushed them out of the caches, takes as long as a small product.
_modes: Any = torch._C._len_torch_dispatch_stack
_transforms: Any = torch._C._are_functorch_transforms_active
_Parameter = nn.Parameter
_mv, _dot, _sqrt = torch.mv, torch.dot, math.sqrt

# Not public, and found out sooner than for one kind of device.
is_any_autocast_enabled: Any = getattr(torch._C, "_is_any_autocast_enabled", None) or partial(
    torch.is_autocast_enabled, "cpu"
)


class Step(NamedTuple):
    """What a step finds. Neither vector is made a unit one, which would be an operation more.

    Attributes:
        sigma: σ. Zero for a zero matrix, and not finite for one that is not.
        t: (m,), along u, unless σ is zero.
        x: (n,), along v.
        size: ‖t‖.
        length: ‖x‖.
    """

    sigma: float
    t: Tensor
    x: Tensor
    size: float
    length: float


def is_here(weight: Tensor) -> bool:
    """Whether this file is for a weight: numbers computed from it can be read at no cost."""
    kind = type(weight)
    return (
        (kind is _Parameter or (kind is Tensor and forward_ad._current_level < 0))
        and weight.is_cpu
        and weight.dtype in _DTYPES
        and not _transforms()
    )


class Matrix:
    """A weight read as one matrix; where that copies nothing, for as long as it lies where it does.

    Attributes:
        matrix: (m, n).
        transposed: (n, m).
        shape: (m, n).
        matrix_strides: of `matrix`.
        flat: (m · n,), in the order in which the entries lie, or None where `matrix` is a copy.
        kind: shape, strides and dtype of the weight.
        strides: of the weight.
        is_large: whether its memory comes from the system.
    """

    __slots__ = (
        "_address",
        "_contiguous",
        "flat",
        "is_large",
        "kind",
        "matrix",
        "matrix_strides",
        "shape",
        "strides",
        "transposed",
    )

    def __init__(self, weight: Tensor, view: View) -> None:
        weight = weight.detach()
        self.matrix = view.to_matrix(weight)
        self.shape, self.matrix_strides = self.matrix.shape, self.matrix.stride()
        self.transposed = self.matrix.t()
        self.strides = weight.stride()
        self.kind = (weight.shape, self.strides, weight.dtype)
        self.is_large = weight.numel() >= LARGE
        self._address = weight.data_ptr()
        self._contiguous = weight.is_contiguous()
        extent = 1 + sum((n - 1) * step for n, step in zip(weight.shape, self.strides, strict=True))
        is_dense = extent == weight.numel()
        is_alias = self.matrix.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        self.flat = as_it_lies(weight) if is_dense and is_alias else None

    def is_of(self, weight: Tensor) -> bool:
        """Whether this is a weight as it is now. No other lies where this one keeps its memory."""
        return (
            self.flat is not None
            and weight.data_ptr() == self._address
            and weight.is_contiguous() == self._contiguous
        )

    def is_ready(self, weight: Tensor) -> bool:
        """Whether it is one of `is_here` as it is now, and no mode and no autocast are on.

        Only where all this takes little to tell: False may be wrong, and then costs time.
        """
        return (
            type(weight) is _Parameter
            and self.flat is not None
            and weight.data_ptr() == self._address
            and weight.is_contiguous() == self._contiguous
            and not (_transforms() or _modes() or is_any_autocast_enabled())
        )


def step(of: Matrix, u: Tensor) -> Step:
    """`linalg.power_step` for one matrix, float32 or float64, and one vector.

    Args:
        of: (m, n).
        u: (m,), of any length.
    """
    return finish_step(of, _mv(of.transposed, u))


def finish_step(of: Matrix, x: Tensor) -> Step:
    """The second half of a step, or all of it again, to the bit, from the `x` of an earlier one."""
    matrix = of.matrix
    square = _dot(x, x).item()
    if _LEAST_SQUARE < square < _MOST_SQUARE:
        length = _sqrt(square)
    else:
        length = _norm(x)
        if length > 0:
            x.div_(length)
        else:  # u is orthogonal to every column: another direction finds the matrix again
            x.fill_(matrix.shape[1] ** -0.5)
        length = _norm(x)
    t = _mv(matrix, x)
    square = _dot(t, t).item()
    if _LEAST_SQUARE**2 < square < _MOST_SQUARE**2:
        size = _sqrt(square)
        return Step(size / length, t, x, size, length)
    size = _norm(t)
    return Step(size / length, t.div_(size or 1.0), x, 1.0, length)


def as_it_lies(tensor: Tensor) -> Tensor:
    """All entries of a tensor without gaps, in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _norm(x: Tensor) -> float:
    square = _dot(x, x).item()
    if 1e-30 < square < 1e30:
        return math.sqrt(square)
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))
