"""What an estimator finds, and what every estimator offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from snparam.matrices.orthonormalisation import positive
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
    def of(cls, u: Tensor, v: Tensor, sv: Tensor) -> Estimate:
        """Return the estimate of these vectors and values, with the σ₁ to divide by."""
        sigma = sv[0, 0] if len(sv) == 1 else sv[:, 0]
        usable = positive(sigma)
        return cls(u, v, sv, sigma if usable is None else torch.where(usable, sigma, 1.0))


class Estimator:
    """A way to find σ: it starts a state from a stack, moves it, and reads it.

    A state is what `buffers` names, tensors of an Estimate; all else follows from them and the
    matrices. An estimator has no state of its own, and is registered by its name.

    Attributes:
        name: what the option `sigma` calls it.
        side: whether its σ₁ lies below the largest singular value, is exact, or lies above.
        buffers: the tensors that are kept between forwards.
    """

    name: str
    side: Literal["below", "exact", "above"]
    buffers: Sequence[str] = ("u", "sv")

    def start(self, stack: Tensor | Stack, k: int) -> tuple[Tensor, Tensor]:
        """Return u (b, k, m) and sv (b, k), converged, from the matrices alone."""
        raise NotImplementedError

    def move(
        self, stacks: Sequence[Tensor | Stack], us: Sequence[Tensor], steps: int, eps: float
    ) -> list[Estimate]:
        """Return what so many steps find, for stacks that are alike: equal shapes, equal ranks.

        Args:
            stacks: each (b, m, n).
            us: for each, the u (b, k, m) to start from, of any length.
            steps: how many.
            eps: floor under the norms that a step divides by.
        """
        raise NotImplementedError

    def read(self, stack: Tensor | Stack, u: Tensor, eps: float) -> Estimate:
        """Return what one step finds that is not stored, with the first values at least."""
        raise NotImplementedError


ESTIMATORS: dict[str, Estimator] = {}


def register_estimator(estimator: Estimator) -> None:
    """Let the option `sigma` name an estimator.

    Raises:
        ValueError: if the name is taken.
    """
    if estimator.name in ESTIMATORS:
        raise ValueError(f"sigma={estimator.name!r} is registered already")
    ESTIMATORS[estimator.name] = estimator
