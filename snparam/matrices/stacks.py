"""A weight as a stack of matrices to compute with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from snparam.matrices.sharded import ShardedStack, is_sharded
from snparam.matrices.views import View


def stack_of(
    weight: Tensor, view: View, at_least: torch.dtype = torch.float32
) -> Tensor | ShardedStack:
    """A weight as a stack of matrices, in the dtype of the arithmetic."""
    dtype = torch.promote_types(weight.dtype, at_least)
    if is_sharded(weight):
        return ShardedStack(weight, view, dtype)  # type: ignore[arg-type]
    return view.to_matrices(weight).to(dtype)


def is_finite(stack: Tensor | ShardedStack) -> bool:
    """Whether a stack has neither NaN nor inf."""
    if isinstance(stack, ShardedStack):
        return math.isfinite(stack.largest())
    return bool(torch.isfinite(stack).all())


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for a weight of the given dtype: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
