"""The certified estimator: a σ to divide by with which no norm exceeds what it is held at.

Vectors are found as by Rayleigh-Ritz iteration. σ is not their value, which lies below the norm,
but a certified bound of the norm (see `certified` and `convolution_bounds`), enlarged so that the
division's own rounding is covered too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snparam.estimators.certified import covering_divisor, matrix_bounds
from snparam.estimators.convolution_bounds import convolution_bounds, magnitude_bounds
from snparam.estimators.estimate import Estimate, register_estimator
from snparam.estimators.rayleigh_ritz import RayleighRitz
from snparam.matrices.convolutions import ConvolutionStack
from snparam.matrices.products import Stack


class Upper(RayleighRitz):
    """Rayleigh-Ritz iteration for the vectors, and a certified bound for σ.

    With B for the bound, σ̂ for the value of u₁ and v₁, and both constant to autograd, the gradient
    of B is taken to be (B / σ̂) u₁ v₁ᴴ, so that ⟨∂B/∂W, W⟩ is B, and W / B does not change with the
    length of W. It is exact where B is a multiple of σ. The estimate has that factor in v₁.
    """

    name = "upper"
    side = "above"

    def certify(
        self,
        estimate: Estimate,
        stack: Tensor | Stack,
        dtype: torch.dtype,
        coeff: float,
        soft: bool,
    ) -> Estimate:
        """Return an estimate whose σ, divided by c, is a divisor that covers all rounding.

        Of a convolution that is a bound for every size of its inputs.
        """
        upper, magnitude, entries = _bounds(stack)
        sv = estimate.sv
        upper, magnitude = upper.to(sv.device), magnitude.to(sv.device)
        divisor = covering_divisor(upper, magnitude, entries, dtype, sv.dtype, coeff)
        # A device may cast a single number to the dtype of the tensor that it divides.
        divisor = _rounded_up(divisor, dtype.to_real()).to(sv.dtype)
        sigma = _times(divisor, coeff)
        if soft:
            # A weight that is within the bound is left as it is. Rounding is monotone.
            sigma = torch.where(upper <= coeff, upper.to(sv.dtype), sigma)
        sigma = torch.where(upper == 0, 1.0, sigma)
        usable = (upper > 0) & upper.isfinite()
        first = sv[:, 0]
        factor = torch.where(usable & (first > 0), sigma / first, 1.0)
        v = torch.cat([estimate.v[:, :1] * factor[:, None, None], estimate.v[:, 1:]], 1)
        first = torch.where(usable, sigma, first)
        sigma = torch.where(usable, sigma, 1.0)
        return Estimate(
            estimate.u,
            v,
            torch.cat([first[:, None], sv[:, 1:]], 1),
            sigma[0] if len(sigma) == 1 else sigma,
        )


register_estimator(Upper())


def _bounds(stack: Tensor | Stack) -> tuple[Tensor, Tensor, int]:
    """Return bounds (b,) of σ and of the norm of the magnitudes, and the entries they sum over.

    Raises:
        ValueError: for a sharded stack.
    """
    if isinstance(stack, Tensor):
        bounds = matrix_bounds(stack)
        return bounds.upper, bounds.frobenius, stack.shape[1] * stack.shape[2]
    if isinstance(stack, ConvolutionStack):
        geometry = stack.view.geometry
        upper = convolution_bounds(stack.weight, geometry).upper
        magnitude, entries = magnitude_bounds(stack.weight, geometry)
        both = torch.tensor([[upper], [magnitude]], dtype=torch.float64)
        return both[0], both[1], entries
    raise ValueError(
        "sigma='upper': the weight is sharded, and no rank has all that a certificate needs; "
        "convert with another sigma, or do not shard it"
    )


def _rounded_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x rounded to a narrower dtype, not below it, or as it is above the range of that."""
    narrow = x.to(dtype)
    above = torch.nextafter(narrow, torch.full_like(narrow, torch.inf))
    rounded = torch.where(narrow.to(x.dtype) < x, above, narrow).to(x.dtype)
    return torch.where(rounded.isfinite(), rounded, x)


def _times(divisor: Tensor, coeff: float) -> Tensor:
    """Return a number whose quotient by c, rounded as constraints round it, is not below d."""
    if coeff == 1:
        return divisor
    product = divisor * coeff
    for _ in range(4):
        above = torch.nextafter(product, torch.full_like(product, torch.inf))
        product = torch.where(product / coeff < divisor, above, product)
    return product
