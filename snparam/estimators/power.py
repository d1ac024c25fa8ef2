"""Block power iteration, the classic method of finding σ.

Source: Miyato et al. 2018 for one vector; Brock, Donahue and Simonyan 2019 for several, which they
compute one vector after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from snparam.estimators import convergence
from snparam.estimators.estimate import Estimate, Estimator, register_estimator
from snparam.matrices.orthonormalisation import (
    orthonormal_rows,
    orthonormalise,
    plain_norm,
    positive_mask,
    row_norms,
    scaled_rows,
    unit_rows,
)
from snparam.matrices.products import Stack, left_product, right_product
from snparam.matrices.sharded import ShardedStack, reduce_jointly


class BlockIteration(Estimator):
    """An estimator whose step computes V = orth(U W) and T = V Wᵀ, and an estimate from T.

    A step takes two products whatever k is. Dense stacks that move together are concatenated to one
    stack, and sharded ones have their vectors reduced together.
    """

    side: Literal["below", "exact", "above"] = "below"

    def start(self, stack: Tensor | Stack, k: int) -> tuple[Tensor, Tensor]:
        """Return converged u and sv, the same in every run."""
        return convergence.converged(stack, k)

    def finish(self, t: Tensor, v: Tensor, previous_u: Tensor, eps: float) -> Estimate:
        """Return the estimate of a step, from its T = V Wᵀ.

        Args:
            t: T, (b, k, m); it may be overwritten.
            v: (b, k, n), orthonormal rows.
            previous_u: the u (b, k, m) that the step began with; a matrix of zeros, or with NaN or
                inf, keeps it.
            eps: floor under the norms that are divided by.
        """
        raise NotImplementedError

    def step(self, stack: Tensor | Stack, u: Tensor, eps: float) -> Estimate:
        """Return the estimate after one step."""
        v = right_vectors(left_product(stack, u), eps)
        return self.finish(right_product(stack, v), v, u, eps)

    def read(self, stack: Tensor | Stack, u: Tensor, eps: float) -> Estimate:
        """Return the estimate after one step from a state, which does not move."""
        return self.step(stack, u, eps)

    def move(
        self, stacks: Sequence[Tensor | Stack], us: Sequence[Tensor], steps: int, eps: float
    ) -> list[Estimate]:
        """Return, for each of several stacks, the estimate after several steps."""
        sharded = [stack for stack in stacks if isinstance(stack, ShardedStack)]
        if len(sharded) > 1:
            return self._move_sharded(sharded, list(us), steps, eps)
        stack, u = stacks[0], us[0]
        if len(stacks) > 1:
            stack, u = torch.cat([*stacks]), torch.cat([*us])  # type: ignore[list-item]
        for _ in range(steps):
            estimate = self.step(stack, u, eps)
            u = estimate.u
        if len(stacks) == 1:
            return [estimate]
        blocks = stacks[0].shape[0]
        parts = [torch.split(part, blocks) for part in estimate]
        if blocks == 1:
            parts[3] = tuple(sigma.view(()) for sigma in parts[3])
        return [Estimate(*part) for part in zip(*parts, strict=True)]

    def _move_sharded(
        self, stacks: list[ShardedStack], us: list[Tensor], steps: int, eps: float
    ) -> list[Estimate]:
        """Return the estimate for each stack, with two reductions a step for all of them.

        The stacks are sharded over the same ranks. A reduction takes no longer than its latency
        until the vectors have millions of entries.
        """
        for _ in range(steps):
            xs = reduce_jointly(
                stacks, [s.left_summand(u) for s, u in zip(stacks, us, strict=True)]
            )
            vs = [right_vectors(x, eps) for x in xs]
            ts = reduce_jointly(
                stacks, [s.right_summand(v) for s, v in zip(stacks, vs, strict=True)]
            )
            estimates = [self.finish(t, v, u, eps) for t, v, u in zip(ts, vs, us, strict=True)]
            us = [estimate.u for estimate in estimates]
        return estimates


class PowerIteration(BlockIteration):
    """The block power iteration: U = orth(T) and sv = rowwise ⟨T, U⟩.

    Its numbers are those of the classic form, which orthogonalises one vector after another.
    """

    name = "power"

    def finish(self, t: Tensor, v: Tensor, previous_u: Tensor, eps: float) -> Estimate:
        """Return the estimate of a step, with U = orth(T)."""
        if t.shape[1] > 1:
            u, sv = orthonormalise(t, eps)
            sigma = sv[0, 0] if len(sv) == 1 else sv[:, 0]
            usable = positive_mask(sigma)
            if usable is None:
                return Estimate(u, v, sv, sigma)
            u = torch.where(usable.view(-1, 1, 1), u, previous_u)
            return Estimate(u, v, sv, torch.where(usable, sigma, 1.0))
        norm = plain_norm(t, eps)
        if norm is not None:
            return Estimate(t.div_(norm), v, norm.view(1, 1), norm)
        norm = row_norms(t)
        usable = positive_mask(norm)
        length = norm
        if usable is not None:
            length = torch.where(usable, norm, 1.0)
            t = torch.where(usable, t, previous_u)
        u = scaled_rows(t, length, eps)
        if eps > 0:
            floored = (length / eps).clamp_max(1.0)
            norm, length = norm * floored, length * floored
        sigma = length.view(()) if len(t) == 1 else length.view(-1).to(v.real.dtype)
        return Estimate(u, v, norm.squeeze(-1).to(v.real.dtype), sigma)

    def read(self, stack: Tensor | Stack, u: Tensor, eps: float) -> Estimate:
        """Return the estimate of the first vectors alone, which do not depend on the others."""
        return self.step(stack, u[:, :1], eps)


def right_vectors(x: Tensor, eps: float = 0.0) -> Tensor:
    """Return the v (b, k, n) of a step, from X = U conj(W), which may be overwritten.

    Where u is orthogonal to every column of W, X is zero, and the classic layer ends in NaN. Here v
    becomes another unit vector, from which the iteration recovers; only a zero W keeps σ = 0.
    """
    if x.shape[1] > 1:
        return orthonormal_rows(x, eps)
    return unit_rows(x, eps, fill=x.shape[2] ** -0.5)


POWER = PowerIteration()
register_estimator(POWER)


def power_step(stack: Tensor | Stack, u: Tensor, eps: float = 0.0) -> Estimate:
    """Return the estimate after one step of block power iteration.

    A zero matrix keeps its u: from there the iteration finds what a layer that starts at zero
    learns first. To that a u of zeros, or any other arbitrary u, might be orthogonal up to
    rounding.

    Args:
        stack: (b, m, n), float32 or wider.
        u: (b, k, m), of any length, with k ≤ min(m, n).
        eps: floor under the norms that are divided by. The classic layer has 1e-12, an absolute
            number, which makes the iteration collapse for matrices of σ below it; a norm of exactly
            zero needs no floor here, so that the default 0 is right at every scale.
    """
    return POWER.step(stack, u, eps)
