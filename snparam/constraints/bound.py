"""The constraint W / max(1, σ / c), which leaves weights of σ ≤ c alone (SNGP, Liu et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from snparam.constraints.constraint import (
    Division,
    Options,
    Parameters,
    refuse_other_norms,
    register_constraint,
)
from snparam.constraints.division import Divisor


class Bound(Division):
    """The constraint that holds the norm at no more than `coeff`."""

    name = "bound"
    takes_bounds = True

    def check(self, options: Options) -> None:
        """Refuse options that set the norm in another way.

        Raises:
            ValueError: if `gain` is set.
        """
        refuse_other_norms("constraint='bound'", options, "gain")

    def divisor(self, sigma: Tensor, parameters: Parameters, options: Options) -> Divisor:
        """Return max(1, σ / c) and its slope."""
        over = sigma > options.coeff
        value = torch.where(over, sigma / options.coeff, 1.0)
        return Divisor(value, over.to(sigma.dtype) / options.coeff)

    def norm(self, sigma: Tensor, parameters: Parameters, options: Options) -> Tensor:
        """Return min(σ, c)."""
        return sigma.clamp_max(options.coeff)


register_constraint(Bound())
