"""Clip and stable rank as functions of the weight: values by full decompositions, derivatives by
finite differences, of the first, second and third order, and under torch.func.

Finite differences follow the singular vectors along with the weight, so that a gradient that holds
them constant fails here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.spectra import changed, with_values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from snparam.constraints.constraint import CONSTRAINTS
from snparam.estimators.estimate import Estimate
from snparam.matrices.views import Layout, View
from snparam.parametrization.options import Settings

CLIP = {"clip": 1.0}
RANK = {"stable_rank": 1.5}


def constrained(view: View, k: int, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The weight in use as a function of the weight, whose k leading triplets are exact."""
    given = Settings(num_svs=k, **options)
    constraint = CONSTRAINTS[given.constraint_name]

    def in_use(weight: Tensor) -> Tensor:
        with torch.no_grad():
            u, sv, vh = torch.linalg.svd(view.to_matrices(weight.detach()), full_matrices=False)
            estimate = Estimate.from_vectors(u.mT[:, :k], vh[:, :k].conj(), sv[:, :k])
        return constraint.apply(weight, estimate, {}, given, view, plain=False)

    return in_use


def view_of(matrix: Tensor, blocks: int = 1) -> View:
    return Layout().view(matrix.shape, blocks)


pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning"  # torch's own, at the first use of forward mode
)

# Singular values, the number that is tracked, and the options.
CASES: dict[str, tuple[list[float], int, dict[str, Any]]] = {
    "none above": ([0.9, 0.5, 0.2], 2, CLIP),
    "one above": ([3.0, 0.8, 0.5], 1, CLIP),
    "one above, more tracked": ([3.0, 0.8, 0.5], 3, CLIP),
    "two above": ([3.0, 2.0, 0.6], 3, CLIP),
    "equal above": ([2.0, 2.0, 0.5], 2, CLIP),
    "all above": ([4.0, 3.0, 2.0], 3, CLIP),
    "just above": ([1.02, 0.9, 0.5], 1, CLIP),
    "rank inactive": ([3.0, 1.0, 0.5], 1, RANK),
    "rank active": ([3.0, 2.5, 1.0], 1, RANK),
    "rank active, more tracked": ([3.0, 2.0, 2.0], 2, RANK),
    "rank one of more": ([3.0, 2.0, 1.0], 1, {"stable_rank": 1.0}),
    "rank one": ([3.0], 1, RANK),
    "rank and norm": ([3.0, 2.5, 1.0], 1, {"stable_rank": 1.2, "coeff": 0.7}),
}


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 4), torch.complex128), ((4, 3), torch.float64)], ids=str
)
@pytest.mark.parametrize("case", CASES)
def test_first_and_second_derivatives(
    case: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    values, k, options = CASES[case]
    weight = with_values(values, *shape, seed=len(case), dtype=dtype).requires_grad_()
    in_use = constrained(view_of(weight), k, options)
    assert gradcheck(in_use, weight, check_forward_ad=True)
    if case != "rank one":  # whose other singular values are equal, and zero
        assert gradgradcheck(in_use, weight, fast_mode=True)


@pytest.mark.parametrize("options", [CLIP, RANK], ids=str)
def test_third_derivatives(options: dict[str, Any]) -> None:
    weight = with_values([3.0, 1.6, 0.5], 3, 3, seed=1).requires_grad_()
    in_use = constrained(view_of(weight), 2, options)
    upstream = torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3)

    def gradient(W: Tensor) -> Tensor:
        (out,) = torch.autograd.grad(in_use(W), W, upstream, create_graph=True)
        return out

    assert gradgradcheck(gradient, weight, atol=1e-3)


@pytest.mark.parametrize(
    ("layout", "shape", "blocks", "memory"),
    [
        (Layout(), (4, 3, 2, 2), 1, torch.channels_last),
        (Layout(), (6, 4), 2, torch.contiguous_format),
        (Layout("columns"), (4, 5), 1, torch.contiguous_format),
        (Layout("transposed_conv", groups=2), (4, 3, 2), 2, torch.contiguous_format),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [CLIP, RANK], ids=str)
def test_derivatives_of_every_kind_of_view(
    layout: Layout, shape: tuple[int, ...], blocks: int, memory: Any, options: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    if len(shape) == 4:
        weight = weight.to(memory_format=memory)
    in_use = constrained(layout.view(shape, blocks), 2, options)
    out = in_use(weight.requires_grad_())
    assert out.stride() == weight.stride()
    assert gradcheck(in_use, weight)


@settings(max_examples=25)
@given(
    values=st.lists(st.floats(0.0, 10.0), min_size=1, max_size=5),
    clip=st.floats(0.05, 5.0),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float64, torch.complex128]),
)
def test_clip_is_the_minimum_of_each_singular_value_and_c(
    values: list[float], clip: float, seed: int, dtype: torch.dtype
) -> None:
    matrix = with_values(values, 5, 7, seed, dtype)
    out = constrained(view_of(matrix), 5, {"clip": clip})(matrix)
    expected = changed(matrix, lambda s: s.clamp_max(clip))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert not (max(values) <= clip * (1 - 1e-9)) or torch.equal(out, matrix)


@settings(max_examples=25)
@given(
    values=st.lists(st.floats(0.01, 10.0), min_size=1, max_size=5),
    rank=st.floats(1.0, 5.0),
    coeff=st.floats(0.1, 5.0),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float64, torch.complex128]),
)
def test_stable_rank_is_bounded_and_no_more_is_changed_than_that_needs(
    values: list[float], rank: float, coeff: float, seed: int, dtype: torch.dtype
) -> None:
    matrix = with_values(values, 5, 7, seed, dtype)
    out = constrained(view_of(matrix), 1, {"stable_rank": rank, "coeff": coeff})(matrix)
    s, before = torch.linalg.svdvals(out), torch.linalg.svdvals(matrix)
    assert float(s[0]) == pytest.approx(coeff, rel=1e-9)
    allowed = min(rank, float((before / before[0]).square().sum()))
    assert float((s / s[0]).square().sum()) == pytest.approx(allowed, rel=1e-9)
    # All values but the first are shrunk by one factor.
    torch.testing.assert_close(s[1:] * before[1], before[1:] * s[1], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("options", [CLIP, RANK, {"stable_rank": 1.0}], ids=str)
def test_a_zero_matrix_stays_zero_with_a_finite_gradient(options: dict[str, Any]) -> None:
    weight = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    out = constrained(view_of(weight), 2, options)(weight)
    assert torch.equal(out, torch.zeros(3, 4, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(gradient, torch.ones(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("options", [{"clip": 1.5}, {"stable_rank": 1.3}], ids=str)
def test_gradients_scale_with_the_weight_in_float32(scale: float, options: dict[str, Any]) -> None:
    matrix = with_values([3.0, 2.0, 1.0, 0.4], 5, 6, seed=3)
    upstream = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    scaled = {"clip": options["clip"] * scale} if "clip" in options else options
    exact = matrix.clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        constrained(view_of(matrix), 2, options)(exact), exact, upstream.double()
    )
    small = (matrix * scale).float().requires_grad_()
    (found,) = torch.autograd.grad(constrained(view_of(matrix), 2, scaled)(small), small, upstream)
    expected = expected if "clip" in options else expected / scale
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )


@pytest.mark.parametrize("options", [CLIP, RANK], ids=str)
def test_under_torch_func(options: dict[str, Any]) -> None:
    weights = torch.stack([with_values([3.0, 1.6, 0.5], 3, 4, seed) for seed in range(3)])
    in_use = constrained(view_of(weights[0]), 2, options)

    def loss(W: Tensor) -> Tensor:
        return in_use(W).pow(3).sum()

    batched = torch.func.vmap(torch.func.grad(loss))(weights)
    for weight, gradient in zip(weights, batched, strict=True):
        weight = weight.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(weight), weight)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
        _, along = torch.func.jvp(loss, (weight.detach(),), (weights[0],))
        torch.testing.assert_close(along, (expected * weights[0]).sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("options", [CLIP, RANK], ids=str)
def test_second_derivatives_in_mixed_modes(options: dict[str, Any], dtype: torch.dtype) -> None:
    weight, first, second = (with_values([3.0, 1.6, 0.5], 3, 4, s, dtype) for s in range(3))
    in_use = constrained(view_of(weight), 2, options)

    def along(vector: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda W: torch.func.jvp(loss, (W,), (vector,))[1]

    def loss(W: Tensor) -> Tensor:
        return in_use(W).abs().pow(4).sum()

    leaf = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad((gradient.conj() * first).sum().real, leaf)
    forward_over_reverse = torch.func.jvp(torch.func.grad(loss), (weight,), (first,))[1]
    torch.testing.assert_close(forward_over_reverse, expected, rtol=1e-7, atol=1e-7)
    reverse_over_forward = torch.func.grad(along(first))(weight)
    torch.testing.assert_close(reverse_over_forward, expected, rtol=1e-7, atol=1e-7)
    with pytest.raises(NotImplementedError, match=r"jvp of torch\.func\.grad"):
        torch.func.jvp(along(first), (weight,), (second,))
