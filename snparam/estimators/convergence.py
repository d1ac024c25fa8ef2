"""Singular vectors and values computed from the matrices alone, to a promised accuracy.

Pure functions of stacks of matrices (b, m, n), with the shapes of `products`.
"""

from __future__ import annotations

import math
from itertools import count

import torch
from torch import Tensor

from snparam.matrices.orthonormalisation import orthonormal_rows, orthonormalise
from snparam.matrices.products import Stack, left_product, right_product, wide_dtype

# Above this many rows (or columns, whichever are fewer) block Lanczos finds the top of the spectrum
# sooner than a full eigendecomposition of the Gram matrix: 2x at 512, 20x at 4096, on two cores.
_FULL_DECOMPOSITION = 256

# Lanczos stops once ‖A x − θ x‖ ≤ tolerance · θ₁ for each Ritz pair (θ, x) of A = W Wᴴ, where θ₁ is
# the largest θ. Each θ is then that near an eigenvalue, and √θ₁ that near a singular value to half
# the tolerance: 2.5e-4 relative, against the 1e-3 promised.
_LANCZOS_TOLERANCE = 5e-4

# The eigenvalue that θ₁ is near need not be the largest: a block that is nearly orthogonal to the
# first singular vector has a small residual too, where the other singular values lie close
# together. After one step σ₁ was 4e-3 too low for n = 500 and all others at 0.996 σ₁. After this
# many it is below 2e-5, for spectra that are flat, narrow, uniform or of two values below σ₁, with
# gaps of 0.1 to 5 % and n from 300 to 3000.
_LEAST_STEPS = 8

# The residual, in units of rounding of the products, at which nothing but rounding is left of it.
_ROUNDING = 16

# The residual at which a long Lanczos stops, σ being within 5e-11 of a singular value then, and the
# number of entries that its basis may have: 2 GiB in float64.
_LONG_TOLERANCE, _LONG_BASIS = 1e-10, 1 << 28


def converged(
    matrices: Tensor | Stack, k: int, tolerance: float = _LANCZOS_TOLERANCE
) -> tuple[Tensor, Tensor]:
    """Return the top k left singular vectors and singular values, the same in every run.

    Small matrices take the full eigendecomposition, in float64, of the Gram matrix of the shorter
    side (σ₁ to about 1e-8 relative, whatever the spectrum). Large and sharded ones take block
    Lanczos with full reorthogonalisation, stopped by its residual (σ₁ to 2.5e-4 relative, also in
    clusters).

    Args:
        matrices: (b, m, n), finite, real or complex.
        k: number of vectors, at most min(m, n).
        tolerance: residual at which Lanczos stops, relative to σ₁².

    Returns:
        u (b, k, m) and sv (b, k), in float64 (complex128).
    """
    wide = wide_dtype(matrices.dtype)
    us, svs = [], []
    for block in range(matrices.shape[0]):
        scale = _largest(matrices, block)
        if scale == 0:
            # All vectors are singular vectors of zero. Training would hardly ever make it a matrix
            # to which these are orthogonal.
            rows = quasi_random(k, matrices.shape[1], matrices.device, wide)
            u, sv = orthonormal_rows(rows.unsqueeze(0))[0], rows.new_zeros(k, dtype=torch.float64)
        elif isinstance(matrices, Tensor):
            u, sv = _top_of_matrix(matrices[block], scale, k, wide, tolerance)
        else:
            u, sv, _ = _top_by_lanczos(_Block(matrices, block, scale), k, wide, tolerance)
        us.append(u)
        svs.append(sv * scale)
    return torch.stack(us), torch.stack(svs)


def _top_of_matrix(
    matrix: Tensor, scale: float, k: int, wide: torch.dtype, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Return u (k, m) and sv (k,) of matrix / scale, by whichever method is cheaper."""
    if min(matrix.shape) > _FULL_DECOMPOSITION:
        size = min(matrix.shape)
        scaled = matrix.to(torch.promote_types(matrix.dtype, torch.float32)) / scale
        # Once the basis has a third of the dimension, the full decomposition is cheaper.
        block = _Block(scaled[None], 0, 1.0)
        u, sv, is_within = _top_by_lanczos(block, k, wide, tolerance, size // 3)
        if is_within:
            return u, sv
    return _top_by_gram(matrix, scale, k, wide)


def exact_sigma(matrices: Tensor | Stack) -> Tensor:
    """Return the largest singular value of each matrix, (b,) in float64, by a full decomposition.

    Matrices that are known by products, and are large or sharded, take Lanczos to 5e-11, or to as
    many vectors as memory holds, in float64 if that is the dtype of their arithmetic:
    `exact_method` tells which of the two it is.
    """
    if not isinstance(matrices, Tensor):
        if not matrices.is_small:
            return _long_lanczos(matrices)
        matrices = matrices.to_dense()
    wide = wide_dtype(matrices.dtype)
    sigmas = []
    for block, matrix in enumerate(matrices):
        scale = _largest(matrices, block) or 1.0
        gram = _gram(matrix, scale, wide)
        top = torch.linalg.eigvalsh(gram)[-1]
        sigmas.append(top.clamp_min(0).sqrt() * scale)
    return torch.stack(sigmas)


def exact_method(matrices: Tensor | Stack) -> str:
    """Return by what `exact_sigma` finds σ: `"decomposition"` or, from below, `"Lanczos"`."""
    is_formed = isinstance(matrices, Tensor) or matrices.is_small
    return "decomposition" if is_formed else "Lanczos"


def _long_lanczos(matrices: Stack) -> Tensor:
    """Return the largest singular value of each matrix, (b,), by a long Lanczos.

    It stops at its tolerance, or if the basis has as many vectors as `_LONG_BASIS` allows.
    """
    wide, sigmas = wide_dtype(matrices.dtype), []
    for block in range(matrices.shape[0]):
        matrix = _Block(matrices, block, _largest(matrices, block) or 1.0)
        most_vectors = max(4 * matrix.least_steps, _LONG_BASIS // matrix.size)
        _, sv, _ = _top_by_lanczos(matrix, 1, wide, _LONG_TOLERANCE, most_vectors)
        sigmas.append(sv[0] * matrix.scale)
    return torch.stack(sigmas)


def _largest(matrices: Tensor | Stack, block: int) -> float:
    """Return the largest magnitude of an entry of a block; of all blocks, if they are sharded.

    Entries that are divided by it can be squared and summed without overflow.
    """
    if not isinstance(matrices, Tensor):
        return matrices.largest()
    return float(matrices[block].abs().amax())


def _gram(matrix: Tensor, scale: float, wide: torch.dtype) -> Tensor:
    """Return the smaller of W Wᴴ and Wᴴ W, for W = matrix / scale, in float64."""
    rows, columns = matrix.shape
    tall = matrix if rows >= columns else matrix.mH
    if columns == 0 or rows == 0:
        return matrix.new_zeros((0, 0), dtype=wide)
    gram = torch.zeros((tall.shape[1],) * 2, dtype=wide, device=matrix.device)
    # In pieces, because a float64 copy of a large embedding costs more than the product does.
    for piece in torch.split(tall, max(1, (1 << 22) // tall.shape[1])):
        wider = piece.to(wide) / scale
        gram.addmm_(wider.mH, wider)
    return gram


def _top_by_gram(matrix: Tensor, scale: float, k: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return u (k, m) and sv (k,) of matrix / scale, from the eigenvectors of its Gram matrix."""
    _, vectors = torch.linalg.eigh(_gram(matrix, scale, wide))
    rows = vectors[:, -k:].flip(-1).mT
    if matrix.shape[0] < matrix.shape[1]:
        # The eigenvectors of W Wᴴ are left singular vectors already. sv comes from a product, since
        # the roots of the eigenvalues would be off by 1e-8 σ₁ where singular values are small.
        return _fix_sign(rows), _left_from_right(matrix.mH, scale, rows)[1]
    return _left_from_right(matrix, scale, rows)


def _left_from_right(matrix: Tensor, scale: float, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return u (k, m) and sv (k,) of matrix / scale, from right singular vectors v (k, n)."""
    t = v.new_empty((v.shape[0], matrix.shape[0]))
    size = max(1, (1 << 22) // matrix.shape[1])
    for start in range(0, matrix.shape[0], size):
        piece = matrix[start : start + size].to(v.dtype) / scale
        t[:, start : start + size] = v @ piece.mT
    u, sv = orthonormalise(t.unsqueeze(0))
    return _fix_sign(u[0]), sv[0]


class _Block:
    """The Gram operator A of one matrix W of a stack, divided by `scale`, on its shorter side.

    Attributes:
        by_rows: whether A is W Wᴴ, for a matrix with no more rows than columns, and not Wᴴ W.
        size: length of the shorter side.
        least_steps: number of Lanczos steps to take at least.
        guard_vectors: number of vectors to iterate with beyond those that are asked for.
        rounding: unit of rounding of the products.
    """

    def __init__(self, stack: Tensor | Stack, block: int, scale: float) -> None:
        self.stack, self.block, self.scale = stack, block, scale
        _, rows, columns = stack.shape
        self.by_rows = rows <= columns
        self.size = min(rows, columns)
        self.least_steps = _LEAST_STEPS if isinstance(stack, Tensor) else stack.least_steps
        self.guard_vectors = 1 if isinstance(stack, Tensor) else stack.guard_vectors
        self.rounding = torch.finfo(stack.dtype).eps

    def gram(self, rows: Tensor) -> Tensor:
        """Return A x for each row x of (width, size)."""
        first_product, second_product = (
            (left_product, right_product) if self.by_rows else (right_product, left_product)
        )
        image = (
            second_product(
                self.stack, first_product(self.stack, self._pad_to_stack(rows)) / self.scale
            )
            / self.scale
        )
        return image[self.block].to(rows.dtype)

    def longer_side(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return singular vectors of the longer side, and sv, from those of the shorter side."""
        product = left_product if self.by_rows else right_product
        t = product(self.stack, self._pad_to_stack(rows))[self.block].to(rows.dtype) / self.scale
        vectors, sv = orthonormalise(t.unsqueeze(0))
        return _fix_sign(vectors[0]), sv[0]

    def _pad_to_stack(self, rows: Tensor) -> Tensor:
        """Return vectors for the whole stack: `rows` for this block, and zeros for all others."""
        out = rows.new_zeros((self.stack.shape[0], *rows.shape), dtype=self.stack.dtype)
        out[self.block] = rows
        return out


def _top_by_lanczos(
    matrix: _Block, k: int, wide: torch.dtype, tolerance: float, max_vectors: int | None = None
) -> tuple[Tensor, Tensor, bool]:
    """Return u (k, m) and sv (k,) of a matrix by block Lanczos on its Gram operator.

    The basis is fully reorthogonalised. Its start is a fixed quasi-random block, which takes no
    global random state and is the same on every machine. In exact arithmetic the Ritz values are
    the squares of those of Golub-Kahan bidiagonalisation from the same start. Source: Golub and
    Underwood 1977; Musco and Musco 2015 for its gap-free convergence.

    Args:
        matrix: its Gram operator on the shorter side.
        k: number of vectors.
        wide: dtype of the basis.
        tolerance: residual at which it stops, relative to the largest Ritz value.
        max_vectors: number of basis vectors at which it stops at the latest, or None to go on until
            the basis is complete.

    Returns:
        u, sv, and whether the residuals are within the tolerance.
    """
    size = matrix.size
    width = min(k + matrix.guard_vectors, size)
    block = orthonormal_rows(quasi_random(width, size, matrix.stack.device, wide)[None])[0]
    basis, storage = block, block
    projected = block.new_empty((0, 0))
    for steps in count(1):
        image = matrix.gram(block)
        columns = basis.conj() @ image.mT  # ⟨bᵢ, A bⱼ⟩ for all vectors bᵢ and those bⱼ of the block
        older = len(basis) - len(block)
        projected = torch.cat([torch.cat([projected, columns[:older].mH]), columns], 1)
        remainder = image - columns.mT @ basis
        values, vectors = torch.linalg.eigh((projected + projected.mH) / 2)
        values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
        # A b lies in the basis for all but the last block, so that its remainder is all there is.
        residual = torch.linalg.vector_norm(vectors[older:].mT @ remainder, dim=-1).amax()
        largest = values[0].clamp_min(0)
        is_within = bool(residual <= tolerance * largest)
        # With residuals of rounding, the basis holds all that the start can reach.
        is_exhausted = bool(residual <= _ROUNDING * matrix.rounding * largest)
        width = min(width, size - len(basis))
        is_full = width == 0 or (max_vectors is not None and len(basis) + width > max_vectors)
        if (is_within and steps >= matrix.least_steps) or is_exhausted or is_full:
            break
        # Two passes are enough for orthogonality (Parlett 1980); the remainder is the first.
        block = orthonormal_rows(remainder[None, :width])[0]
        block = block - (block @ basis.mH) @ basis
        block = orthonormal_rows(block[None])[0]
        if len(basis) + width > len(storage):
            storage = torch.cat([storage, storage.new_empty((matrix.least_steps * width, size))])
        storage[len(basis) : len(basis) + width] = block
        basis = storage[: len(basis) + width]
    # sv comes from a product: the roots of the Ritz values are off by √eps σ₁ where singular
    # values are small.
    ritz = vectors.mT @ basis
    longer_side, sv = matrix.longer_side(ritz)
    return (_fix_sign(ritz) if matrix.by_rows else longer_side), sv, is_within or width == 0


def quasi_random(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return rows of a Weyl sequence in (−1, 1), with no structure that a weight would share."""
    grid = torch.arange(1, rows * columns + 1, dtype=torch.float64, device=device)
    golden = (math.sqrt(5.0) - 1) / 2
    points = torch.frac(grid * golden + torch.frac(grid * grid * math.sqrt(2.0))) * 2 - 1
    return points.reshape(rows, columns).to(dtype)


def _fix_sign(rows: Tensor) -> Tensor:
    """Multiply each row by the phase that makes its entry of largest magnitude positive."""
    position = rows.abs().argmax(-1, keepdim=True)
    phase = torch.sgn(rows.gather(-1, position))
    return rows * torch.where(phase == 0, torch.ones_like(phase), phase.conj())
