"""Certified bounds of convolutions: against their explicit matrices at drawn sizes."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.convolutions import exact_norm, ignores_same, layers
from hypothesis import given, settings
from torch import Tensor, nn

from snparam.estimators import convolution_bounds as subject
from snparam.estimators.convolution_bounds import Bounds, convolution_bounds
from snparam.layers.convolutions import geometry_of
from snparam.matrices.convolutions import Geometry

ROUNDING = 1e-13


def bounds_of(layer: nn.Module, size: Any = None, tightness: float = 1.05) -> Bounds:
    geometry = geometry_of(layer)
    assert geometry is not None
    return convolution_bounds(layer.weight, geometry, size, tightness)


def layer_with(kernel: Tensor, **options: Any) -> nn.Module:
    """A convolution of one input and output channel, with the given kernel."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layer = kinds[kernel.ndim - 1](1, 1, kernel.shape, bias=False, dtype=kernel.dtype, **options)
    with torch.no_grad():
        layer.weight.copy_(kernel)
    return layer


@ignores_same
@settings(max_examples=200)
@given(drawn=layers())
def test_no_drawn_convolution_exceeds_its_bounds(drawn: Any) -> None:
    """At its size, by both forms of the bound there, and by the bound for every size."""
    layer, size = drawn
    norm = exact_norm(layer, size)
    explicit, everywhere = bounds_of(layer, size), bounds_of(layer)
    with mock.patch.object(subject, "_MAX_EXPLICIT_ENTRIES", 0):
        by_symbol = bounds_of(layer, size)
    for bounds in (explicit, everywhere, by_symbol):
        assert norm * (1 - ROUNDING) <= bounds.upper
    for bounds in (explicit, by_symbol):
        assert bounds.lower <= norm * (1 + ROUNDING)
    assert norm * (1 - 1e-9) <= explicit.lower
    assert explicit.upper <= norm * (1 + 1e-9)
    assert norm * 0.9 <= by_symbol.lower


def supremum(layer: nn.Module, points: int = 256) -> float:
    """The norm of the symbol of a convolution of stride 1, on a fine grid."""
    weight = layer.weight.detach()
    axes = tuple(range(2, weight.ndim))
    symbol = torch.fft.fftn(weight, s=(points,) * len(axes), dim=axes).movedim((0, 1), (-2, -1))
    return float(torch.linalg.svdvals(symbol)[..., 0].max())


@pytest.mark.parametrize("tightness", [1.2, 1.05, 1.01])
@pytest.mark.parametrize("shape", [(3, 2, 5), (2, 3, 3, 3), (1, 1, 7, 2), (1, 2, 1, 4)], ids=str)
def test_the_bound_for_every_size_is_as_tight_as_asked(
    shape: tuple[int, ...], tightness: float
) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        kind = (nn.Conv1d, nn.Conv2d)[len(shape) - 3]
        layer = kind(shape[1], shape[0], shape[2:], padding=1, bias=False, dtype=torch.float64)
        bounds, right = bounds_of(layer, tightness=tightness), supremum(layer)
        assert right <= bounds.upper <= tightness * right * (1 + 1e-4)
        assert right / tightness <= bounds.lower <= right * (1 + 1e-3)


def test_a_kernel_of_ones_is_bounded_by_their_number() -> None:
    """‖K̂‖ is largest at ω = 0, where it is 9; at n × n it is (1 + 2 cos(π / (n + 1)))²."""
    layer = layer_with(torch.ones(3, 3, dtype=torch.float64), padding=1)
    bounds = bounds_of(layer)
    assert 9 <= bounds.upper <= 9 * 1.05
    assert 9 * (1 - 1e-9) <= bounds.lower <= 9
    for n in (1, 4, 9):
        right = (1 + 2 * math.cos(math.pi / (n + 1))) ** 2
        at_size = bounds_of(layer, (n, n))
        assert at_size.lower * (1 - 1e-12) <= right <= at_size.upper <= right * (1 + 1e-9)


def test_dilation_is_left_out_only_after_the_common_divisor_with_the_stride() -> None:
    """K = [1, 1] with s = d = 2: both taps meet the same channel, and the norm is 2, not √2."""
    layer = layer_with(torch.ones(2, dtype=torch.float64), stride=2, dilation=2)
    assert 2 <= bounds_of(layer).upper <= 2.1
    other = layer_with(torch.ones(2, dtype=torch.float64), stride=2)
    assert math.sqrt(2) <= bounds_of(other).upper <= math.sqrt(2) * (1 + 1e-9)


@pytest.mark.parametrize("kernel", [2, 3], ids=str)
def test_a_stride_of_the_kernel_is_a_matrix(kernel: int) -> None:
    """A patch embedding: patches do not overlap, and the norm is that of the reshaped weight."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, kernel, stride=kernel, bias=False, dtype=torch.float64)
    right = float(torch.linalg.svdvals(layer.weight.detach().flatten(1))[0])
    bounds = bounds_of(layer)
    assert right * (1 - 1e-9) <= bounds.lower <= right <= bounds.upper <= right * (1 + 1e-9)


@pytest.mark.parametrize("taps", [(1.0, -1.0), (1.0, -2.0, 1.0), (1.0, 1.0)], ids=str)
def test_a_symbol_with_zeros_is_bounded_by_its_maximum(taps: tuple[float, ...]) -> None:
    """Differences: at ω = 0 the symbol is 0, and at π their sum of magnitudes."""
    bounds = bounds_of(layer_with(torch.tensor(taps, dtype=torch.float64)))
    right = sum(map(abs, taps))
    assert right <= bounds.upper <= right * 1.05
    assert right / 1.05 <= bounds.lower <= right


@pytest.mark.parametrize("n", [3, 5, 7])
def test_a_stride_that_does_not_divide_the_ring_is_left_out(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outputs wrap around at odd places: the norm is above the strided symbol's supremum."""
    monkeypatch.setattr(subject, "_MAX_EXPLICIT_ENTRIES", 0)
    kernel = torch.tensor([0.0, 0.4, 0.3], dtype=torch.float64)
    layer = layer_with(kernel, stride=2, padding=1, padding_mode="circular")
    norm = exact_norm(layer, (n,))
    strided = layer_with(kernel, stride=2)
    assert norm > 1.1 * bounds_of(strided).lower
    assert norm <= bounds_of(layer, (n,)).upper
    assert norm <= bounds_of(layer).upper


def test_circular_padding_is_exact_on_its_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm is the largest of the n frequencies' blocks: no more of them are looked at."""
    monkeypatch.setattr(subject, "_MAX_EXPLICIT_ENTRIES", 0)
    for n in (4, 5, 6):
        torch.manual_seed(n)
        layer = nn.Conv1d(
            2, 3, 3, padding=1, padding_mode="circular", bias=False, dtype=torch.float64
        )
        blocks = torch.fft.fft(layer.weight.detach(), n=n).movedim(-1, 0)
        right = float(torch.linalg.svdvals(blocks)[:, 0].max())
        assert right <= bounds_of(layer, (n,)).upper <= right * (1 + 1e-5)


def test_padding_that_copies_entries_is_in_the_bound() -> None:
    """Wide padding of each kind: the plain symbol's supremum, 1, is no bound."""
    one = torch.ones(1, dtype=torch.float64)
    for mode, size, right in (
        ("circular", 4, 3),
        ("reflect", 5, 3),
        ("replicate", 3, 5),
        ("replicate", 1, 9),
    ):
        layer = layer_with(one, padding=4, padding_mode=mode)
        norm = exact_norm(layer, (size,))
        assert norm == pytest.approx(math.sqrt(right), rel=1e-12)
        assert norm * (1 - 1e-12) <= bounds_of(layer).upper
        assert norm * (1 - 1e-12) <= bounds_of(layer, (size,)).upper <= norm * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e4])
def test_every_dtype_and_scale_is_bounded(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(1)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    weight = (torch.randn(3, 2, 3, 2, dtype=wide) * scale).to(dtype)
    geometry = Geometry((1, 1), ((1, 1), (0, 0)), (1, 1))
    bounds = convolution_bounds(weight, geometry)
    symbol = torch.fft.fftn(weight.to(wide), s=(128, 128), dim=(2, 3)).movedim((0, 1), (-2, -1))
    right = float(torch.linalg.svdvals(symbol / scale)[..., 0].max()) * scale
    assert right * (1 - 1e-12) <= bounds.upper <= right * 1.0501
    assert bounds.lower <= right * 1.001


def test_zero_and_broken_weights() -> None:
    geometry = Geometry((1,), ((1, 1),), (1,))
    zero = torch.zeros(2, 2, 3)
    assert convolution_bounds(zero, geometry)[:2] == (0.0, 0.0)
    zero[0, 0, 1] = float("nan")
    assert all(math.isnan(end) for end in convolution_bounds(zero, geometry)[:2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tightness": 1.0}, r"tightness=1.0: expected a finite number of at least 1.0001"),
        ({"tightness": math.nan}, r"tightness=nan: expected a finite number"),
        ({"input_size": (8,)}, r"input_size=\(8,\): expected 2 positive number"),
        ({"input_size": (8, 0)}, r"input_size=\(8, 0\): expected 2 positive number"),
        ({"input_size": (8, 2)}, r"the output would have the size \(6, 0\)"),
    ],
)
def test_wrong_arguments_are_named(arguments: Any, message: str) -> None:
    geometry = Geometry((1, 1), ((0, 0), (0, 0)), (1, 1))
    with pytest.raises(ValueError, match=message):
        convolution_bounds(torch.ones(2, 2, 3, 3), geometry, **arguments)


def test_a_weight_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"of 3 dimensions, not one of shape \(2, 2, 3, 3\)"):
        convolution_bounds(torch.ones(2, 2, 3, 3), Geometry((1,), ((0, 0),), (1,)))
    with pytest.raises(ValueError, match=r"does not split into groups=2"):
        convolution_bounds(torch.ones(3, 2, 3), Geometry((1,), ((0, 0),), (1,), groups=2))


def test_it_works_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_MAX_EXPLICIT_ENTRIES", 0)
    layer, size = nn.Conv2d(2, 3, 3, bias=False), (7, 6)
    with torch.inference_mode():
        assert bounds_of(layer, size).upper == bounds_of(layer, size).upper > 0
