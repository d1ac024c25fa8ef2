"""What is done with σ: the constraints there are, and what each has to say.

W / σ                 the default (Miyato et al. 2018)
c · W / σ             coeff=c: the norm is held at c
W / max(1, σ / c)     soft=True, coeff=c: the norm is held at no more than c (SNGP, Liu et al.
                      2020)
γ · W / σ             gain: the norm is γ, fixed, or learned (σReparam, Zhai et al. 2023)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from snparam.constraints.division import Divisor, divide
from snparam.estimators.estimate import Estimate
from snparam.matrices.views import View


class Options(Protocol):
    """The options of a constraint: attributes of the settings that a weight is registered with."""

    @property
    def coeff(self) -> float:
        """c."""

    @property
    def soft(self) -> bool:
        """Whether c is a bound only."""

    @property
    def gain(self) -> Any:
        """Whether there is a γ, and whether it is learned."""


Parameters = Mapping[str, Tensor]


class Constraint:
    """Something to do with σ. It has no state of its own, and is registered by its name.

    Attributes:
        name: what the option `constraint` calls it.
    """

    name: str

    def check(self, options: Options) -> None:
        """Check the options that belong to this constraint.

        Raises:
            ValueError: if a value is out of range, or one that is set has no meaning here.
        """

    def parameters(self, sigma: Tensor, options: Options) -> dict[str, tuple[Tensor, bool]]:
        """Return tensors to keep beside the state: where each starts, and whether it is learned.

        Args:
            sigma: σ₁ (b,) of the weight, 1 where it has none.
            options: those that the weight is registered with.
        """
        return {}

    def apply(
        self,
        weight: Tensor,
        estimate: Estimate,
        parameters: Parameters,
        options: Options,
        view: View,
        *,
        plain: bool,
    ) -> Tensor:
        """Return the weight in use, differentiable any number of times.

        Args:
            weight: the original, of the view's shape.
            estimate: what an estimator has found, constant to autograd.
            parameters: the tensors that `parameters` has named.
            options: those that the weight is registered with.
            view: how the weight is read as (b, m, n).
            plain: whether to use torch's own operations alone, for tracers that save them.
        """
        raise NotImplementedError

    def norm(self, sigma: Tensor, parameters: Parameters, options: Options) -> Tensor:
        """Return the norm (b,) that it promises for weights of these σ, which `verify` checks."""
        raise NotImplementedError


class Division(Constraint):
    """A constraint that divides each block by a function of its σ, from which `apply` follows."""

    def divisor(self, sigma: Tensor, parameters: Parameters, options: Options) -> Divisor:
        """Return d(σ), its slope, and what to multiply by; σ is () for one block, or (b,)."""
        raise NotImplementedError

    def apply(
        self,
        weight: Tensor,
        estimate: Estimate,
        parameters: Parameters,
        options: Options,
        view: View,
        *,
        plain: bool,
    ) -> Tensor:
        """Return γ W / d."""
        divisor = self.divisor(estimate.sigma, parameters, options)
        return divide(weight, divisor, estimate.u[:, 0], estimate.v[:, 0], view, plain=plain)


CONSTRAINTS: dict[str, Constraint] = {}


def register_constraint(constraint: Constraint) -> None:
    """Let the option `constraint` name a constraint.

    Raises:
        ValueError: if the name is taken.
    """
    if constraint.name in CONSTRAINTS:
        raise ValueError(f"constraint={constraint.name!r} is registered already")
    CONSTRAINTS[constraint.name] = constraint
