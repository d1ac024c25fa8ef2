"""Weights that are DTensors: products on the shards, and vectors reduced between ranks.

Knows views and `torch.distributed.tensor`, not modules. A rank multiplies the piece of the matrix
that it has, and what is communicated is vectors of as many entries as the matrix has rows or
columns. No rank ever holds the weight. Every function here is collective: all ranks of the mesh
have to call it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from snparam.matrices import torch_private
from snparam.matrices.views import View

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is a DTensor."""
    # Asked of every weight in every forward, so without importing torch.distributed.tensor.
    return type(weight) not in (Tensor, nn.Parameter) and hasattr(weight, "device_mesh")


def is_fully_sharded(tensor: Tensor, modules: Iterable[nn.Module]) -> bool:
    """Whether FSDP2 has a tensor in hand: sharded, with one of the modules around it wrapped.

    FSDP2 keeps its own reference to the module and the name of each parameter, so that a
    parameter that moves elsewhere later is lost to it.
    """
    return is_sharded(tensor) and any(
        base.__name__ == "FSDPModule" for module in modules for base in type(module).__mro__
    )


def gathered(vector: Tensor) -> Tensor:
    """A vector of a few entries, such as a gain, whole on every rank that has a shard of it."""
    whole: Tensor = vector.full_tensor() if is_sharded(vector) else vector  # type: ignore[attr-defined]
    return whole


class ShardedStack:
    """A stack of matrices (b, m, n), of which each rank has a piece.

    Attributes:
        shape: (b, m, n).
        dtype: of the arithmetic.
        device: of this rank's piece.
        rows: indices of this rank's rows among all b · m, ascending.
        columns: indices of this rank's columns among all n.
        piece: this rank's entries, (len(rows), len(columns)).
    """

    def __init__(self, weight: DTensor, view: View, dtype: torch.dtype) -> None:
        """Read a DTensor of the view's shape.

        Raises:
            ValueError: if the shards are no pieces of rows and columns of the matrices.
        """
        self.shape = torch.Size(view.matrices)
        self.dtype = dtype
        self.weight = weight
        self.tile = Tile(weight, view)
        local = weight.to_local()
        self.device = local.device
        self.rows, self.columns = self.tile.rows, self.tile.columns
        self.piece = self.tile.to_piece(local).to(dtype)

    def is_complex(self) -> bool:
        """Whether the entries are complex."""
        return self.dtype.is_complex

    def left(self, u: Tensor) -> Tensor:
        """U conj(W), (b, k, m) to (b, k, n)."""
        return self.tile.reduce(self.left_here(u))

    def right(self, v: Tensor) -> Tensor:
        """V Wᵀ, (b, k, n) to (b, k, m)."""
        return self.tile.reduce(self.right_here(v))

    def left_here(self, u: Tensor) -> Tensor:
        """This rank's summand of `left`."""
        blocks, rows, columns = self.shape
        out = u.new_zeros((blocks, u.shape[1], columns))
        for block, part in self.tile.segments():
            here = u[block][:, self.rows[part] - block * rows]
            out[block][:, self.columns] = here @ self.piece[part].conj()
        return out

    def right_here(self, v: Tensor) -> Tensor:
        """This rank's summand of `right`."""
        blocks, rows, _ = self.shape
        out = v.new_zeros((blocks, v.shape[1], rows))
        for block, part in self.tile.segments():
            here = v[block][:, self.columns] @ self.piece[part].mT
            out[block][:, self.rows[part] - block * rows] = here
        return out

    def outer(self, u: Tensor, v: Tensor) -> Tensor:
        """The gradient of Σ Re(uᴴ W v), (b, m) and (b, n), for the weight, sharded as it is."""
        rows, columns = u.reshape(-1)[self.rows, None], v[self.tile.blocks][:, self.columns]
        return placed_as(
            self.weight, self.tile.from_piece(rows * columns.conj(), self.weight.to_local())
        )

    def largest(self) -> float:
        """The largest magnitude of an entry; NaN or inf if there is one anywhere."""
        largest = self.piece.abs().max() if self.piece.numel() else self.piece.new_zeros(()).abs()
        largest = torch.where(torch.isfinite(largest), largest, torch.inf)
        return float(self.tile.reduce(largest.reshape(1), dist.ReduceOp.MAX))


def reduced_together(stacks: list[ShardedStack], parts: list[Tensor]) -> list[Tensor]:
    """Each part summed over its stack's ranks; the stacks are sharded over the same ranks."""
    flat = stacks[0].tile.reduce(torch.cat([part.reshape(-1) for part in parts]))
    sums = torch.split(flat, [part.numel() for part in parts])
    return [total.view(part.shape) for total, part in zip(sums, parts, strict=True)]


class Tile:
    """Where this rank's shard lies in the matrices, and how to reduce over the ranks."""

    def __init__(self, weight: DTensor, view: View) -> None:
        self.view = view
        mesh, placements = weight.device_mesh, weight.placements
        for placement in placements:
            if placement.is_partial():
                raise ValueError(f"its placement is {placement}; redistribute it to shards first")
        self.groups: list[dist.ProcessGroup] = [
            mesh.get_group(dim)
            for dim, placement in enumerate(placements)
            if not placement.is_replicate()
        ]
        device = weight.to_local().device
        at = _place(
            view.shape, view.split, view.order, view.stack_axes, view.row_axes, mesh, placements
        )
        row_axes, column_axes, shape, offset, self._segments = at
        self.axes = (*row_axes, *column_axes)
        self.rows = _indices(view.shape, shape, offset, row_axes, device)
        self.columns = _indices(view.shape, shape, offset, column_axes, device)

    def to_piece(self, local: Tensor) -> Tensor:
        """This rank's shard as a matrix of its rows and columns."""
        return local.permute(self.axes).reshape(len(self.rows), len(self.columns))

    def from_piece(self, piece: Tensor, like: Tensor) -> Tensor:
        """A matrix of this rank's rows and columns as a shard."""
        permuted = [like.shape[axis] for axis in self.axes]
        inverse = [self.axes.index(axis) for axis in range(len(self.axes))]
        return piece.reshape(permuted).permute(inverse).contiguous()

    def segments(self) -> list[tuple[int, slice]]:
        """The blocks this rank has rows of, and which of its rows they are."""
        return [(block, slice(start, end)) for block, start, end in self._segments]

    def reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduce over all ranks that have different shards."""
        for group in self.groups:
            dist.all_reduce(x, op, group=group)
        return x

    def per_row(self, x: Tensor) -> Tensor:
        """For each of this rank's rows, the entry of its block, (b,) to (len(rows), 1)."""
        return x[self.blocks, None]

    @property
    def blocks(self) -> Tensor:
        """The block of each of this rank's rows."""
        return self.rows // self.view.matrices[1]


@torch_private.constant_while_compiling
def _place(
    shape: tuple[int, ...],
    split: tuple[int, ...],
    order: tuple[int, ...],
    stack_axes: int,
    row_axes: int,
    mesh: Any,
    placements: Any,
) -> tuple[Any, ...]:
    """Where a rank's shard of the weight of a view lies.

    In plain numbers throughout, as compilers want constants.

    Returns:
        The axes of the weight that count blocks and rows, those that count columns, the shard's
        shape and offset, and for each block that it has rows of, (block, start, end) among them.
    """
    view = View(shape, split, order, stack_axes, row_axes)
    rows_on, columns_on = _axes_of(view)
    local, offset = torch_private.local_shape_and_offset(shape, mesh, placements)
    rows = _indices(shape, local, offset, rows_on, torch.device("cpu"))
    bounds = torch.arange(view.matrices[0] + 1) * view.matrices[1]
    pairs = enumerate(pairwise(torch.searchsorted(rows, bounds).tolist()))
    segments = tuple((block, *pair) for block, pair in pairs if pair[0] < pair[1])
    return tuple(rows_on), tuple(columns_on), local, offset, segments


def _axes_of(view: View) -> tuple[list[int], list[int]]:
    """The axes of a weight that count blocks and rows, and those that count columns.

    Raises:
        ValueError: if an axis counts both, as that of a grouped transposed convolution does.
    """
    row_axes: list[int] = []
    column_axes: list[int] = []
    first = view.stack_axes + view.row_axes
    in_rows = set(view.order[:first])
    split = 0
    for axis, length in enumerate(view.shape):
        parts, size = [], 1
        while split < len(view.split) and (size < length or view.split[split] == 1):
            size *= view.split[split]
            parts.append(split)
            split += 1
        kinds = {part in in_rows for part in parts if view.split[part] > 1}
        if len(kinds) > 1:
            raise ValueError(
                f"sharded, and axis {axis} of it counts rows and columns of a grouped layer; "
                "leave it unsharded"
            )
        (row_axes if kinds == {True} else column_axes).append(axis)
    if prod(view.shape[axis] for axis in row_axes) != prod(view.matrices[:2]):
        raise ValueError("sharded, and read in a way that shards cannot follow; leave it unsharded")
    return row_axes, column_axes


def _indices(
    shape: tuple[int, ...],
    local: tuple[int, ...],
    offset: tuple[int, ...],
    axes: list[int],
    device: torch.device,
) -> Tensor:
    """Which of the flattened indices of some axes a shard covers."""
    index = torch.zeros(1, dtype=torch.long, device=device)
    for axis in axes:
        along = torch.arange(offset[axis], offset[axis] + local[axis], device=device)
        index = (index[:, None] * shape[axis] + along).reshape(-1)
    return index


def placed_as(weight: DTensor, local: Tensor) -> DTensor:
    """A DTensor of this rank's shard, placed as a weight of the same shape is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
