"""Block power iteration, the classic way to find σ.

Source: Miyato et al. 2018 for one vector; Brock, Donahue and Simonyan 2019 for several, there
written vector by vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snparam.estimators import convergence
from snparam.estimators.estimate import Estimate, Estimator, register_estimator
from snparam.matrices.orthonormalisation import (
    orthonormal_rows,
    orthonormalise,
    positive,
    row_norms,
    scaled_rows,
    unit_rows,
)
from snparam.matrices.products import Stack, left_product, right_product
from snparam.matrices.sharded import ShardedStack, reduced_together


class BlockIteration(Estimator):
    """An estimator whose step is V = orth(U W), T = V Wᵀ, and something made of T.

    Two products whatever k is. Stacks that are moved together become one stack, and of stacks that
    are sharded the vectors of all are reduced at once.
    """

    side = "below"

    def start(self, stack: Tensor | Stack, k: int) -> tuple[Tensor, Tensor]:
        """Return u and sv, converged, deterministically."""
        return convergence.converged(stack, k)

    def finish(self, t: Tensor, v: Tensor, before: Tensor, eps: float) -> Estimate:
        """Return what a step finds, from T = V Wᵀ (b, k, m), which may be overwritten.

        Args:
            t: (b, k, m).
            v: (b, k, n), orthonormal rows.
            before: the u (b, k, m) that the step began with, which a matrix of zeros, or with NaN
                or inf, keeps.
            eps: floor under norms.
        """
        raise NotImplementedError

    def step(self, stack: Tensor | Stack, u: Tensor, eps: float) -> Estimate:
        """Return what one step finds."""
        v = right_vectors(left_product(stack, u), eps)
        return self.finish(right_product(stack, v), v, u, eps)

    def read(self, stack: Tensor | Stack, u: Tensor, eps: float) -> Estimate:
        """Return what one step finds that is not stored."""
        return self.step(stack, u, eps)

    def move(
        self, stacks: Sequence[Tensor | Stack], us: Sequence[Tensor], steps: int, eps: float
    ) -> list[Estimate]:
        """Return what so many steps find."""
        sharded = [stack for stack in stacks if isinstance(stack, ShardedStack)]
        if len(sharded) > 1:
            return self._move_sharded(sharded, list(us), steps, eps)
        if len(stacks) == 1:
            return [self._moved(stacks[0], us[0], steps, eps)]
        dense = [stack for stack in stacks if isinstance(stack, Tensor)]
        found = self._moved(torch.cat(dense), torch.cat(list(us)), steps, eps)
        blocks = dense[0].shape[0]
        parts = [torch.split(part, blocks) for part in found]
        if blocks == 1:
            parts[3] = tuple(sigma.view(()) for sigma in parts[3])
        return [Estimate(*part) for part in zip(*parts, strict=True)]

    def _moved(self, stack: Tensor | Stack, u: Tensor, steps: int, eps: float) -> Estimate:
        for _ in range(steps):
            found = self.step(stack, u, eps)
            u = found.u
        return found

    def _move_sharded(
        self, stacks: list[ShardedStack], us: list[Tensor], steps: int, eps: float
    ) -> list[Estimate]:
        """Move with two reductions a step for all stacks, which are sharded over the same ranks.

        A reduction takes as long as its latency until the vectors are millions of entries long.
        """
        for _ in range(steps):
            xs = reduced_together(stacks, [s.left_here(u) for s, u in zip(stacks, us, strict=True)])
            vs = [right_vectors(x, eps) for x in xs]
            ts = reduced_together(
                stacks, [s.right_here(v) for s, v in zip(stacks, vs, strict=True)]
            )
            found = [self.finish(t, v, u, eps) for t, v, u in zip(ts, vs, us, strict=True)]
            us = [each.u for each in found]
        return found


class PowerIteration(BlockIteration):
    """U = orth(T), sv = rowwise ⟨T, U⟩: what the sequential Gram-Schmidt form finds."""

    name = "power"

    def finish(self, t: Tensor, v: Tensor, before: Tensor, eps: float) -> Estimate:
        """Return u, v and sv of a step."""
        if t.shape[1] > 1:
            u, sv = orthonormalise(t, eps)
            usable = positive(sv[:, :1].unsqueeze(-1))
            u = u if usable is None else torch.where(usable, u, before)
            return Estimate.of(u, v, sv)
        norm = row_norms(t)
        usable = positive(norm)
        length = norm
        if usable is not None:
            length = torch.where(usable, norm, 1.0)
            t = torch.where(usable, t, before)
        u = scaled_rows(t, length, eps)
        if eps > 0:
            floored = (length / eps).clamp_max(1.0)
            norm, length = norm * floored, length * floored
        sigma = length.view(()) if len(t) == 1 else length.view(-1).to(v.real.dtype)
        return Estimate(u, v, norm.squeeze(-1), sigma)

    def read(self, stack: Tensor | Stack, u: Tensor, eps: float) -> Estimate:
        """Return the first vectors and values of a step, which depend on no others."""
        return self.step(stack, u[:, :1], eps)


def right_vectors(x: Tensor, eps: float = 0.0) -> Tensor:
    """Return the v (b, k, n) of a step, from X = U conj(W), which it overwrites.

    Where u is orthogonal to every column the classic layer ends in NaN. Another direction finds the
    matrix again, and only a zero matrix keeps σ = 0.
    """
    if x.shape[1] > 1:
        return orthonormal_rows(x, eps)
    return unit_rows(x, eps, instead=x.shape[2] ** -0.5)


POWER = PowerIteration()
register_estimator(POWER)


def power_step(stack: Tensor | Stack, u: Tensor, eps: float = 0.0) -> Estimate:
    """Return what one step of block power iteration finds.

    Args:
        stack: (b, m, n), float32 or wider.
        u: (b, k, m), of any length, with k ≤ min(m, n).
        eps: floor under the norms that are divided by. The classic layer has 1e-12, an absolute
            number, which makes the iteration collapse for matrices of σ below it; a norm of exactly
            zero needs no floor here, so that the default 0 keeps every scale right.

    For a zero matrix u is returned as it came: what a layer that starts at zero learns next is
    found from there, where a u of zeros, or any other made without reason, might be orthogonal to
    it up to rounding.
    """
    return POWER.step(stack, u, eps)
