"""Orthonormal rows: against plain linear algebra."""

import pytest
import torch
from helpers.matrices import FLOATS, WIDE, gram, matrices, rounding
from helpers.reference import normalize, without_projections
from hypothesis import given
from hypothesis import strategies as st

from snparam.matrices.orthonormalisation import orthonormal_rows
from snparam.testing.tensors import weight_with

# Orthonormal rows


@given(x=matrices(), count=st.integers(1, 5))
def test_orthonormal_rows_are_orthonormal_whatever_the_rows_are(x, count):
    """Dependent rows, zero rows, subnormal and huge ones included."""
    x = x[:, : min(count, x.shape[2])]
    rows = orthonormal_rows(x)
    eye = torch.eye(x.shape[1], dtype=x.dtype).unsqueeze(0)
    torch.testing.assert_close(gram(rows), eye, rtol=0, atol=rounding(x))


@given(x=matrices(dtypes=(torch.float64,), spectra=("gaussian", "flat"), scales=(1.0, 1e-3, 1e3)))
def test_orthonormal_rows_are_those_of_gram_schmidt(x):
    x = x[:, : min(x.shape[1:])]
    done = []
    for row in x[0].numpy():
        done.append(normalize(without_projections(row, done)))
    condition = float(torch.linalg.cond(x[0]))
    right = torch.stack([torch.from_numpy(row) for row in done])
    torch.testing.assert_close(orthonormal_rows(x)[0], right, rtol=0, atol=rounding(x) * condition)


@given(x=matrices(spectra=("gaussian", "flat"), dtypes=FLOATS, scales=(1.0, 1e-3)))
def test_each_row_keeps_its_direction(x):
    """Each is made of the rows up to its own, of that one with a positive coefficient."""
    x = x[:, : min(x.shape[1:])]
    rows = orthonormal_rows(x)
    coefficients = x @ rows.mT  # lower triangular with a positive diagonal
    assert (coefficients.diagonal(dim1=-2, dim2=-1) > 0).all()
    largest = coefficients.abs().amax()
    assert (coefficients.triu(1).abs() <= rounding(x) * largest).all()


@pytest.mark.parametrize("dtype", WIDE)
def test_eps_shortens_rows_whose_remainder_is_below_it(dtype):
    x = torch.zeros(1, 3, 4, dtype=dtype)
    x[0, 0, 0], x[0, 1, 1], x[0, 2, 2] = 3.0, 1e-4, 2e-2
    rows = orthonormal_rows(x, eps=1e-2)
    lengths = torch.linalg.vector_norm(rows, dim=-1).double()
    torch.testing.assert_close(lengths, torch.tensor([[1.0, 1e-2, 1.0]]).double(), check_dtype=True)


@pytest.mark.parametrize("sizes", [(1.0, 1e-39, 1e-42, 1e-44, 0.0), (1e30, 1e-39, 1.0, 0.0, 1e-44)])
@pytest.mark.parametrize("dtype", WIDE)
def test_rows_of_all_sizes_together_are_made_orthonormal(dtype, sizes):
    """As a floor under the norms leaves them, of a matrix of low rank, after some steps."""
    sizes = torch.tensor(sizes, dtype=torch.float64)
    x = weight_with("gaussian", (1, 5, 8), seed=1, dtype=dtype) * sizes[:, None].to(dtype)
    rows = orthonormal_rows(x)
    eye = torch.eye(5, dtype=dtype).unsqueeze(0)
    torch.testing.assert_close(gram(rows), eye, rtol=0, atol=rounding(x))
    lengths = torch.linalg.vector_norm(orthonormal_rows(x, eps=1e-12)[0], dim=-1)
    assert ((lengths - 1).abs()[sizes >= 1] <= rounding(x)).all()
    assert (lengths[sizes < 1] < 1e-25).all()
