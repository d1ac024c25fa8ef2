"""The stack of matrices, dense or sharded, that the arithmetic uses for a weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from snparam.matrices.sharded import ShardedStack, is_sharded
from snparam.matrices.views import View


def stack_of(
    weight: Tensor, view: View, at_least: torch.dtype = torch.float32
) -> Tensor | ShardedStack:
    """Return a weight as a stack of matrices, in the dtype of the arithmetic.

    Args:
        weight: of the view's shape; a DTensor becomes a `ShardedStack`.
        view: how the weight is read as (b, m, n).
        at_least: dtype that the weight's own is promoted with; float32 keeps half precision out of
            the arithmetic.

    Raises:
        ValueError: if the weight is sharded in a way that the view cannot follow.
    """
    dtype = torch.promote_types(weight.dtype, at_least)
    if is_sharded(weight):
        return ShardedStack(weight, view, dtype)  # type: ignore[arg-type]
    stack = view.to_matrices(weight)
    return stack if stack.dtype == dtype else stack.to(dtype)


def is_finite(stack: Tensor | ShardedStack) -> bool:
    """Return whether a stack has neither NaN nor inf (a collective call for a sharded one)."""
    if isinstance(stack, ShardedStack):
        return math.isfinite(stack.largest())
    return bool(torch.isfinite(stack).all())


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic for a weight of the given dtype: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
