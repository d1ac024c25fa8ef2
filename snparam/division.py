"""Dividing a weight by a function of its σ, with the gradient in one pass.

Knows views, not modules. The classic case is W / σ (Miyato et al. 2018; their equation 12 is the
gradient).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .sharded import divide_sharded, is_sharded
from .views import View

# Up to here a loop over blocks on a CPU is faster than one batched product of vectors.
_FEW_BLOCKS = 64


def divide(
    weight: Tensor, divisor: Tensor | float, slope: float, u: Tensor, v: Tensor, view: View
) -> Tensor:
    """W / d, block by block, where d is a function of σ(W) = Re(uᴴ W v), u and v constants.

    The value of d comes in, already known from the power-iteration step, so that nothing is
    multiplied twice; its dependence on W is only in the gradient: dd/dW = slope · u vᴴ.

    Args:
        weight: of the view's shape and any floating dtype; the result has both, and its strides.
        divisor: d, (b,), not negative. Gradients flow into it too. A matrix whose d is 0 is a zero
            matrix: it stays as it is, and so does its gradient, so that a zero-initialised layer
            learns its way out. For one matrix d may be a number (see `reads_numbers`).
        slope: dd/dσ. With d = σ it is 1.
        u: (b, m), unit.
        v: (b, n), unit.
        view: how the weight is read as (b, m, n).

    Differentiable any number of times, in forward mode, and under torch.func and torch.compile.
    """
    if is_sharded(weight):
        return divide_sharded(weight, divisor, slope, u, v, view)  # type: ignore[arg-type]
    if _transformed():
        return _divided(weight, _attached(weight, divisor, slope, u, v, view), view)
    out: Tensor = _Divide.apply(weight, divisor, slope, u, v, view)  # type: ignore[no-untyped-call]
    return out


def reads_numbers(weight: Tensor) -> bool:
    """Whether numbers computed from a weight can be read at no cost: eagerly, on a CPU."""
    return weight.is_cpu and type(weight) in (Tensor, nn.Parameter) and not _transformed()


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context without autocast for the tensor's device; free of cost where there is none."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


class _Divide(torch.autograd.Function):
    """`divide` in one pass forward, and backward in one dot product and one rank-one update.

    It has `forward(ctx, ...)` and no `setup_context`, which torch.func would need: binding the
    arguments of the latter takes longer than a small layer's whole step.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        divisor: Tensor | float,
        slope: float,
        u: Tensor,
        v: Tensor,
        view: View,
    ) -> Tensor:
        ctx.slope, ctx.view = slope, view
        if isinstance(divisor, Tensor):
            ctx.number = None
            ctx.save_for_backward(weight, u, v, divisor)
            return _divided(weight, divisor, view)
        ctx.number = divisor or 1.0
        ctx.save_for_backward(weight, u, v)
        return torch.div(weight, ctx.number)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, u, v, *rest = ctx.saved_tensors
        slope, view, divisor = ctx.slope, ctx.view, ctx.number or rest[0]
        with without_autocast(grad):
            into: tuple[Tensor, Tensor | None]
            if torch.is_grad_enabled():
                # Double backward: differentiable operations, in which d depends on W.
                attached = _attached(weight, divisor, slope, u, v, view)
                into = _gradients(grad, weight, attached, slope, u, v, view)
                if ctx.number is not None:  # no tensor, so no gradient
                    into = (into[0], None)
            elif ctx.number is not None:
                into = (_gradient_by_numbers(grad, weight, divisor, slope, u, v, view), None)
            else:
                into = _gradients(grad, weight, divisor, slope, u, v, view)
        return (*into, None, None, None, None)


def _gradient_by_numbers(
    grad: Tensor, weight: Tensor, divisor: float, slope: float, u: Tensor, v: Tensor, view: View
) -> Tensor:
    """`_gradients` for one matrix on a CPU, with nothing made but the gradient."""
    g = view.to_matrix(grad, like=weight)
    along = torch.dot(g.reshape(-1), view.to_matrix(weight).reshape(-1))
    # Not `float(along)`: a batch of gradients (is_grads_batched) has one for each.
    u = u.view(-1) * (along / divisor)
    combined = torch.addr(g, u, v.view(-1), beta=1.0 / divisor, alpha=-slope / divisor)
    return view.from_matrices(combined, like=weight)


def _gradients(
    grad: Tensor, weight: Tensor, divisor: Tensor, slope: float, u: Tensor, v: Tensor, view: View
) -> tuple[Tensor, Tensor]:
    """G / d − slope · ⟨G, W⟩ / d² · u vᴴ for the weight, and −⟨G, W⟩ / d² for d."""
    blocks, rows, columns = view.matrices
    u, v = u.reshape(blocks, rows, 1), v.reshape(blocks, 1, columns).conj()
    g = view.to_matrices(grad, like=weight).to(u.dtype)
    w = view.to_matrices(weight).to(u.dtype)
    d = _nonzero(divisor)
    into_divisor = -_inner(g, w) / d / d  # not / d², which underflows first
    outer = slope * into_divisor[:, None, None] * u
    combined = g / d[:, None, None]
    if torch.is_grad_enabled():
        combined = combined + outer * v
    else:
        combined.baddbmm_(outer, v)
    return view.from_matrices(combined, like=weight).to(weight.dtype), into_divisor


def _transformed() -> bool:
    """Whether plain operations are needed: in a compiler, torch.func or forward-mode AD."""
    if torch.compiler.is_compiling():
        return True
    transforms: bool = torch._C._are_functorch_transforms_active()
    return transforms or forward_ad._current_level >= 0


def _divided(weight: Tensor, divisor: Tensor, view: View) -> Tensor:
    d = _nonzero(divisor)
    if d.shape[0] == 1:
        out = weight / d
    else:
        out = view.from_matrices(view.to_matrices(weight) / d[:, None, None], like=weight)
    return out.to(weight.dtype)


def _nonzero(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, 1.0, divisor)


def _inner(g: Tensor, w: Tensor) -> Tensor:
    """Re⟨G, W⟩ per block, (b,)."""
    g, w = g.reshape(len(g), -1), w.reshape(len(w), -1)
    if g.is_cpu and len(g) <= _FEW_BLOCKS and not torch.is_grad_enabled():
        return torch.stack([torch.vdot(*pair) for pair in zip(g, w, strict=True)]).real
    # A product, because multiplying and summing would first make a third tensor of their size.
    inner: Tensor = torch.bmm(g.conj()[:, None], w[:, :, None]).flatten().real
    return inner


def _attached(
    weight: Tensor, divisor: Tensor | float, slope: float, u: Tensor, v: Tensor, view: View
) -> Tensor:
    """The divisor, unchanged in value, made to depend on the weight with the given slope."""
    blocks, rows, columns = view.matrices
    product = view.to_matrices(weight).to(u.dtype) @ v.reshape(blocks, columns, 1)
    sigma: Tensor = (u.reshape(blocks, rows).conj() * product.squeeze(-1)).sum(-1).real
    attached: Tensor = divisor + slope * (sigma - sigma.detach())
    return attached
