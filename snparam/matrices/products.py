"""Products of a stack of matrices with vectors, dense or known by its products alone.

The shapes are the same throughout the package:

    stack:  (b, m, n)   b blocks, m rows, n columns
    u:      (b, k, m)   left singular vectors, as rows, the largest singular value's first
    v:      (b, k, n)   right singular vectors, as rows
    sv:     (b, k)      singular values, largest first, real

Complex matrices follow W = Σ σᵢ uᵢ vᵢᴴ.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}

# From this many vectors and multiplications on BLAS is faster with W Vᵀ than with V Wᵀ, whose rows
# are fewer than it expects: 1.3x at 8 vectors from 2304x768 on, 2x at 16, on two cores.
_MANY_ROWS, _MANY_PRODUCTS = 8, 12 << 20

# Entries of a matrix that outgrow one core's cache.
_WORTH_PARTING = 1 << 19


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a norm of tensors of the given dtype."""
    return _REAL.get(dtype, dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64, or complex128 for complex dtypes."""
    return torch.complex128 if dtype.is_complex else torch.float64


class Stack(Protocol):
    """A stack of matrices (b, m, n) that is known by its products, such as one sharded over ranks.

    Attributes:
        shape: (b, m, n).
        dtype: of the arithmetic.
        device: where the vectors are.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def left(self, u: Tensor) -> Tensor:
        """Return U conj(W), (b, k, m) to (b, k, n)."""

    def right(self, v: Tensor) -> Tensor:
        """Return V Wᵀ, (b, k, n) to (b, k, m)."""

    def outer(self, u: Tensor, v: Tensor) -> Tensor:
        """Return the gradient of Σ Re(uᴴ W v), (b, m) and (b, n), for the weight, in its shape."""

    def largest(self) -> float:
        """Return the largest magnitude of an entry; it is not finite if there is NaN or inf."""


def left_product(stack: Tensor | Stack, u: Tensor) -> Tensor:
    """Return U conj(W), (b, k, m) to (b, k, n)."""
    if not isinstance(stack, Tensor):
        return stack.left(u)
    if u.shape[:2] == (1, 1):  # one product with a vector is what BLAS does best
        return torch.mv(stack[0].mH, u.view(-1)).view(1, 1, -1)
    other = stack.conj() if stack.is_complex() else stack
    pieces = _pieces(stack)
    if pieces == 1:
        return torch.bmm(u, other)
    k, (rows, columns) = u.shape[1], (stack.shape[1] // pieces, stack.shape[2])
    apart = u.reshape(k, pieces, rows).transpose(0, 1)
    parts = torch.bmm(apart, other.view(pieces, rows, columns))
    return parts.sum(0, keepdim=True) if pieces > 2 else parts[:1].add_(parts[1:])


def _pieces(stack: Tensor) -> int:
    """Return into how many bands of rows, summed afterwards, to part U W on a CPU: one a thread.

    BLAS gives each thread some columns instead, each thread then reads all over the matrix, and
    what it has in its cache is not what V Wᵀ asks it for next. 1.2x for both products at 4096x1024
    and 1.1x at 1024x1024 and 1024x4096, on two cores of an Intel Xeon, and 1.5x for U W from
    512x4608 on, on two of an AMD EPYC; nothing for matrices of few rows.
    """
    blocks, rows, columns = stack.shape
    if stack.device.type != "cpu" or blocks > 1 or rows * columns < _WORTH_PARTING:
        return 1
    if torch.compiler.is_compiling() or not stack.is_contiguous():
        return 1  # a graph cannot ask for the number of threads, which may be others when it runs
    threads = torch.get_num_threads()
    enough = 64 * threads if rows >= columns else 256 * threads
    return threads if rows >= enough and rows % threads == 0 else 1


def right_product(stack: Tensor | Stack, v: Tensor) -> Tensor:
    """Return V Wᵀ, (b, k, n) to (b, k, m)."""
    if not isinstance(stack, Tensor):
        return stack.right(v)
    if v.shape[:2] == (1, 1):
        return torch.mv(stack[0], v.view(-1)).view(1, 1, -1)
    rows = v.shape[1]
    if rows >= _MANY_ROWS and rows * stack[0].numel() >= _MANY_PRODUCTS:
        return torch.bmm(stack, v.mT).mT
    return torch.bmm(v, stack.mT)
