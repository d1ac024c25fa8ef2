"""The stack of matrices that the arithmetic uses for a weight: dense, sharded, or an operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from snparam.matrices.products import Stack
from snparam.matrices.sharded import ShardedStack, is_sharded
from snparam.matrices.views import WeightView

# Why a sharded weight has no operator, and what to do.
OPERATOR_OF_SHARDS = (
    "it is sharded, and a convolution needs its whole weight",
    "leave it unsharded, or pass norm='matrix'",
)


def stack_of(
    weight: Tensor, view: WeightView, at_least: torch.dtype = torch.float32
) -> Tensor | Stack:
    """Return a weight as a stack of matrices, in the dtype of the arithmetic.

    Args:
        weight: of the view's shape; a DTensor becomes a `ShardedStack`.
        view: how the weight is read as (b, m, n).
        at_least: dtype that the weight's own is promoted with; float32 keeps half precision out of
            the arithmetic.

    Raises:
        ValueError: if the weight is sharded, and the view is no `View` or cannot follow the shards.
    """
    dtype = torch.promote_types(weight.dtype, at_least)
    if not is_sharded(weight):
        return view.stack(weight, dtype)
    if not view.is_dense:
        raise ValueError("; ".join(OPERATOR_OF_SHARDS))
    return ShardedStack(weight, view.entries, dtype)  # type: ignore[arg-type]


def is_finite(stack: Tensor | Stack) -> bool:
    """Return whether a stack has neither NaN nor inf (a collective call for a sharded one)."""
    if not isinstance(stack, Tensor):
        return math.isfinite(stack.largest())
    return bool(torch.isfinite(stack).all())


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic for a weight of the given dtype: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
