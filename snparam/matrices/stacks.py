"""A weight as a stack of matrices to compute with, and what a step on it finds."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from snparam.matrices import linalg
from snparam.matrices.sharded import ShardedStack, is_sharded
from snparam.matrices.views import View


class Estimate(NamedTuple):
    """What a step finds: u (b, k, m), v (b, k, n) and sv (b, k)."""

    u: Tensor
    v: Tensor
    sv: Tensor

    def first(self) -> tuple[Tensor, Tensor, Tensor]:
        """u (b, m), v (b, n) and σ (b,) of the largest singular values."""
        return self.u[:, 0], self.v[:, 0], self.sv[:, 0]


def stack_of(
    weight: Tensor, view: View, at_least: torch.dtype = torch.float32
) -> Tensor | ShardedStack:
    """A weight as a stack of matrices, in the dtype of the arithmetic."""
    dtype = torch.promote_types(weight.dtype, at_least)
    if is_sharded(weight):
        return ShardedStack(weight, view, dtype)  # type: ignore[arg-type]
    return view.to_matrices(weight).to(dtype)


def steps_from_u(weight: Tensor, view: View, u: Tensor, steps: int, eps: float) -> Estimate:
    """What so many steps find from a u (b, k, m)."""
    matrices = stack_of(weight, view)
    u = u.to(matrices.dtype)
    for _ in range(steps):
        u, v, sv = linalg.power_step(matrices, u, eps)
    return Estimate(u, v, sv)


def step_from_v(weight: Tensor, view: View, v: Tensor, eps: float) -> Estimate:
    """What the second half of a step finds from a v: (b, k, n), or (n,) of any length."""
    matrices = stack_of(weight, view)
    vs = v.view(matrices.shape[0], -1, matrices.shape[2])
    if v.ndim == 1:
        vs = vs / torch.linalg.vector_norm(vs, dim=-1, keepdim=True)
    return Estimate(*linalg.finish_step(matrices, vs, eps))


def is_finite(stack: Tensor | ShardedStack) -> bool:
    """Whether a stack has neither NaN nor inf."""
    if isinstance(stack, ShardedStack):
        return math.isfinite(stack.largest())
    return bool(torch.isfinite(stack).all())


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for a weight of the given dtype: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
