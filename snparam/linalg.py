"""Singular values of stacks of matrices: power iteration and convergence.

Pure functions, tensors in, tensors out. The shapes are the same throughout:

    matrices: (b, m, n)   b blocks, m rows, n columns
    u:        (b, k, m)   left singular vectors, as rows, the largest singular value's first
    v:        (b, k, n)   right singular vectors, as rows
    sv:       (b, k)      singular values, largest first, real

Complex matrices follow W = Σ σᵢ uᵢ vᵢᴴ.
"""

from __future__ import annotations

import math
from typing import Protocol, overload

import torch
from torch import Tensor

_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}

# Above this many rows (or columns, whichever are fewer) block Lanczos finds the top of the spectrum
# sooner than a full eigendecomposition of the Gram matrix: 2x at 512, 20x at 4096, on two cores.
_FULL_DECOMPOSITION = 256

# Lanczos stops once ‖A x − θ x‖ ≤ tolerance · θ for each Ritz pair of A = W Wᴴ. θ is then within
# that of an eigenvalue, and σ = √θ within half of it: 2.5e-4, against the 1e-3 promised.
_LANCZOS_TOLERANCE = 5e-4


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a norm of tensors of the given dtype."""
    return _REAL.get(dtype, dtype)


class Stack(Protocol):
    """A stack of matrices (b, m, n) that is known by its products, such as one sharded over ranks.

    Attributes:
        shape: (b, m, n).
        dtype: of the arithmetic.
        device: where the vectors are.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def left(self, u: Tensor) -> Tensor:
        """U conj(W), (b, k, m) to (b, k, n)."""

    def right(self, v: Tensor) -> Tensor:
        """V Wᵀ, (b, k, n) to (b, k, m)."""

    def largest(self) -> float:
        """The largest magnitude of an entry; not finite if there is NaN or inf."""


def power_step(
    matrices: Tensor | Stack, u: Tensor, eps: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of block power iteration, equal to the sequential Gram-Schmidt form.

    V = orth(U W), T = V Wᵀ, U = orth(T), sv = rowwise ⟨T, U⟩: two products whatever k is. Source:
    Brock, Donahue and Simonyan 2019 (the layer of BigGAN), there written vector by vector.

    Args:
        matrices: (b, m, n), float32 or wider.
        u: (b, k, m), of any length, with k ≤ min(m, n).
        eps: floor under the norms that are divided by. The classic layer has 1e-12, an absolute
            number, which makes the iteration collapse for matrices of σ below it; a norm of exactly
            zero needs no floor here, so that the default 0 keeps every scale right.

    Returns:
        The new u (b, k, m), the v (b, k, n) between, and sv (b, k). For a zero matrix u is returned
        as it came: what a layer that starts at zero learns next is found from there, where a u of
        zeros, or any other made without reason, might be orthogonal to it up to rounding.
    """
    v = right_vectors(_left(matrices, u), eps)
    found, sv = left_vectors(_right(matrices, v), eps, u)
    return found, v, sv


def finish_step(
    matrices: Tensor | Stack, v: Tensor, eps: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The second half of a step: u, v and sv from a given v, with one product."""
    u, sv = left_vectors(_right(matrices, v), eps)
    return u, v, sv


def right_vectors(x: Tensor, eps: float = 0.0) -> Tensor:
    """The v (b, k, n) of a step, from X = U conj(W), which it overwrites."""
    if x.shape[1] > 1:
        return orthonormal_rows(x, eps)
    # Where u is orthogonal to every column the classic layer ends in NaN. Another direction finds
    # the matrix again, and only a zero matrix keeps σ = 0.
    v, _ = _unit(x, eps, instead=x.shape[2] ** -0.5)
    return v


def left_vectors(
    t: Tensor, eps: float = 0.0, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The u (b, k, m) and sv (b, k) of a step, from T = V Wᵀ, which it overwrites.

    For a zero matrix u is as `before`, or, if that is not given and k = 1, zeros.
    """
    if t.shape[1] > 1:
        u = orthonormal_rows(t, eps)
        sv: Tensor = (t * u.conj()).sum(-1).real
    else:
        u, norm = _unit(t, eps, instead=0.0 if before is None else None)
        sv = norm.to(real_dtype(t.dtype))
        sv = sv if eps == 0 else sv * (sv / eps).clamp_max(1.0)
    return u if before is None else torch.where(sv[:, :1, None] > 0, u, before), sv


def orthonormal_rows(x: Tensor, eps: float = 0.0) -> Tensor:
    """Orthonormalise rows, earlier rows first, each keeping its direction.

    What Gram-Schmidt gives, by a QR decomposition whose triangular factor has a positive diagonal.
    A row that depends on earlier ones becomes some unit vector orthogonal to them.

    Args:
        x: (b, k, n) with k ≤ n.
        eps: rows whose remainder is shorter than this keep the length remainder / eps, as
            normalize(x) = x / max(‖x‖, eps) gives.
    """
    scale = None
    if x.is_complex():  # LAPACK's complex QR makes NaN of subnormal numbers, its real one does not
        parts = torch.view_as_real(x.resolve_conj())
        largest = parts.abs().amax((-2, -1), keepdim=True)
        parts = parts / torch.where(largest > 0, largest, 1.0)
        x, scale = torch.view_as_complex(parts), largest[..., 0, 0]
    q, r = torch.linalg.qr(x.mT)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    phase = torch.sgn(diagonal) + (diagonal == 0)
    if eps > 0:
        length = diagonal.abs() if scale is None else diagonal.abs() * scale
        phase = phase * (length / eps).clamp(max=1.0)
    rows: Tensor = (q * phase.unsqueeze(-2)).mT
    return rows


def converged(
    matrices: Tensor | Stack, k: int, tolerance: float = _LANCZOS_TOLERANCE
) -> tuple[Tensor, Tensor]:
    """The top k left singular vectors and singular values, deterministically.

    Small matrices: the full eigendecomposition, in float64, of the Gram matrix of the shorter side
    (σ₁ to about 1e-8 relative, whatever the spectrum). Large and sharded ones: block Lanczos with
    full reorthogonalisation, stopped by its residual (σ to 2.5e-4, also in clusters).

    Args:
        matrices: (b, m, n), finite, real or complex.
        k: how many, at most min(m, n).
        tolerance: residual at which Lanczos stops, relative to σ₁².

    Returns:
        u (b, k, m) and sv (b, k), in float64 (complex128).
    """
    wide = _wide(matrices.dtype)
    us, svs = [], []
    for block in range(matrices.shape[0]):
        scale = _largest(matrices, block)
        if scale == 0:
            # Any vectors are singular vectors; these are orthogonal to nothing that training makes.
            rows = _quasi_random(k, matrices.shape[1], matrices.device, wide)
            u, sv = orthonormal_rows(rows.unsqueeze(0))[0], rows.new_zeros(k, dtype=torch.float64)
        elif isinstance(matrices, Tensor):
            u, sv = _top_of_matrix(matrices[block], scale, k, wide, tolerance)
        else:
            u, sv = _top_by_lanczos(_Block(matrices, block, scale), k, wide, tolerance)
        us.append(u)
        svs.append(sv * scale)
    return torch.stack(us), torch.stack(svs)


def _top_of_matrix(
    matrix: Tensor, scale: float, k: int, wide: torch.dtype, tolerance: float
) -> tuple[Tensor, Tensor]:
    if min(matrix.shape) > _FULL_DECOMPOSITION:
        size = min(matrix.shape)
        scaled = matrix.to(torch.promote_types(matrix.dtype, torch.float32)) / scale
        # Past a third of the dimension the full decomposition is the cheaper of the two.
        found = _top_by_lanczos(_Block(scaled[None], 0, 1.0), k, wide, tolerance, size // 3)
        if found is not None:
            return found
    return _top_by_gram(matrix, scale, k, wide)


def exact_sigma(matrices: Tensor | Stack) -> Tensor:
    """Largest singular value of each matrix in float64, shape (b,), by a full decomposition.

    Of sharded matrices: by Lanczos to rounding, in float64 where their own products are.
    """
    if not isinstance(matrices, Tensor):
        return converged(matrices, 1, tolerance=1e-13)[1][:, 0]
    wide = _wide(matrices.dtype)
    sigmas = []
    for block, matrix in enumerate(matrices):
        scale = _largest(matrices, block) or 1.0
        gram = _gram(matrix, scale, wide)
        top = torch.linalg.eigvalsh(gram)[-1]
        sigmas.append(top.clamp_min(0).sqrt() * scale)
    return torch.stack(sigmas)


def _left(matrices: Tensor | Stack, u: Tensor) -> Tensor:
    """U conj(W), (b, k, m) to (b, k, n)."""
    if not isinstance(matrices, Tensor):
        return matrices.left(u)
    if u.shape[:2] == (1, 1):  # one product with a vector is what BLAS does best
        return torch.mv(matrices[0].mH, u.view(-1)).view(1, 1, -1)
    return torch.bmm(u, matrices.conj() if matrices.is_complex() else matrices)


def _right(matrices: Tensor | Stack, v: Tensor) -> Tensor:
    """V Wᵀ, (b, k, n) to (b, k, m)."""
    if not isinstance(matrices, Tensor):
        return matrices.right(v)
    if v.shape[:2] == (1, 1):
        return torch.mv(matrices[0], v.view(-1)).view(1, 1, -1)
    return torch.bmm(v, matrices.mT)


def _unit(x: Tensor, eps: float, instead: float | None) -> tuple[Tensor, Tensor]:
    """Rows made unit in place, (b, 1, n), and their norms, (b, 1); a zero row becomes `instead`.

    The norms are taken in float64, where squares of float32 neither overflow nor underflow. A row
    with NaN becomes `instead` too, so that a step on a broken weight does not break the state. With
    None either becomes NaN.
    """
    wide = x.dtype if x.device.type == "mps" else _wide(x.dtype)  # which has no float64
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    if x.is_complex():  # by parts: complex division takes reciprocals, which overflow first
        torch.view_as_real(x).div_(norm.unsqueeze(-1))
    else:
        x = x.div_(norm)
    if eps > 0:
        x = x.mul_((norm / eps).clamp_max(1.0))
    if instead is not None:
        # NaN is replaced in the real and in the imaginary part, each by itself.
        x.nan_to_num_(nan=instead * 0.5**0.5 if x.is_complex() else instead)
    return x, norm.squeeze(-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _largest(matrices: Tensor | Stack, block: int) -> float:
    """The largest magnitude of an entry: divided by it, they can be squared and summed."""
    if not isinstance(matrices, Tensor):
        return matrices.largest()
    return float(matrices[block].abs().amax())


def _gram(matrix: Tensor, scale: float, wide: torch.dtype) -> Tensor:
    """The smaller of W Wᴴ and Wᴴ W, scaled, in float64."""
    rows, columns = matrix.shape
    tall = matrix if rows >= columns else matrix.mH
    if columns == 0 or rows == 0:
        return matrix.new_zeros((0, 0), dtype=wide)
    gram = torch.zeros((tall.shape[1],) * 2, dtype=wide, device=matrix.device)
    # In pieces, because a float64 copy of a large embedding costs more than its product.
    for piece in torch.split(tall, max(1, (1 << 22) // tall.shape[1])):
        wider = piece.to(wide) / scale
        gram.addmm_(wider.mH, wider)
    return gram


def _top_by_gram(matrix: Tensor, scale: float, k: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    _, vectors = torch.linalg.eigh(_gram(matrix, scale, wide))
    rows = vectors[:, -k:].flip(-1).mT
    if matrix.shape[0] < matrix.shape[1]:
        # Columns of `vectors` are eigenvectors of W Wᴴ: left singular vectors. The roots of the
        # eigenvalues would be off by 1e-8 σ₁ where singular values are small.
        return _fix_sign(rows), _left_from_right(matrix.mH, scale, rows)[1]
    return _left_from_right(matrix, scale, rows)


def _left_from_right(matrix: Tensor, scale: float, v: Tensor) -> tuple[Tensor, Tensor]:
    """U and sv (scaled) from right singular vectors (k, n)."""
    t = v.new_empty((v.shape[0], matrix.shape[0]))
    size = max(1, (1 << 22) // matrix.shape[1])
    for start in range(0, matrix.shape[0], size):
        piece = matrix[start : start + size].to(v.dtype) / scale
        t[:, start : start + size] = v @ piece.mT
    u = orthonormal_rows(t.unsqueeze(0))[0]
    return _fix_sign(u), (t * u.conj()).sum(-1).real.clamp_min(0)


class _Block:
    """One matrix of a stack, scaled, as the Gram operator of its shorter side."""

    def __init__(self, stack: Tensor | Stack, block: int, scale: float) -> None:
        self.stack, self.block, self.scale = stack, block, scale
        _, rows, columns = stack.shape
        self.by_rows = rows <= columns
        self.size = min(rows, columns)

    def gram(self, rows: Tensor) -> Tensor:
        """Each row x, (width, size), to A x."""
        there, back = (_left, _right) if self.by_rows else (_right, _left)
        image = back(self.stack, there(self.stack, self._in_stack(rows)) / self.scale) / self.scale
        return image[self.block].to(rows.dtype)

    def across(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The singular vectors of the longer side, and sv, from those of the shorter."""
        there = _left if self.by_rows else _right
        t = there(self.stack, self._in_stack(rows))[self.block].to(rows.dtype) / self.scale
        across = orthonormal_rows(t.unsqueeze(0))[0]
        return _fix_sign(across), (t * across.conj()).sum(-1).real.clamp_min(0)

    def _in_stack(self, rows: Tensor) -> Tensor:
        out = rows.new_zeros((self.stack.shape[0], *rows.shape), dtype=self.stack.dtype)
        out[self.block] = rows
        return out


@overload
def _top_by_lanczos(
    matrix: _Block, k: int, wide: torch.dtype, tolerance: float
) -> tuple[Tensor, Tensor]: ...
@overload
def _top_by_lanczos(
    matrix: _Block, k: int, wide: torch.dtype, tolerance: float, most: int
) -> tuple[Tensor, Tensor] | None: ...
def _top_by_lanczos(
    matrix: _Block, k: int, wide: torch.dtype, tolerance: float, most: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """Block Lanczos on the Gram operator of the shorter side, fully reorthogonalised.

    None if it has not converged within a basis of `most` vectors; without `most`, the basis grows
    until it is complete. Source: Golub and Underwood 1977; Musco and Musco 2015 for its gap-free
    convergence. The start is a fixed quasi-random block: no global random state, the same on every
    machine.
    """
    size = matrix.size
    width = min(k + 1, size)
    start = _quasi_random(width, size, matrix.stack.device, wide)
    basis = block = orthonormal_rows(start.unsqueeze(0))[0]
    images = basis.new_empty((0, size))
    while True:
        image = matrix.gram(block)
        images = torch.cat([images, image])
        projected = basis.conj() @ images.mT
        values, vectors = torch.linalg.eigh((projected + projected.mH) / 2)
        values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
        ritz = vectors.mT @ basis
        residual = torch.linalg.vector_norm(vectors.mT @ images - values[:, None] * ritz, dim=-1)
        done = bool((residual <= tolerance * values[0].clamp_min(0)).all())
        width = min(width, size - basis.shape[0])
        if done or width == 0:
            break
        if most is not None and basis.shape[0] + width > most:
            return None
        block = image[:width]
        for _ in range(2):  # twice is enough (Parlett 1980)
            block = block - (block @ basis.mH) @ basis
            block = orthonormal_rows(block.unsqueeze(0))[0]
        basis = torch.cat([basis, block])
    # Not the roots of the Ritz values, which are off by √eps σ₁ where singular values are small.
    across, sv = matrix.across(ritz)
    return (_fix_sign(ritz) if matrix.by_rows else across), sv


def _quasi_random(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Rows of a Weyl sequence in (−1, 1): no structure that a weight would share."""
    grid = torch.arange(1, rows * columns + 1, dtype=torch.float64, device=device)
    golden = (math.sqrt(5.0) - 1) / 2
    points = torch.frac(grid * golden + torch.frac(grid * grid * math.sqrt(2.0))) * 2 - 1
    return points.reshape(rows, columns).to(dtype)


def _fix_sign(rows: Tensor) -> Tensor:
    """Turn each row so that its entry of largest magnitude is real and positive."""
    at = rows.abs().argmax(-1, keepdim=True)
    phase = torch.sgn(rows.gather(-1, at))
    return rows * torch.where(phase == 0, torch.ones_like(phase), phase.conj())
