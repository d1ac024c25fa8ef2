"""Filling up a state of the power iteration that is there in part.

Shapes as in `products`: matrices (b, m, n), u (b, k, m), sv (b, k).
"""

from __future__ import annotations

import torch
from torch import Tensor

from snparam.estimators import convergence
from snparam.matrices.orthonormalisation import orthonormal_rows
from snparam.matrices.sharded import ShardedStack


def completed(
    matrices: Tensor | ShardedStack, u: Tensor | None, sv: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """The top k left singular vectors and singular values, as many of them as given kept.

    What is not given is estimated as `convergence.converged` does; further vectors are those of the
    matrices without the directions that the given ones span.

    Args:
        matrices: (b, m, n), finite.
        u: (b, j, m), or None.
        sv: (b, i), or None. Without u it is not used: it belongs to other vectors.
        k: how many, at most min(m, n). What is given beyond it is dropped.

    Returns:
        u (b, k, m) and sv (b, k).
    """
    if u is None or (u.shape[1] < k and isinstance(matrices, ShardedStack)):
        return convergence.converged(matrices, k)
    given = min(u.shape[1], k)
    if sv is None or sv.shape[1] < given:
        _, sv = convergence.converged(matrices, given)
    u, sv = u[:, :given], sv[:, :given]
    if given == k:
        return u, sv
    assert isinstance(matrices, Tensor)
    more, more_sv = _beside(matrices, u, k - given)
    return torch.cat([u.to(more.dtype), more], 1), torch.cat([sv.to(more_sv.dtype), more_sv], 1)


def _beside(matrices: Tensor, u: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The top `count` left singular vectors, and values, orthogonal to given vectors."""
    wide = torch.promote_types(matrices.dtype, torch.float64)
    rows = orthonormal_rows(u.to(wide))
    rest = matrices.to(wide)
    rest = rest - rows.mT @ (rows.conj() @ rest)
    more, sv = convergence.converged(rest, count)
    # Once more against the given ones: where nothing is left, `more` is any direction.
    return orthonormal_rows(torch.cat([rows, more], 1))[:, u.shape[1] :], sv
