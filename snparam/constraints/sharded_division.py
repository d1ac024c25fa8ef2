"""Division of a sharded weight by a function of its σ, shard by shard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snparam.matrices.sharded import Tile, full_vector, sharded_like
from snparam.matrices.views import View

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def divide_sharded(
    weight: DTensor,
    gain: Tensor | None,
    divisor: Tensor,
    slope: Tensor | float,
    u: Tensor,
    v: Tensor,
    view: View,
) -> DTensor:
    """Return γ W / d for a DTensor, placed as the weight is.

    The backward communicates one number for each block, the double backward a few more.

    Args:
        weight: of the view's shape.
        gain: γ, (b,), sharded or whole, or None for 1.
        divisor: value of d, () for one block or (b,).
        slope: dd/dσ, of the same shape or a number.
        u: (b, m), unit vectors.
        v: (b, n), unit vectors.
        view: how the weight is read as (b, m, n).
    """
    divisor = divisor.reshape(-1).to(v.real.dtype)
    slope = slope.reshape(-1).to(divisor) if isinstance(slope, Tensor) else slope
    gain = None if gain is None else full_vector(gain)
    out: DTensor = _DivideSharded.apply(weight, gain, divisor, slope, u, v, view)  # type: ignore[no-untyped-call]
    return out


class _DivideSharded(torch.autograd.Function):
    """The autograd Function of `divide_sharded`."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: DTensor,
        gain: Tensor | None,
        divisor: Tensor,
        slope: Tensor | float,
        u: Tensor,
        v: Tensor,
        view: View,
    ) -> DTensor:
        ctx.save_for_backward(weight, gain, divisor, u, v)
        ctx.slope, ctx.tile = slope, Tile(weight, view)
        scale = 1.0 / divisor if gain is None else gain / divisor
        local = weight.to_local()
        piece = ctx.tile.to_piece(local) * ctx.tile.per_row(scale)
        return sharded_like(weight, ctx.tile.from_piece(piece, local).to(local.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
        weight, gain, divisor, u, v = ctx.saved_tensors
        tile = ctx.tile
        if tuple(grad.placements) != tuple(weight.placements):
            grad = grad.redistribute(weight.device_mesh, weight.placements)
        local = weight.to_local()
        g = tile.to_piece(grad.to_local()).to(u.dtype)
        w = tile.to_piece(local).to(u.dtype)
        gradients = _differentiable_gradients if torch.is_grad_enabled() else _gradients
        grad_piece, inner_over_d = gradients(g, w, gain, divisor, ctx.slope, u, v, tile)
        grad_weight = sharded_like(weight, tile.from_piece(grad_piece, local).to(local.dtype))
        grad_gain = None if gain is None else inner_over_d.to(gain.dtype)
        return grad_weight, grad_gain, None, None, None, None, None


def _gradients(
    g: Tensor,
    w: Tensor,
    gain: Tensor | None,
    divisor: Tensor,
    slope: Tensor | float,
    u: Tensor,
    v: Tensor,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of γ W / d for this rank's piece W, with the gradient G of the result.

    Args:
        g: this rank's piece of G, (len(tile.rows), len(tile.columns)).
        w: this rank's piece of the weight, of the same shape.
        gain: γ, (b,), or None for 1.
        divisor: d, (b,).
        slope: dd/dσ, (b,) or a number.
        u: (b, m).
        v: (b, n).
        tile: where this rank's piece lies in the matrices.

    Returns:
        this rank's piece of the weight's gradient, and ⟨G, W⟩/d (b,), that of γ.
    """
    inner = divisor.new_zeros(divisor.shape)
    for block, part in tile.segments():
        inner[block] = torch.vdot(g[part].reshape(-1), w[part].reshape(-1)).real
    inner_over_d = tile.reduce(inner) / divisor
    scale = 1.0 / divisor if gain is None else gain / divisor
    column = u.reshape(-1)[tile.rows, None] * tile.per_row(slope * inner_over_d * scale)
    out = g * tile.per_row(scale)
    for block, part in tile.segments():
        out[part].addmm_(column[part], v[block, None, tile.columns].conj(), alpha=-1.0)
    return out, inner_over_d


def _differentiable_gradients(
    g: Tensor,
    w: Tensor,
    gain: Tensor | None,
    divisor: Tensor,
    slope: Tensor | float,
    u: Tensor,
    v: Tensor,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Return what `_gradients` returns, by differentiable operations, with d dependent on W."""
    outer = u.reshape(-1)[tile.rows, None] * v[tile.blocks][:, tile.columns].conj()
    sigma = _sum_over_ranks(_block_inner_products(outer, w, tile), tile)
    d = divisor + slope * (sigma - sigma.detach())
    inner_over_d = _sum_over_ranks(_block_inner_products(g, w, tile), tile) / d
    scale = 1.0 / d if gain is None else gain / d
    rate = _copy_to_ranks(slope * inner_over_d * scale, tile)
    return g * tile.per_row(_copy_to_ranks(scale, tile)) - tile.per_row(rate) * outer, inner_over_d


def _block_inner_products(x: Tensor, y: Tensor, tile: Tile) -> Tensor:
    """Return this rank's summand of Re⟨X, Y⟩ for each block, (b,)."""
    rows = (x.conj() * y).sum(-1).real
    return rows.new_zeros(tile.view.matrices[0]).index_add(0, tile.blocks, rows)


# The gradient of a value that is equal on all ranks is whole on each of them; that of a value which
# a rank uses with its own piece comes from this piece alone, and has to be summed over the ranks.


def _sum_over_ranks(x: Tensor, tile: Tile) -> Tensor:
    """Return the sum, equal on all ranks, of the summands that each rank has."""
    out: Tensor = _SumOverRanks.apply(x, tile)  # type: ignore[no-untyped-call]
    return out


def _copy_to_ranks(x: Tensor, tile: Tile) -> Tensor:
    """Return a value that is equal on all ranks, for each rank to use with its own piece."""
    out: Tensor = _CopyToRanks.apply(x, tile)  # type: ignore[no-untyped-call]
    return out


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks; its backward gives each rank the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tile: Tile) -> Tensor:
        ctx.tile = tile
        return tile.reduce(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _copy_to_ranks(grad, ctx.tile), None


class _CopyToRanks(torch.autograd.Function):
    """The identity; its backward sums the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tile: Tile) -> Tensor:
        ctx.tile = tile
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_over_ranks(grad, ctx.tile), None
