"""The exact decomposition: σ to rounding from a single look at the weight, whatever its spectrum.

It is meant for small layers and for tests: a step costs a full eigendecomposition of the smaller
Gram matrix, of about 10 p³ operations for p = min(m, n), instead of two products with a vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snparam.estimators import convergence
from snparam.estimators.estimate import Estimate, Estimator, register_estimator
from snparam.estimators.power import right_vectors
from snparam.matrices.orthonormalisation import orthonormalise
from snparam.matrices.products import Stack, left_product, real_dtype, right_product, wide_dtype


class Exact(Estimator):
    """The estimator that decomposes the smaller Gram matrix, W Wᴴ or Wᴴ W, in float64.

    The k largest singular values and their vectors do not depend on the u that a step begins with,
    on the number of steps, or on eps. Since σ₁ is exact, its gradient with constant u and v, u₁v₁ᴴ,
    is the whole gradient where σ₁ is simple. Second derivatives leave out how u and v change, as
    with all estimators.

    Squaring costs half of the digits of small values: a vector whose singular value is below
    √(2⁻⁵²) σ₁ = 1.5e-8 σ₁ is lost in rounding, and its value is off by up to that. The values
    themselves come from a product with W, so that those above it are right to rounding.
    """

    name = "exact"
    side = "exact"

    def start(self, stack: Tensor | Stack, k: int) -> tuple[Tensor, Tensor]:
        """Return the top k left singular vectors and values, the same in every run."""
        return convergence.converged(stack, k)

    def move(
        self,
        stacks: Sequence[Tensor | Stack],
        us: Sequence[Tensor],
        steps: int,  # noqa: ARG002
        eps: float,  # noqa: ARG002
    ) -> list[Estimate]:
        """Return, for each of several stacks, its decomposition; more steps change nothing."""
        return [_decomposition(stack, u) for stack, u in zip(stacks, us, strict=True)]

    def read(self, stack: Tensor | Stack, u: Tensor, eps: float) -> Estimate:  # noqa: ARG002
        """Return the decomposition; of the state, only the number of its vectors counts."""
        return _decomposition(stack, u)


register_estimator(Exact())


def _decomposition(stack: Tensor | Stack, u: Tensor) -> Estimate:
    """Return the top k singular vectors and values of each matrix, for u (b, k, m).

    A matrix of zeros, or with NaN or inf, keeps its u.
    """
    k = u.shape[1]
    matrices = _entries(stack)
    largest = matrices.abs().amax((1, 2), keepdim=True)
    is_usable = (largest > 0) & largest.isfinite()
    # So that squares neither overflow nor underflow.
    scale = torch.where(is_usable, largest, 1.0)
    w = torch.where(is_usable, matrices, 0.0).to(wide_dtype(matrices.dtype)) / scale
    previous = u.to(device=w.device, dtype=w.dtype)
    if w.shape[1] <= w.shape[2]:
        _, vectors = torch.linalg.eigh(w @ w.mH)
        v = right_vectors(left_product(w, vectors[..., -k:].flip(-1).mT.contiguous()))
    else:
        _, vectors = torch.linalg.eigh(w.mH @ w)
        v = vectors[..., -k:].flip(-1).mT.contiguous()
    rows, values = orthonormalise(right_product(w, v))
    sv = torch.where(is_usable[..., 0], values * scale[..., 0], largest[..., 0] * 0.0)
    rows = torch.where(is_usable, rows, previous)
    sv = sv.to(u.device, real_dtype(u.dtype))
    return Estimate.from_vectors(rows.to(u), v.to(u), sv)


def _entries(stack: Tensor | Stack) -> Tensor:
    """Return the matrices (b, m, n) of a stack; one that is known by its products is multiplied."""
    if isinstance(stack, Tensor):
        return stack.cpu() if stack.device.type == "mps" else stack
    blocks, rows, columns = stack.shape
    size = min(rows, columns)
    identity = torch.eye(size, dtype=stack.dtype, device=stack.device).expand(blocks, -1, -1)
    if rows <= columns:
        return stack.left(identity.contiguous()).conj()
    return stack.right(identity.contiguous()).mT
