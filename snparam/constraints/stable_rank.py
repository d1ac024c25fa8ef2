"""The constraint of norm 1 and of stable rank at most r, where ‖W‖_F² / σ₁² is the stable rank.

Source: Sanyal, Torr and Dokania 2020, "Stable rank normalization for improved generalization in
neural networks and GANs", algorithm 1 with the first singular value preserved, after W / σ₁.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from snparam.constraints.constraint import (
    Options,
    Parameters,
    TripletFunction,
    refuse_other_norms,
    register_constraint,
)
from snparam.constraints.triplets import triplets_of
from snparam.estimators.estimate import Estimate


class StableRank(TripletFunction):
    """c (u₁ v₁ᴴ + t S), S = W / σ₁ − u₁ v₁ᴴ, t = min(1, √(r − 1) / ‖S‖_F), with its whole gradient.

    That is the nearest matrix to W / σ₁, in the Frobenius norm, that keeps the first triplet and
    has stable rank at most r, since the squares of its singular values sum to 1 + t² ‖S‖_F².

    The published gradient holds u₁ and v₁ constant, and so leaves out (1 − t) d(u₁ v₁ᴴ), which was
    22 % of the gradient where the bound is active. It is not left out here (`triplets`). It grows
    as 1 / (σ₁ − σ₂): where the first two singular values are equal, the weight in use jumps.
    """

    name = "stable-rank"

    def check(self, options: Options) -> None:
        """Refuse options that set the norm in another way.

        Raises:
            ValueError: if `stable_rank` is missing, or another option sets the norm.
        """
        if options.stable_rank is None:
            raise ValueError(
                "constraint='stable-rank': expected stable_rank=r with it; pass stable_rank=r alone"
            )
        given = f"stable_rank={options.stable_rank!r}"
        refuse_other_norms(given, options, "soft", "clip", "gain")

    def matrices_in_use(self, matrices: Tensor, estimate: Estimate, options: Options) -> Tensor:
        """Return c (u₁ v₁ᴴ + t S); a zero matrix stays zero."""
        u, v, sv = (part[:, :1] for part in estimate[:3])
        usable = (sv > 0) & sv.isfinite()
        triplets = triplets_of(matrices, u, v, sv, usable)
        # |B|, by the phase of B: of a complex weight Re B is σ to the first order alone.
        sigma = torch.where(usable.unsqueeze(-1), (triplets.phase.conj() * triplets.core).real, 1.0)
        first = triplets.between(triplets.phase)
        rest = matrices / sigma - first
        length = torch.linalg.vector_norm(rest, dim=(1, 2), keepdim=True)
        bound = math.sqrt(options.stable_rank - 1)
        # A matrix of rank one has no rest, and for r = 1 the bound is 0: 0 / 0 must not be
        # computed.
        exceeds = length > bound
        factor = torch.where(exceeds, bound / torch.where(exceeds, length, 1.0), 1.0)
        out: Tensor = options.coeff * (factor * rest + first)
        return out

    def norm(self, sigma: Tensor, parameters: Parameters, options: Options) -> Tensor:
        """Return c, and 0 for a zero matrix."""
        return torch.where(sigma == 0, 0.0, torch.full_like(sigma, options.coeff))

    def note(self, sv: Tensor, options: Options, rank: int) -> str:
        """Return the bound of the stable rank."""
        return f"stable rank at most {options.stable_rank:g}"


register_constraint(StableRank())
