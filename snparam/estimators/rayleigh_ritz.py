"""Rayleigh-Ritz iteration: a block step, and then the best vectors in the span of its vectors.

The classic step keeps its vectors in order: where the second singular value of a matrix overtakes
the first, power iteration has to turn u₁ to the direction that u₂ has already. Here the small
singular value decomposition of the k × k triangular factor rotates U and V within their spans, and
a step still takes two products with W.

Source: Stewart 1969, "Accelerating the orthogonal iteration for the eigenvectors of a Hermitian
matrix" (simultaneous iteration with a Rayleigh-Ritz projection), for W Wᴴ in factored form; Golub
and Van Loan, section 8.6.3, for one-sided Jacobi.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from snparam.estimators.estimate import Estimate, register_estimator
from snparam.estimators.power import POWER, BlockIteration
from snparam.matrices.orthonormalisation import positive_mask, reads_freely, triangular

# The number of sweeps of Jacobi's method after which matrices of so many rows are diagonal to
# rounding: for two rows one rotation is exact, and a second one mends its rounding; for more,
# convergence is quadratic. The last number is enough for up to 8 rows; for 16, of which each is ten
# times as long as the next, it leaves 2e-6. Such matrices come from a cold start alone: else R is
# nearly diagonal before the first sweep.
_SWEEPS = {2: 2, 3: 5, 4: 5}
_MOST_SWEEPS = 8

# Entries off the diagonal, and values out of order, by no more than this many units of rounding of
# the largest entry: a rotation for them would follow rounding alone.
_ROUNDING = 8.0


class RayleighRitz(BlockIteration):
    """The block iteration that rotates U and V to the Ritz vectors; sv are the Ritz values.

    u₁ and v₁ are then the best in their spans. With one vector it is the classic step, and with
    min(m, n) vectors one step is exact.
    """

    name = "rayleigh-ritz"

    def finish(self, t: Tensor, v: Tensor, previous_u: Tensor, eps: float) -> Estimate:
        """Return the estimate of a step, with U and V rotated.

        T = Rᵀ X, where X has orthonormal rows, and R = P Σ Qᴴ. Since conj(X) W Vᵀ = R, U becomes
        Pᵀ X, V becomes Qᵀ V, and sv becomes Σ.
        """
        if t.shape[1] == 1:
            return POWER.finish(t, v, previous_u, eps)
        rows, r = triangular(t)
        finite = r.isfinite().all(-1).all(-1)[:, None]
        p, values, q = small_svd(torch.where(finite[..., None], r, 0.0))
        sv = torch.where(finite, values, torch.nan)
        u, rotated_v = p.mT @ rows, q.mT @ v
        usable = positive_mask(sv[:, :1].unsqueeze(-1))
        if usable is not None:
            u, rotated_v = torch.where(usable, u, previous_u), torch.where(usable, rotated_v, v)
        return Estimate.from_vectors(u, rotated_v, sv)


register_estimator(RayleighRitz())


def small_svd(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return P, Σ and Q of R = P Σ Qᴴ, values largest first, for small triangular matrices.

    Column i of P and of Q has the phase that makes P_ii real and not negative. Where R is diagonal
    up to rounding, and its values are in order, P and Q are the identity: equal singular values
    determine no vectors, so the present ones stay.

    Args:
        r: (b, k, k), upper triangular, finite, with a diagonal that is real and not negative.

    Returns:
        P (b, k, k), the diagonal (b, k) of Σ, and Q (b, k, k).
    """
    p, values, q = _svd_by_lapack(r) if reads_freely(r) else _svd_by_jacobi(r)
    diagonal = p.diagonal(dim1=-2, dim2=-1)
    phase = torch.sgn(diagonal) + (diagonal == 0)  # a phase of 0 would erase the vector
    p, q = p * phase.conj().unsqueeze(-2), q * phase.conj().unsqueeze(-2)
    lengths = r.diagonal(dim1=-2, dim2=-1).real
    largest = lengths.amax(-1)
    off_diagonal = (r - torch.diag_embed(lengths).to(r.dtype)).abs().amax((-2, -1))
    rounding = _ROUNDING * torch.finfo(r.dtype).eps * largest
    descends = (lengths.diff(dim=-1) <= rounding.unsqueeze(-1)).all(-1)
    is_decomposed = (descends & (off_diagonal <= rounding))[:, None, None]
    identity = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    p, q = torch.where(is_decomposed, identity, p), torch.where(is_decomposed, identity, q)
    return p, torch.where(is_decomposed[..., 0], lengths, values), q


def _svd_by_lapack(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p, values, q = torch.linalg.svd(r)
    return p, values, q.mH


def _svd_by_jacobi(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the decomposition by one-sided Jacobi, in a fixed number of operations.

    A device's own decomposition may wait for the host, and a tracer cannot record one that does.
    """
    k = r.shape[-1]
    scale = r.abs().amax((-2, -1), keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    identity = torch.eye(k, dtype=r.dtype, device=r.device).expand_as(r)
    # The columns of R Q, above those of Q. They are picked one by one, because a list of indices
    # would have to be copied to the device.
    columns = list(torch.cat([r / scale, identity], -2).unbind(-1))
    for pairs in _disjoint_pairs(k) * _SWEEPS.get(k, _MOST_SWEEPS):
        x, y = (torch.stack([columns[i] for i in side], -1) for side in zip(*pairs, strict=True))
        x, y = _rotated(x, y, k)
        for (i, j), *pair in zip(pairs, x.unbind(-1), y.unbind(-1), strict=True):
            columns[i], columns[j] = pair
    stacked = torch.stack(columns, -1)
    a, q = stacked[..., :k, :], stacked[..., k:, :]
    values, order = torch.linalg.vector_norm(a, dim=-2).sort(dim=-1, descending=True)
    order = order.unsqueeze(-2).expand_as(a)
    a, q = a.gather(-1, order), q.gather(-1, order)
    # The columns of `a` are P Σ. Where one is zero, the orthonormalisation makes a column of P for
    # it, so that P is unitary.
    rows, _ = triangular(a.mT)
    return rows.mT, values * scale[..., 0], q


def _disjoint_pairs(k: int) -> list[list[tuple[int, int]]]:
    """Return all pairs of k columns, in rounds whose pairs have no column in common."""
    remaining = list(combinations(range(k), 2))
    rounds = []
    while remaining:
        pairs: list[tuple[int, int]] = []
        for pair in remaining:
            if not any(column in other for other in pairs for column in pair):
                pairs.append(pair)
        remaining = [pair for pair in remaining if pair not in pairs]
        rounds.append(pairs)
    return rounds


def _rotated(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return columns x and y (b, 2k, p), each pair rotated so that its first k rows are orthogonal.

    Source: Golub and Van Loan, algorithm 8.5.1, for the tangent of smaller size.
    """
    (a, b), floor = (x[..., :k, :], y[..., :k, :]), 0.5 * torch.finfo(x.dtype).eps
    aa, bb = (torch.linalg.vector_norm(side, dim=-2, keepdim=True) for side in (a, b))
    ab = (a.conj() * b).sum(-2, keepdim=True)
    size = ab.abs()
    small = size <= floor * aa * bb
    difference = (bb - aa) * (bb + aa)
    tangent = torch.copysign(2 * size, difference) / (
        difference.abs() + torch.hypot(difference, 2 * size)
    )
    tangent = torch.where(small, 0.0, tangent)  # where both are zero it is 0 / 0
    cosine = (1 + tangent * tangent).rsqrt()
    sine = cosine * tangent
    y = y * torch.where(small, 1.0, torch.sgn(ab).conj())
    return cosine * x - sine * y, sine * x + cosine * y
