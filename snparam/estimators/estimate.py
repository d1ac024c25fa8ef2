"""The result of an estimator, the interface of all estimators, and their registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from snparam.matrices.orthonormalisation import positive_mask
from snparam.matrices.products import Stack


class Estimate(NamedTuple):
    """Singular vectors and values of a stack of matrices (b, m, n).

    Attributes:
        u: (b, k, m), left singular vectors as rows.
        v: (b, k, n), right singular vectors as rows.
        sv: (b, k), singular values, largest first. Zero for a zero matrix, and not finite for one
            with NaN or inf.
        sigma: σ₁ to divide by: () for one block, (b,) for several; 1 for a matrix whose σ₁ is zero
            or not finite, which is left as it is.
    """

    u: Tensor
    v: Tensor
    sv: Tensor
    sigma: Tensor

    @classmethod
    def from_vectors(cls, u: Tensor, v: Tensor, sv: Tensor) -> Estimate:
        """Return the estimate with these vectors and values, and with the σ₁ to divide by."""
        sigma = sv[0, 0] if len(sv) == 1 else sv[:, 0]
        usable = positive_mask(sigma)
        return cls(u, v, sv, sigma if usable is None else torch.where(usable, sigma, 1.0))


class Estimator:
    """A method of finding σ, which starts a state from a stack, moves it, and reads it.

    The state consists of the fields of an `Estimate` that `buffers` names; all else follows from
    them and the matrices. An estimator object keeps no state itself, and is registered by its name.

    Attributes:
        name: value of the option `sigma` that selects it.
        side: whether its σ₁ lies below the largest singular value, is exact, or lies above.
        buffers: names of the tensors that are kept between forwards.
    """

    name: str
    side: Literal["below", "exact", "above"]
    buffers: Sequence[str] = ("u", "sv")

    def start(self, stack: Tensor | Stack, k: int) -> tuple[Tensor, Tensor]:
        """Return converged u (b, k, m) and sv (b, k), computed from the matrices alone."""
        raise NotImplementedError

    def move(
        self, stacks: Sequence[Tensor | Stack], us: Sequence[Tensor], steps: int, eps: float
    ) -> list[Estimate]:
        """Return, for each of several stacks, the estimate after several steps.

        Args:
            stacks: each (b, m, n), all of one shape, and all dense or sharded over the same ranks.
            us: for each stack, the u (b, k, m) to start from, of any length.
            steps: number of steps, at least 1.
            eps: floor under the norms that a step divides by.
        """
        raise NotImplementedError

    def read(self, stack: Tensor | Stack, u: Tensor, eps: float) -> Estimate:
        """Return the estimate after one step from a state, which does not move.

        Args:
            stack: (b, m, n).
            u: (b, k, m), of any length; the estimate may be of the first vector alone.
            eps: floor under the norms that the step divides by.
        """
        raise NotImplementedError

    def certify(
        self,
        estimate: Estimate,
        stack: Tensor | Stack,
        dtype: torch.dtype,
        coeff: float,
        soft: bool,
    ) -> Estimate:
        """Return an estimate to divide by for which the norm in use is certainly at most c.

        It is asked of estimators whose σ lies above, after each `move` and `read`.

        Args:
            estimate: what `move` or `read` returned.
            stack: (b, m, n), of the same matrices.
            dtype: dtype of the weight, to which the quotient is rounded.
            coeff: c; the weight is divided by σ / c.
            soft: whether c is a bound only, so that weights with σ ≤ c are left alone.
        """
        raise NotImplementedError


ESTIMATORS: dict[str, Estimator] = {}


def register_estimator(estimator: Estimator) -> None:
    """Register an estimator under its name, which the option `sigma` then accepts.

    Raises:
        ValueError: if another estimator is registered under that name.
    """
    if estimator.name in ESTIMATORS:
        raise ValueError(f"sigma={estimator.name!r} is registered already")
    ESTIMATORS[estimator.name] = estimator
