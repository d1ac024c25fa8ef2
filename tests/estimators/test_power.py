"""Power-iteration steps: against plain linear algebra."""

import pytest
import torch
from helpers.holder import exact
from helpers.matrices import FLOATS, WIDE, gram, matrices, rounding
from hypothesis import given
from hypothesis import strategies as st

from snparam.estimators.power import power_step
from snparam.testing.tensors import weight_with


def gram_schmidt(rows):
    """The rows made orthonormal one after another."""
    done = []
    for row in rows:
        for earlier in done:
            row = row - torch.vdot(earlier, row) * earlier
        done.append(row / row.norm())
    return torch.stack(done)


@given(W=matrices(), count=st.integers(1, 4), eps=st.sampled_from((0.0, 1e-12)), data=st.data())
def test_a_step_gives_orthonormal_u_and_v_and_their_values(W, count, eps, data):
    count = min(count, *W.shape[1:])
    u = weight_with("gaussian", (1, count, W.shape[1]), seed=count, dtype=W.dtype)
    u, v, sv = power_step(W, u, eps)[:3]
    assert all(torch.isfinite(each).all() for each in (u, v, sv))
    eye = torch.eye(count, dtype=W.dtype).unsqueeze(0)
    sigma = float(exact(W[0])[0])
    if eps == 0:
        torch.testing.assert_close(gram(v), eye, rtol=0, atol=rounding(W))
        if sigma > 0:
            torch.testing.assert_close(gram(u), eye, rtol=0, atol=rounding(W))
        expected = (u.conj() * (v @ W.mT)).sum(-1).real
        atol = rounding(W) * sigma + 64 * torch.finfo(W.dtype).tiny * torch.finfo(W.dtype).eps
        torch.testing.assert_close(sv.to(expected), expected, rtol=0, atol=atol)
    assert (torch.linalg.vector_norm(u, dim=-1) <= 1 + rounding(W)).all()


@pytest.fixture(params=[2, 4])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(
    "shape", [(1024, 512), (512, 1024), (1536, 2048), (2176, 1024), (1025, 2048)]
)
def test_a_step_of_a_large_matrix_is_the_products_written_out(shape, dtype, count):
    """Large matrices are multiplied in bands, one for each thread, or the other way around."""
    W, u = torch.randn(shape, dtype=dtype), torch.randn(count, shape[0], dtype=dtype)
    found = power_step(W[None], u[None])[:3]
    wide = W.to(torch.complex128 if dtype.is_complex else torch.float64)
    v = gram_schmidt(u.to(wide) @ wide.conj())
    t = v @ wide.mT
    right = gram_schmidt(t), v, (t * gram_schmidt(t).conj()).sum(-1).real
    for got, expected in zip(found, right, strict=True):
        torch.testing.assert_close(got[0].to(expected), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("scale", [1e-38, 1e-39, 1e30])
def test_a_step_on_subnormal_and_huge_numbers(scale, dtype, count):
    """All-equal entries: u and v are even, and σ is known."""
    W = weight_with("equal", (4, 3), scale=scale, dtype=dtype).unsqueeze(0)
    u, v, sv = power_step(W, torch.eye(4, dtype=dtype)[None, :count])[:3]
    close = {"rtol": 0.0, "atol": 1e-5}
    torch.testing.assert_close(u[0, 0], torch.full((4,), 4**-0.5, dtype=dtype), **close)
    torch.testing.assert_close(v[0, 0], torch.full((3,), 3**-0.5, dtype=dtype), **close)
    assert float(sv[0, 0]) == pytest.approx(scale, rel=1e-5)
    torch.testing.assert_close(gram(v)[0], torch.eye(count, dtype=dtype), **close)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_u_orthogonal_to_every_column_finds_the_matrix_again(dtype, count):
    """The classic layer ends in NaN here."""
    W = torch.zeros(1, 3, 4, dtype=dtype)
    W[0, 0, 1] = 5.0
    u = torch.zeros(1, count, 3, dtype=dtype)
    u[0, 0, 2] = 1.0
    if count == 2:
        u[0, 1, 1] = 1.0
    for _ in range(2):
        u, v, sv = power_step(W, u)[:3]
        assert all(torch.isfinite(each).all() for each in (u, v, sv))
    if count == 1:
        assert float(sv[0, 0]) == pytest.approx(5.0)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("count", [1, 2])
def test_a_zero_matrix_leaves_u_where_it_was(count, dtype):
    W = torch.zeros(2, 4, 3, dtype=dtype)
    W[1] = 1.0  # of a stack, its own zero matrices only
    u = weight_with("gaussian", (2, count, 4), seed=1, dtype=dtype)
    found, v, sv = power_step(W, u)[:3]
    assert torch.equal(found[0], u[0])
    assert not torch.equal(found[1], u[1])
    assert not sv[0].any()
    assert torch.isfinite(v).all()


@given(W=matrices(), blocks=st.integers(2, 3), count=st.integers(1, 2))
def test_a_stack_is_stepped_as_its_matrices_are(W, blocks, count):
    count = min(count, *W.shape[1:])
    scales = torch.arange(1, 1 + blocks, dtype=W.real.dtype)[:, None, None]
    stack = W * scales
    u = weight_with("gaussian", (blocks, count, W.shape[1]), seed=5, dtype=W.dtype)
    together = power_step(stack, u)[:3]
    sigma = float(exact(stack.flatten(0, 1))[0]) if torch.isfinite(stack).all() else 0.0
    for index in range(blocks):
        alone = power_step(stack[index : index + 1], u[index : index + 1])[:3]
        torch.testing.assert_close(
            together[2][index : index + 1], alone[2], rtol=0, atol=rounding(W) * sigma
        )
        if count == 1:
            torch.testing.assert_close(
                together[1][index : index + 1], alone[1], rtol=0, atol=rounding(W)
            )
