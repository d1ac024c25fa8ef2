"""Certified bounds of matrices: against norms of more precision, and the forms of the proof."""

from __future__ import annotations

import random
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers.hostile import KINDS, hostile, norms_in_long_double
from helpers.matrices import WIDE, matrices
from hypothesis import given
from torch import Tensor

from snparam.estimators import certified
from snparam.estimators.certified import (
    certified_norm,
    covering_divisor,
    matrix_bounds,
    semidefinite_shift,
)

SHAPES = ((1, 1), (1, 9), (3, 3), (4, 7), (12, 12), (9, 2), (20, 5))

# Long double has 64 bits: its own rounding, in sums of so few squares.
LONG_ROUNDING = np.longdouble(4e-18)


def drawn_batches(count: int) -> list[tuple[str, Tensor]]:
    """Matrices in float64, of every kind, shape and scale that a dtype can hold."""
    batches = []
    scales = {
        torch.float64: (1.0, 1e-300, 1e290, 5e-310),
        torch.float32: (1.0, 1e-42, 1e37),
        torch.float16: (1.0, 1e-6, 1e4),
        torch.bfloat16: (1.0, 1e-38, 1e37),
    }
    for seed, kind in enumerate(KINDS):
        for rows, columns in SHAPES:
            stack = hostile(kind, count, rows, columns, seed)
            for dtype, factors in scales.items():
                batches += [
                    (f"{kind} {dtype} {factor:g}", (stack * factor).to(dtype)) for factor in factors
                ]
    return batches


@pytest.mark.parametrize("by_residual", [False, True], ids=["a priori", "residual"])
def test_no_norm_exceeds_its_bound(by_residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    form = partial(semidefinite_shift, by_residual=by_residual)
    monkeypatch.setattr(certified, "semidefinite_shift", form)
    checked = 0
    for name, batch in drawn_batches(18):
        norms = norms_in_long_double(batch)
        bounds = matrix_bounds(batch)
        upper, lower = bounds.upper.numpy(), bounds.lower.numpy()
        assert (norms * (1 - LONG_ROUNDING) <= upper).all(), name
        assert (lower <= norms * (1 + 1e-15) + 1e-320).all(), name
        checked += len(batch)
    assert checked >= 10_000


def test_without_the_slack_norms_exceed_what_is_computed() -> None:
    exceeding = checked = 0
    for seed, kind in enumerate(KINDS):
        batch = hostile(kind, 100, 12, 20, seed)
        computed = torch.linalg.eigvalsh(batch @ batch.mT)[:, -1].sqrt().numpy()
        exceeding += int((norms_in_long_double(batch) * (1 - LONG_ROUNDING) > computed).sum())
        checked += len(batch)
    assert exceeding > checked / 10


@given(W=matrices(max_side=12))
def test_bounds_enclose_the_norm_closely(W: Tensor) -> None:
    bounds = matrix_bounds(W)
    wide = W.to(torch.complex128 if W.is_complex() else torch.float64)
    scale = float(wide.abs().amax()) or 1.0
    sigma = float(torch.linalg.svdvals(wide[0] / scale)[0]) * scale
    assert float(bounds.lower) <= sigma * (1 + 1e-14)
    assert sigma * (1 - 1e-14) <= float(bounds.upper) <= sigma * (1 + 1e-9) + 1e-320
    assert float(bounds.lower) >= sigma * (1 - 1e-9) - 1e-320
    frobenius = float(torch.linalg.vector_norm(wide / scale)) * scale
    assert frobenius * (1 - 1e-14) <= float(bounds.frobenius) <= frobenius * (1 + 1e-9) + 1e-320


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(130, 400), (300, 150)], ids=str)
def test_bounds_of_larger_matrices_are_tight(kind: str, shape: tuple[int, int]) -> None:
    """Where σ is found by Lanczos."""
    W = hostile(kind, 2, *shape, seed=1)
    sigma = torch.linalg.svdvals(W)[:, 0]
    bounds = matrix_bounds(W)
    assert (bounds.lower <= sigma * (1 + 1e-14)).all()
    assert (sigma * (1 - 1e-14) <= bounds.upper).all()
    assert (bounds.upper <= sigma * (1 + 1e-9)).all()
    assert (bounds.lower >= sigma * (1 - 1e-9)).all()


def test_a_spectrum_that_lanczos_does_not_resolve_is_still_bounded() -> None:
    """Values as dense near the largest as Lanczos finds hardest: 1 − (i/m)⁴, beside equal ones."""
    m = 300
    left, right = (torch.linalg.qr(hostile("gaussian", 1, m, m, seed)[0])[0] for seed in (1, 2))
    values = 1 - torch.linspace(0, 1, m, dtype=torch.float64) ** 4
    W = (left * values @ right.mT)[None]
    upper = float(certified_norm(W))
    assert 1 - 1e-14 <= upper <= 1 + 1e-9


def test_the_norm_of_the_hilbert_matrix_is_the_known_one() -> None:
    i = torch.arange(10, dtype=torch.float64)
    bounds = matrix_bounds((1 / (i[:, None] + i + 1))[None])
    known = 1.7519196702651776
    assert known * (1 - 1e-9) <= float(bounds.lower) <= known <= float(bounds.upper)
    assert float(bounds.upper) <= known * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [*WIDE, torch.float16, torch.bfloat16])
def test_what_has_no_norm_has_no_bound_and_zero_has_zero(dtype: torch.dtype) -> None:
    W = hostile("gaussian", 4, 3, 5, seed=0).to(dtype)
    alone = certified_norm(W[:1].clone())
    W[1], W[2, 0, 1], W[3, 2, 2] = 0.0, float("nan"), float("inf")
    upper = certified_norm(W)
    assert upper.dtype == torch.float64
    torch.testing.assert_close(upper[:1], alone, rtol=1e-12, atol=0)
    assert upper[1] == 0
    assert upper[2:].isnan().all()


def test_a_stack_is_bounded_as_its_matrices_are() -> None:
    W = torch.cat(
        [hostile(kind, 3, 100, 110, seed=2) * 10.0**seed for seed, kind in enumerate(KINDS)]
    )
    together = certified_norm(W)
    apart = torch.cat([certified_norm(one[None]) for one in W])
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=0)


def test_pieces_of_a_long_matrix_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    W = hostile("gaussian", 2, 5, 400, seed=3)
    whole = certified_norm(W)
    monkeypatch.setattr(certified, "_MAX_ENTRIES", 64)
    torch.testing.assert_close(certified_norm(W), whole, rtol=1e-9, atol=0)


@pytest.mark.parametrize("by_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_shift_makes_a_matrix_semidefinite(dtype: torch.dtype, by_residual: bool) -> None:
    """Eigenvalues from clearly above zero to clearly below: where s is finite, λ_min + s ≥ 0."""
    shifts = []
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=dtype))[0]
    rest = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    for least in (0.1, 1e-9, 1e-15, 0.0, -1e-15, -1e-9, -0.1):
        values = torch.cat([torch.tensor([least], dtype=torch.float64), rest])
        shift = float(semidefinite_shift((q * values @ q.mH)[None], by_residual))
        assert least + shift >= -1e-15
        shifts.append(shift)
    assert shifts[0] < 1e-12
    assert shifts[1] < 1e-12
    assert shifts[-1] == shifts[-2] == float("inf")


@pytest.mark.parametrize("by_residual", [False, True])
def test_a_shift_covers_what_rounding_hides(by_residual: bool) -> None:
    """2 × 2 matrices of a negative determinant that are factorised all the same, in fractions."""
    generator = random.Random(0)
    hidden = 0
    for _ in range(2000):
        x, y = generator.uniform(0.5, 2), generator.uniform(0.5, 2)
        z = y * y / x * (1 + generator.randint(-2, 2) * 2.0**-53)
        entries = torch.tensor([[[x, y], [y, z]]], dtype=torch.float64)
        shift = float(semidefinite_shift(entries, by_residual))
        if shift == float("inf"):
            continue
        exact_x, exact_y, exact_z, s = map(Fraction, (x, y, z, shift))
        hidden += exact_x * exact_z < exact_y**2
        assert (exact_x + s) * (exact_z + s) >= exact_y**2
    assert hidden > 20


@pytest.mark.parametrize("sign", [-1, 1])
def test_products_may_be_summed_in_any_order(sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gram matrix that is off by all that n roundings can do still gives bounds."""
    W = hostile("gaussian", 1, 3, 20_000, seed=0).abs()
    gram = certified._scaled_gram

    def off(*arguments: Any) -> Tensor:
        exact = gram(*arguments)
        return exact * (1 + sign * 20_000 * 2.0**-53)  # |X||X|ᵀ is X Xᵀ

    monkeypatch.setattr(certified, "_scaled_gram", off)
    monkeypatch.setattr(certified, "_EXCESSES", (1e-14,))
    bounds = matrix_bounds(W)
    (norm,) = norms_in_long_double(W)
    assert float(bounds.lower) <= norm <= float(bounds.upper)


@pytest.mark.parametrize("by_residual", [False, True])
def test_a_factor_that_is_not_finite_proves_nothing(by_residual: bool) -> None:
    matrices = torch.diag_embed(torch.tensor([[float("inf"), 1.0], [1.0, float("nan")]]).double())
    assert semidefinite_shift(matrices, by_residual).isinf().all()


# The divisor


DIVIDED = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}


def quotients(W: Tensor, d: Tensor) -> Tensor:
    return (W.to(d.dtype) / d[:, None, None]).to(W.dtype)


@pytest.mark.parametrize("dtype", DIVIDED, ids=str)
def test_no_quotient_exceeds_the_norm_that_is_held(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    covered = by_bound_alone = checked = 0
    for seed, kind in enumerate(KINDS):
        for rows, columns in SHAPES:
            for factor in (1.0, limits.smallest_normal * 8, limits.max / 64):
                W = (hostile(kind, 6, rows, columns, seed) * factor).to(dtype)
                bounds = matrix_bounds(W)
                for c in (1.0, 0.3, 7.0):
                    arguments: Any = (rows * columns, dtype, DIVIDED[dtype], c)
                    d = covering_divisor(bounds.upper, bounds.frobenius, *arguments)
                    norms = norms_in_long_double(quotients(W, d))
                    assert (norms * (1 - LONG_ROUNDING) <= c).all(), (kind, rows, columns, factor)
                    covered += int((norms > 0.9 * c).sum())
                    alone = quotients(W, (bounds.upper / c).to(DIVIDED[dtype]))
                    by_bound_alone += int((norms_in_long_double(alone) > c).sum())
                    checked += len(W)
    assert covered > 0.95 * checked  # it is no bound because everything shrinks
    if dtype != torch.float64:  # of which the excess of the bound covers the rounding
        assert by_bound_alone > 0.2 * checked


def test_a_zero_matrix_is_divided_by_one() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    d = covering_divisor(zero, zero, 6, torch.float32, torch.float32)
    assert d.tolist() == [1.0, 1.0]
    assert d.dtype == torch.float32


def test_a_norm_that_rounding_alone_reaches_is_refused() -> None:
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"coeff=1e-06 is too small.*float16.*wider dtype"):
        covering_divisor(one, one, 1 << 12, torch.float16, torch.float32, coeff=1e-6)
    assert covering_divisor(one, one, 1 << 12, torch.bfloat16, torch.float32, coeff=1e-6) > 1e6
