"""Singular values of stacks of matrices by power iteration, and the products it is made of.

Pure functions, tensors in, tensors out. The shapes are the same throughout:

    matrices: (b, m, n)   b blocks, m rows, n columns
    u:        (b, k, m)   left singular vectors, as rows, the largest singular value's first
    v:        (b, k, n)   right singular vectors, as rows
    sv:       (b, k)      singular values, largest first, real

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
    """The dtype of a norm of tensors of the given dtype."""
    return _REAL.get(dtype, dtype)


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
        """U conj(W), (b, k, m) to (b, k, n)."""

    def right(self, v: Tensor) -> Tensor:
        """V Wᵀ, (b, k, n) to (b, k, m)."""

    def largest(self) -> float:
        """The largest magnitude of an entry; not finite if there is NaN or inf."""


def power_step(
    matrices: Tensor | Stack, u: Tensor, eps: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of block power iteration, equal to the sequential Gram-Schmidt form.

    V = orth(U W), T = V Wᵀ, U = orth(T), sv = rowwise ⟨T, U⟩: two products whatever k is. Source:
    Brock, Donahue and Simonyan 2019 (the layer of BigGAN), there written vector by vector.

    Args:
        matrices: (b, m, n), float32 or wider.
        u: (b, k, m), of any length, with k ≤ min(m, n).
        eps: floor under the norms that are divided by. The classic layer has 1e-12, an absolute
            number, which makes the iteration collapse for matrices of σ below it; a norm of exactly
            zero needs no floor here, so that the default 0 keeps every scale right.

    Returns:
        The new u (b, k, m), the v (b, k, n) between, and sv (b, k). For a zero matrix u is returned
        as it came: what a layer that starts at zero learns next is found from there, where a u of
        zeros, or any other made without reason, might be orthogonal to it up to rounding.
    """
    v = right_vectors(left_product(matrices, u), eps)
    found, sv = left_vectors(right_product(matrices, v), eps, u)
    return found, v, sv


def finish_step(
    matrices: Tensor | Stack, v: Tensor, eps: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The second half of a step: u, v and sv from a given v, with one product."""
    u, sv = left_vectors(right_product(matrices, v), eps)
    return u, v, sv


def right_vectors(x: Tensor, eps: float = 0.0) -> Tensor:
    """The v (b, k, n) of a step, from X = U conj(W), which it overwrites."""
    if x.shape[1] > 1:
        return orthonormal_rows(x, eps)
    # Where u is orthogonal to every column the classic layer ends in NaN. Another direction finds
    # the matrix again, and only a zero matrix keeps σ = 0.
    v, _ = _unit(x, eps, instead=x.shape[2] ** -0.5)
    return v


def left_vectors(
    t: Tensor, eps: float = 0.0, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The u (b, k, m) and sv (b, k) of a step, from T = V Wᵀ, which it overwrites.

    For a zero matrix u is as `before`, or, if that is not given and k = 1, zeros.
    """
    if t.shape[1] > 1:
        u, sv = orthonormalise(t, eps)
    else:
        u, norm = _unit(t, eps, instead=0.0 if before is None else None)
        sv = norm.to(real_dtype(t.dtype))
        sv = sv if eps == 0 else sv * (sv / eps).clamp_max(1.0)
    if before is None or (_is_known(sv) and all(norm > 0 for norm in sv[:, 0].tolist())):
        return u, sv
    return torch.where(sv[:, :1, None] > 0, u, before), sv


def orthonormal_rows(x: Tensor, eps: float = 0.0) -> Tensor:
    """Orthonormalise rows, earlier rows first, each keeping its direction.

    What Gram-Schmidt gives, by a QR decomposition whose triangular factor has a positive diagonal.
    A row that depends on earlier ones becomes some unit vector orthogonal to them.

    Args:
        x: (b, k, n) with k ≤ n.
        eps: rows whose remainder is shorter than this keep the length remainder / eps, as
            normalize(x) = x / max(‖x‖, eps) gives.
    """
    return orthonormalise(x, eps)[0]


def orthonormalise(x: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Orthonormal rows, and the inner product (b, k) of each with the row that it was made of.

    Those are the diagonal of the triangular factor: row i of x is a combination of the first i
    orthonormal rows, the last of them with that coefficient.
    """
    scale = None
    if x.is_complex():  # LAPACK's complex QR makes NaN of subnormal numbers, its real one does not
        parts = torch.view_as_real(x.resolve_conj())
        largest = parts.abs().amax((-2, -1), keepdim=True)
        parts = parts / torch.where(largest > 0, largest, 1.0)
        x, scale = torch.view_as_complex(parts), largest[..., 0, 0]
    q, r = torch.linalg.qr(x.mT)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    length = diagonal.abs()
    if scale is None:
        phase = torch.copysign(length.new_ones(()), diagonal)
    else:
        phase, length = torch.sgn(diagonal) + (diagonal == 0), length * scale
    if eps > 0:
        floored = (length / eps).clamp(max=1.0)
        phase, length = phase * floored, length * floored
    return (q * phase.unsqueeze(-2)).mT, length


def left_product(matrices: Tensor | Stack, u: Tensor) -> Tensor:
    """U conj(W), (b, k, m) to (b, k, n)."""
    if not isinstance(matrices, Tensor):
        return matrices.left(u)
    if u.shape[:2] == (1, 1):  # one product with a vector is what BLAS does best
        return torch.mv(matrices[0].mH, u.view(-1)).view(1, 1, -1)
    other = matrices.conj() if matrices.is_complex() else matrices
    pieces = _pieces(matrices)
    if pieces == 1:
        return torch.bmm(u, other)
    k, (rows, columns) = u.shape[1], (matrices.shape[1] // pieces, matrices.shape[2])
    apart = u.reshape(k, pieces, rows).transpose(0, 1)
    parts = torch.bmm(apart, other.view(pieces, rows, columns))
    return parts.sum(0, keepdim=True) if pieces > 2 else parts[:1].add_(parts[1:])


def _pieces(matrices: Tensor) -> int:
    """Into how many bands of rows, summed afterwards, to part U W on a CPU: one for each thread.

    BLAS gives each thread some columns instead, each thread then reads all over the matrix, and
    what it has in its cache is not what V Wᵀ asks it for next. 1.2x for both products at 4096x1024
    and 1.1x at 1024x1024 and 1024x4096, on two cores of an Intel Xeon, and 1.5x for U W from
    512x4608 on, on two of an AMD EPYC; nothing for matrices of few rows.
    """
    blocks, rows, columns = matrices.shape
    if matrices.device.type != "cpu" or blocks > 1 or rows * columns < _WORTH_PARTING:
        return 1
    if torch.compiler.is_compiling() or not matrices.is_contiguous():
        return 1  # a graph cannot ask for the number of threads, which may be others when it runs
    threads = torch.get_num_threads()
    enough = 64 * threads if rows >= columns else 256 * threads
    return threads if rows >= enough and rows % threads == 0 else 1


def right_product(matrices: Tensor | Stack, v: Tensor) -> Tensor:
    """V Wᵀ, (b, k, n) to (b, k, m)."""
    if not isinstance(matrices, Tensor):
        return matrices.right(v)
    if v.shape[:2] == (1, 1):
        return torch.mv(matrices[0], v.view(-1)).view(1, 1, -1)
    rows = v.shape[1]
    if rows >= _MANY_ROWS and rows * matrices[0].numel() >= _MANY_PRODUCTS:
        return torch.bmm(matrices, v.mT).mT
    return torch.bmm(v, matrices.mT)


def _unit(x: Tensor, eps: float, instead: float | None) -> tuple[Tensor, Tensor]:
    """Rows made unit in place, (b, 1, n), and their norms, (b, 1); a zero row becomes `instead`.

    The norms are taken in float64, where squares of float32 neither overflow nor underflow. A row
    with NaN becomes `instead` too, so that a step on a broken weight does not break the state. With
    None either becomes NaN.
    """
    wide = x.dtype if x.device.type == "mps" else wide_dtype(x.dtype)  # which has no float64
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    if x.is_complex():  # by parts: complex division takes reciprocals, which overflow first
        torch.view_as_real(x).div_(norm.unsqueeze(-1))
    else:
        x = x.div_(norm)
    if eps > 0:
        x = x.mul_((norm / eps).clamp_max(1.0))
    if instead is not None:
        # NaN is replaced in the real and in the imaginary part, each by itself.
        x.nan_to_num_(nan=instead * 0.5**0.5 if x.is_complex() else instead)
    return x, norm.squeeze(-1)


def _is_known(x: Tensor) -> bool:
    """Whether the values of a tensor can be read, at no cost."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64, or complex128 for complex dtypes."""
    return torch.complex128 if dtype.is_complex else torch.float64
