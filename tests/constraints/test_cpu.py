"""One matrix on a CPU: the numbers of the general way, in fewer operations."""

import math

import pytest
import torch
from helpers.holder import exact
from hypothesis import assume, given
from hypothesis import strategies as st

from snparam.constraints import cpu
from snparam.matrices import linalg
from snparam.matrices.views import Layout
from snparam.testing import weights
from snparam.testing.tensors import weight_with

FLOATS = (torch.float32, torch.float64)
MATRICES = weights(dtypes=FLOATS).map(lambda w: w.flatten(1))


def whole(matrix):
    return cpu.Matrix(matrix, Layout().view(tuple(matrix.shape)))


def rounding(x):
    return 64 * torch.finfo(x.dtype).eps


def unit(x):
    return x / torch.linalg.vector_norm(x, dtype=torch.float64).to(x.dtype)


@given(W=MATRICES, seed=st.integers(0, 99))
def test_a_step_is_that_of_a_stack_of_one(W, seed):
    u = weight_with("gaussian", (W.shape[0],), seed=seed, dtype=W.dtype)
    right = linalg.power_step(W[None], u[None, None])
    found = cpu.step(whole(W), u)
    sigma = float(exact(W)[0])
    slack = torch.finfo(W.dtype).tiny * torch.finfo(W.dtype).eps
    assert found.sigma == pytest.approx(
        float(right[2]), rel=rounding(W), abs=rounding(W) * sigma or slack
    )
    for x, length, of_stack in ((found.x, found.length, right[1]), (found.t, found.size, right[0])):
        if x is found.x or found.sigma > 0:
            norm = float(torch.linalg.vector_norm(x.double()))
            assert length == pytest.approx(norm, rel=rounding(W))
            torch.testing.assert_close(unit(x), of_stack[0, 0], rtol=0, atol=rounding(W))


@given(W=weights(dtypes=FLOATS, scales=(1.0, 1e-3)), log_length=st.integers(-9, 9))
def test_the_length_of_u_is_of_no_account(W, log_length):
    W = W.flatten(1)
    u = unit(weight_with("gaussian", (W.shape[0],), seed=1, dtype=W.dtype))
    one, other = cpu.step(whole(W), u), cpu.step(whole(W), u * 10.0**log_length)
    sigma = float(exact(W)[0])
    assert other.sigma == pytest.approx(one.sigma, rel=rounding(W), abs=rounding(W) * sigma)


@given(W=MATRICES)
def test_finishing_from_x_repeats_the_step_to_the_bit(W):
    """What a recomputed forward relies on."""
    assume(W.any())
    first = cpu.step(whole(W), weight_with("gaussian", (W.shape[0],), seed=3, dtype=W.dtype))
    again = cpu.finish_step(whole(W), first.x.clone())
    assert torch.equal(first.t, again.t)
    assert torch.equal(first.x, again.x)
    assert first.sigma == again.sigma


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1e-38, 1e-39, 1e30])
def test_subnormal_and_huge_numbers(scale, dtype):
    """All-equal entries: u and v are even, and σ is known."""
    W = weight_with("equal", (4, 3), scale=scale, dtype=dtype)
    found = cpu.step(whole(W), torch.eye(4, dtype=dtype)[0])
    close = {"rtol": 0.0, "atol": 1e-5}
    torch.testing.assert_close(unit(found.t), torch.full((4,), 0.5, dtype=dtype), **close)
    torch.testing.assert_close(unit(found.x), torch.full((3,), 3**-0.5, dtype=dtype), **close)
    assert found.sigma == pytest.approx(scale, rel=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_u_orthogonal_to_every_column_finds_the_matrix_again(dtype):
    """The classic layer ends in NaN here."""
    W = torch.zeros(3, 4, dtype=dtype)
    W[0, 1] = 5.0
    found = cpu.step(whole(W), torch.eye(3, dtype=dtype)[2])
    assert 0 < found.sigma < math.inf
    assert cpu.step(whole(W), found.t).sigma == pytest.approx(5.0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_zero_matrix_has_a_sigma_of_zero_and_finite_vectors(dtype):
    found = cpu.step(whole(torch.zeros(4, 3, dtype=dtype)), torch.ones(4, dtype=dtype))
    assert found.sigma == 0
    assert torch.isfinite(found.x).all()
    assert torch.isfinite(found.t).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_says_so_in_sigma(bad):
    W = torch.ones(4, 3)
    W[1, 1] = bad
    assert not math.isfinite(cpu.step(whole(W), torch.ones(4)).sigma)


def test_a_matrix_is_an_alias_while_the_weight_lies_where_it_does():
    weight = torch.nn.Parameter(torch.randn(4, 3, 2))
    of = cpu.Matrix(weight, Layout().view((4, 3, 2)))
    with torch.no_grad():
        weight.mul_(2)
    assert of.is_of(weight)
    assert torch.equal(of.matrix, weight.flatten(1))
    weight.data = weight.data.clone()
    assert not of.is_of(weight)


def test_a_matrix_that_had_to_be_copied_serves_once():
    weight = torch.randn(3, 4, 2)  # a transposed convolution of two groups: rows are put together
    of = cpu.Matrix(weight, Layout("transposed_conv").view((3, 4, 2)))
    if of.matrix.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
        assert not of.is_of(weight)
    assert torch.equal(of.matrix, weight.transpose(0, 1).reshape(4, 6))
