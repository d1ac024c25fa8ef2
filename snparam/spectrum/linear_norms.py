"""Upper bounds of the norms of the linear maps that a network computes with, for `certify`.

A map is kept until its norm is asked for, so that a batch norm or a scale of the channels behind a
convolution can be folded into it: the norm of the product of both is smaller than the product of
their norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from snparam.estimators.certified import certified_norm
from snparam.estimators.convolution_bounds import convolution_bounds
from snparam.matrices.convolutions import Geometry

# A factor γ/√(var + eps) and its product with a weight are off by less than eight times the unit
# roundoff of float64, 2⁻⁵³, relatively.
_ROUNDING = 2.0**-50


def certified(matrices: Tensor) -> float:
    """Return an upper bound of the largest norm of the matrices (b, m, n)."""
    if 0 in matrices.shape:
        return 0.0
    return float(certified_norm(matrices).max())


@dataclass(frozen=True)
class MatrixMap:
    """x → W x along the last axis of x.

    Attributes:
        weight: W (out, in), in float64 or complex128.
        error: what the norm of the map may exceed that of `weight` by, because of rounding.
    """

    weight: Tensor
    error: float = 0.0

    @property
    def channel_axis(self) -> int:
        """The axis of the output that counts the channels, from the end."""
        return -1

    def scaled(self, factors: Tensor) -> MatrixMap:
        """Return the map whose output channels are multiplied by `factors`, (out,) or ()."""
        weight = self.weight * factors.reshape(-1, 1)
        error = self.error * _largest(factors) + _ROUNDING * float(weight.norm())
        return MatrixMap(weight, error)

    def norm(self) -> float:
        """Return an upper bound of the norm of the map."""
        return certified(self.weight.unsqueeze(0)) + self.error


@dataclass(frozen=True)
class ConvolutionMap:
    """A convolution at one input size.

    Attributes:
        weight: the layer's weight, in float64 or complex128: (out, in / groups, *kernel_size), and
            of a transposed convolution (in, out / groups, *kernel_size).
        geometry: stride, padding, dilation, groups, and whether it is transposed.
        input_size: size of the input along the axes of the kernel.
        tightness: how far the bound may be above the norm, where that is not found exactly.
        error: what the norm of the map may exceed that of `weight`'s by, because of rounding.
    """

    weight: Tensor
    geometry: Geometry
    input_size: tuple[int, ...]
    tightness: float = 1.05
    error: float = 0.0

    @property
    def channel_axis(self) -> int:
        """The axis of the output that counts the channels, from the end."""
        return -1 - len(self.input_size)

    def scaled(self, factors: Tensor) -> ConvolutionMap:
        """Return the map whose output channels are multiplied by `factors`, (out,) or ().

        Each entry of the product is off by a part u of itself, and the norm of the convolution with
        those errors is at most their absolute sum over the taps, in the Frobenius norm over the
        channels, thus at most u √taps ‖K‖_F, which is added.
        """
        taps = self.weight.shape[2:]
        if self.geometry.transposed and factors.numel() > 1:
            groups = self.geometry.groups
            grouped = self.weight.reshape(groups, -1, *self.weight.shape[1:])
            weight = (grouped * factors.reshape(groups, 1, -1, *(1 for _ in taps))).flatten(0, 1)
        else:
            weight = self.weight * factors.reshape(-1, *(1 for _ in self.weight.shape[1:]))
        added = _ROUNDING * math.sqrt(math.prod(taps)) * float(weight.norm())
        return replace(self, weight=weight, error=self.error * _largest(factors) + added)

    def norm(self) -> float:
        """Return an upper bound of the norm of the map at its input size."""
        if self.weight.numel() == 0:
            return 0.0
        bounds = convolution_bounds(self.weight, self.geometry, self.input_size, self.tightness)
        return bounds.upper + self.error


LinearMap = MatrixMap | ConvolutionMap


def _largest(factors: Tensor) -> float:
    return float(factors.abs().max())


def kronecker_norm(matrices: Sequence[Tensor]) -> float:
    """Return an upper bound of the norm of the Kronecker product of matrices (m, n)."""
    return math.prod(certified(matrix.unsqueeze(0)) for matrix in matrices)


def axis_matrix(function: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Return the matrix (m, n) of a linear function of vectors.

    Args:
        function: takes a batch (n, 1, n) of vectors to one of (n, 1, m).
        size: n.
    """
    return function(torch.eye(size, dtype=torch.float64).unsqueeze(1)).squeeze(1).T


def as_float64(weight: Any) -> Tensor:
    """Return a tensor on the CPU in float64, or complex128."""
    dtype = torch.complex128 if weight.is_complex() else torch.float64
    return torch.as_tensor(weight).detach().to("cpu", dtype)
