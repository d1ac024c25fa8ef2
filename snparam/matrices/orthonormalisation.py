"""Making rows orthonormal, and scalars that decide what a result is.

Shapes as in `products`: x (b, k, n), one row for each vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snparam.matrices import torch_private
from snparam.matrices.products import real_dtype, wide_dtype


def orthonormal_rows(x: Tensor, eps: float = 0.0) -> Tensor:
    """Return orthonormal rows, earlier rows first, each keeping its direction.

    That is what Gram-Schmidt gives, by a QR decomposition whose triangular factor has a positive
    diagonal. A row that depends on earlier ones becomes some unit vector orthogonal to them.

    Args:
        x: (b, k, n) with k ≤ n.
        eps: rows whose remainder is shorter than this keep the length remainder / eps, as
            normalize(x) = x / max(‖x‖, eps) gives.
    """
    return orthonormalise(x, eps)[0]


def orthonormalise(x: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return orthonormal rows, and the inner product (b, k) of each with the row it was made of.

    Those are the diagonal of the triangular factor: row i of x is a combination of the first i
    orthonormal rows, the last of them with that coefficient.
    """
    rows, factor = triangular(x)
    length = factor.diagonal(dim1=-2, dim2=-1).real
    if eps > 0:
        floored = (length / eps).clamp(max=1.0)
        rows, length = rows * floored.unsqueeze(-1), length * floored
    return rows, length


def triangular(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal rows Q (b, k, n) and R (b, k, k), upper triangular, with x = Rᵀ Q.

    The diagonal of R is real and not negative.
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
        phase = torch.copysign(diagonal.new_ones(()), diagonal)
    else:
        phase = torch.sgn(diagonal) + (diagonal == 0)
        r = r * scale.unsqueeze(-2)  # each row of x has a scale of its own
    return (q * phase.unsqueeze(-2)).mT, r * phase.conj().unsqueeze(-1)


def unit_rows(x: Tensor, eps: float, instead: float) -> Tensor:
    """Make rows (b, 1, n) unit vectors in place; a row of zeros, or with NaN, becomes `instead`."""
    norm = row_norms(x)
    x = scaled_rows(x, norm, eps)
    # NaN is replaced in the real and in the imaginary part, each by itself.
    return x.nan_to_num_(nan=instead * 0.5**0.5 if x.is_complex() else instead)


def row_norms(x: Tensor) -> Tensor:
    """Return the norms of rows, (b, k, n) to (b, k, 1).

    They are taken in float64, where squares of float32 neither overflow nor underflow; on Apple's
    devices, which have no float64, in float32.
    """
    wide = real_dtype(x.dtype) if x.device.type == "mps" else wide_dtype(x.dtype)
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return norm


def scaled_rows(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Divide rows (b, k, n), in place, by the larger of their norms (b, k, 1) and eps."""
    if x.is_complex():  # by parts: complex division takes reciprocals, which overflow first
        torch.view_as_real(x).div_(norm.unsqueeze(-1))
    else:
        x = x.div_(norm)
    return x if eps == 0 else x.mul_((norm / eps).clamp_max(1.0))


def positive(x: Tensor) -> Tensor | None:
    """Return which entries are positive finite numbers, or None if all are known to be.

    On a CPU, where nothing traces, the entries are read; elsewhere reading them would wait.
    """
    if reads_freely(x) and all(0 < entry < float("inf") for entry in x.flatten().tolist()):
        return None
    return x * 0 < x  # zero is not below zero, and inf and NaN times zero are NaN


def reads_freely(x: Tensor) -> bool:
    """Return whether numbers may be read from a tensor: at no cost, and with no tracer looking.

    A mode that somebody has written to watch operations sees the reading as one of them. torch's
    own modes that trace or fake them, and its transforms, would take one number for all.
    """
    return (
        type(x) is Tensor
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not is_batched(x)
        and torch_private.tracing_state() is None
        and not (
            torch_private.dispatch_mode_count()
            and any(map(torch_private.is_tracing, torch_private.dispatch_modes()))
        )
    )


def is_batched(x: Tensor) -> bool:
    """Return whether a tensor may stand for a batch: in torch.func, or `is_grads_batched`."""
    return torch_private.functorch_is_active() or torch_private.is_batch_of_gradients(x)
