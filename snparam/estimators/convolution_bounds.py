"""Certified bounds of the norm of a convolution: the linear map itself, not its reshaped weight.

The symbol of a kernel of taps K_j (matrices of output by input channels) is K̂(ω) = Σ K_j e^{iωj}.
On an infinite signal the norm of the convolution is the supremum over ω of the largest singular
value ‖K̂(ω)‖. All else is reduced to that:

- Zero padding, none, `"same"` padding and output padding: a finite signal is an infinite one that
  is zero elsewhere, and the finite output is a part of the infinite one, so that the norm is at
  most the supremum. With several groups it is the largest of theirs. A transposed convolution is
  the adjoint of a convolution, whose norm is the same.
- Stride s and dilation d: only inputs at multiples of g = gcd(s, d), from some start, meet in one
  output, so that s/g and d/g do instead. These have no common divisor, and a dilation that has none
  with the stride only permutes the frequencies that the stride folds together; it is left out.
  A stride then reads the input as s/g interleaved channels, each with every (s/g)-th tap.
- Circular padding repeats entries: the output is at most ⌈(n + l + r − d(k − 1)) / n⌉ periods of
  the convolution on the ring of n entries, for padding l before and r after. A stride that does not
  divide n takes some of those outputs, in no period of its own, and is left out.
- Reflecting and replicating padding: the convolution is that of a padded signal, and padding itself
  has the norm √(most copies of one entry), along each axis.

Along an axis with k taps, ‖K̂‖ is at most its largest value at N > k − 1 equally spaced points
divided by cos(π(k − 1)/(2N)). For uᴴ K̂ v e^{−iω(k−1)/2} is of exponential type (k − 1)/2, and
around its maximum such a function falls no faster than that cosine (M. Riesz 1914; Duffin and
Schaeffer 1938). Several axes are taken one after another.

At a point, σ² is bounded by a Cholesky factorisation of a I − K̂ K̂ᴴ, as in `certified`. K̂(ω) K̂(ω)ᴴ
is Σ_d R_d e^{iωd}, with the autocorrelations R_d = Σ_j K_{j+d} K_jᴴ, which all points share. Its
rounding is at most (p n + 2 q + 40) u (Σ_j ‖K_j‖_F)², for p taps, n input channels and q
autocorrelations, of which twice as much is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from snparam.estimators.certified import (
    gamma,
    matrix_bounds,
    on_device_with_float64,
    rounded_down,
    rounded_up,
    scaling_exponent,
    semidefinite_shift,
    times_power_of_two,
)
from snparam.estimators.convergence import quasi_random
from snparam.matrices.convolutions import ConvolutionView, Geometry
from snparam.matrices.products import wide_dtype

# The largest explicit matrix of a convolution at a size that is made: its entries, and the smaller
# number of its rows and columns. Its factorisation then takes less than a second.
_MAX_EXPLICIT_ENTRIES, _MAX_EXPLICIT_SIDE = 1 << 22, 1024

# Entries of the Gram matrices that are factorised at a time. They stay within what malloc reuses:
# with four times as many, making them takes twice as long for 512 channels.
_MAX_ENTRIES = 1 << 20

# By how much the level a exceeds the largest σ² found. The grid is made a little tighter than it is
# asked to be, for that and for rounding; a tightness nearer to 1 than this would take minutes.
_LEVEL_EXCESS = 1e-6
_MARGIN = 1 + 1e-5
_MIN_TIGHTNESS = 1.0001

# Steps of Lanczos on the convolution at a size, for a lower bound, and the multiplications after
# which there are fewer of them, since they would take longer than the upper bound does.
_LOWER_STEPS, _LEAST_LOWER_STEPS, _MAX_MULTIPLICATIONS = 16, 3, 1 << 34

_UNIT = 2.0**-53


class Bounds(NamedTuple):
    """Certified bounds of the norm of a linear map.

    Attributes:
        lower: at most the norm; for every input size, at most its supremum over sizes.
        upper: at least the norm, rounding included.
        method: how the upper bound was found.
    """

    lower: float
    upper: float
    method: str


class _Axis(NamedTuple):
    """One spatial axis of a convolution.

    Attributes:
        taps: number of taps of the kernel.
        stride: stride by which the kernel is split into interleaved channels, free of common
            divisors with the dilation.
        copies: the square of the factor for its padding.
        period: number of points of the discrete frequencies that are enough, or None.
    """

    taps: int
    stride: int
    copies: int = 1
    period: int | None = None


@torch.no_grad()
def convolution_bounds(
    weight: Tensor,
    geometry: Geometry,
    input_size: Sequence[int] | None = None,
    tightness: float = 1.05,
) -> Bounds:
    """Return certified bounds of the norm of a convolution, at one input size or for every size.

    Without a size, the upper bound holds for every one, and for convolutions that are not circular
    it exceeds the supremum of ‖K̂‖, which they come close to on large inputs, at most by the factor
    `tightness` and the factor for their padding. At a size, a small convolution is written as a
    matrix, whose norm is certified; for others the bound is the smaller of those that hold.

    Args:
        weight: as torch's layer has it: (out, in / groups, *kernel_size), and (in, out / groups,
            *kernel_size) of a transposed one; any real or complex floating dtype.
        geometry: stride, padding, dilation and so on.
        input_size: the spatial size of the input, or None for every size.
        tightness: the ratio of the upper bound to the supremum that is aimed for, at
            least 1.0001. The number of frequencies grows as 1 / √(tightness − 1) for each axis.

    Returns:
        the bounds. Both are NaN for a weight with NaN or inf.

    Raises:
        ValueError: if the weight, the geometry and the input size do not belong together, or the
            tightness is below 1.0001.
        TypeError: if the input size is no sequence of whole numbers.

    Source: Sedghi, Gupta and Long 2019 for the symbol; Pfister and Bresler 2019, "Bounding
    multivariate trigonometric polynomials", for bounds from its values on a grid.
    """
    if not _MIN_TIGHTNESS <= tightness < math.inf:
        raise ValueError(
            f"tightness={tightness!r}: expected a finite number of at least {_MIN_TIGHTNESS}"
        )
    kernel_size = tuple(weight.shape[2:])
    size = _checked_size(weight, geometry, input_size)
    weight = on_device_with_float64(weight.detach())
    (exponent,), (is_zero,) = scaling_exponent(weight.reshape(1, -1))
    if not bool(weight.isfinite().all()):
        return Bounds(math.nan, math.nan, "none: the weight has NaN or inf")
    if bool(is_zero):
        return Bounds(0.0, 0.0, "the weight is zero")
    wide = weight.to(wide_dtype(weight.dtype))
    if wide.is_complex():
        parts = times_power_of_two(torch.view_as_real(wide.resolve_conj()), -exponent)
        kernels = torch.view_as_complex(parts)
    else:
        kernels = times_power_of_two(wide, -exponent)
    # (groups, output channels, input channels, *kernel); the channels of a transposed convolution
    # are in the other order, which its norm does not depend on.
    kernels = kernels.reshape(geometry.groups, -1, *weight.shape[1:])
    if size is not None and _fits_explicitly(kernels, geometry, size):
        lower, upper, method = _explicit_bounds(kernels, geometry, size)
    else:
        axes = _axes(geometry, kernel_size, size)
        lower, upper, method = _symbol_bounds(kernels, axes, tightness)
        if size is not None:
            lower = _lower_bound_at(kernels, geometry, size)
        elif any(axis.stride != true for axis, true in zip(axes, _strides(geometry), strict=True)):
            true_axes = [
                _Axis(taps, stride)
                for taps, stride in zip(kernel_size, _strides(geometry), strict=True)
            ]
            lower, _, _ = _symbol_bounds(kernels, true_axes, tightness)
    ends = times_power_of_two(torch.tensor([lower, upper], dtype=torch.float64), exponent.cpu())
    return Bounds(float(rounded_down(ends[0])), float(rounded_up(ends[1])), method)


def magnitude_bounds(weight: Tensor, geometry: Geometry) -> tuple[float, int]:
    """Return bounds of the norms of two convolutions that say how rounding of a weight changes it.

    They hold for every input size. The first is of the convolution with the magnitudes of all
    entries: Σ_j ‖K_j‖_F, times the factor for the padding. The square of the other is the number
    that is returned second: of the convolution of a kernel of ones, bounded in the same way.

    Args:
        weight: finite, as in `convolution_bounds`.
        geometry: stride, padding, dilation and so on.
    """
    weight = on_device_with_float64(weight.detach())
    kernels = weight.to(wide_dtype(weight.dtype)).reshape(geometry.groups, -1, *weight.shape[1:])
    scale = float(kernels.abs().amax()) or 1.0
    norms = torch.linalg.matrix_norm((kernels / scale).movedim((1, 2), (-2, -1)))
    taps = kernels.shape[3:]
    copies = math.prod(axis.copies for axis in _axes(geometry, taps, None))
    total = float(norms.flatten(1).sum(1).max()) * scale * math.sqrt(copies) * (1 + 1e-10)
    return total, math.prod(taps) ** 2 * kernels.shape[1] * kernels.shape[2] * copies


def _checked_size(
    weight: Tensor, geometry: Geometry, input_size: Sequence[int] | None
) -> tuple[int, ...] | None:
    """Return the input size as a tuple.

    Raises:
        ValueError: if weight, geometry and input size do not belong together.
        TypeError: if the input size is no sequence of whole numbers.
    """
    count = len(geometry.stride)
    if weight.ndim != count + 2:
        raise ValueError(
            f"a convolution along {count} axes has a weight of {count + 2} dimensions, not one of "
            f"shape {tuple(weight.shape)}"
        )
    if weight.numel() == 0 or weight.shape[0] % geometry.groups:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} does not split into groups={geometry.groups}"
        )
    if input_size is None:
        return None
    given: Any = input_size
    if not isinstance(given, Sequence) or not all(isinstance(n, int) for n in given):
        raise TypeError(f"input_size={input_size!r}: expected a tuple of {count} number(s)")
    size = tuple(input_size)
    if len(size) != count or any(n < 1 for n in size):
        raise ValueError(
            f"input_size={size}: expected {count} positive number(s), the spatial size of the "
            "input, without batch and channels"
        )
    ConvolutionView(tuple(weight.shape), geometry, size)  # raises where the size is too small
    return size


# The reduction to a symbol


def _strides(geometry: Geometry) -> list[int]:
    """Return, for each axis, the stride without its common divisor with the dilation."""
    return [s // math.gcd(s, d) for s, d in zip(geometry.stride, geometry.dilation, strict=True)]


def _axes(
    geometry: Geometry, kernel_size: Sequence[int], input_size: Sequence[int] | None
) -> list[_Axis]:
    """Return the axes of a convolution whose symbol bounds its norm; see the top of this file."""
    axes = []
    for index, (taps, stride) in enumerate(zip(kernel_size, _strides(geometry), strict=True)):
        before, after = geometry.padding[index]
        n = None if input_size is None else input_size[index]
        mode = "zeros" if geometry.transposed else geometry.padding_mode
        if mode == "circular":
            # torch pads by no more than the input, so that no input is smaller than this.
            least = max(before, after, 1) if n is None else n
            extent = geometry.dilation[index] * (taps - 1)
            copies = max(1, -(-(least + before + after - extent) // least))
            if n is not None and n % geometry.stride[index] == 0:
                axes.append(_Axis(taps, stride, copies, n // geometry.stride[index]))
            else:
                axes.append(_Axis(taps, 1, copies, n))
        else:
            axes.append(_Axis(taps, stride, _most_copies(mode, n, before, after)))
    return axes


def _most_copies(mode: str, n: int | None, before: int, after: int) -> int:
    """Return how often padding puts the same entry into a signal of n entries, or of any number."""
    if mode == "zeros":
        return 1
    if n is None:
        if mode == "reflect":
            return 1 + (before > 0) + (after > 0)
        return 1 + before + after  # of a signal of one entry
    positions = torch.arange(-before, n + after)
    return int(_source(positions, n, mode).bincount().max())


def _source(positions: Tensor, n: int, mode: str) -> Tensor:
    """Return the index of the entry that padding puts at each position, -1 for a zero."""
    if mode == "circular":
        return positions % n
    if mode == "replicate":
        return positions.clamp(0, n - 1)
    if mode == "reflect":
        positions = positions.abs()
        return (n - 1) - ((n - 1) - positions).abs()
    return torch.where((positions >= 0) & (positions < n), positions, -1)


def _polyphase(kernels: Tensor, axes: Sequence[_Axis]) -> Tensor:
    """Return kernels (g, o, i, *k) with the taps of each stride's phases as input channels."""
    for index, axis in enumerate(axes):
        if axis.stride == 1:
            continue
        dim = 3 + index
        taps = -(-kernels.shape[dim] // axis.stride)
        missing = taps * axis.stride - kernels.shape[dim]
        after = [0, 0] * (kernels.ndim - 1 - dim)
        kernels = F.pad(kernels, [*after, 0, missing])
        split = kernels.reshape(*kernels.shape[:dim], taps, axis.stride, *kernels.shape[dim + 1 :])
        kernels = split.movedim(dim + 1, 3).flatten(2, 3)
    return kernels


# Bounds from the symbol


def _symbol_bounds(
    kernels: Tensor, axes: Sequence[_Axis], tightness: float
) -> tuple[float, float, str]:
    """Return the largest norm that was found on the grid, a bound of the map's, and the method.

    Args:
        kernels: (g, o, i, *k), with entries of at most 1.
        axes: what the spatial axes are reduced to.
        tightness: ratio of the bound on the grid to the supremum.
    """
    kernels = _polyphase(kernels, axes)
    copies = math.prod(axis.copies for axis in axes)
    padding = math.sqrt(copies) * (1 + 2.0**-50)
    times = f", times √{copies} for the padding" if copies > 1 else ""
    if math.prod(kernels.shape[3:]) == 1:
        bounds = matrix_bounds(kernels.flatten(2))
        upper = float(bounds.upper.max()) * padding * (1 + 2.0**-50)
        return float(bounds.lower.max()), upper, f"certified norm of a matrix{times}"
    if kernels.shape[1] > kernels.shape[2]:
        kernels = kernels.transpose(1, 2)
    grid, factor = _grid(kernels.shape[3:], axes, tightness)
    found, level = _largest_on_grid(kernels, grid)
    size = " x ".join(map(str, grid))
    return found, level * factor * padding * (1 + 2.0**-48), f"symbol on a grid of {size}{times}"


def _grid(
    taps: Sequence[int], axes: Sequence[_Axis], tightness: float
) -> tuple[tuple[int, ...], float]:
    """Return the number of points along each axis, and the factor from the grid to the supremum."""
    count = sum(k > 1 for k in taps)
    angle = math.acos((tightness / _MARGIN) ** (-1 / count))
    grid, factor = [], 1.0
    for k, axis in zip(taps, axes, strict=True):
        points = max(k, math.ceil(math.pi * (k - 1) / (2 * angle))) if k > 1 else 1
        if axis.period is not None and axis.period <= points:
            # On a ring there are no other frequencies.
            grid.append(axis.period)
            continue
        grid.append(points)
        factor /= math.cos(math.pi * (k - 1) / (2 * points))
    return tuple(grid), factor


def _largest_on_grid(kernels: Tensor, grid: Sequence[int]) -> tuple[float, float]:
    """Return the largest norm of a symbol that was found on a grid, and a bound of all of them.

    All points share one level a, slightly above the largest σ² that was found so far. A point whose
    a I − G is not positive definite has a larger one, which raises the level. The points come in a
    random order, in batches that double: of each, about one point is expected to raise the level,
    whatever the symbol is, and all others take a Cholesky factorisation only.

    Args:
        kernels: (g, o, i, *k) with o ≤ i.
        grid: number of points along each spatial axis.
    """
    rows, inner, taps = kernels.shape[1], kernels.shape[2], kernels.shape[3:]
    norms = torch.linalg.matrix_norm(kernels.movedim((1, 2), (-2, -1)))
    total = float(norms.flatten(1).sum(1).max()) * (1 + 1e-12)
    offsets = _half_of_offsets(taps)
    points = _points(grid, kernels.is_complex())
    roundings = math.prod(taps) * inner + 2 * (2 * len(offsets) + 1) + 40
    error = 2 * gamma(roundings) * total**2
    found, shift = 0.0, 0.0
    a = (
        1e-24 * total**2
    )  # not 0, where the symbol may be zero, because levels are raised by factors
    in_batch = max(1, _MAX_ENTRIES // (rows * rows))
    for part in torch.split(kernels, in_batch):
        terms = _terms(part, offsets)
        start, batch = 0, 1
        while start < len(points):
            phases = _phases(points[start : start + batch], offsets, grid, part.device)
            start, batch = start + batch, min(2 * batch, max(1, in_batch // len(part)))
            grams = _negated_grams(terms, phases)
            shifts = _shifts_at(a, grams)
            too_low = ~shifts.isfinite()
            if bool(too_low.any()):
                shift = max(shift, float(torch.where(too_low, 0.0, shifts).max()))
                grams = _negated_grams(terms, phases)[too_low]
                found = max(found, -float(torch.linalg.eigvalsh(grams)[:, 0].min()))
                a, shifts = _least_level(max(a, found), grams)
            shift = max(shift, float(shifts.max()))
    upper = math.sqrt((a + shift + error + _UNIT * a) * (1 + 2.0**-48)) * (1 + 2.0**-50)
    lower = math.sqrt(max(0.0, found * (1 - 64 * rows * _UNIT) - error)) * (1 - 2.0**-50)
    return lower, upper


def _shifts_at(a: float, negated: Tensor) -> Tensor:
    """Return by how much a I − G has to be shifted to be certainly semidefinite, for each G.

    Args:
        a: the level.
        negated: −G, which is overwritten.
    """
    negated.diagonal(dim1=-2, dim2=-1).add_(a)
    return semidefinite_shift(negated)


def _least_level(a: float, negated: Tensor) -> tuple[float, Tensor]:
    """Return the least level, slightly above a, at which all G are certified, and their shifts."""
    excess = _LEVEL_EXCESS
    while True:
        shifts = _shifts_at(a * (1 + excess), negated.clone())
        if bool(shifts.isfinite().all()):
            return a * (1 + excess), shifts
        excess *= 10


def _half_of_offsets(taps: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the differences d ≠ 0 of two taps, of d and −d the one that is positive first."""
    zero = (0,) * len(taps)
    return [d for d in product(*(range(1 - k, k) for k in taps)) if d > zero]


def _terms(kernels: Tensor, offsets: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """Return the matrices whose combinations are −K̂ K̂ᴴ at each frequency, of kernels (g, o, i, *k).

    For a real kernel that is −R_0 − Σ_d cos(ωd) (R_d + R_dᵀ) − i Σ_d sin(ωd) (R_d − R_dᵀ).

    Returns:
        −R_0 (g, 1, o²); and for the q offsets, (g, q, o²) each, of real kernels −(R_d + R_dᵀ) and
        −(R_d − R_dᵀ), and of complex ones −R_d and −R_dᴴ.
    """
    correlations = [_autocorrelation(kernels, offset) for offset in offsets]
    zero = _autocorrelation(kernels, (0,) * (kernels.ndim - 3)).neg_()
    first, second = (zero.new_empty(len(kernels), len(offsets), *zero.shape[1:]) for _ in range(2))
    for index, matrix in enumerate(correlations):
        adjoint = matrix.mH
        first[:, index] = -matrix if matrix.is_complex() else -matrix - adjoint
        second[:, index] = -adjoint if matrix.is_complex() else adjoint - matrix
    return zero.flatten(1).unsqueeze(1), first.flatten(2), second.flatten(2)


def _autocorrelation(kernels: Tensor, offset: Sequence[int]) -> Tensor:
    """Return R_d = Σ_j K_{j+d} K_jᴴ, (g, o, o)."""
    shifted = kernels
    for axis, d in enumerate(offset):
        count = kernels.shape[3 + axis] - abs(d)
        shifted = shifted.narrow(3 + axis, max(d, 0), count)
        kernels = kernels.narrow(3 + axis, max(-d, 0), count)
    return torch.bmm(shifted.flatten(2), kernels.flatten(2).mH)


def _points(grid: Sequence[int], is_complex: bool) -> Tensor:
    """Return the indices (f, axes) of the points of a grid, in a random order, the same every time.

    Of a real kernel, one of ω and −ω is enough, whose symbols are conjugate.
    """
    points = torch.cartesian_prod(*(torch.arange(n) for n in grid)).reshape(-1, len(grid))
    if not is_complex:
        sizes = torch.tensor(grid)
        places = torch.tensor([math.prod(grid[axis + 1 :]) for axis in range(len(grid))])
        opposite = (sizes - points) % sizes
        points = points[(points * places).sum(1) <= (opposite * places).sum(1)]
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    return points[order]


def _phases(
    points: Tensor, offsets: Sequence[tuple[int, ...]], grid: Sequence[int], device: torch.device
) -> Tensor:
    """Return e^{iωd} (f, q) for points ω (f, axes) of a grid and q offsets d."""
    # As multiples of one fraction of a turn, in whole numbers, so that the angle is rounded once.
    turn = math.lcm(*grid)
    per_axis = torch.tensor([turn // n for n in grid])
    multiples = (points * per_axis) @ torch.tensor(offsets).T % turn
    angles = multiples.double() / turn * (2 * math.pi)
    return torch.complex(angles.cos(), angles.sin()).to(device)


def _negated_grams(terms: tuple[Tensor, ...], phases: Tensor) -> Tensor:
    """Return −K̂ K̂ᴴ (g · f, o, o) at f points, from their phases (f, q) and `_terms`."""
    zero, first, second = terms
    if zero.is_complex():
        grams = zero + phases @ first + phases.conj() @ second
    else:
        grams = torch.complex((phases.real @ first).add_(zero), phases.imag @ second)
    rows = math.isqrt(grams.shape[-1])
    return grams.reshape(-1, rows, rows)


# Bounds at one size


def _fits_explicitly(kernels: Tensor, geometry: Geometry, input_size: Sequence[int]) -> bool:
    """Return whether the matrix of the convolution is small enough to be made."""
    rows, columns = _explicit_shape(kernels, geometry, input_size)
    is_small = rows * columns * len(kernels) <= _MAX_EXPLICIT_ENTRIES
    return is_small and min(rows, columns) <= _MAX_EXPLICIT_SIDE


def _explicit_shape(
    kernels: Tensor, geometry: Geometry, input_size: Sequence[int]
) -> tuple[int, int]:
    """Return the numbers of outputs and inputs of each group, or of inputs and outputs."""
    outputs = math.prod(geometry.output_size(tuple(input_size), tuple(kernels.shape[3:])))
    inputs = math.prod(input_size)
    if geometry.transposed:
        outputs, inputs = inputs, outputs
    return kernels.shape[1] * outputs, kernels.shape[2] * inputs


def _explicit_bounds(
    kernels: Tensor, geometry: Geometry, input_size: Sequence[int]
) -> tuple[float, float, str]:
    """Return certified bounds of the matrix of a convolution, which is made entry by entry."""
    bounds = matrix_bounds(explicit_matrices(kernels, geometry, input_size))
    error = 0.0
    if geometry.padding_mode != "zeros":  # there, entries may be sums of several taps
        magnitudes = explicit_matrices(kernels.abs(), geometry, input_size)
        taps = math.prod(kernels.shape[3:])
        error = gamma(2 * taps + 2) * float(torch.linalg.matrix_norm(magnitudes).max()) * 1.01
    upper = (float(bounds.upper.max()) + error) * (1 + 2.0**-50)
    lower = max(0.0, float(bounds.lower.max()) - error) * (1 - 2.0**-50)
    return lower, upper, "certified norm of the convolution as a matrix, at this size"


def explicit_matrices(kernels: Tensor, geometry: Geometry, input_size: Sequence[int]) -> Tensor:
    """Return the matrix of a convolution at one size, or of the adjoint of a transposed one.

    Args:
        kernels: (g, o, i, *k), float64 or complex128; of a transposed convolution o counts its
            input channels.
        geometry: stride, padding and so on.
        input_size: the spatial size of the layer's input.

    Returns:
        (g, o · positions, i · positions).
    """
    taps = tuple(kernels.shape[3:])
    output_size = geometry.output_size(tuple(input_size), taps)
    matrices = kernels
    for axis, k in enumerate(taps):
        reads = _reads(geometry, axis, k, input_size[axis], output_size[axis])
        # Each time the first remaining axis of taps becomes two at the end: outputs and inputs.
        matrices = torch.tensordot(matrices, reads.to(kernels), dims=([3], [0]))
    count = len(taps)
    outputs, inputs = range(3, 3 + 2 * count, 2), range(4, 4 + 2 * count, 2)
    matrices = matrices.permute(0, 1, *outputs, 2, *inputs)
    return matrices.flatten(2 + count).flatten(1, 1 + count)


def _reads(geometry: Geometry, axis: int, taps: int, n: int, outputs: int) -> Tensor:
    """Return how often tap j reads input q for output p along an axis, (taps, outputs, inputs).

    Of a transposed convolution, p and q are those of its adjoint.
    """
    before, _ = geometry.padding[axis]
    mode = geometry.padding_mode
    if geometry.transposed:
        n, outputs, mode = outputs, n, "zeros"
    starts = geometry.stride[axis] * torch.arange(outputs) - before
    positions = starts + geometry.dilation[axis] * torch.arange(taps)[:, None]
    source = _source(positions, n, mode)
    reads = torch.zeros(taps, outputs, n + 1, dtype=torch.float64)
    reads.scatter_(2, (source % (n + 1)).unsqueeze(-1), 1.0)
    return reads[..., :n]  # zeros are read from one entry more, which -1 stands for


def _lower_bound_at(kernels: Tensor, geometry: Geometry, input_size: Sequence[int]) -> float:
    """Return a lower bound of the norm at a size: that of one image, less its rounding.

    The image is of an approximate singular vector, from a few steps of Lanczos on the layer's own
    convolution and its adjoint.
    """
    with torch.inference_mode(False):  # autograd saves no tensors of inference mode
        apply, shape = _operator(kernels.clone(), geometry, input_size)
    dtype, device = kernels.dtype, kernels.device
    x = quasi_random(1, math.prod(shape), device, dtype).reshape(shape)
    basis: list[Tensor] = []
    images: list[Tensor] = []
    each = 2 * kernels.numel() * math.prod(input_size)  # an image, and one of the adjoint
    affordable = max(_LEAST_LOWER_STEPS, _MAX_MULTIPLICATIONS // each)
    for _ in range(min(_LOWER_STEPS, affordable)):
        for _ in range(2):
            for q in basis:
                x = x - torch.vdot(q.flatten(), x.flatten()) * q
        length = torch.linalg.vector_norm(x)
        if float(length) < 1e-12:
            break
        x = x / length
        basis.append(x)
        image, x = _image_and_return(apply, x)
        images.append(image.flatten())
        x = x / torch.linalg.vector_norm(x).clamp_min(1e-300)
    stacked = torch.stack(images)
    _, vectors = torch.linalg.eigh(stacked.conj() @ stacked.mT)
    best = torch.stack([q.flatten() for q in basis]).mT @ vectors[:, -1]
    length = torch.linalg.vector_norm(best)
    stretched = torch.linalg.vector_norm(apply(best.reshape(shape))) / length
    # Each output is a sum of so many products, and the norm of the map of all magnitudes is at most
    # the sum of the norms of its taps, times the factor for the padding.
    products = math.prod(kernels.shape[2:]) * (4 if kernels.is_complex() else 1)
    norms = torch.linalg.matrix_norm(kernels.movedim((1, 2), (-2, -1))).flatten(1).sum(1)
    axes = _axes(geometry, kernels.shape[3:], input_size)
    copies = math.prod(axis.copies for axis in axes)
    total = float(norms.max()) * math.sqrt(copies) * 1.01
    return max(0.0, float(stretched) * (1 - 1e-12) - gamma(products + 8) * total)


def _operator(
    kernels: Tensor, geometry: Geometry, input_size: Sequence[int]
) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """Return the convolution as a function of an input, and the input's shape."""
    weight = kernels.flatten(0, 1)
    axis = len(input_size) - 1
    groups, first, second = kernels.shape[:3]
    if geometry.transposed:
        transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axis]
        cut = [before for before, _ in geometry.padding]

        def apply_transposed(x: Tensor) -> Tensor:
            return transposed(
                x,
                weight,
                None,
                geometry.stride,
                cut,
                geometry.output_padding,
                groups,
                geometry.dilation,
            )

        return apply_transposed, (1, groups * first, *input_size)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[axis]
    pads = [count for pair in reversed(geometry.padding) for count in pair]
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode

    def apply(x: Tensor) -> Tensor:
        padded = F.pad(x, pads, mode) if any(pads) else x
        return convolve(padded, weight, None, geometry.stride, 0, geometry.dilation, groups)

    return apply, (1, groups * second, *input_size)


def _image_and_return(apply: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return A x and Aᴴ A x for a linear map A, the latter by reverse-mode differentiation."""
    with torch.inference_mode(False), torch.enable_grad():
        source = x.clone().requires_grad_()
        image = apply(source)
        (back,) = torch.autograd.grad(image, source, image.detach())
    return image.detach(), back
