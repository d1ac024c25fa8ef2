"""The matrix that torch's own two spectral norms read in a weight, compared with that of a view.

torch reads one matrix, whose rows are the axis `dim`, and whose columns are all others, in order.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from snparam.estimators.power import power_step
from snparam.matrices.products import real_dtype
from snparam.matrices.stacks import compute_dtype, stack_of
from snparam.matrices.views import WeightView

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def torch_axis(owner: nn.Module) -> int:
    """Return the axis that torch takes as rows in a module by default."""
    return 1 if isinstance(owner, _TRANSPOSED) else 0


def matrix_relation(view: WeightView, axis: int) -> Literal["same", "transposed"] | None:
    """Return how the matrix that torch reads, with `axis` as rows, relates to those of a view.

    Returns:
        `"same"` for the view's matrix, `"transposed"` for its transpose, None for others.
    """
    if not view.is_dense or view.matrices[0] > 1:
        return None
    entries = view.entries
    strides = torch.empty(view.shape, device="meta").reshape(entries.split).stride()
    view_axes = [(entries.split[a], strides[a]) for a in entries.order]
    column_start = entries.stack_axes + entries.row_axes
    rows, columns = (
        _without_unit_axes(view_axes[:column_start]),
        _without_unit_axes(view_axes[column_start:]),
    )
    torch_axes = list(zip(view.shape, torch.empty(view.shape, device="meta").stride(), strict=True))
    torch_rows, torch_columns = (
        _without_unit_axes([torch_axes.pop(axis)]),
        _without_unit_axes(torch_axes),
    )
    if (rows, columns) == (torch_rows, torch_columns):
        return "same"
    return "transposed" if (rows, columns) == (torch_columns, torch_rows) else None


def _without_unit_axes(axes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return axes, as (size, stride), without those of length 1."""
    return [(size, stride) for size, stride in axes if size != 1]


def fitting_axis(shape: tuple[int, ...], axis: int, u: Any, v: Any) -> int | None:
    """Return the axis that, taken as rows, fits the lengths of torch's u and v; `axis` if it does.

    Args:
        shape: shape of the weight.
        axis: the axis to try first.
        u: torch's u, (m,), or None.
        v: torch's v, (n,), or None.

    Returns:
        the axis, or None if there is none: the vectors belong to another weight.
    """
    axes: list[int] = [axis, *range(len(shape))]
    for rows in axes:
        columns = math.prod(shape) // shape[rows]
        if all(x is None or _is_vector(x, size) for x, size in ((u, shape[rows]), (v, columns))):
            return rows
    return None


def _is_vector(x: Any, length: int) -> bool:
    return isinstance(x, Tensor) and list(x.shape) == [length]


def left_vector(view: WeightView, axis: int, u: Tensor | None, v: Tensor | None) -> Tensor | None:
    """Return the u (1, 1, m) of a view, from torch's u and v, which have `axis` as rows.

    Where torch reads the transpose, the view's u is the conjugate of torch's v.

    Returns:
        u, or None if torch reads other matrices, or the vector that would be u is None.
    """
    candidates = {"same": u, "transposed": None if v is None else v.conj(), None: None}
    vector = candidates[matrix_relation(view, axis)]
    return None if vector is None else vector.detach().reshape(1, 1, -1)


@torch.no_grad()
def torch_sigma(weight: Tensor, axis: int, u: Tensor | None, v: Tensor | None) -> Tensor:
    """Return the σ () that torch divides a weight by in eval mode, uᴴ W v.

    Without v it is the σ of one step from u, ‖W Wᴴu‖ / ‖Wᴴu‖; without u it is ‖W v‖. Where σ is
    zero, NaN or inf the result is 1, so that a division by it changes nothing.

    Args:
        weight: the original.
        axis: the axis that torch takes as rows.
        u: torch's u, (m,), or None if v is given.
        v: torch's v, (n,), or None if u is given.
    """
    dtype = compute_dtype(weight.dtype)
    matrix = weight.detach().movedim(axis, 0).flatten(1)
    if u is not None and v is not None:
        # In the weight's dtype, as torch does: before u and v have converged, σ may be small, and
        # its rounding may matter.
        sigma = torch.vdot(u.detach().to(matrix), torch.mv(matrix, v.detach().to(matrix))).real
    else:
        matrix = matrix.to(dtype)
        direction = v
        if direction is None:
            assert u is not None
            direction = (u.detach().to(matrix).conj() @ matrix).conj()
            direction = direction / torch.linalg.vector_norm(direction)
        sigma = torch.linalg.vector_norm(matrix @ direction.detach().to(matrix))
    sigma = sigma.to(real_dtype(dtype))
    return torch.where(sigma.isfinite() & (sigma != 0), sigma, 1.0)


@torch.no_grad()
def torch_vectors(
    weight: Tensor, view: WeightView, axis: int, u: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Return the u and v with which torch computes the σ that one step from snparam's u finds.

    Args:
        weight: the original.
        view: how snparam reads it.
        axis: the axis that torch takes as rows.
        u: snparam's u, (1, k, m).

    Returns:
        torch's u (m,) and v (n,), in the dtype of the weight, or None if torch reads other
        matrices.
    """
    relation = matrix_relation(view, axis)
    if relation is None:
        return None
    # Contiguous, because a view orders the columns by memory format, and torch does not.
    weight = weight.detach().contiguous()
    stack = stack_of(weight, view)
    estimate = power_step(stack, u[:, :1].to(stack.dtype))
    left, right = estimate.u[0, 0], estimate.v[0, 0]
    if relation == "transposed":
        left, right = right.conj().resolve_conj(), left.conj().resolve_conj()
    return left.to(weight.dtype), right.to(weight.dtype)
