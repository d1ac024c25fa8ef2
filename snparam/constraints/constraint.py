"""The interface and the registry of constraints, which make the weight in use from W and σ.

W / σ                 the default (Miyato et al. 2018)
c · W / σ             coeff=c: the norm is held at c
W / max(1, σ / c)     soft=True, coeff=c: the norm is held at no more than c (SNGP, Liu et al.
                      2020)
γ · W / σ             gain: the norm is γ, fixed, or learned (σReparam, Zhai et al. 2023)
W − Σ (σᵢ − c)⁺ uᵢvᵢᴴ clip=c: tracked singular values above c are cut to c (BigGAN, Brock et al.
                      2019)
uvᴴ + t (W / σ − uvᴴ) stable_rank=r: norm 1, and stable rank at most r (Sanyal et al. 2020)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from snparam.constraints.division import Divisor, divide
from snparam.estimators.estimate import Estimate
from snparam.matrices import torch_private
from snparam.matrices.views import WeightView


class Options(Protocol):
    """The options of a constraint: attributes of the settings that a weight is registered with."""

    @property
    def coeff(self) -> Any:
        """The norm, or its bound, c: a number, but in `Constraint.check` it may be `"mup"`."""

    @property
    def soft(self) -> bool:
        """True where c is only a bound."""

    @property
    def gain(self) -> Any:
        """`"learned"` or `"fixed"` where there is a γ, else None."""

    @property
    def clip(self) -> Any:
        """The value to which larger singular values are cut, or None."""

    @property
    def stable_rank(self) -> Any:
        """The bound of the stable rank, or None."""


Parameters = Mapping[str, Tensor]


class Constraint:
    """A rule that makes the weight in use from a weight and its σ.

    A constraint object keeps no state, and is registered by its name.

    Attributes:
        name: value of the option `constraint` that selects it.
        uses_all_triplets: whether `apply` reads all tracked vectors and values of the estimate, and
            not the first alone.
        takes_shards: whether `apply` takes sharded weights (DTensors).
        takes_bounds: whether it divides by σ / c for a number c, so that the norm of the weight in
            use is held by a σ that is a certified bound.
    """

    name: str
    uses_all_triplets = False
    takes_shards = True
    takes_bounds = False

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
        view: WeightView,
        *,
        plain: bool,
    ) -> Tensor:
        """Return the weight in use, differentiable any number of times.

        Args:
            weight: the original, of the view's shape.
            estimate: singular vectors and values of the weight, constant to autograd.
            parameters: current values of the tensors that `parameters` has named.
            options: options that the weight is registered with.
            view: how the weight is read as (b, m, n). It is dense, so that `view.entries` reads
                the matrices, unless the constraint is a `Division`: others are refused with
                `norm="operator"`.
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

    def note(self, sv: Tensor, options: Options, rank: int) -> str:
        """Return what the plan says of a weight, "" for nothing.

        Args:
            sv: (b, k), the tracked singular values of the weight.
            options: options that the weight is registered with.
            rank: number of singular values that each block has, min(m, n).
        """
        return ""


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
        view: WeightView,
        *,
        plain: bool,
    ) -> Tensor:
        """Return γ W / d(σ)."""
        divisor = self.divisor(estimate.sigma, parameters, options)
        u, v = estimate.u, estimate.v
        if u.shape[1] > 1:
            u, v = u[:, 0], v[:, 0]
        return divide(weight, divisor, u, v, view, plain=plain)


class TripletFunction(Constraint):
    """A constraint that computes with singular triplets, and so needs the whole matrices.

    A subclass writes `matrices_in_use`, from which `apply` follows. It does not take sharded
    weights: its gradient has products with the matrix that no rank has.

    A program that torch.jit.trace records can save no autograd Function, and so gives the original
    no gradient, rather than a wrong one.
    """

    takes_shards = False

    def matrices_in_use(self, matrices: Tensor, estimate: Estimate, options: Options) -> Tensor:
        """Return the matrices of the weight in use, differentiable any number of times.

        Args:
            matrices: those of the original, (b, m, n), in the dtype of the estimate's vectors.
            estimate: their singular vectors and values, constant to autograd.
            options: options that the weight is registered with.
        """
        raise NotImplementedError

    def apply(
        self,
        weight: Tensor,
        estimate: Estimate,
        parameters: Parameters,
        options: Options,
        view: WeightView,
        *,
        plain: bool,
    ) -> Tensor:
        """Return the weight in use, in the shape, dtype and strides of the original."""
        if torch_private.tracing_state() is not None:
            weight = weight.detach()
        matrices = view.entries.to_matrices(weight).to(estimate.u.dtype)
        out = self.matrices_in_use(matrices, estimate, options)
        return view.entries.from_matrices(out, like=weight).to(weight.dtype)


def refuse_other_norms(given: str, options: Options, *others: str) -> None:
    """Refuse options that say something else about the singular values than the one given.

    Args:
        given: the option that was given, with its value, for the error.
        options: all options.
        others: names of the options that contradict it: they have to be at their defaults.

    Raises:
        ValueError: if one of them is set.
    """
    defaults = {"coeff": 1, "soft": False}
    for name in others:
        value = getattr(options, name)
        if value != defaults.get(name):
            raise ValueError(
                f"{given} and {name}={value!r}: each says what becomes of the singular values; "
                "pass one of them"
            )


CONSTRAINTS: dict[str, Constraint] = {}


def register_constraint(constraint: Constraint) -> None:
    """Register a constraint under its name, which the option `constraint` then accepts.

    Raises:
        ValueError: if another constraint is registered under that name.
    """
    if constraint.name in CONSTRAINTS:
        raise ValueError(f"constraint={constraint.name!r} is registered already")
    CONSTRAINTS[constraint.name] = constraint
