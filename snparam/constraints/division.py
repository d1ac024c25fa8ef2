"""Dividing a weight by a function of its σ, with the gradient in one pass.

Knows views, not modules. The classic case is W / σ (Miyato et al. 2018; their equation 12 is the
gradient).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from snparam.matrices.sharded import divide_sharded, is_sharded
from snparam.matrices.views import View

# Up to here a loop over blocks on a CPU is faster than one batched product of vectors.
_FEW_BLOCKS = 64


class Division(NamedTuple):
    """What a weight is divided by: d(σ) with σ(W) = Re(uᴴ W v), u and v constants.

    Attributes:
        divisor: the value of d, (b,), not negative, or a number for one matrix. A matrix whose d
            is 0 is a zero matrix: it stays as it is, and so does its gradient, so that a
            zero-initialised layer learns its way out.
        slope: (b,) or a number, with dd/dW = slope · u vᴴ. It is dd/dσ where u and v are unit.
        u: (b, m).
        v: (b, n).
        view: how the weight is read as (b, m, n).
        filled: the value of d with 1 for 0, where it has been computed.
    """

    divisor: Tensor | float
    slope: Tensor | float
    u: Tensor
    v: Tensor
    view: View
    filled: Tensor | None = None


def divide(weight: Tensor, by: Division, gain: Tensor | None = None) -> Tensor:
    """γ W / d, block by block.

    The value of d comes in, already known from the power-iteration step, so that nothing is
    multiplied twice; its dependence on W is only in the gradient: dd/dW = slope · u vᴴ.

    Args:
        weight: of the view's shape and any floating dtype; the result has both, and its strides.
        by: the divisor.
        gain: γ, (b,), which gradients flow into; None is 1.

    Differentiable any number of times, in forward mode, and under torch.func and torch.compile; a
    sharded weight in reverse mode only.
    """
    if is_sharded(weight):
        return divide_sharded(weight, gain, *by[:5])  # type: ignore[arg-type]
    if _transformed():
        return _divided(weight, _nonzero(_attached(weight, by)), gain, by.view)
    out: Tensor = _Divide.apply(weight, gain, by)  # type: ignore[no-untyped-call]
    return out


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
    def forward(ctx: Any, weight: Tensor, gain: Tensor | None, by: Division) -> Tensor:
        d = filled(by.divisor) if by.filled is None else by.filled
        ctx.slope, ctx.view = by.slope, by.view
        ctx.save_for_backward(weight, gain, by.u, by.v, by.divisor, d)
        return _divided(weight, d, gain, by.view)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gain, u, v, divisor, d = ctx.saved_tensors
        by = Division(divisor, ctx.slope, u, v, ctx.view)
        with without_autocast(grad):
            if torch.is_grad_enabled():
                return (*gradients_in_graph(grad, weight, gain, by), None)
            return (*_gradients(grad, weight, gain, d, by), None)


def gradients_in_graph(
    grad: Tensor, weight: Tensor, gain: Tensor | None, by: Division
) -> tuple[Tensor, Tensor | None]:
    """The gradients for the weight and for γ, for double backward.

    By differentiable operations, in which d depends on W.
    """
    return _gradients(grad, weight, gain, _nonzero(_attached(weight, by)), by)


def filled(divisor: Tensor | float) -> Tensor:
    """A divisor (b,) with 1 for 0."""
    assert isinstance(divisor, Tensor)
    return divisor + (divisor == 0)


def _gradients(
    grad: Tensor, weight: Tensor, gain: Tensor | None, d: Tensor, by: Division
) -> tuple[Tensor, Tensor | None]:
    """γ/d (G − slope · ⟨G, W⟩/d · u vᴴ) for the weight, and ⟨G, W⟩/d for γ.

    In as few operations as there can be: on an accelerator they are what a small weight costs.
    """
    blocks, rows, columns = by.view.matrices
    u, v = by.u.reshape(blocks, rows, 1), by.v.reshape(blocks, 1, columns).conj()
    g = by.view.to_matrices(grad, like=weight).to(u.dtype)
    along = _inner(g, by.view.to_matrices(weight).to(u.dtype)) / d
    # Not slope · ⟨G, W⟩ / d², which underflows first.
    if gain is None:
        combined, rate = g / d[:, None, None], along / d
    else:
        scale = gain.to(d.dtype) / d
        combined, rate = g * scale[:, None, None], along * scale
    slope = by.slope
    if isinstance(slope, Tensor):
        rate, slope = rate * slope, 1.0
    outer = rate[:, None, None] * u
    if torch.is_grad_enabled():
        combined = combined - slope * outer * v
    else:
        combined.baddbmm_(outer, v, alpha=-slope)
    into_gain = None if gain is None else along.to(gain.dtype)
    return by.view.from_matrices(combined, like=weight).to(weight.dtype), into_gain


def _transformed() -> bool:
    """Whether plain operations are needed: in a compiler, torch.func or forward-mode AD."""
    if torch.compiler.is_compiling():
        return True
    transforms: bool = torch._C._are_functorch_transforms_active()
    return transforms or forward_ad._current_level >= 0


def _divided(weight: Tensor, d: Tensor, gain: Tensor | None, view: View) -> Tensor:
    if d.shape[0] == 1:
        out = weight / d if gain is None else weight * (gain / d)
    else:
        matrices = view.to_matrices(weight)
        d = d[:, None, None]
        out = matrices / d if gain is None else matrices * (gain[:, None, None] / d)
        out = view.from_matrices(out, like=weight)
    return out.to(weight.dtype)


def _nonzero(divisor: Tensor) -> Tensor:
    """`filled` for a divisor that depends on the weight: 1 is a constant, and that of a zero is."""
    return torch.where(divisor == 0, 1.0, divisor)


def _inner(g: Tensor, w: Tensor) -> Tensor:
    """Re⟨G, W⟩ per block, (b,)."""
    g, w = g.reshape(len(g), -1), w.reshape(len(w), -1)
    if g.is_cpu and len(g) <= _FEW_BLOCKS and not torch.is_grad_enabled():
        if len(g) == 1:
            return torch.vdot(g[0], w[0]).real.view(1)
        return torch.stack([torch.vdot(*pair) for pair in zip(g, w, strict=True)]).real
    # A product, because multiplying and summing would first make a third tensor of their size.
    inner: Tensor = torch.bmm(g.conj()[:, None], w[:, :, None]).flatten().real
    return inner


def _attached(weight: Tensor, by: Division) -> Tensor:
    """The divisor, unchanged in value, made to depend on the weight with the given slope."""
    blocks, rows, columns = by.view.matrices
    product = by.view.to_matrices(weight).to(by.u.dtype) @ by.v.reshape(blocks, columns, 1)
    sigma: Tensor = (by.u.reshape(blocks, rows).conj() * product.squeeze(-1)).sum(-1).real
    attached: Tensor = by.divisor + by.slope * (sigma - sigma.detach())
    return attached
