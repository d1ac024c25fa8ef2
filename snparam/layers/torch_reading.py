"""How torch's own two spectral norms read a weight, next to how a view does.

torch reads one matrix, with the axis `dim` as rows and all others, in order, as columns.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from snparam.estimators.power import power_step
from snparam.matrices.products import real_dtype
from snparam.matrices.sharded import ShardedStack, is_sharded
from snparam.matrices.stacks import compute_dtype
from snparam.matrices.views import View

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def torch_axis(owner: nn.Module) -> int:
    """The axis that torch takes as rows in a module where nobody says which."""
    return 1 if isinstance(owner, _TRANSPOSED) else 0


def relation(view: View, axis: int) -> Literal["same", "transposed"] | None:
    """Whether torch, with `axis` as rows, reads the matrix of a view, its transpose or others."""
    if view.matrices[0] > 1:
        return None
    strides = torch.empty(view.shape, device="meta").reshape(view.split).stride()
    ours = [(view.split[a], strides[a]) for a in view.order]
    first = view.stack_axes + view.row_axes
    rows, columns = _long(ours[:first]), _long(ours[first:])
    theirs = list(zip(view.shape, torch.empty(view.shape, device="meta").stride(), strict=True))
    their_rows, their_columns = _long([theirs.pop(axis)]), _long(theirs)
    if (rows, columns) == (their_rows, their_columns):
        return "same"
    return "transposed" if (rows, columns) == (their_columns, their_rows) else None


def _long(axes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Axes, as (size, stride), without those of length 1."""
    return [(size, stride) for size, stride in axes if size != 1]


def fitting_axis(shape: tuple[int, ...], axis: int, u: Any, v: Any) -> int | None:
    """The axis by which torch's u and v are those of a weight of this shape; `axis` if it can be.

    Either vector may be None. None if there is no such axis: they belong to another weight.
    """
    axes: list[int] = [axis, *range(len(shape))]
    for rows in axes:
        columns = math.prod(shape) // shape[rows]
        if all(x is None or _is_vector(x, size) for x, size in ((u, shape[rows]), (v, columns))):
            return rows
    return None


def _is_vector(x: Any, length: int) -> bool:
    return isinstance(x, Tensor) and list(x.shape) == [length]


def left_vector(view: View, axis: int, u: Tensor | None, v: Tensor | None) -> Tensor | None:
    """torch's u (m,) and v (n,), with `axis` as rows, as the u (1, 1, m) of a view.

    None if torch reads other matrices, or what would be u is not there.
    """
    found = {"same": u, "transposed": None if v is None else v.conj(), None: None}
    vector = found[relation(view, axis)]
    return None if vector is None else vector.detach().reshape(1, 1, -1)


@torch.no_grad()
def torch_sigma(weight: Tensor, axis: int, u: Tensor | None, v: Tensor | None) -> Tensor:
    """The σ () that torch divides a weight by in eval mode: uᴴ W v, of what there is of u and v.

    Without v, that of one step from u, ‖W Wᴴu‖ / ‖Wᴴu‖. 1 where that is zero, NaN or inf, so that
    what is divided by it stays what it is.
    """
    dtype = compute_dtype(weight.dtype)
    matrix = weight.detach().movedim(axis, 0).flatten(1)
    if u is not None and v is not None:
        # As torch does, in the weight's dtype: before it has converged little may be left of σ.
        sigma = torch.vdot(u.detach().to(matrix), torch.mv(matrix, v.detach().to(matrix))).real
    else:
        matrix = matrix.to(dtype)
        right = v
        if right is None:
            assert u is not None
            right = (u.detach().to(matrix).conj() @ matrix).conj()
            right = right / torch.linalg.vector_norm(right)
        sigma = torch.linalg.vector_norm(matrix @ right.detach().to(matrix))
    sigma = sigma.to(real_dtype(dtype))
    return torch.where(sigma.isfinite() & (sigma != 0), sigma, 1.0)


@torch.no_grad()
def torch_vectors(weight: Tensor, view: View, axis: int, u: Tensor) -> tuple[Tensor, Tensor] | None:
    """The u (m,) and v (n,) with which torch computes the σ that one step from our u finds.

    Args:
        weight: the original.
        view: how we read it.
        axis: the one that torch takes as rows.
        u: ours, (1, k, m).

    Returns:
        torch's u and v, in the dtype of the weight, or None if torch reads other matrices.
    """
    kind = relation(view, axis)
    if kind is None:
        return None
    dtype = compute_dtype(weight.dtype)
    # The columns in torch's order, whatever the weight's memory format.
    weight = weight.detach().contiguous()
    stack: Tensor | ShardedStack
    if is_sharded(weight):
        stack = ShardedStack(weight, view, dtype)  # type: ignore[arg-type]
    else:
        stack = view.to_matrices(weight).to(dtype)
    found = power_step(stack, u[:, :1].to(dtype))
    left, right = found.u[0, 0], found.v[0, 0]
    if kind == "transposed":
        left, right = right.conj().resolve_conj(), left.conj().resolve_conj()
    return left.to(weight.dtype), right.to(weight.dtype)
