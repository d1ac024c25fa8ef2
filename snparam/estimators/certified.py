"""Certified bounds of the largest singular value: no rounding makes them wrong.

An estimate of σ, even that of a full decomposition, may lie below σ by its rounding. A bound here
does not. Let X be a matrix of m ≤ n rows and columns, G = fl(X Xᵀ), and a a number slightly above
an estimate of σ². If the Cholesky factorisation of A = fl(a I − G) succeeds in floating-point
arithmetic, A is positive semidefinite up to an error that is known beforehand, so that σ² is at
most a plus that error. With u = 2⁻⁵³ and γ_k = k u / (1 − k u):

    σ² ≤ a + γ_{m+2} / (1 − γ_{m+2}) · tr A + γ_n ‖X‖_F² + u a

- A computed factor L satisfies |L Lᵀ − A| ≤ γ_{m+1} |L||L|ᵀ (Higham 2002, "Accuracy and Stability
  of Numerical Algorithms", theorem 10.3), so that λ_min(A) ≥ −γ / (1 − γ) · tr A (Demmel 1989;
  Rump 2006, "Verification of positive definiteness"). It is m + 2, because BLAS multiplies by the
  rounded reciprocals of the diagonal.
- |G − X Xᵀ| ≤ γ_n |X||X|ᵀ in whatever order the products are summed (Higham, section 3.5), and the
  norm of that is at most γ_n ‖X‖_F². ‖X‖_F² itself is at most tr G · (1 + 2 (m + n) u).
- The diagonal of A is rounded once: u a.

What is left, the rounding of the bound itself and underflow, is below 2⁻⁴⁸ of it, since X is
scaled by a power of two so that its largest entry is in [½, 1). Products have to be conventional
ones: a BLAS that uses Strassen's algorithm, three real products for a complex one, or emulated
float64, makes larger errors.

A complex matrix is read as the real one [[Re, −Im], [Im, Re]], whose singular values are the same,
each twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from snparam.estimators.convergence import quasi_random

# Unit roundoff of float64.
_UNIT = 2.0**-53

# The number of rows up to which a full decomposition is as fast as so many steps of Lanczos.
_FULL_DECOMPOSITION = 96

# Steps of Lanczos that find σ², enough for Gaussian, trained and clustered weights, and by how much
# a exceeds what they find, in the order in which that is tried.
_STEPS = 80
_EXCESSES = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2)

# Where only a larger excess was enough, so many steps with (a I − G)⁻¹ improve the estimate of σ²,
# so many times at most. 1 − (i/m)⁴ for m = 300 needs two.
_INVERSE_STEPS, _ROUNDS = 24, 4

# Entries of a Gram matrix, or of a piece of a weight, that are computed with at a time.
_MAX_ENTRIES = 1 << 24


class MatrixBounds(NamedTuple):
    """Certified bounds of the norms of a stack of matrices, each (b,) in float64.

    Attributes:
        lower: at most σ.
        upper: at least σ.
        frobenius: at least the Frobenius norm.
    """

    lower: Tensor
    upper: Tensor
    frobenius: Tensor


def certified_norm(stack: Tensor) -> Tensor:
    """Return an upper bound of the largest singular value of each matrix, rounding included.

    It exceeds σ by 5e-11 of it, and by up to m n u / 2, for u = 2⁻⁵³: 1e-9 for 4096 × 4096. The
    proof is at the top of this file; see there for what is asked of products. Nothing is
    differentiated.

    Args:
        stack: (b, m, n), of any real or complex floating dtype.

    Returns:
        (b,), in float64, on the stack's device, or on the CPU if the device has no float64. It is 0
        for a zero matrix, and NaN for one with NaN or inf.
    """
    return matrix_bounds(stack).upper


@torch.no_grad()
def matrix_bounds(stack: Tensor) -> MatrixBounds:
    """Return certified bounds of the norms of matrices; see `certified_norm` for the upper one.

    The lower one is the Rayleigh quotient √(yᵀ G y / yᵀ y) of an approximate singular vector y,
    less what rounding may have added to it.

    Args:
        stack: (b, m, n), of any real or complex floating dtype.
    """
    stack = on_device_with_float64(stack.detach())
    if stack.shape[1] > stack.shape[2]:
        stack = stack.mT
    blocks, rows, columns = stack.shape
    if stack.numel() == 0:
        zero = torch.zeros(blocks, dtype=torch.float64, device=stack.device)
        return MatrixBounds(zero, zero, zero)
    if stack.is_complex():
        rows, columns = 2 * rows, 2 * columns
    parts = [
        _bounds_of_scaled(part, rows, columns)
        for part in torch.split(stack, max(1, _MAX_ENTRIES // (rows * rows)))
    ]
    return MatrixBounds(*(torch.cat(list(bounds)) for bounds in zip(*parts, strict=True)))


def on_device_with_float64(tensor: Tensor) -> Tensor:
    """Return a tensor on its device, or on the CPU if that device has no float64."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


# Scaling by powers of two


def scaling_exponent(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each block the exponent e (b,) with max|x| in [½, 1) · 2ᵉ, and whether it is zero.

    The exponent of a block with NaN or inf is 0.

    Args:
        tensor: (b, ...), real or complex, where max|x| is that of real and imaginary parts.
    """
    parts = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    largest = parts.flatten(1).abs().amax(1).double()
    _, exponent = torch.frexp(torch.where(largest.isfinite(), largest, 1.0))
    return exponent.long(), largest == 0


def times_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """Return x · 2ᵉ in float64, in two halves, since one power of two may overflow.

    It is exact where the result is a normal number.

    Args:
        x: float64.
        exponent: e, int64, at most 2000 in magnitude, of a shape that broadcasts against x.
    """
    half = exponent // 2
    return x * _power_of_two(half) * _power_of_two(exponent - half)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2ᵉ in float64, exactly, which `torch.pow` does not promise; |e| ≤ 1022."""
    return ((exponent + 1023) << 52).view(torch.float64)


def rounded_up(x: Tensor) -> Tensor:
    """Return a number above x, twice the next one, for the rounding of a root and of a scale."""
    infinity = torch.full_like(x, torch.inf)
    return torch.where(x > 0, torch.nextafter(torch.nextafter(x, infinity), infinity), x)


def rounded_down(x: Tensor) -> Tensor:
    """Return a number below x, twice the next one, and 0 for x ≤ 0."""
    zero = torch.zeros_like(x)
    return torch.nextafter(torch.nextafter(x.clamp_min(0.0), zero), zero)


# The bounds of matrices


def gamma(roundings: float) -> float:
    """Return γ_k = k u / (1 − k u), which bounds the relative error of k roundings (Higham)."""
    return roundings * _UNIT / (1 - roundings * _UNIT)


def _bounds_of_scaled(stack: Tensor, rows: int, columns: int) -> MatrixBounds:
    """Return the bounds of matrices (b, m, n) of m ≤ n, real ones of `rows` and `columns`."""
    exponent, is_zero = scaling_exponent(stack)
    gram = _scaled_gram(stack, exponent, rows)
    is_finite = gram.isfinite().all(-1).all(-1)
    # A matrix that has no bound of its own is replaced by one that is easily bounded.
    unit = torch.zeros_like(gram)
    unit[:, 0, 0] = 1.0
    gram = torch.where((is_finite & ~is_zero)[:, None, None], gram, unit)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    squared_frobenius = trace * (1 + 2 * (rows + columns) * _UNIT)
    product_error = gamma(columns) * squared_frobenius
    estimate, y = _top_eigenpair(lambda x: torch.bmm(gram, x), gram, _STEPS)
    lower = _rayleigh_quotient(gram, y)
    upper = _level(gram, estimate * (1 + _EXCESSES[0]))
    for block in (~upper.isfinite()).nonzero().flatten().tolist():
        part = slice(block, block + 1)
        upper[part], lower[part] = _persistent_level(gram[part], lower[part])
    upper = (upper + product_error) * (1 + 2.0**-48)
    # Where nothing has converged, the Frobenius norm is a bound as well.
    upper = torch.minimum(upper, squared_frobenius)
    lower = lower - (gamma(2 * rows + 8) * squared_frobenius + product_error)

    def unscaled(squares: Tensor) -> Tensor:
        norms = times_power_of_two(squares.clamp_min(0.0).sqrt(), exponent)
        norms = torch.where(is_zero, 0.0, norms)
        return torch.where(is_finite, norms, torch.nan)

    return MatrixBounds(
        rounded_down(unscaled(lower * (1 - 2.0**-48))),
        rounded_up(unscaled(upper)),
        # The real matrix of a complex one has each of its entries twice.
        rounded_up(unscaled(squared_frobenius * (1 + 2.0**-48) / (1 + stack.is_complex()))),
    )


def _scaled_gram(stack: Tensor, exponent: Tensor, rows: int) -> Tensor:
    """Return X Xᵀ (b, rows, rows) in float64 for X = W / 2ᵉ, W (b, m, n), complex W embedded.

    It is summed over pieces of the columns, since a float64 copy of a large weight would take more
    memory than all else here.
    """
    gram = torch.zeros(len(stack), rows, rows, dtype=torch.float64, device=stack.device)
    for piece in torch.split(stack, max(1, _MAX_ENTRIES // (len(stack) * rows)), dim=2):
        if piece.is_complex():
            real, imaginary = piece.real.double(), piece.imag.double()
            above, below = torch.cat([real, -imaginary], 2), torch.cat([imaginary, real], 2)
            piece = torch.cat([above, below], 1)
        x = times_power_of_two(piece.double(), -exponent[:, None, None])
        gram.baddbmm_(x, x.mT)
    return gram


def _level(gram: Tensor, a: Tensor) -> Tensor:
    """Return a bound (b,) of the eigenvalues of G (b, m, m), near a (b,); inf if a is too small."""
    return a + semidefinite_shift(_shifted(gram, a)) + _UNIT * a


def _shifted(gram: Tensor, a: Tensor) -> Tensor:
    """Return a I − G for G (b, m, m) and a (b,)."""
    shifted = gram.neg()
    shifted.diagonal(dim1=-2, dim2=-1).add_(a[:, None])
    return shifted


def _persistent_level(gram: Tensor, estimate: Tensor) -> tuple[Tensor, Tensor]:
    """Return bounds above and below of the largest eigenvalue of one G, that Lanczos did not find.

    Its eigenvalues lie too close together there. The first level that is high enough gives the
    factor of a I − G, and its inverse spreads those eigenvalues.

    Args:
        gram: (1, m, m).
        estimate: (1,), a Rayleigh quotient.
    """
    upper, lower = torch.full_like(estimate, torch.inf), estimate
    for _ in range(_ROUNDS):
        for excess in _EXCESSES:
            a = lower * (1 + excess)
            level = _level(gram, a)
            if level.isfinite():
                break
        else:
            break
        upper = torch.minimum(upper, level)
        if excess == _EXCESSES[0]:
            break
        factor = torch.linalg.cholesky_ex(_shifted(gram, a)).L
        _, y = _top_eigenpair(
            lambda x, factor=factor: torch.cholesky_solve(x, factor),  # type: ignore[misc]
            gram,
            _INVERSE_STEPS,
        )
        lower = torch.maximum(lower, _rayleigh_quotient(gram, y))
    return upper, lower


def semidefinite_shift(matrices: Tensor, by_residual: bool | None = None) -> Tensor:
    """Return s (b,) such that A + s I is certainly positive semidefinite, inf where none is found.

    One triangle of A is factorised. On a CPU, s follows from the error of the Cholesky
    factorisation, which the top of this file describes. A library for an accelerator may use
    inverses of diagonal blocks, of which that is not known: there s is at least the norm of
    A − L Lᵀ, whatever L is, which takes one product more:

        s = ‖fl(A − L Lᵀ)‖_F (1 + 10⁻¹²) + γ_{m+3} (‖L‖_F² + ‖A‖_F)

    In complex arithmetic, where a product has four roundings for one, four times as many roundings
    are counted.

    Args:
        matrices: A, (b, m, m), float64 or complex128.
        by_residual: whether to use the residual; None (the default) for what the device needs.
    """
    matrices = matrices.mT  # of the same eigenvalues, and stored as LAPACK wants it
    factor, info = torch.linalg.cholesky_ex(matrices)
    roundings = 4 if matrices.is_complex() else 1
    m = matrices.shape[-1]
    if by_residual is None:
        by_residual = not matrices.is_cpu
    if by_residual:
        strictly_lower = matrices.tril(-1)
        hermitian = matrices.tril() + strictly_lower.mH
        residual = _norm(hermitian - factor @ factor.mH) * (1 + 1e-12)
        size = _norm(factor).square() + _norm(hermitian)
        shift = residual + gamma(roundings * (m + 3)) * size
    else:
        error = gamma(roundings * (m + 2))
        shift = error / (1 - error) * matrices.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    # The factorisation of diag(inf, 1) "succeeds". Each entry of a row of L is subtracted from what
    # becomes its diagonal, so that the diagonal is finite only if all are.
    diagonal = factor.diagonal(dim1=-2, dim2=-1).real
    succeeded = (info == 0) & diagonal.isfinite().all(-1) & shift.isfinite()
    return torch.where(succeeded, shift, torch.inf)


def _norm(matrices: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(matrices)
    return norm


def _rayleigh_quotient(gram: Tensor, y: Tensor) -> Tensor:
    """Return yᵀ G y / yᵀ y, (b,), for y (b, m)."""
    image = torch.bmm(gram, y.unsqueeze(-1)).squeeze(-1)
    return (image * y).sum(-1) / y.square().sum(-1)


def _top_eigenpair(
    operator: Callable[[Tensor], Tensor], gram: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Return approximations of the largest eigenvalue (b,) and of its vector (b, m).

    Large matrices take Lanczos with full reorthogonalisation, from a fixed quasi-random vector. A
    power iteration would not do: in clusters it is too far below for a bound that is to be tight.

    Args:
        operator: the product of a symmetric operator with columns (b, m, 1): of G, or of a function
            of it with the same vector.
        gram: G, (b, m, m), which small ones are decomposed by.
        steps: number of steps.
    """
    blocks, size, _ = gram.shape
    if size <= _FULL_DECOMPOSITION:
        values, vectors = torch.linalg.eigh(gram)
        return values[:, -1], vectors[:, :, -1]
    steps = min(steps, size)
    start = quasi_random(size, 1, gram.device, gram.dtype)
    q = (start / torch.linalg.vector_norm(start)).expand(blocks, size, 1)
    basis = gram.new_zeros(blocks, size, steps)
    tridiagonal = gram.new_zeros(blocks, steps, steps)
    for step in range(steps):
        basis[:, :, step] = q[..., 0]
        image = operator(q)
        tridiagonal[:, step, step] = (image * q).sum((1, 2))
        known = basis[:, :, : step + 1]
        for _ in range(2):  # two passes are enough for orthogonality (Parlett 1980)
            image = image - known @ (known.mT @ image)
        length = torch.linalg.vector_norm(image, dim=1, keepdim=True)
        # Once the basis spans an invariant subspace, what is left is rounding.
        goes_on = length > 1e-14 * tridiagonal[:, :1, :1]
        q = torch.where(goes_on, image / length.clamp_min(1e-300), 0.0)
        if step + 1 < steps:
            beta = torch.where(goes_on, length, 0.0)[:, 0, 0]
            tridiagonal[:, step, step + 1] = tridiagonal[:, step + 1, step] = beta
    values, vectors = torch.linalg.eigh(tridiagonal)
    return values[:, -1], (basis @ vectors[:, :, -1:]).squeeze(-1)


# The divisor


def covering_divisor(
    upper: Tensor,
    frobenius: Tensor,
    entries: int,
    dtype: torch.dtype,
    arithmetic: torch.dtype,
    coeff: float = 1.0,
) -> Tensor:
    """Return a divisor d such that the norm of the computed W / d is at most c.

    Each entry of the computed quotient is off by at most ε of itself, or by η where it is
    subnormal, so that its norm is at most (B + ε ‖W‖_F) / d + √(m n) η, where B bounds σ(W).
    Therefore

        d ≥ (B + ε ‖W‖_F) / (c − √(m n) η)

    It is rounded up, and c is in it, because a second rounding would not be covered. ε is the unit
    roundoff of the weight's dtype, or (1 + ε₁)(1 + ε₂) − 1 of both roundings if the quotient is
    computed in a wider dtype first; η is half of the smallest subnormal number, or the smallest
    normal one where subnormal numbers are flushed to zero.

    Args:
        upper: B, (b,), in float64, from `matrix_bounds`.
        frobenius: at least the Frobenius norms, (b,), in float64.
        entries: number m n of entries of a matrix.
        dtype: the weight's dtype, to which the quotient is rounded. For a complex one, eight times
            as much rounding is counted.
        arithmetic: real dtype of d, in which the quotient is computed first.
        coeff: c.

    Returns:
        d, (b,), in the dtype of the arithmetic; 1 for a zero matrix, which is left as it is.

    Raises:
        ValueError: if c is not above √(m n) η, which the rounding of subnormal quotients may reach
            alone.
    """
    # A complex number is divided by a real one in several steps, in each of its parts.
    roundings = 8 if dtype.is_complex else 1
    dtype, arithmetic = dtype.to_real(), arithmetic.to_real()
    relative = torch.finfo(dtype).eps / 2 * roundings
    absolute = _smallest_step(dtype, upper.device) * roundings
    if arithmetic != dtype:
        first = torch.finfo(arithmetic).eps / 2 * roundings
        relative = relative + first + relative * first
        absolute = absolute + _smallest_step(arithmetic, upper.device)
    room = coeff - (entries * (1 + 1e-12)) ** 0.5 * absolute
    if not room > 0:
        raise ValueError(
            f"coeff={coeff:g} is too small for a matrix of {entries} entries in {dtype}: the "
            f"rounding of its smallest entries alone may have that norm; pass a coeff above "
            f"{entries**0.5 * absolute:.1e}, or use a wider dtype"
        )
    # As a product, since ε ‖W‖_F may underflow where B does not.
    d = upper / room * (1 + relative * (frobenius / upper)) * (1 + 2.0**-50)
    d = torch.where(upper == 0, 1.0, rounded_up(d))
    narrow = d.to(arithmetic)
    above = torch.nextafter(narrow, torch.full_like(narrow, torch.inf))
    return torch.where(narrow.double() < d, above, narrow)


def _smallest_step(dtype: torch.dtype, device: torch.device) -> float:
    """Return by how much the rounding of a subnormal number may change it."""
    limits = torch.finfo(dtype)
    # float64's own is rounded up: half of its smallest number is no number.
    half = max(limits.smallest_normal * limits.eps / 2, 5e-324)
    smallest = torch.full((), limits.smallest_normal, dtype=dtype, device=device)
    return limits.smallest_normal if bool(smallest / 2 == 0) else half
