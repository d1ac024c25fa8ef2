"""Stacks of matrices whose weight is a DTensor: products with shards, vectors summed over ranks.

Each rank multiplies the piece of the matrix that it has, and the ranks communicate only vectors of
as many entries as the matrix has rows or columns. No rank ever holds the weight. The functions that
communicate (`full_vector`, `reduce_jointly`, `Tile.reduce`, and `left`, `right` and `largest` of a
`ShardedStack`) are collective: all ranks of the mesh have to call them.
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
    """Return whether a weight is a DTensor."""
    # Every forward asks this of every weight, so torch.distributed.tensor is not imported for it.
    return type(weight) not in (Tensor, nn.Parameter) and hasattr(weight, "device_mesh")


def is_fully_sharded(tensor: Tensor, modules: Iterable[nn.Module]) -> bool:
    """Return whether FSDP2 manages a tensor: it is sharded, and one of `modules` is wrapped.

    FSDP2 keeps its own reference to the module and the name of each parameter, so that it loses a
    parameter that is moved elsewhere later.

    Args:
        tensor: the parameter.
        modules: the modules around it.
    """
    return is_sharded(tensor) and any(
        base.__name__ == "FSDPModule" for module in modules for base in type(module).__mro__
    )


def full_vector(vector: Tensor) -> Tensor:
    """Return a vector of a few entries, such as a gain, whole on every rank of its mesh."""
    full: Tensor = vector.full_tensor() if is_sharded(vector) else vector  # type: ignore[attr-defined]
    return full


class ShardedStack:
    """A stack of matrices (b, m, n), of which each rank has a piece.

    Attributes:
        shape: (b, m, n).
        dtype: dtype of the arithmetic.
        weight: the DTensor.
        tile: where this rank's piece lies in the matrices.
        device: device of this rank's piece.
        rows: indices of this rank's rows among all b · m, ascending.
        columns: indices of this rank's columns among all n.
        piece: this rank's entries, (len(rows), len(columns)).
    """

    least_steps, guard_vectors = 8, 1  # as dense matrices take, in `estimators.convergence`

    def __init__(self, weight: DTensor, view: View, dtype: torch.dtype) -> None:
        """Read a DTensor of the view's shape.

        Args:
            weight: of the view's shape.
            view: how the weight is read as (b, m, n).
            dtype: dtype of the arithmetic.

        Raises:
            ValueError: if a shard is not where some rows and some columns of the matrices cross, or
                the DTensor has a partial placement.
        """
        self.shape = torch.Size(view.matrices)
        self.dtype = dtype
        self.weight = weight
        self.tile = Tile(weight, view)
        local = weight.to_local()
        self.device = local.device
        self.rows, self.columns = self.tile.rows, self.tile.columns
        self.piece = self.tile.to_piece(local).to(dtype)

    def left(self, u: Tensor) -> Tensor:
        """Return U conj(W), (b, k, n), for u (b, k, m)."""
        return self.tile.reduce(self.left_summand(u))

    def right(self, v: Tensor) -> Tensor:
        """Return V Wᵀ, (b, k, m), for v (b, k, n)."""
        return self.tile.reduce(self.right_summand(v))

    def left_summand(self, u: Tensor) -> Tensor:
        """Return this rank's summand of `left`."""
        blocks, rows, columns = self.shape
        out = u.new_zeros((blocks, u.shape[1], columns))
        for block, part in self.tile.segments():
            u_entries = u[block][:, self.rows[part] - block * rows]
            out[block][:, self.columns] = u_entries @ self.piece[part].conj()
        return out

    def right_summand(self, v: Tensor) -> Tensor:
        """Return this rank's summand of `right`."""
        blocks, rows, _ = self.shape
        out = v.new_zeros((blocks, v.shape[1], rows))
        for block, part in self.tile.segments():
            product = v[block][:, self.columns] @ self.piece[part].mT
            out[block][:, self.rows[part] - block * rows] = product
        return out

    def outer(self, u: Tensor, v: Tensor) -> Tensor:
        """Return the gradient of Σ Re(uᴴ W v) with respect to the weight, sharded as that is.

        Args:
            u: (b, m).
            v: (b, n).
        """
        rows, columns = u.reshape(-1)[self.rows, None], v[self.tile.blocks][:, self.columns]
        return sharded_like(
            self.weight, self.tile.from_piece(rows * columns.conj(), self.weight.to_local())
        )

    def largest(self) -> float:
        """Return the largest magnitude of an entry on any rank; inf if any entry is NaN or inf."""
        largest = self.piece.abs().max() if self.piece.numel() else self.piece.new_zeros(()).abs()
        largest = torch.where(torch.isfinite(largest), largest, torch.inf)
        return float(self.tile.reduce(largest.reshape(1), dist.ReduceOp.MAX))

    @property
    def is_small(self) -> bool:
        """False: no rank is to hold the weight."""
        return False

    def to_dense(self) -> Tensor:
        """Refuse: no rank is to hold the weight.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError


def reduce_jointly(stacks: list[ShardedStack], parts: list[Tensor]) -> list[Tensor]:
    """Return each part summed over the ranks, all of them reduced as one vector.

    Args:
        stacks: stacks that are sharded over the same ranks.
        parts: for each stack, this rank's summand.
    """
    flat = stacks[0].tile.reduce(torch.cat([part.reshape(-1) for part in parts]))
    sums = torch.split(flat, [part.numel() for part in parts])
    return [total.view(part.shape) for total, part in zip(sums, parts, strict=True)]


class Tile:
    """The place of this rank's shard in the matrices, and the reduction over the ranks.

    Attributes:
        view: how the weight is read as (b, m, n).
        groups: process groups of the mesh dimensions that shard the weight.
        axes: axes of the weight, first those that count blocks and rows, then those of columns.
        rows: indices of this rank's rows among all b · m, ascending.
        columns: indices of this rank's columns among all n.
    """

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
        location = _locate_shard(
            view.shape, view.split, view.order, view.stack_axes, view.row_axes, mesh, placements
        )
        row_axes, column_axes, shape, offset, self._segments = location
        self.axes = (*row_axes, *column_axes)
        self.rows = _indices(view.shape, shape, offset, row_axes, device)
        self.columns = _indices(view.shape, shape, offset, column_axes, device)

    def to_piece(self, local: Tensor) -> Tensor:
        """Return this rank's shard as a matrix (len(rows), len(columns))."""
        return local.permute(self.axes).reshape(len(self.rows), len(self.columns))

    def from_piece(self, piece: Tensor, like: Tensor) -> Tensor:
        """Return a matrix (len(rows), len(columns)) in the shape of a shard, that of `like`."""
        permuted = [like.shape[axis] for axis in self.axes]
        inverse = [self.axes.index(axis) for axis in range(len(self.axes))]
        return piece.reshape(permuted).permute(inverse).contiguous()

    def segments(self) -> list[tuple[int, slice]]:
        """Return the blocks that this rank has rows of, each with its slice of `rows`."""
        return [(block, slice(start, end)) for block, start, end in self._segments]

    def reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduce a tensor in place over all ranks whose shards differ, and return it."""
        for group in self.groups:
            dist.all_reduce(x, op, group=group)
        return x

    def per_row(self, x: Tensor) -> Tensor:
        """Return the entry of x (b,) that belongs to each of this rank's rows, (len(rows), 1)."""
        return x[self.blocks, None]

    @property
    def blocks(self) -> Tensor:
        """Index of the block of each of this rank's rows, (len(rows),)."""
        return self.rows // self.view.matrices[1]


@torch_private.constant_while_compiling
def _locate_shard(
    shape: tuple[int, ...],
    split: tuple[int, ...],
    order: tuple[int, ...],
    stack_axes: int,
    row_axes: int,
    mesh: Any,
    placements: Any,
) -> tuple[Any, ...]:
    """Return where this rank's shard lies in a weight and in the matrices of its view.

    The view comes as its attributes, and the result is plain numbers, because torch.compile takes
    both for constants.

    Returns:
        the axes of the weight that count blocks and rows, those that count columns, the shard's
        shape and offset, and, for each block that the shard has rows of, (block, start, end), where
        start and end delimit them among the shard's rows.
    """
    view = View(shape, split, order, stack_axes, row_axes)
    axes_of_rows, axes_of_columns = _axes_of(view)
    local, offset = torch_private.local_shape_and_offset(shape, mesh, placements)
    rows = _indices(shape, local, offset, axes_of_rows, torch.device("cpu"))
    bounds = torch.arange(view.matrices[0] + 1) * view.matrices[1]
    pairs = enumerate(pairwise(torch.searchsorted(rows, bounds).tolist()))
    segments = tuple((block, *pair) for block, pair in pairs if pair[0] < pair[1])
    return tuple(axes_of_rows), tuple(axes_of_columns), local, offset, segments


def _axes_of(view: View) -> tuple[list[int], list[int]]:
    """Return the axes of a weight that count blocks and rows, and those that count columns.

    Raises:
        ValueError: if an axis counts both, as that of a grouped transposed convolution does, or the
            axes do not give the view's rows.
    """
    row_axes: list[int] = []
    column_axes: list[int] = []
    column_start = view.stack_axes + view.row_axes
    in_rows = set(view.order[:column_start])
    split_axis = 0
    for axis, length in enumerate(view.shape):
        parts, size = [], 1
        while split_axis < len(view.split) and (size < length or view.split[split_axis] == 1):
            size *= view.split[split_axis]
            parts.append(split_axis)
            split_axis += 1
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
    """Return the flattened indices, over some axes of a weight, that a shard covers.

    Args:
        shape: shape of the weight.
        local: shape of the shard.
        offset: where in the weight the shard begins.
        axes: the axes of the weight to flatten.
        device: device of the result.
    """
    index = torch.zeros(1, dtype=torch.long, device=device)
    for axis in axes:
        axis_indices = torch.arange(offset[axis], offset[axis] + local[axis], device=device)
        index = (index[:, None] * shape[axis] + axis_indices).reshape(-1)
    return index


def sharded_like(weight: DTensor, local: Tensor) -> DTensor:
    """Return the DTensor that has `local` as this rank's shard, placed as the weight is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
