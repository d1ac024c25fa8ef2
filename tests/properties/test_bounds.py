"""Bounds and invariances of singular values, and the estimates: against full SVDs in float64."""

import itertools

import pytest
import torch
from helpers.holder import exact, held, matrix_of, norm_of, original_of, used
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from snparam.estimators import convergence
from snparam.testing import weights
from snparam.testing.tensors import SPECTRA, weight_with

FLOATS = (torch.float32, torch.float64)


def compute_eps(dtype):
    """Relative rounding of the arithmetic: float32 at least."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def count_in(data, weight):
    return data.draw(st.integers(1, min(4, *matrix_of(weight).shape)), label="num_svs")


# Estimates are bounds from below


@settings(max_examples=200)
@given(weight=weights(), init=st.sampled_from(("converged", "random")), data=st.data())
def test_estimates_do_not_exceed_the_singular_values(weight, init, data):
    """Ky Fan: over orthonormal u_i and v_i, the largest Σ Re u_iᴴ W v_i of j terms is Σ σ_i."""
    count = count_in(data, weight)
    holder = held(weight, count, data.draw(st.integers(1, 3)), init=init)
    for _ in range(data.draw(st.integers(0, 4))):
        holder()
    if init == "random" and not data.draw(st.booleans()):
        holder()  # before its first forward a random start has no estimate
    sv = norm_of(holder).sv[0].double()
    sigma = exact(weight)[:count]
    rounding = 64 * compute_eps(weight.dtype)
    if init == "converged" or (sv != 1).any():
        # A number below float32's normal range is rounded to a multiple of the smallest subnormal.
        info = torch.finfo(norm_of(holder).sv.dtype)
        slack = count * weight.numel() * info.tiny * info.eps
        assert (sv.cumsum(0) <= sigma.cumsum(0) * (1 + rounding) + slack).all()
        assert (sv <= sigma[0] * (1 + rounding) + slack).all()


@settings(max_examples=200)
@given(weight=weights(dtypes=(*FLOATS, torch.complex64)), steps=st.integers(0, 5), data=st.data())
def test_the_weight_in_use_has_norm_one(weight, steps, data):
    """Within 1e-3 right after registration, and no training forward takes it further away."""
    holder = held(weight, count_in(data, weight))
    for _ in range(steps):
        holder()
    sigma = exact(used(holder))[0]
    assert sigma == 0 if not weight.any() else abs(sigma - 1) <= 1e-3


@given(weight=weights(dtypes=(torch.bfloat16, torch.float16)))
def test_half_precision_weights_are_off_by_their_own_rounding_only(weight):
    """Computed in float32, rounded once, entry by entry."""
    sigma = exact(weight)[0]
    right = weight.double() / (sigma if sigma > 0 else 1.0)
    info = torch.finfo(weight.dtype)
    allowed = right.abs() * (1e-3 + info.eps) + info.tiny * info.eps
    assert ((used(held(weight)).double() - right).abs() <= allowed).all()


# Convergence right after registration


@settings(max_examples=200)
@given(weight=weights(max_side=24), data=st.data())
def test_registration_starts_converged(weight, data):
    count = count_in(data, weight)
    sv, sigma = norm_of(held(weight, count)).sv[0].double(), exact(weight)[:count]
    assert abs(sv[0] - sigma[0]) <= 1e-3 * sigma[0]
    assert (abs(sv - sigma) <= 1e-3 * sigma[0]).all()


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(
    ("shape", "count"), [((770, 800), 1), ((900, 400), 1), ((300, 310), 5), ((500, 300), 5)]
)
def test_large_matrices_start_converged(spectrum, shape, count):
    """Above a few hundred on the shorter side: these take the other way of finding σ."""
    assert min(shape) > convergence._FULL_DECOMPOSITION
    weight = weight_with(spectrum, shape, seed=len(spectrum), scale=30.0)
    norm = norm_of(held(weight, count))
    sv, sigma = norm.sv[0].double(), exact(weight)[:count]
    assert (abs(sv - sigma) <= 1e-3 * sigma[0]).all()
    # And u belongs to them: ‖Wᵀu‖ is a lower bound of σ that only a good u makes tight.
    rows = norm.u[0].double()
    torch.testing.assert_close(rows @ rows.T, torch.eye(count).double(), rtol=0, atol=1e-4)
    assert (rows[0] @ weight.double()).norm() >= sigma[0] * (1 - 1e-3)


# Invariances


@given(
    weight=weights(dtypes=FLOATS, scales=(1.0,)),
    log_factor=st.floats(-25, 25),
    sign=st.sampled_from((1.0, -1.0)),
    data=st.data(),
)
def test_scaling_changes_nothing_but_the_sign(weight, log_factor, sign, data):
    count = count_in(data, weight)
    factor = 10.0**log_factor
    one, other = held(weight, count), held(weight * (sign * factor), count)
    rtol = 64 * torch.finfo(weight.dtype).eps
    torch.testing.assert_close(used(one) * sign, used(other), rtol=rtol, atol=rtol)
    torch.testing.assert_close(
        norm_of(one).sv[:, 0] * factor, norm_of(other).sv[:, 0], rtol=rtol, atol=0
    )


@given(weight=weights(dtypes=(torch.float64,), scales=(1.0, 1e-3, 1e3)), seed=st.integers(0, 99))
def test_orthogonal_changes_of_basis_change_nothing(weight, seed):
    """W → Q W P: the same σ, and the weight in use changes as W does."""
    W = matrix_of(weight)
    generator = torch.Generator().manual_seed(seed)
    Q, P = (
        torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=W.dtype))[0] for n in W.shape
    )
    count = min(3, *W.shape)
    one, other = held(W, count), held(Q @ W @ P, count)
    torch.testing.assert_close(used(other), Q @ used(one) @ P, rtol=0, atol=1e-11)
    close_values(norm_of(one).sv, norm_of(other).sv)


@given(weight=weights(dtypes=(torch.float64,), scales=(1.0, 1e-3, 1e3)))
def test_transposition_changes_nothing(weight):
    W = matrix_of(weight)
    count = min(3, *W.shape)
    one, other = held(W, count), held(W.T.contiguous(), count)
    torch.testing.assert_close(used(other), used(one).T, rtol=0, atol=1e-11)
    close_values(norm_of(one).sv, norm_of(other).sv)


def close_values(a, b):
    """To rounding of the largest: inside a cluster the vectors differ, but not their values."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * float(a.max()))


@given(weight=weights(dtypes=FLOATS, scales=(1.0, 1e30)), blocks=st.integers(2, 3))
def test_blocks_are_normalised_as_if_each_were_alone(weight, blocks):
    weight = weight.flatten(1)
    stack = torch.cat([weight * (index + 1) for index in range(blocks)])
    assume(torch.isfinite(stack).all())
    together = used(held(stack, blocks=blocks))
    alone = torch.cat([used(held(part.contiguous())) for part in stack.chunk(blocks)])
    rtol = 32 * torch.finfo(weight.dtype).eps
    torch.testing.assert_close(together, alone, rtol=rtol, atol=rtol)


# The power iteration


@given(weight=weights(dtypes=(torch.float64,), spectra=("decaying", "gaussian", "row")))
def test_a_random_start_rises_to_sigma(weight):
    """σ̂ never falls from one step to the next, and gets there: its gap shrinks geometrically."""
    sigma = exact(weight)
    assume(len(sigma) == 1 or sigma[1] <= 0.9 * sigma[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(weight.numel())
        holder = held(weight, init="random")
    estimates = []
    for _ in range(150):
        holder()
        estimates.append(float(norm_of(holder).sv[0, 0]))
    for before, after in itertools.pairwise(estimates):
        assert after >= before * (1 - 1e-14)
    # Were the start's part along the top 1e-6 only: 1e12 · 0.9^(4 · 150) is below 1e-15.
    assert abs(estimates[-1] / float(sigma[0]) - 1) <= 1e-12


@given(weight=weights(dtypes=FLOATS))
def test_more_steps_at_once_are_the_same_steps(weight):
    one, three = held(weight, init="converged"), held(weight, 1, 3)
    for holder in (one, three):
        norm_of(holder).u.copy_(torch.arange(1.0, 1 + weight.shape[0]).cos())
    for _ in range(3):
        one()
    three()
    assert torch.equal(norm_of(one).u, norm_of(three).u)
    assert torch.equal(norm_of(one).sv, norm_of(three).sv)


def test_the_original_is_never_changed():
    weight = weight_with("gaussian", (5, 7))
    holder = held(weight, 3)
    for _ in range(3):
        holder()
    used(holder)
    assert torch.equal(original_of(holder), weight)
