"""What is found from the matrix alone is what a full decomposition finds."""

import pytest
import torch
from helpers.holder import exact
from helpers.matrices import FLOATS, gram, matrices
from hypothesis import given, settings
from hypothesis import strategies as st

from snparam.estimators import convergence
from snparam.testing import weights
from snparam.testing.tensors import DTYPES, SPECTRA, weight_with


@pytest.mark.parametrize("count", [1, 3])
def test_a_zero_matrix_starts_at_vectors_orthogonal_to_nothing_likely(count):
    """Not to single rows, nor to sums of rows, as u has to be turned towards what is learned."""
    u, sv = convergence.converged(torch.zeros(1, 8, 6), count)
    assert not sv.any()
    torch.testing.assert_close(gram(u)[0], torch.eye(count).double(), rtol=0, atol=1e-12)
    assert (u.abs() > 1e-3).all()
    assert abs(float(u[0, 0].sum())) > 1e-3


@settings(max_examples=200)
@given(W=matrices(dtypes=(*DTYPES, torch.complex128), max_side=16), count=st.integers(1, 4))
def test_converged_vectors_of_small_matrices_are_singular_vectors(W, count):
    """σ₁ to rounding; values below 1e-8 σ₁ to that, for their squares are lost beside σ₁²."""
    count = min(count, *W.shape[1:])
    u, sv = convergence.converged(W, count)
    sigma = exact(W[0])[:count]
    assert u.dtype == (torch.complex128 if W.is_complex() else torch.float64)
    torch.testing.assert_close(sv[0, :1], sigma[:1], rtol=1e-12, atol=0)
    torch.testing.assert_close(sv[0], sigma, rtol=0, atol=2e-8 * float(sigma[0]))
    torch.testing.assert_close(gram(u)[0], torch.eye(count, dtype=u.dtype), rtol=0, atol=1e-12)
    lengths = torch.linalg.vector_norm(u[0].conj() @ W[0].to(u.dtype), dim=-1)
    torch.testing.assert_close(lengths, sigma, rtol=0, atol=2e-8 * float(sigma[0]))
    assert float(lengths[0]) >= float(sigma[0]) * (1 - 1e-12)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_converged_vectors_of_large_matrices_are_near(spectrum, dtype):
    W = weight_with(spectrum, (400, 300), seed=1, scale=7.0, dtype=dtype).unsqueeze(0)
    for each in (W, W.mT.contiguous()):
        u, sv = convergence.converged(each, 3)
        sigma = exact(each[0])[:3]
        assert (abs(sv[0] - sigma) <= 1e-3 * sigma[0]).all()
        torch.testing.assert_close(gram(u)[0], torch.eye(3, dtype=u.dtype), rtol=0, atol=1e-9)
        # Products of bfloat16 matrices are in float32.
        computed = torch.promote_types(dtype, torch.float32)
        slack = 64 * torch.finfo(computed).eps
        assert (sv[0].cumsum(0) <= sigma.cumsum(0) * (1 + slack)).all()


# Just below σ₁: all others equal, of two values, in a narrow band, or spread down to zero.
BELOW = {
    "flat": lambda n: torch.ones(n),
    "two values": lambda n: 1 - 0.1 * (torch.arange(n) % 2),
    "narrow": lambda n: 1 - 0.005 * torch.linspace(0, 1, n),
    "uniform": lambda n: torch.linspace(1, 0, n),
}


@pytest.mark.parametrize("gap", [0.001, 0.002, 0.004, 0.01, 0.05])
@pytest.mark.parametrize("below", BELOW)
def test_the_first_value_is_found_beside_many_that_are_nearly_as_large(below, gap):
    n = 500
    generator = torch.Generator().manual_seed(1)
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    sigma = BELOW[below](n).double() * (1 - gap)
    sigma[0] = 1.0
    _, sv = convergence.converged((left * sigma @ right).float()[None], 1)
    assert abs(float(sv[0, 0]) - 1) <= 1e-4


@given(W=matrices(), count=st.integers(1, 3))
def test_convergence_is_deterministic(W, count):
    count = min(count, *W.shape[1:])
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    first = convergence.converged(W, count)
    torch.rand(1)
    second = convergence.converged(W, count)
    torch.random.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@given(W=weights(), blocks=st.integers(1, 3))
def test_exact_sigma_is_that_of_a_singular_value_decomposition(W, blocks):
    stack = W.flatten(1).unsqueeze(0).expand(blocks, -1, -1)
    sigma = exact(W)[0]
    found = convergence.exact_sigma(stack)
    assert found.shape == (blocks,)
    torch.testing.assert_close(found, sigma.expand(blocks), rtol=1e-12, atol=0)
