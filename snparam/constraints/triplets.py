"""Leading singular triplets of matrices as functions of them, differentiable any number of times.

W = Σ σᵢ uᵢ vᵢᴴ. A constraint that changes σᵢ and leaves uᵢ and vᵢ, such as clipping, is a function
of W that moves the vectors too: with the vectors held constant, the gradient of a clipped weight is
off by half. The vectors one by one have no derivative where singular values are equal. So what is
differentiated here is a basis U, V of the subspaces that they span, the small matrix B = Uᴴ W V
between the bases, and its unitary polar factor Q. They are the factors of

    Σ σᵢ uᵢ vᵢᴴ = U B Vᴴ    and    Σ uᵢ vᵢᴴ = U Q Vᴴ,

and neither product depends on the bases. Both have derivatives as long as σ of the selected
triplets are above all others, however many of the selected are equal.

The derivatives, with W V = U B and Wᴴ U = V Bᴴ differentiated (columns are vectors here, rows in
the code): with dU = P orthogonal to U, dV = L orthogonal to V, and R = W − U B Vᴴ the rest of the
matrix,

    P B − R L = (I − U Uᴴ) dW V
    L Bᴴ − Rᴴ P = (I − V Vᴴ) dWᴴ U
    dB = Uᴴ dW V
    dQ = Q Ω, where H Ω + Ω H = Qᴴ dB − dBᴴ Q and H = Qᴴ B.

The bases of singular vectors make B diagonal, so that the first two equations are one positive
definite system for each vector, which conjugate gradients solve with products with R alone, and the
last is a division by σᵢ + σⱼ. Holding dU orthogonal to U picks one of many bases; what does not
depend on the bases has its right derivatives, the higher ones too. Backward and forward mode of
each Function are written with differentiable operations and the Functions themselves.

Source: Stewart and Sun 1990, "Matrix perturbation theory", chapter V, for the first two equations;
Higham 2008, "Functions of matrices", section 8.2, for the polar factor; Hestenes and Stiefel 1952
for conjugate gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from snparam.matrices import torch_private
from snparam.matrices.orthonormalisation import reads_freely, row_norms
from snparam.matrices.products import left_product, right_product

# The number of steps after which conjugate gradients stop, and the power of the unit of rounding
# that is the residual at which they do so before: 2e-5 in float32, 4e-11 in float64. After j steps
# the error has shrunk to 2 ((√κ − 1) / (√κ + 1))ʲ, with κ = σᵢ² / (σᵢ² − s²) and s the largest
# singular value outside: for s = 0.95 σᵢ, 2e-5 takes 18 steps.
_MOST_STEPS = 24
_TOLERANCE = 2 / 3


class Triplets(NamedTuple):
    """The selected ones of k leading singular triplets of matrices (b, m, n).

    Attributes:
        u: U, (b, k, m), as rows; rows that are not selected are zero.
        v: V, (b, k, n), as rows; rows that are not selected are zero.
        core: B = Uᴴ W V, (b, k, k), with the value diag(σ).
        phase: Q, the unitary polar factor of B, (b, k, k), with the value I.
    """

    u: Tensor
    v: Tensor
    core: Tensor
    phase: Tensor

    def between(self, core: Tensor) -> Tensor:
        """Return U C Vᴴ, (b, m, n), for a matrix C (b, k, k) between the bases."""
        return self.u.mT @ (core @ self.v.conj())


def triplets_of(matrices: Tensor, u: Tensor, v: Tensor, sv: Tensor, selected: Tensor) -> Triplets:
    """Return the selected triplets of matrices as differentiable functions of them.

    The values are those that are given, and only derivatives are computed from the matrices. They
    are right as far as u, v and sv are singular triplets, and the selected singular values are
    above all others.

    Args:
        matrices: W, (b, m, n), in the dtype of u.
        u: (b, k, m), orthonormal rows.
        v: (b, k, n), orthonormal rows.
        sv: (b, k), positive where selected.
        selected: (b, k), bool.

    Raises:
        NotImplementedError: in forward-mode AD within forward-mode AD.
    """
    if _needs_derivatives(matrices):
        subspaces: Any = _Subspaces if is_compiling() else _SubspacesInBothModes
        polar_factor: Any = _PolarFactor if is_compiling() else _PolarFactorInBothModes
        u, v, core = subspaces.apply(matrices, u, v, sv, selected)
        return Triplets(u, v, core, polar_factor.apply(core + _unselected(selected, u.dtype)))
    u, v, core = _selected_part(u, v, sv, selected)
    return Triplets(u, v, core, _identity_like(core))


def _needs_derivatives(matrices: Tensor) -> bool:
    """Return whether anything may differentiate functions of matrices.

    Raises:
        NotImplementedError: in forward-mode AD within forward-mode AD.
    """
    if is_compiling() or not torch_private.functorch_is_active():
        differentiated = torch.is_grad_enabled() and matrices.requires_grad
        return differentiated or (not is_compiling() and torch_private.forward_ad_is_active())
    if torch_private.forward_mode_is_nested():
        raise NotImplementedError(
            "torch gives autograd Functions wrong derivatives in forward mode within forward "
            "mode, and clip= and stable_rank= are such; use torch.func.jvp of torch.func.grad"
        )
    return True


def _selected_part(
    u: Tensor, v: Tensor, sv: Tensor, selected: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the selected vectors, zero in place of the others, and diag(σ) of the selected."""
    mask = selected.unsqueeze(-1)
    return u * mask, v * mask, torch.diag_embed(torch.where(selected, sv, 0.0)).to(u.dtype)


def _identity_like(core: Tensor) -> Tensor:
    """Return identity matrices of the shape (b, k, k) and dtype of B."""
    identity = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
    return identity.expand_as(core).clone()


def _unselected(selected: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the diagonal matrix (b, k, k) of ones where a triplet is not selected.

    With it added, B is invertible; in the rows and columns that it adds everything stays zero.
    """
    return torch.diag_embed((~selected).to(dtype))


class _Subspaces(torch.autograd.Function):
    """The bases U and V of the selected triplets, and B between them, as functions of W.

    They are (b, k, m), (b, k, n) and (b, k, k).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        matrices: Tensor,  # noqa: ARG004 - only its derivatives count
        u: Tensor,
        v: Tensor,
        sv: Tensor,
        selected: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _selected_part(u, v, sv, selected)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0], inputs[-1], *output)
        ctx.save_for_forward(inputs[0], inputs[-1], *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        matrices, selected, u, v, core = ctx.saved_tensors
        grad_u, grad_v, grad_core = gradients
        rest, core = _rest_and_core(matrices, selected, u, v, core)
        # The adjoint system has Bᴴ in place of B.
        x, y = _solve(rest, core.mH, _without(grad_u, u), _without(grad_v, v))
        left, right = torch.cat([x + grad_core.mT @ u, u], 1), torch.cat([v, y], 1)
        return left.mT @ right.conj(), None, None, None, None


class _SubspacesInBothModes(_Subspaces):
    """`_Subspaces` with forward mode, which torch.compile does not take."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, Tensor, Tensor]:
        matrices, selected, u, v, core = ctx.saved_tensors
        rest, core = _rest_and_core(matrices, selected, u, v, core)
        image, adjoint_image = right_product(tangent, v), left_product(tangent, u)
        p, q = _solve(rest, core, _without(image, u), _without(adjoint_image, v))
        return p, q, u.conj() @ image.mT


def _rest_and_core(
    matrices: Tensor, selected: Tensor, u: Tensor, v: Tensor, core: Tensor
) -> tuple[Tensor, Tensor]:
    """Return R = W − U B Vᴴ, and B with ones where a triplet is not selected."""
    return matrices - u.mT @ (core @ v.conj()), core + _unselected(selected, u.dtype)


def _without(rows: Tensor, basis: Tensor) -> Tensor:
    """Return rows (b, k, n) without their components in the span of the rows of a basis."""
    return rows - (rows @ basis.mH) @ basis


def _solve(rest: Tensor, core: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the solution P, L of P B − R L = A and L Bᴴ − Rᴴ P = C, for B with a diagonal value.

    Args:
        rest: R, (b, m, n).
        core: B, (b, k, k).
        a: A, (b, k, m), columns as rows.
        c: C, (b, k, n), columns as rows.

    Returns:
        P (b, k, m) and L (b, k, n), columns as rows.
    """
    if is_compiling():
        # A graph that is compiled has first derivatives alone.
        opaque: tuple[Tensor, Tensor] = _solve_opaquely(rest, core, a, c)
        return opaque
    if torch.is_grad_enabled():
        solution: tuple[Tensor, Tensor] = _Solution.apply(rest, core, a, c)  # type: ignore[no-untyped-call]
        return solution
    return _solve_by_conjugate_gradients(rest, core, a, c)


class _Solution(torch.autograd.Function):
    """The solution that `_solve` describes.

    With (ā, c̄) the solution for the incoming gradients and Bᴴ, the gradients are ā and c̄ for A
    and C, ā Lᴴ + P c̄ᴴ for R, and −Pᴴ ā − c̄ᴴ L for B.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rest: Tensor, core: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return _solve_by_conjugate_gradients(rest, core, a, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:2], *output)
        ctx.save_for_forward(*inputs[:2], *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        rest, core, p, q = ctx.saved_tensors
        x, y = _solve(rest, core.mH, *gradients)
        grad_rest = x.mT @ q.conj() + p.mT @ y.conj()
        grad_core = -(p.conj() @ x.mT) - y.conj() @ q.mT
        return grad_rest, grad_core, x, y

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, Tensor]:
        rest, core, p, q = ctx.saved_tensors
        d_rest, d_core, d_a, d_c = tangents
        d_a = d_a - d_core.mT @ p + right_product(d_rest, q)
        d_c = d_c - d_core.conj() @ q + left_product(d_rest, p)
        return _solve(rest, core, d_a, d_c)


def _solve_by_conjugate_gradients(
    rest: Tensor, core: Tensor, a: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `_solve` returns, from the diagonal of B alone.

    For each vector, L = (C + Rᴴ P) / σ, which leaves (I − R Rᴴ / σ²) P = (A + R C / σ) / σ. That is
    positive definite for σ above the norm of R. A vector stops where it has converged, and where
    its system proves to be indefinite.
    """
    sigma = core.diagonal(dim1=-2, dim2=-1).real.unsqueeze(-1)
    inverse = 1 / sigma
    a, c = a * inverse, c * inverse

    def image(rows: Tensor) -> Tensor:
        return rows - right_product(rest, left_product(rest, rows) * inverse) * inverse

    target = a + right_product(rest, c) * inverse
    # Of length 1, so that squares neither overflow nor underflow.
    length = row_norms(target)
    length = torch.where(length > 0, length, 1.0).to(inverse.dtype)
    residual = target / length
    solution = torch.zeros_like(residual)
    direction, square = residual, _squares(residual)
    precision = torch.finfo(residual.dtype)
    tolerance = precision.eps ** (2 * _TOLERANCE)
    active = (square > tolerance).to(square.dtype)  # 1 for vectors that still move, else 0
    for _ in range(_MOST_STEPS):
        if reads_freely(active) and not active.any():
            break
        applied = image(direction)
        curvature = (direction.conj() * applied).sum(-1, keepdim=True).real
        active = active * (curvature > 0)
        step = active * square / curvature.clamp_min(precision.tiny)
        solution = solution + step * direction
        residual = residual - step * applied
        new_square = _squares(residual)
        direction = residual + direction * (new_square / square.clamp_min(precision.tiny))
        square = new_square
        active = active * (square > tolerance)
    p = solution * length
    return p, c + left_product(rest, p) * inverse


@torch.library.custom_op(
    "snparam::solve_for_subspaces",
    mutates_args=(),
    schema="(Tensor rest, Tensor core, Tensor a, Tensor c) -> (Tensor, Tensor)",
)
def _solve_opaquely(rest: Tensor, core: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `_solve_by_conjugate_gradients` returns, as one operation of a compiled graph.

    Unrolled, the steps would be hundreds of operations for each weight, and compile for minutes.
    """
    return _solve_by_conjugate_gradients(rest, core, a, c)


@_solve_opaquely.register_fake
def _(_rest: Tensor, _core: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(c)


def _squares(rows: Tensor) -> Tensor:
    """Return the squares (b, k, 1) of the lengths of rows (b, k, n)."""
    return (rows.conj() * rows).sum(-1, keepdim=True).real


class _PolarFactor(torch.autograd.Function):
    """The unitary polar factor Q of B = Q H, for B (b, k, k) with the value of a positive diagonal.

    With X the solution of H X + X H = (Qᴴ Q̄ − Q̄ᴴ Q) / 2 for the incoming gradient Q̄, the gradient
    for B is 2 Q X.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(core: Tensor) -> Tensor:
        return _identity_like(core)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        core, phase = ctx.saved_tensors
        rotated = phase.mH @ gradient
        right = (rotated - rotated.mH) / 2
        out: Tensor = 2 * phase @ _solve_lyapunov(phase.mH @ core, right)
        return out


class _PolarFactorInBothModes(_PolarFactor):
    """`_PolarFactor` with forward mode, which torch.compile does not take."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        core, phase = ctx.saved_tensors
        rotated = phase.mH @ tangent
        out: Tensor = phase @ _solve_lyapunov(phase.mH @ core, rotated - rotated.mH)
        return out


def _solve_lyapunov(h: Tensor, right: Tensor) -> Tensor:
    """Return X with H X + X H = Y, for H (b, k, k) with the value of a positive diagonal."""
    if torch.is_grad_enabled() and not is_compiling():
        solution: Tensor = _LyapunovSolution.apply(h, right)  # type: ignore[no-untyped-call]
        return solution
    return _divide_by_sums(h, right)


def _divide_by_sums(h: Tensor, right: Tensor) -> Tensor:
    diagonal = h.diagonal(dim1=-2, dim2=-1).real
    return right / (diagonal.unsqueeze(-1) + diagonal.unsqueeze(-2))


class _LyapunovSolution(torch.autograd.Function):
    """The solution X that `_solve_lyapunov` describes.

    With ȳ the solution for the incoming gradient, the gradients are ȳ for Y and −ȳ Xᴴ − Xᴴ ȳ for H.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, right: Tensor) -> Tensor:
        return _divide_by_sums(h, right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        h, x = ctx.saved_tensors
        y = _solve_lyapunov(h, gradient)
        return -(y @ x.mH) - x.mH @ y, y

    @staticmethod
    def jvp(ctx: Any, d_h: Tensor, d_right: Tensor) -> Tensor:
        h, x = ctx.saved_tensors
        return _solve_lyapunov(h, d_right - d_h @ x - x @ d_h)
