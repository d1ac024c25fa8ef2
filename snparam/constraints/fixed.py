"""The constraint c · W / σ, with c = 1 by default. Source: Miyato et al. 2018, equation 8."""

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


class Fixed(Division):
    """The constraint that holds the norm at `coeff`."""

    name = "fixed"
    takes_bounds = True

    def check(self, options: Options) -> None:
        """Refuse options that set the norm in another way.

        Raises:
            ValueError: if `soft` or `gain` is set.
        """
        refuse_other_norms("constraint='fixed'", options, "soft", "gain")

    def divisor(self, sigma: Tensor, parameters: Parameters, options: Options) -> Divisor:
        """Return σ / c."""
        if options.coeff == 1:
            return Divisor(sigma)
        return Divisor(sigma / options.coeff, 1 / options.coeff)

    def norm(self, sigma: Tensor, parameters: Parameters, options: Options) -> Tensor:
        """Return c, and 0 for a zero matrix."""
        return torch.where(sigma == 0, 0.0, torch.full_like(sigma, options.coeff))

    def divides_by_sigma(self, options: Options) -> bool:
        """Return whether c is 1."""
        return bool(options.coeff == 1)


register_constraint(Fixed())
