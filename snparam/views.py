"""How a weight is read as a stack of matrices, and back.

All of snparam's mathematics is written once, for stacks of shape (b, m, n): b blocks, m rows,
n columns. A `View` turns one weight into such a stack and turns a stack back into the weight's
shape. It is made of `reshape` and `permute` alone, so that for the usual memory formats nothing is
copied, and autograd, vmap and compilation see through it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True)
class View:
    """One way of reading a weight of a given shape as a stack of matrices.

    The weight is reshaped to `split`, whose axes fall into three runs after `order` has permuted
    them: the first `stack_axes` of them count the blocks, the next `row_axes` the rows and the rest
    the columns.

    Attributes:
        shape: shape of the weight.
        split: shape after splitting axes, with the same number of entries.
        order: permutation of the axes of `split` into blocks, rows, columns.
        stack_axes: how many of the permuted axes make up the blocks.
        row_axes: how many of the permuted axes make up the rows.
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    stack_axes: int
    row_axes: int

    @cached_property
    def matrices(self) -> tuple[int, int, int]:
        """Shape (b, m, n) of the stack: blocks, rows, columns."""
        permuted = [self.split[axis] for axis in self.order]
        rows = self.stack_axes + self.row_axes
        return (
            math.prod(permuted[: self.stack_axes]),
            math.prod(permuted[self.stack_axes : rows]),
            math.prod(permuted[rows:]),
        )

    def to_matrices(self, weight: Tensor, like: Tensor | None = None) -> Tensor:
        """Read a weight of shape `shape` as a stack of shape (b, m, n).

        With `like`, the columns are in the order in which that tensor is read.
        """
        order = self.order_for(weight if like is None else like)
        if order == self._in_place:
            return weight.reshape(self.matrices)
        return weight.reshape(self.split).permute(order).reshape(self.matrices)

    def to_matrix(self, weight: Tensor, like: Tensor | None = None) -> Tensor:
        """`to_matrices` for a view of one block: (m, n)."""
        if weight.ndim == 2 and self.order == self._in_place:
            return weight
        return self.to_matrices(weight, like).squeeze(0)

    def from_matrices(self, matrices: Tensor, like: Tensor) -> Tensor:
        """Write a stack of shape (b, m, n) back in the shape and memory format of `like`."""
        order = self.order_for(like)
        if order == self._in_place:
            return matrices if matrices.shape == self.shape else matrices.reshape(self.shape)
        inverse = [order.index(axis) for axis in range(len(order))]
        permuted = [self.split[axis] for axis in order]
        return matrices.reshape(permuted).permute(inverse).reshape(self.shape)

    @cached_property
    def _in_place(self) -> tuple[int, ...]:
        """The order that permutes nothing."""
        return tuple(range(len(self.split)))

    def order_for(self, weight: Tensor) -> tuple[int, ...]:
        """The order of the axes in which reading `weight` copies least.

        Singular values and left singular vectors do not depend on the order of the columns, so the
        column axes are taken as they lie in memory: a channels_last convolution needs no copy.
        """
        if weight.shape != self.split or weight.is_contiguous():
            return self.order
        first = self.stack_axes + self.row_axes
        columns = sorted(self.order[first:], key=weight.stride, reverse=True)
        return (*self.order[:first], *columns)


@dataclass(frozen=True)
class Layout:
    """Where the rows of a weight are, whatever its shape.

    Attributes:
        kind: `"rows"` (axis 0 counts the rows), `"transposed_conv"` (axis 1 does, per group),
            `"columns"` (a 2-D weight stored input-first: axis 1 does) or `"bare"` (as `"rows"`;
            but split into as many blocks as axis 0 is long, it is a stack of tensors, each read by
            its own axis 0).
        natural: the number of blocks that the layer itself computes with (groups, gates, fused
            projections), for `blocks="auto"`.
        groups: groups of a transposed convolution.
    """

    kind: str = "rows"
    natural: int = 1
    groups: int = 1

    def view(self, shape: Sequence[int], blocks: int = 1) -> View:
        """The view of a weight of this `shape` in `blocks` blocks of equally many rows.

        Raises:
            ValueError: if the rows cannot be split into `blocks` equal parts.
        """
        shape = tuple(shape)
        if self.kind == "bare" and len(shape) >= 3 and blocks == shape[0] > 1:
            return View(shape, shape, tuple(range(len(shape))), stack_axes=1, row_axes=1)
        if self.kind == "transposed_conv":
            return self._transposed_conv(shape, blocks)
        row_axis = 1 if self.kind == "columns" else 0
        rows = _equal_parts(shape[row_axis], blocks)
        others = [axis for axis in range(len(shape)) if axis != row_axis]
        if blocks == 1:
            return View(shape, shape, (row_axis, *others), stack_axes=0, row_axes=1)
        split = (*shape[:row_axis], blocks, rows, *shape[row_axis + 1 :])
        columns = [axis if axis < row_axis else axis + 1 for axis in others]
        return View(shape, split, (row_axis, row_axis + 1, *columns), stack_axes=1, row_axes=1)

    def _transposed_conv(self, shape: tuple[int, ...], blocks: int) -> View:
        """(in, out / groups, *kernel) read with one row per output channel, groups in order."""
        inputs, outputs, *kernel = shape
        groups = self.groups
        _equal_parts(groups * outputs, blocks)
        if blocks == 1 or groups == 1:
            rows = _equal_parts(outputs, blocks) if groups == 1 else outputs
            split = (groups, inputs // groups, blocks if groups == 1 else 1, rows, *kernel)
            order = (0, 2, 3, 1, *range(4, len(split)))
            # With one group axis 0 has length 1, so axes 0 and 2 together count the blocks; with
            # more groups and one block, all of axes 0, 2 and 3 count rows.
            stacked = groups == 1
            return View(shape, split, order, 2 if stacked else 0, 1 if stacked else 3)
        if blocks % groups == 0:
            parts = blocks // groups
            split = (groups, inputs // groups, parts, outputs // parts, *kernel)
            return View(shape, split, (0, 2, 3, 1, *range(4, len(split))), 2, 1)
        members = _equal_parts(groups, blocks)
        split = (blocks, members, inputs // groups, outputs, *kernel)
        return View(shape, split, (0, 1, 3, 2, *range(4, len(split))), 1, 2)


def _equal_parts(rows: int, blocks: int) -> int:
    if blocks < 1 or rows % blocks:
        raise ValueError(f"{rows} rows do not split into blocks={blocks} equal blocks")
    return rows // blocks
