"""Completion of a state (u, sv) that has fewer vectors or values than are needed.

Shapes as in `products`: matrices (b, m, n), u (b, k, m), sv (b, k).
"""

from __future__ import annotations

import torch
from torch import Tensor

from snparam.estimators import convergence
from snparam.matrices.orthonormalisation import orthonormal_rows
from snparam.matrices.products import Stack


def complete_state(
    matrices: Tensor | Stack, u: Tensor | None, sv: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """Return the top k left singular vectors and singular values, and keep those that are given.

    `convergence.converged` computes what is missing; further vectors are those of the
    matrices after the given vectors are projected out. Matrices
    that are known by products, and lack vectors, keep none.

    Args:
        matrices: (b, m, n), finite.
        u: (b, j, m), or None.
        sv: (b, i), or None. It is not used without u, since it then belongs to other vectors, nor
            if it has fewer values than vectors are kept.
        k: number of vectors to return, at most min(m, n); given ones beyond it are dropped.

    Returns:
        u (b, k, m) and sv (b, k).
    """
    if u is None or (u.shape[1] < k and not isinstance(matrices, Tensor)):
        return convergence.converged(matrices, k)
    kept = min(u.shape[1], k)
    if sv is None or sv.shape[1] < kept:
        _, sv = convergence.converged(matrices, kept)
    u, sv = u[:, :kept], sv[:, :kept]
    if kept == k:
        return u, sv
    assert isinstance(matrices, Tensor)
    further, further_sv = _further_vectors(matrices, u, k - kept)
    return torch.cat([u.to(further.dtype), further], 1), torch.cat(
        [sv.to(further_sv.dtype), further_sv], 1
    )


def _further_vectors(matrices: Tensor, u: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the top `count` left singular vectors orthogonal to the given u, and their values."""
    wide = torch.promote_types(matrices.dtype, torch.float64)
    rows = orthonormal_rows(u.to(wide))
    remainder = matrices.to(wide)
    remainder = remainder - rows.mT @ (rows.conj() @ remainder)
    further, sv = convergence.converged(remainder, count)
    # Orthogonalised against u once more, because a zero remainder gives vectors of any direction.
    return orthonormal_rows(torch.cat([rows, further], 1))[:, u.shape[1] :], sv
