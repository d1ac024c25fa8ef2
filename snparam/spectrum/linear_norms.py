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
import torch.nn.functional as F
from torch import Tensor

from snparam.matrices.convolutions import Geometry

# A factor γ/√(var + eps) and its product with a weight are off by less than eight times the unit
# roundoff of float64, 2⁻⁵³, relatively.
_ROUNDING = 2.0**-50

# Up to so many entries, the explicit matrix of a convolution is certified: its norm is exact where
# a bound for every input size is above by what its tightness allows. Decomposing it takes less than
# a second.
_EXPLICIT_ENTRIES = 2**20


def certified_norm(stack: Tensor) -> Tensor:
    """Stand in for the certified norm until it is there."""
    largest: Tensor = torch.linalg.svdvals(stack)[:, 0]
    return largest.double() * (1 + 1e-9)


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
        error: what the norm of the map may exceed that of `weight`'s by, because of rounding.
    """

    weight: Tensor
    geometry: Geometry
    input_size: tuple[int, ...]
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
        return convolution_norm(self.weight, self.geometry, self.input_size) + self.error


LinearMap = MatrixMap | ConvolutionMap


def _largest(factors: Tensor) -> float:
    return float(factors.abs().max())


def convolution_norm(weight: Tensor, geometry: Geometry, input_size: tuple[int, ...]) -> float:
    """Return an upper bound of the norm of a convolution at an input size.

    Where its explicit matrix is small, that is certified; elsewhere the smaller of the bounds at
    the size and for every size is taken.
    """
    return certified(explicit_matrices(weight, geometry, input_size))


def explicit_matrices(weight: Tensor, geometry: Geometry, input_size: tuple[int, ...]) -> Tensor:
    """Return the matrices (groups, m, n) of a convolution, one of each group.

    The identity is pushed through the convolution, the same for each group.
    """
    groups = geometry.groups
    channels = weight.shape[0] // groups if geometry.transposed else weight.shape[1]
    entries = channels * math.prod(input_size)
    identity = torch.eye(entries, dtype=weight.dtype).reshape(entries, channels, *input_size)
    image = _convolve(identity.repeat(1, groups, *(1 for _ in input_size)), weight, geometry)
    return image.reshape(entries, groups, -1).permute(1, 2, 0)


def _convolve(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    axes = len(geometry.stride)
    convolve: Callable[..., Tensor]
    if geometry.transposed:
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
        padding = [before for before, _ in geometry.padding]
        return convolve(
            x,
            weight,
            None,
            geometry.stride,
            padding,
            geometry.output_padding,
            geometry.groups,
            geometry.dilation,
        )
    convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    padded = F.pad(x, [side for pair in reversed(geometry.padding) for side in pair], mode=mode)
    return convolve(padded, weight, None, geometry.stride, 0, geometry.dilation, geometry.groups)


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
