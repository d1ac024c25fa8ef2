"""The operator of a convolution is the matrix that the identity gives, pushed through the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.convolutions import MODES, exact_norm, explicit_matrix, ignores_same, layers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from snparam.estimators import convergence
from snparam.layers.convolutions import geometry_of
from snparam.matrices.convolutions import ConvolutionView
from snparam.matrices.products import left_product, right_product
from snparam.matrices.stacks import stack_of

WIDE = (torch.float64, torch.complex128)
pytestmark = ignores_same


def view_of(layer: Any, size: tuple[int, ...]) -> ConvolutionView:
    geometry = geometry_of(layer)
    assert geometry is not None
    return ConvolutionView(tuple(layer.weight.shape), geometry, size)


def vectors(count: int, length: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, length, dtype=dtype, generator=generator)


@pytest.mark.parametrize("dtype", WIDE)
@settings(max_examples=200)
@given(data=st.data())
def test_products_are_those_with_the_explicit_matrix(data: Any, dtype: torch.dtype) -> None:
    layer, size = data.draw(layers(dtype))
    matrix, view = explicit_matrix(layer, size), view_of(layer, size)
    assert view.matrices == (1, *matrix.shape)
    stack: Any = stack_of(layer.weight.detach(), view)
    count = data.draw(st.integers(1, 3))
    u, v = (vectors(count, length, dtype, seed) for seed, length in enumerate(matrix.shape))
    torch.testing.assert_close(right_product(stack, v), v @ matrix.T)
    torch.testing.assert_close(left_product(stack, u), u @ matrix.conj())
    torch.testing.assert_close(stack.to_dense(), matrix[None])


@pytest.mark.parametrize("dtype", WIDE)
@settings(max_examples=100)
@given(data=st.data())
def test_the_outer_product_is_the_gradient_of_what_u_and_v_see(
    data: Any, dtype: torch.dtype
) -> None:
    """Re(uᴴ A v) is linear in the weight: its derivative along a weight is its value there."""
    layer, size = data.draw(layers(dtype))
    matrix, view = explicit_matrix(layer, size), view_of(layer, size)
    u, v = (vectors(1, length, dtype, seed)[0] for seed, length in enumerate(matrix.shape))
    weight = layer.weight.detach()
    value = (u[0].conj() @ matrix @ v[0]).real
    torch.testing.assert_close(view.inner(u, weight, v)[0], value)
    outer = stack_of(weight, view).outer(u, v)  # type: ignore[union-attr]
    assert outer.shape == weight.shape
    torch.testing.assert_close((outer.conj() * weight).sum().real, value)
    differentiable = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(view.inner(u, differentiable, v).sum(), differentiable)
    torch.testing.assert_close(outer, gradient)


@settings(max_examples=200)
@given(drawn=layers())
def test_the_norm_is_found_from_the_products_alone(drawn: Any) -> None:
    """Whether products are in float32, as in training, or in float64."""
    layer, size = drawn
    exact, view = exact_norm(layer, size), view_of(layer, size)
    for dtype in (torch.float32, torch.float64):
        stack = stack_of(layer.weight.detach().to(dtype), view)
        _, sv = convergence.converged(stack, 1)
        assert float(sv) == pytest.approx(exact, rel=1e-3, abs=1e-12)
        assert float(sv) <= exact * (1 + 1e-5)


# On long inputs the largest singular values of a convolution lie closest together.
LONG = {
    "smooth": lambda layer: layer.weight.data.copy_(1 + 0.1 * torch.randn_like(layer.weight)),
    "random": lambda layer: layer.weight.data.copy_(torch.randn_like(layer.weight)),
    "one tap": lambda layer: nn.init.dirac_(layer.weight),
}


@pytest.mark.parametrize("weight", LONG)
@pytest.mark.parametrize(
    ("kind", "mode"), [(nn.ConvTranspose1d, "zeros"), *((nn.Conv1d, mode) for mode in MODES)]
)
def test_the_norm_on_long_inputs_is_found_to_a_thousandth(
    kind: Any, mode: str, weight: str
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = kind(1, 1, 3, padding=1, padding_mode=mode, bias=False).double()
        LONG[weight](layer)
    _, sv = convergence.converged(
        stack_of(layer.weight.detach().float(), view_of(layer, (500,))), 1
    )
    assert float(sv) == pytest.approx(exact_norm(layer, (500,)), rel=1e-3)


def test_a_norm_that_hides_behind_many_nearly_as_large_is_found() -> None:
    """One channel of 500 is larger than the others, which hide it from the first steps."""
    layer = nn.Conv1d(500, 500, 1, groups=500, bias=False)
    layer.weight.data.fill_(0.996)
    layer.weight.data[123] = 1.0
    _, sv = convergence.converged(stack_of(layer.weight.detach(), view_of(layer, (1,))), 1)
    assert float(sv) == pytest.approx(1, rel=1e-3)


@given(drawn=layers(), count=st.integers(2, 3))
def test_further_singular_values_are_found_with_their_vectors(drawn: Any, count: int) -> None:
    layer, size = drawn
    matrix, view = explicit_matrix(layer, size), view_of(layer, size)
    count = min(count, *matrix.shape)
    sigma = torch.linalg.svdvals(matrix)[:count]
    u, sv = convergence.converged(stack_of(layer.weight.detach(), view), count)
    torch.testing.assert_close(sv[0], sigma, rtol=0, atol=1e-3 * float(sigma[0]) + 1e-12)
    lengths = torch.linalg.vector_norm(u[0] @ matrix, dim=-1)
    torch.testing.assert_close(lengths, sigma, rtol=0, atol=1e-2 * float(sigma[0]) + 1e-12)


REFUSED = {
    "too few axes": (nn.Conv2d(1, 1, 3), (8,), "expected 2 numbers"),
    "no entries": (nn.Conv1d(1, 1, 3), (0,), "at least 1"),
    "shorter than the kernel": (nn.Conv1d(1, 1, 5), (4,), r"output would have the size \(0,\)"),
    "shorter than what is repeated": (
        nn.Conv1d(1, 1, 5, padding=3, padding_mode="circular"),
        (2,),
        "too small for circular padding by 3",
    ),
    "without what is reflected": (
        nn.Conv1d(1, 1, 5, padding=2, padding_mode="reflect"),
        (2,),
        "too small for reflect padding by 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inputs_that_the_layer_cannot_take_have_no_operator(case: str) -> None:
    layer, size, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        view_of(layer, size)
    with pytest.raises((RuntimeError, ValueError)):  # torch's own
        layer(torch.zeros(1, 1, *size))
