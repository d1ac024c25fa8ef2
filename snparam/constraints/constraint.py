"""The interface and the registry of constraints, which make the weight in use from W and σ.

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
        """The norm, or its bound, c."""

    @property
    def soft(self) -> bool:
        """True where c is only a bound."""

    @property
    def gain(self) -> Any:
        """`"learned"` or `"fixed"` where there is a γ, else None."""


Parameters = Mapping[str, Tensor]


class Constraint:
    """A rule that makes the weight in use from a weight and its σ.

    A constraint object keeps no state, and is registered by its name.

    Attributes:
        name: value of the option `constraint` that selects it.
    """

    name: str

    def check(self, options: Options) -> None:
        """Check the options that belong to this constraint.

        Raises:
            ValueError: if a value is out of range, or one that is set has no meaning here.
        """

    def parameters(self, sigma: Tensor, options: Options) -> dict[str, tuple[Tensor, bool]]:
        """Return the tensors that the constraint needs kept beside the state, by name.

        Args:
            sigma: σ₁ (b,) of the weight; 1 where it is zero or not finite.
            options: options that the weight is registered with.

        Returns:
            for each name, the initial value, and whether it is learned.
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
            estimate: singular vectors and values of the weight, constant to autograd.
            parameters: current values of the tensors that `parameters` has named.
            options: options that the weight is registered with.
            view: how the weight is read as (b, m, n).
            plain: whether to use torch's own operations alone, for tracers that save them.
        """
        raise NotImplementedError

    def norm(self, sigma: Tensor, parameters: Parameters, options: Options) -> Tensor:
        """Return the norm (b,) that it promises for blocks of σ (b,); `verify` checks it."""
        raise NotImplementedError

    def divides_by_sigma(self, options: Options) -> bool:
        """Return whether the weight in use is W / σ, which is all that other implementations know.

        False by default: `state_dict_for` then refuses to write the weight as one of theirs.

        Args:
            options: options that the weight is registered with.
        """
        return False


class Division(Constraint):
    """A constraint that divides each block by a function of its σ.

    A subclass writes `divisor`, from which `apply` follows.
    """

    def divisor(self, sigma: Tensor, parameters: Parameters, options: Options) -> Divisor:
        """Return the divisor d(σ), its slope, and the factor γ.

        Args:
            sigma: σ₁, () for one block, or (b,).
            parameters: current values of the tensors that `parameters` has named.
            options: options that the weight is registered with.
        """
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
        """Return γ W / d(σ)."""
        divisor = self.divisor(estimate.sigma, parameters, options)
        u, v = estimate.u, estimate.v
        if u.shape[1] > 1:
            u, v = u[:, 0], v[:, 0]
        return divide(weight, divisor, u, v, view, plain=plain)


CONSTRAINTS: dict[str, Constraint] = {}


def register_constraint(constraint: Constraint) -> None:
    """Register a constraint under its name, which the option `constraint` then accepts.

    Raises:
        ValueError: if another constraint is registered under that name.
    """
    if constraint.name in CONSTRAINTS:
        raise ValueError(f"constraint={constraint.name!r} is registered already")
    CONSTRAINTS[constraint.name] = constraint
