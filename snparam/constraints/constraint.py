"""What is done with σ: the divisor of a weight as a function of its largest singular value.

    W / σ                 the default (Miyato et al. 2018)
    W / (σ / c)           coeff=c: the norm is held at c
    W / max(1, σ / c)     soft=True, coeff=c: the norm is held at no more than c (as in SNGP,
                          Liu et al. 2020)
    γ W / σ               gain: the norm is γ, fixed, or learned (σReparam, Zhai et al. 2023)

Every divisor is piecewise linear in σ, so that its value and its slope are all there is to know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Constraint:
    """The bound on σ, and whether it is a bound only or the value.

    Attributes:
        coeff: c.
        soft: whether weights with σ ≤ c are left as they are.
    """

    coeff: float = 1.0
    soft: bool = False

    def divisor(self, sigma: Tensor) -> tuple[Tensor, Tensor | float]:
        """d(σ) and dd/dσ, for σ (b,)."""
        if not self.soft:
            return (sigma, 1.0) if self.coeff == 1 else (sigma / self.coeff, 1 / self.coeff)
        over = sigma > self.coeff
        return torch.where(over, sigma / self.coeff, 1.0), over.to(sigma.dtype) / self.coeff

    def divisor_of(self, sigma: float) -> tuple[float, float]:
        """`divisor` for a number."""
        if self.soft and sigma <= self.coeff:
            return 1.0, 0.0
        return sigma / self.coeff, 1 / self.coeff

    def norm_of(self, sigma: Tensor, gain: Tensor | None) -> Tensor:
        """The norm (b,) that a weight with the given σ has under the constraint; 0 stays 0."""
        if gain is not None:
            norm = gain.detach().abs().to(sigma)
        else:
            norm = torch.full_like(sigma, self.coeff)
            norm = torch.minimum(sigma, norm) if self.soft else norm
        return torch.where(sigma == 0, 0.0, norm)


def gain_in(dtype: torch.dtype, gain: Tensor) -> Tensor:
    """γ (b,) in a dtype, or as it is where that does not reach so far."""
    rounded = gain.to(dtype)
    return rounded if rounded.isfinite().all() else gain
