"""Orthonormal rows and unit rows, and whether a tensor's values may be read to choose a result.

Shapes as in `products`: x (b, k, n), one row for each vector.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from snparam.matrices import torch_private
from snparam.matrices.products import real_dtype, wide_dtype

# The range of norms whose squares, and the squares of their larger entries, are normal in float32.
_SMALLEST_PLAIN_NORM, _LARGEST_PLAIN_NORM = 1e-15, 1e15

# Up to this many entries, torch's norm of a row in float32 is right to 3e-7; it is 1e-6 off at
# 50,000.
_MAX_SHORT_ROW = 1 << 13


def orthonormal_rows(x: Tensor, eps: float = 0.0) -> Tensor:
    """Return the rows of x orthonormalised, earlier rows first, with the signs of Gram-Schmidt.

    They come from a QR decomposition whose triangular factor has a positive diagonal. A row that
    depends linearly on earlier ones becomes some unit vector orthogonal to them.

    Args:
        x: (b, k, n) with k ≤ n.
        eps: floor under the norm of what the projections on earlier rows leave of a row, as in
            normalize(x) = x / max(‖x‖, eps): a shorter remainder gets the length ‖remainder‖ / eps.
    """
    return orthonormalise(x, eps)[0]


def orthonormalise(x: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the rows of x orthonormalised, and the inner product of each with its row of x.

    The inner products are the diagonal of the triangular factor: row i of x is a combination of the
    first i orthonormal rows, in which the i-th has that coefficient.

    Args:
        x: (b, k, n) with k ≤ n.
        eps: floor under norms, as in `orthonormal_rows`.

    Returns:
        the rows (b, k, n), and the inner products (b, k), real and not negative.
    """
    q, _, diagonal, phase, scale = _qr(x)
    rows, length = (q * phase.unsqueeze(-2)).mT, diagonal.abs()
    if scale is not None:
        length = length * scale
    if eps > 0:
        floored = (length / eps).clamp(max=1.0)
        rows, length = rows * floored.unsqueeze(-1), length * floored
    return rows, length


def triangular(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal rows Q (b, k, n) and R (b, k, k), upper triangular, with x = Rᵀ Q.

    The diagonal of R is real and not negative.
    """
    q, r, _, phase, scale = _qr(x)
    if scale is not None:
        r = r * scale.unsqueeze(-2)  # column i of R is row i of x
    return (q * phase.unsqueeze(-2)).mT, r * phase.conj().unsqueeze(-1)


def _qr(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the QR decomposition of xᵀ, and what makes the diagonal of R real and positive.

    Returns:
        Q (b, n, k); R (b, k, k); the diagonal (b, k) of R; its phase (b, k), 1 for zero; and for
        complex x the scale (b, k) by which its rows were divided first, else None.
    """
    scale = None
    if x.is_complex():  # LAPACK's complex QR makes NaN of subnormal numbers, its real one does not
        parts = torch.view_as_real(x.resolve_conj())
        largest = parts.abs().amax((-2, -1), keepdim=True)
        parts = parts / torch.where(largest > 0, largest, 1.0)
        x, scale = torch.view_as_complex(parts), largest[..., 0, 0]
    q, r = torch.linalg.qr(x.mT)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    if scale is None:
        return q, r, diagonal, torch.copysign(diagonal.new_ones(()), diagonal), None
    return q, r, diagonal, torch.sgn(diagonal) + (diagonal == 0), scale


def unit_rows(x: Tensor, eps: float, fill: float) -> Tensor:
    """Normalise rows (b, 1, n) in place; a row of zeros, or with NaN, is filled with `fill`."""
    norm = plain_norm(x, eps)
    if norm is not None:
        return x.div_(norm)
    x = scaled_rows(x, row_norms(x), eps)
    # In a complex entry the real and the imaginary part are replaced each, so `fill` is its
    # magnitude.
    return x.nan_to_num_(nan=fill * 0.5**0.5 if x.is_complex() else fill)


def row_norms(x: Tensor) -> Tensor:
    """Return the norms (b, k, 1) of rows (b, k, n), in float64.

    There the squares of float32 numbers neither overflow nor underflow. On Apple's devices, which
    have no float64, the norms are computed and returned in float32.
    """
    wide = real_dtype(x.dtype) if x.device.type == "mps" else wide_dtype(x.dtype)
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return norm


def scaled_rows(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Divide rows (b, k, n), in place, by the larger of their norms (b, k, 1) and eps."""
    if x.is_complex():  # in parts: complex division takes reciprocals, which overflow first
        torch.view_as_real(x).div_(norm.unsqueeze(-1))
    else:
        x = x.div_(norm)
    return x if eps == 0 else x.mul_((norm / eps).clamp_max(1.0))


def plain_norm(x: Tensor, eps: float) -> Tensor | None:
    """Return the norm () of a single row (1, 1, n) to divide it by, in its own dtype, or None.

    None is returned for several rows, where a norm may not be read, where there is a floor under
    it, and where it may be zero, not finite, or inaccurate in that dtype: `row_norms` and
    `scaled_rows` are right there too, and take longer.
    """
    if eps > 0 or x.shape[0] != 1 or x.shape[1] != 1 or not reads_freely(x):
        return None
    norm: Tensor
    if x.shape[2] <= _MAX_SHORT_ROW:
        norm = torch.linalg.vector_norm(x)
    else:
        norm = row_norms(x).view(()).to(real_dtype(x.dtype))
    return norm if _SMALLEST_PLAIN_NORM < norm.item() < _LARGEST_PLAIN_NORM else None


def positive_mask(x: Tensor) -> Tensor | None:
    """Return a mask of the entries that are positive and finite, or None if all are known to be.

    The entries are read where `reads_freely` allows it: on a CPU, with nothing tracing. On other
    devices the read would wait for the device.
    """
    if reads_freely(x):
        entries = [x.item()] if x.numel() == 1 else x.flatten().tolist()
        if all(0 < entry < float("inf") for entry in entries):
            return None
    return x * 0 < x  # false for 0, and for inf and NaN, whose products with 0 are NaN


def reads_freely(x: Tensor) -> bool:
    """Return whether Python may read a tensor's values: it costs nothing, and no tracer records it.

    A TorchDispatchMode that a user has written to watch operations may be on: it sees the read as
    one of them. torch's own modes that trace or fake operations, and its transforms, would take the
    one number that was read for the value in every later run, or for a whole batch.
    """
    return (
        type(x) is Tensor
        and x.is_cpu
        and not is_compiling()
        and not torch_private.functorch_is_active()
        and not torch_private.is_batch_of_gradients(x)
        and torch_private.tracing_state() is None
        and not (
            torch_private.dispatch_mode_count()
            and any(map(torch_private.is_tracing, torch_private.dispatch_modes()))
        )
    )


def is_batched(x: Tensor) -> bool:
    """Return whether a tensor may stand for a batch of them, as torch.func's transforms make.

    `torch.autograd.grad(..., is_grads_batched=True)` makes such tensors too.
    """
    return torch_private.functorch_is_active() or torch_private.is_batch_of_gradients(x)
