"""The constraint that cuts what exceeds c of the tracked singular values, and leaves the rest.

Source: Brock, Donahue and Simonyan 2019 (BigGAN), equation 4, W − max(0, σ₁ − c) u₁ v₁ᴴ; here for
every singular value that is tracked.
"""

from __future__ import annotations

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


class Clip(TripletFunction):
    """W − Σ max(0, σᵢ − c) uᵢ vᵢᴴ over the tracked triplets, with its whole gradient.

    The norm is then at most c, if no more singular values exceed c than are tracked. A weight none
    of whose tracked values exceeds c stays as it is, to the bit.

    Over the triplets that exceed c, Σ (σᵢ − c) uᵢ vᵢᴴ = U (B − c Q) Vᴴ, whose derivatives are those
    of `triplets`. In closed form, with h = max(0, σ − c), ∘ the product of entries, and M = Uᴴ Ḡ V
    over all singular vectors, Ḡ the gradient of the weight in use, that of the weight is
    Ḡ − U [D⁻ ∘ (M + Mᴴ) / 2 + D⁺ ∘ (M − Mᴴ) / 2] Vᴴ with D∓ = (hᵢ ∓ hⱼ) / (σᵢ ∓ σⱼ).
    """

    name = "clip"
    uses_all_triplets = True

    def check(self, options: Options) -> None:
        """Refuse options that set the norm as clipping does.

        Raises:
            ValueError: if `clip` is missing, or another option sets the norm.
        """
        if options.clip is None:
            raise ValueError("constraint='clip': expected clip=c with it; pass clip=c alone")
        refuse_other_norms(
            f"clip={options.clip!r}", options, "coeff", "soft", "stable_rank", "gain"
        )

    def matrices_in_use(self, matrices: Tensor, estimate: Estimate, options: Options) -> Tensor:
        """Return W − Σ max(0, σᵢ − c) uᵢ vᵢᴴ."""
        u, v, sv, _ = estimate
        exceeding = (sv > options.clip) & sv.isfinite()
        triplets = triplets_of(matrices, u, v, sv, exceeding)
        return matrices - triplets.between(triplets.core - options.clip * triplets.phase)

    def norm(self, sigma: Tensor, parameters: Parameters, options: Options) -> Tensor:
        """Return min(σ, c)."""
        return sigma.clamp_max(options.clip)

    def note(self, sv: Tensor, options: Options, rank: int) -> str:
        """Return how many values are tracked, and whether more than these may exceed c."""
        tracked = sv.shape[1]
        values = "the largest singular value" + (f"s, {tracked} of {rank}" if tracked > 1 else "")
        note = f"clip={options.clip:g} for {values}"
        if tracked < rank and bool((sv[:, -1] > options.clip).any()):
            note += "; all that are tracked exceed it, and more may: raise num_svs"
        return note


register_constraint(Clip())
