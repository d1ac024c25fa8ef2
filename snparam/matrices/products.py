"""Products of a stack of matrices with vectors; the stack is a tensor, or known by its products.

The whole package uses these shapes:

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

# From this many vectors and multiplications on, BLAS computes W Vᵀ faster than V Wᵀ, whose left
# factor has fewer rows than BLAS expects: 1.3x at 8 vectors from 2304x768 on, 2x at 16, on two
# cores.
_MANY_ROWS, _MANY_PRODUCTS = 8, 12 << 20

# The number of entries up to which a batched product with one vector is faster than `torch.mv`,
# which BLAS does best, and the views around it: 4x at 64x64, 3x at 192x192, equal at 512x512, on
# two cores.
_MAX_SMALL_ENTRIES = 1 << 16

# The number of entries from which a matrix outgrows one core's cache.
_MIN_BANDED_ENTRIES = 1 << 19


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the real dtype that belongs to a complex one, and any other dtype unchanged."""
    return _REAL.get(dtype, dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64, or complex128 for complex dtypes."""
    return torch.complex128 if dtype.is_complex else torch.float64


class Stack(Protocol):
    """A stack of matrices (b, m, n) that is known by its products, such as one sharded over ranks.

    Attributes:
        shape: (b, m, n).
        dtype: dtype of the arithmetic.
        device: device of the vectors.
        least_steps: number of steps that Lanczos takes at least to find its largest singular
            values; kinds of stacks in which those lie close together need more.
        guard_vectors: number of vectors that Lanczos iterates with beyond those asked for, by which
            it needs fewer steps.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    least_steps: int
    guard_vectors: int

    def left(self, u: Tensor) -> Tensor:
        """Return U conj(W), (b, k, n), for u (b, k, m)."""

    def right(self, v: Tensor) -> Tensor:
        """Return V Wᵀ, (b, k, m), for v (b, k, n)."""

    def outer(self, u: Tensor, v: Tensor) -> Tensor:
        """Return the gradient of Σ Re(uᴴ W v), summed over blocks, with respect to the weight.

        Args:
            u: (b, m).
            v: (b, n).

        Returns:
            a tensor of the weight's shape.
        """

    def largest(self) -> float:
        """Return the largest magnitude of an entry; it is not finite if any entry is NaN or inf."""

    @property
    def is_small(self) -> bool:
        """Whether the stack may be made a tensor, to be decomposed."""

    def to_dense(self) -> Tensor:
        """Return the stack as a tensor, where `is_small` says that it may be one."""


def left_product(stack: Tensor | Stack, u: Tensor) -> Tensor:
    """Return U conj(W), (b, k, n), for u (b, k, m)."""
    if not isinstance(stack, Tensor):
        return stack.left(u)
    conjugate = stack.conj() if stack.is_complex() else stack
    entries = stack.numel()
    if entries <= _MAX_SMALL_ENTRIES:
        return torch.bmm(u, conjugate)
    if u.shape[0] == u.shape[1] == 1:
        return torch.mv(stack[0].mH, u.view(-1)).view(1, 1, -1)
    bands = _row_bands(stack) if entries >= _MIN_BANDED_ENTRIES else 1
    if bands == 1:
        return torch.bmm(u, conjugate)
    k, (rows, columns) = u.shape[1], (stack.shape[1] // bands, stack.shape[2])
    u_bands = u.reshape(k, bands, rows).transpose(0, 1)
    products = torch.bmm(u_bands, conjugate.view(bands, rows, columns))
    return products.sum(0, keepdim=True) if bands > 2 else products[:1].add_(products[1:])


def _row_bands(stack: Tensor) -> int:
    """Return the number of bands of rows into which to split W for U W: on a CPU, one a thread.

    The products with the bands are summed afterwards. BLAS would give each thread some of the
    columns: each thread then reads all over the matrix, and its cache does not hold what V Wᵀ asks
    it for next. Bands are 1.2x faster for both products at 4096x1024 and 1.1x at 1024x1024 and
    1024x4096, on two cores of an Intel Xeon, and 1.5x for U W from 512x4608 on, on two of an AMD
    EPYC; matrices of few rows gain nothing.
    """
    blocks, rows, columns = stack.shape
    if stack.device.type != "cpu" or blocks > 1:
        return 1
    if torch.compiler.is_compiling() or not stack.is_contiguous():
        return 1  # a graph cannot ask for the number of threads, which may differ when it runs
    threads = torch.get_num_threads()
    min_rows = 64 * threads if rows >= columns else 256 * threads
    return threads if rows >= min_rows and rows % threads == 0 else 1


def right_product(stack: Tensor | Stack, v: Tensor) -> Tensor:
    """Return V Wᵀ, (b, k, m), for v (b, k, n)."""
    if not isinstance(stack, Tensor):
        return stack.right(v)
    blocks, rows, _ = v.shape
    entries = stack.numel()
    if blocks == rows == 1 and entries > _MAX_SMALL_ENTRIES:
        return torch.mv(stack[0], v.view(-1)).view(1, 1, -1)
    if rows >= _MANY_ROWS and rows * (entries // blocks) >= _MANY_PRODUCTS:
        return torch.bmm(stack, v.mT).mT
    return torch.bmm(v, stack.mT)


def rank_one_update_by_numbers(
    matrix: Tensor, u: Tensor, v: Tensor, scale: float, rate: float
) -> Tensor:
    """Return scale · G − rate · u vᴴ in one pass, for a matrix G (m, n), u (m,) and v (n,)."""
    v = v.conj() if v.is_complex() else v
    limit = torch.finfo(matrix.dtype).max
    if abs(scale) > limit or abs(rate) > limit:  # torch.addr refuses such factors
        return matrix * scale - (rate * u[:, None]) * v
    return torch.addr(matrix, u, v, beta=scale, alpha=-rate)


def rank_one_update(g: Tensor, u: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    """Return G − rate · u vᴴ for each block; unless gradients are recorded, it may overwrite G.

    Args:
        g: G, (b, m, n).
        u: (b, m).
        v: (b, n).
        rate: () for one block, (b,) for several.
    """
    blocks, rows, columns = g.shape
    u, v = u.reshape(blocks, rows, 1), v.reshape(blocks, 1, columns).conj()
    outer = (rate if blocks == 1 else rate[:, None, None]) * u
    if torch.is_grad_enabled():
        return g - outer * v
    return g.baddbmm_(outer.to(g.dtype), v, alpha=-1.0)
