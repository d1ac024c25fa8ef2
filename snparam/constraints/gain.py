"""The constraint γ · W / σ, whose γ starts at σ (σReparam, Zhai et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from snparam.constraints.constraint import Division, Options, Parameters, register_constraint
from snparam.constraints.division import Divisor


class Gain(Division):
    """The constraint that holds the norm at |γ|, with one γ for each block, learned or fixed."""

    name = "gain"

    def check(self, options: Options) -> None:
        """Refuse options that set the norm as γ does.

        Raises:
            ValueError: if `soft` is set, or `coeff` is not 1.
        """
        if options.soft or options.coeff != 1:
            given = "constraint='gain'" if options.gain is None else f"gain={options.gain!r}"
            raise ValueError(
                f"{given} sets the norm, and so do coeff and soft; pass one or the other"
            )

    def parameters(self, sigma: Tensor, options: Options) -> dict[str, tuple[Tensor, bool]]:
        """Return γ (b,), starting at σ, so that γ W / σ is W."""
        return {"gain": (sigma, options.gain == "learned")}

    def divisor(self, sigma: Tensor, parameters: Parameters, options: Options) -> Divisor:
        """Return σ in γ's dtype, so that a γ which equals σ leaves the weight unchanged."""
        gain = parameters["gain"]
        return Divisor(sigma.to(gain.dtype), numerator=gain)

    def norm(self, sigma: Tensor, parameters: Parameters, options: Options) -> Tensor:
        """Return |γ|, and 0 for a zero matrix."""
        return torch.where(sigma == 0, 0.0, parameters["gain"].detach().abs().to(sigma))


register_constraint(Gain())


def gain_in(dtype: torch.dtype, gain: Tensor) -> Tensor:
    """Return γ (b,) in a dtype, or unchanged where it is too large for that dtype."""
    rounded = gain.to(dtype)
    return rounded if rounded.isfinite().all() else gain
