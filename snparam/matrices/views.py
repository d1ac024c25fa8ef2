"""Views, which read a weight as a stack of matrices, and layouts, which give the view of a shape.

All of snparam's mathematics is written once, for stacks of shape (b, m, n): b blocks, m rows,
n columns. A `View` turns one weight into such a stack and turns a stack back into the weight's
shape. It uses `reshape` and `permute` alone, so that for the usual memory formats nothing is
copied, and autograd, vmap and torch.compile can follow it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from snparam.matrices.products import Stack, rank_one_update, rank_one_update_by_numbers


class WeightView(Protocol):
    """A reading of a weight as a stack of matrices (b, m, n).

    A `View` finds the entries of the matrices in the weight. Other readings are linear in the
    weight too, and their matrices are known by products.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""

    @property
    def matrices(self) -> tuple[int, int, int]:
        """Shape (b, m, n) of the stack: blocks, rows, columns."""

    @property
    def is_dense(self) -> bool:
        """Whether the entries of the matrices are those of the weight, as in a `View`."""

    @property
    def input_size(self) -> tuple[int, ...] | None:
        """Lengths of the inputs that the matrices are for, None where they depend on no input."""

    @property
    def entries(self) -> View:
        """The view that reads the entries of the weight itself, in b parts; where dense, itself."""

    def order_for(self, weight: Tensor) -> tuple[int, ...]:
        """Return what the order of the columns depends on in a weight's memory format."""

    def stack(self, weight: Tensor, dtype: torch.dtype) -> Tensor | Stack:
        """Return the matrices of a weight, (b, m, n), in a dtype."""

    def inner(self, u: Tensor, weight: Tensor, v: Tensor) -> Tensor:
        """Return Re(uᴴ W v) for each block, (b,), by differentiable operations.

        Args:
            u: (b, m) or (b, 1, m).
            weight: of the view's shape.
            v: (b, n) or (b, 1, n).
        """

    def minus_outer(self, g: Tensor, u: Tensor, v: Tensor, rate: Tensor, like: Tensor) -> Tensor:
        """Return G − rate · ∂Re(uᴴ W v)/∂W; unless gradients are recorded, it may overwrite G.

        Args:
            g: G, a tensor of the weight's shape as `entries` reads it.
            u: (b, m) or (b, 1, m).
            v: (b, n) or (b, 1, n).
            rate: () for one block, (b,) for several.
            like: the weight, whose memory format the entries follow.
        """

    def minus_outer_by_numbers(
        self, matrix: Tensor, u: Tensor, v: Tensor, scale: float, rate: float, like: Tensor
    ) -> Tensor:
        """Return scale · G − rate · ∂Re(uᴴ W v)/∂W for one block, as `entries` reads its matrix."""


@dataclass(frozen=True)
class View:
    """The reading of a weight of a given shape as a stack of matrices: a reshape and a permutation.

    The weight is reshaped to `split`, whose axes fall into three runs after `order` has permuted
    them: the first `stack_axes` of them count the blocks, the next `row_axes` the rows and the rest
    the columns.

    Attributes:
        shape: shape of the weight.
        split: shape that the weight is reshaped to, mostly by splitting axes.
        order: permutation of the axes of `split` into blocks, rows, columns.
        stack_axes: number of the permuted axes that make up the blocks.
        row_axes: number of the permuted axes that make up the rows.
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
        """Read a weight as a stack of shape (b, m, n).

        Args:
            weight: of shape `shape`.
            like: tensor of the same shape whose memory format decides the order of the columns, or
                None for the weight itself.
        """
        order = self.order_for(weight if like is None else like)
        if order == self._identity_order:
            return weight.reshape(self.matrices)
        return weight.reshape(self.split).permute(order).reshape(self.matrices)

    def to_matrix(self, weight: Tensor, like: Tensor | None = None) -> Tensor:
        """Read a weight as the one matrix (m, n) of a view of one block, as `to_matrices` does."""
        if self.is_plain:
            return weight
        return self.to_matrices(weight, like).squeeze(0)

    def from_matrices(self, matrices: Tensor, like: Tensor) -> Tensor:
        """Return a stack of shape (b, m, n) in the shape and memory format of `like`.

        Args:
            matrices: (b, m, n), with the columns in the order in which `like` is read.
            like: tensor of shape `shape`.
        """
        order = self.order_for(like)
        if order == self._identity_order:
            return matrices if matrices.shape == self.shape else matrices.reshape(self.shape)
        inverse = [order.index(axis) for axis in range(len(order))]
        permuted = [self.split[axis] for axis in order]
        return matrices.reshape(permuted).permute(inverse).reshape(self.shape)

    def from_matrix(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Return the one matrix (m, n) of a view of one block as `from_matrices` does."""
        if self.is_plain:
            return matrix
        return self.from_matrices(matrix.unsqueeze(0), like)

    @cached_property
    def is_plain(self) -> bool:
        """True where a view of one block reads the weight as it is."""
        return self.shape == self.matrices[1:] and self.order == self._identity_order

    @cached_property
    def _identity_order(self) -> tuple[int, ...]:
        """Identity permutation of the axes of `split`."""
        return tuple(range(len(self.split)))

    def order_for(self, weight: Tensor) -> tuple[int, ...]:
        """Return the order of the axes of `split` in which reading `weight` copies least.

        Singular values and left singular vectors do not depend on the order of the columns, so the
        column axes are sorted as they lie in memory: a channels_last convolution needs no copy.
        """
        if self.shape != self.split or weight.is_contiguous():
            return self.order
        first = self.stack_axes + self.row_axes
        columns = sorted(self.order[first:], key=weight.stride, reverse=True)
        return (*self.order[:first], *columns)

    @property
    def is_dense(self) -> bool:
        """True: the entries of the matrices are those of the weight."""
        return True

    @property
    def input_size(self) -> None:
        """None: the matrices depend on the weight alone."""
        return None

    @property
    def entries(self) -> View:
        """The view itself."""
        return self

    def stack(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the matrices of a weight, (b, m, n), in a dtype."""
        stack = self.to_matrices(weight)
        return stack if stack.dtype == dtype else stack.to(dtype)

    def inner(self, u: Tensor, weight: Tensor, v: Tensor) -> Tensor:
        """Return Re(uᴴ W v) for each block, (b,), by differentiable operations.

        Args:
            u: (b, m) or (b, 1, m).
            weight: of the view's shape.
            v: (b, n) or (b, 1, n).
        """
        blocks, rows, columns = self.matrices
        product = self.to_matrices(weight).to(u.dtype) @ v.reshape(blocks, columns, 1)
        return (u.reshape(blocks, rows).conj() * product.squeeze(-1)).sum(-1).real

    def minus_outer(
        self,
        g: Tensor,
        u: Tensor,
        v: Tensor,
        rate: Tensor,
        like: Tensor,  # noqa: ARG002 - other views use it
    ) -> Tensor:
        """Return G − rate · u vᴴ for each block; unless gradients are recorded, it may overwrite G.

        Args:
            g: G, (b, m, n), read as `like` is.
            u: (b, m) or (b, 1, m).
            v: (b, n) or (b, 1, n).
            rate: () for one block, (b,) for several.
            like: the weight.
        """
        return rank_one_update(g, u, v, rate)

    def minus_outer_by_numbers(
        self,
        matrix: Tensor,
        u: Tensor,
        v: Tensor,
        scale: float,
        rate: float,
        like: Tensor,  # noqa: ARG002 - other views use it
    ) -> Tensor:
        """Return scale · G − rate · u vᴴ for the one matrix G (m, n) of a view of one block."""
        return rank_one_update_by_numbers(matrix, u.view(-1), v.view(-1), scale, rate)


KINDS = ("rows", "columns", "stack", "stack_columns", "transposed_conv", "bare")


@dataclass(frozen=True)
class Layout:
    """The axes of a weight that count its rows, its columns and its blocks, whatever its shape.

    Attributes:
        kind: which axes count what.

            - `"rows"`: axis 0 counts the rows, all others the columns.
            - `"columns"`: stored input-first; axis 0 counts the columns, all others the rows.
            - `"stack"`: axis 0 counts matrices, each read as by `"rows"`.
            - `"stack_columns"`: axis 0 counts matrices, each read as by `"columns"`.
            - `"transposed_conv"`: axis 1 counts the rows of each group.
            - `"bare"`: a tensor of which no layer type is known, read as by `"rows"`, or by
              `"stack"` where it has three axes or more and `blocks` is the length of axis 0.
        natural: number of blocks that the layer itself computes with (groups, gates, fused
            projections), for `blocks="auto"`; in a stack, the number in each matrix.
        groups: number of groups of a transposed convolution.
        into: shape to which the weight is reshaped first, or None for its own; one entry may be -1.
    """

    kind: str = "rows"
    natural: int = 1
    groups: int = 1
    into: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: if `kind` is unknown, or `natural` or `groups` is below 1.
        """
        if self.kind not in KINDS:
            raise ValueError(f"Layout kind={self.kind!r}: expected one of {', '.join(KINDS)}")
        for name in ("natural", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"Layout {name}={getattr(self, name)}: expected at least 1")

    def view(self, shape: Sequence[int], blocks: int | Literal["auto"] | None = 1) -> View:
        """Return the view of a weight of this `shape` in `blocks` blocks of equally many rows.

        Args:
            shape: shape of the weight.
            blocks: number of blocks; None or 1 for the fewest there can be (one, or in a stack one
                for each matrix); `"auto"` for `natural`, in a stack for each matrix.

        Raises:
            ValueError: if the rows cannot be split into `blocks` equal parts, or the shape does not
                fit `kind` or `into`.
        """
        shape = tuple(shape)
        axes = shape if self.into is None else _fill_shape(shape, self.into)
        if self.kind in ("stack", "stack_columns"):
            return self._stack(shape, axes, self._parts(axes, blocks))
        count = self.natural if blocks == "auto" else 1 if blocks is None else blocks
        if self.kind == "bare" and len(axes) >= 3 and count == axes[0] > 1:
            return self._stack(shape, axes, 1)
        if self.kind == "transposed_conv":
            return self._transposed_conv(shape, count)
        if self.kind == "columns":
            rows = _equal_parts(axes[1], count)
            split = (axes[0], count, rows, *axes[2:])
            order = (*range(1, len(split)), 0)
        else:
            rows = _equal_parts(axes[0], count)
            split = (count, rows, *axes[1:])
            order = tuple(range(len(split)))
        row_axes = len(axes) - 1 if self.kind == "columns" else 1
        return _view(shape, split, order, order[0], 1, row_axes)

    def _parts(self, axes: tuple[int, ...], blocks: int | Literal["auto"] | None) -> int:
        """Return the number of blocks into which each matrix of a stack is split."""
        if len(axes) < 3:
            raise ValueError(f"a stack of matrices has three dimensions or more, not {len(axes)}")
        if blocks == "auto":
            return self.natural
        if blocks is None or blocks == 1:
            return 1
        if blocks < 1 or blocks % axes[0]:
            raise ValueError(
                f"a stack of {axes[0]} matrices does not split into blocks={blocks} equal blocks"
            )
        return blocks // axes[0]

    def _stack(self, shape: tuple[int, ...], axes: tuple[int, ...], parts: int) -> View:
        """Return the view of (matrices, rows, columns...) or (matrices, columns, rows...)."""
        if self.kind == "stack_columns":
            rows = _equal_parts(axes[2], parts)
            split = (axes[0], axes[1], parts, rows, *axes[3:])
            order = (0, *range(2, len(split)), 1)
            return _view(shape, split, order, 2, 2, len(axes) - 2)
        rows = _equal_parts(axes[1], parts)
        split = (axes[0], parts, rows, *axes[2:])
        return _view(shape, split, tuple(range(len(split))), 1, 2, 1)

    def _transposed_conv(self, shape: tuple[int, ...], blocks: int) -> View:
        """Return the view of (in, out / groups, *kernel): rows are output channels, in order."""
        inputs, outputs, *kernel = shape
        groups = self.groups
        _equal_parts(groups * outputs, blocks)
        if blocks == 1 or groups == 1:
            rows = _equal_parts(outputs, blocks) if groups == 1 else outputs
            split = (groups, inputs // groups, blocks if groups == 1 else 1, rows, *kernel)
            order = (0, 2, 3, 1, *range(4, len(split)))
            # With one group axis 0 has length 1, so axes 0 and 2 together count the blocks; with
            # more groups and one block, all of axes 0, 2 and 3 count rows.
            has_block_axes = groups == 1
            return View(shape, split, order, 2 if has_block_axes else 0, 1 if has_block_axes else 3)
        if blocks % groups == 0:
            parts = blocks // groups
            split = (groups, inputs // groups, parts, outputs // parts, *kernel)
            return View(shape, split, (0, 2, 3, 1, *range(4, len(split))), 2, 1)
        members = _equal_parts(groups, blocks)
        split = (blocks, members, inputs // groups, outputs, *kernel)
        return View(shape, split, (0, 1, 3, 2, *range(4, len(split))), 1, 2)


def _view(
    shape: tuple[int, ...],
    split: tuple[int, ...],
    order: tuple[int, ...],
    blocks: int,
    stack_axes: int,
    row_axes: int,
) -> View:
    """Return a view that leaves out the axis `blocks` of `split` where that has length 1."""
    if split[blocks] == 1:
        order = tuple(axis - (axis > blocks) for axis in order if axis != blocks)
        split = (*split[:blocks], *split[blocks + 1 :])
        stack_axes -= 1
    return View(shape, split, order, stack_axes, row_axes)


def _fill_shape(shape: tuple[int, ...], into: tuple[int, ...]) -> tuple[int, ...]:
    """Return `into` with its -1 filled in for a weight of the given shape."""
    count, known_count = math.prod(shape), math.prod(size for size in into if size != -1)
    filled = (
        tuple(count // known_count if size == -1 else size for size in into)
        if known_count
        else into
    )
    if math.prod(filled) != count:
        raise ValueError(f"a weight of shape {shape} cannot be read as one of {into}")
    return filled


def _equal_parts(rows: int, blocks: int) -> int:
    if blocks < 1 or rows % blocks:
        raise ValueError(f"{rows} rows do not split into blocks={blocks} equal blocks")
    return rows // blocks
