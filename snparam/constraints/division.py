"""Division of a weight by a function of its σ, with a gradient that takes one pass.

The classic case is W / σ (Miyato et al. 2018; their equation 12 is the gradient).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from snparam.constraints.sharded_division import divide_sharded
from snparam.matrices import torch_private
from snparam.matrices.orthonormalisation import reads_freely
from snparam.matrices.sharded import is_sharded
from snparam.matrices.views import WeightView

# Up to this many blocks, a loop over them on a CPU is faster than one batched product of vectors.
_FEW_BLOCKS = 64

# Kinds of devices of which torch refuses to say whether autocast is on.
_WITHOUT_AUTOCAST = ("meta", "lazy", "vulkan")


class Divisor(NamedTuple):
    """The divisor of a weight, a function d of σ, and the factor that multiplies the weight.

    Attributes:
        value: d(σ), () for one block or (b,), positive.
        slope: dd/dσ, of the same shape or a number.
        numerator: the factor γ, (b,), or None for 1; gradients flow into it.
    """

    value: Tensor
    slope: Tensor | float = 1.0
    numerator: Tensor | None = None


def divide(
    weight: Tensor,
    divisor: Divisor,
    u: Tensor,
    v: Tensor,
    view: WeightView,
    *,
    plain: bool = False,
) -> Tensor:
    """Return γ W / d, block by block, where σ(W) = Re(uᴴ W v) with u and v constant.

    The value of d is known from the step that found σ, so it is an argument, and no product is made
    twice. That it depends on W enters the gradient alone: dd/dW = slope · dσ/dW, where dσ/dW is
    u vᴴ for a matrix, and the weight gradient for a convolution. The result is differentiable any
    number of times, in forward mode, and under torch.func and torch.compile; for a sharded weight
    in reverse mode only.

    Args:
        weight: of the view's shape, real or complex; the result has its shape, dtype and strides.
        divisor: d and γ.
        u: (b, m) or (b, 1, m), unit vectors.
        v: (b, n) or (b, 1, n), unit vectors.
        view: how the weight is read as (b, m, n).
        plain: whether to use torch's own operations alone, which tracers can follow and save, and
            not an autograd Function, which saves memory and passes in the backward.
    """
    if is_sharded(weight):
        u, v = u.view(len(u), -1), v.view(len(v), -1)
        return divide_sharded(weight, divisor.numerator, *divisor[:2], u, v, view.entries)  # type: ignore[arg-type]
    if plain or _needs_plain_operations():
        # One trace serves with and without gradients, and torch.jit.trace compares it with another
        # that is made without.
        tracing = torch_private.tracing_state() is not None
        recording = torch.is_grad_enabled() and weight.requires_grad
        if recording or tracing or _needs_plain_operations():
            # In u's dtype, because gradients would be summed in half precision otherwise.
            wide = weight.to(u.dtype)
            divisor = _differentiable_divisor(wide, divisor, u, v, view)
            return _quotient(wide, divisor, view).to(weight.dtype)
        return _quotient(weight, divisor, view)
    out: Tensor = _Divide.apply(weight, divisor.numerator, divisor, u, v, view)  # type: ignore[no-untyped-call]
    return out


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast on a tensor's device, free of cost where it is off."""
    if is_autocast_on(tensor):
        return torch.autocast(tensor.device.type, enabled=False)
    return nullcontext()


def is_autocast_on(tensor: Tensor) -> bool:
    """Return whether autocast is on for a tensor's device."""
    kind = tensor.device.type
    return kind not in _WITHOUT_AUTOCAST and torch.is_autocast_enabled(kind)


class _Divide(torch.autograd.Function):
    """The autograd Function of `divide`, whose backward is one dot product and one update.

    It saves the weight, γ, u, v, d and its slope: neither the result nor anything else of the
    weight's size. It has no `setup_context`, which torch.func would need, because binding the
    arguments of that takes longer than a small layer's whole step.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        numerator: Tensor | None,
        divisor: Divisor,
        u: Tensor,
        v: Tensor,
        view: WeightView,
    ) -> Tensor:
        slope = divisor.slope
        ctx.slope, ctx.view = (None if isinstance(slope, Tensor) else slope), view
        slope_tensor = slope if isinstance(slope, Tensor) else None
        ctx.save_for_backward(weight, numerator, u, v, divisor.value, slope_tensor)
        return _quotient(weight, divisor, view)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, numerator, u, v, value, slope = ctx.saved_tensors
        divisor = Divisor(value, ctx.slope if slope is None else slope, numerator)
        with without_autocast(grad):
            if torch.is_grad_enabled():
                divisor = _differentiable_divisor(weight, divisor, u, v, ctx.view)
            grad_weight, grad_numerator = _gradients(grad, weight, divisor, u, v, ctx.view)
        return grad_weight, grad_numerator, None, None, None, None


def _gradients(
    grad: Tensor, weight: Tensor, divisor: Divisor, u: Tensor, v: Tensor, view: WeightView
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients γ/d (G − slope · ⟨G, W⟩/d · dσ/dW) for W, and ⟨G, W⟩/d for γ."""
    d, slope, numerator = divisor
    grad_numerator: Tensor | None = None
    if len(u) == 1 and not torch.is_grad_enabled() and reads_freely(grad):
        entries = view.entries
        matrix = _cast(entries.to_matrix(grad, like=weight), u.dtype)
        number = d.item()
        inner = _inner_product_of_matrices(matrix, _cast(entries.to_matrix(weight), u.dtype))
        inner_over_d = inner.item() / number
        scale = (1.0 if numerator is None else numerator.item()) / number
        rate = inner_over_d * scale * (slope.item() if isinstance(slope, Tensor) else slope)
        if numerator is not None:
            grad_numerator = torch.full_like(numerator, inner_over_d)
        matrix = view.minus_outer_by_numbers(matrix, u, v, scale, rate, like=weight)
        return _cast(entries.from_matrix(matrix, like=weight), weight.dtype), grad_numerator
    g = view.entries.to_matrices(grad, like=weight).to(u.dtype)
    w = view.entries.to_matrices(weight).to(u.dtype)
    if len(g) > 1:
        d = d.to(g.real.dtype)[:, None, None]
    # G is divided before the inner product, because ⟨G, W⟩/d² would underflow first.
    g_over_d = g / d
    inners_over_d = _inner_product(g_over_d, w)
    rates = inners_over_d / d.reshape(inners_over_d.shape)
    if isinstance(slope, Tensor) or slope != 1:
        rates = rates * slope
    if numerator is not None:
        grad_numerator = inners_over_d.reshape(-1).to(numerator.dtype)
        factor = numerator.to(g.real.dtype).reshape(inners_over_d.shape)
        rates = rates * factor
        g_over_d = g_over_d * (factor if len(g) == 1 else factor[:, None, None])
    g = view.minus_outer(g_over_d, u, v, rates, like=weight)
    return view.entries.from_matrices(g, like=weight).to(weight.dtype), grad_numerator


def _needs_plain_operations() -> bool:
    """Return whether plain operations are needed: in a tracer, torch.func or forward-mode AD."""
    return (
        is_compiling()
        or torch_private.tracing_state() is not None
        or torch_private.functorch_is_active()
        or torch_private.forward_ad_is_active()
    )


def _quotient(weight: Tensor, divisor: Divisor, view: WeightView) -> Tensor:
    """Return γ W / d by torch's own operations, with d as a constant or as it depends on W."""
    d, _, numerator = divisor
    if view.matrices[0] == 1:
        d = d.reshape(()) if d.ndim else d
        out = weight / d if numerator is None else weight * (numerator.reshape(()) / d)
    else:
        stack = view.entries.to_matrices(weight)
        d = d[:, None, None]
        out = stack / d if numerator is None else stack * (numerator[:, None, None] / d)
        out = view.entries.from_matrices(out, like=weight)
    return _cast(out, weight.dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype, without a call of `to` if it has it."""
    return x if x.dtype == dtype else x.to(dtype)


def _inner_product_of_matrices(g: Tensor, w: Tensor) -> Tensor:
    """Return Re⟨G, W⟩ for two matrices."""
    g, w = g.reshape(-1), w.reshape(-1)
    return torch.vdot(g, w).real if g.is_complex() else torch.dot(g, w)


def _inner_product(g: Tensor, w: Tensor) -> Tensor:
    """Return Re⟨G, W⟩ for each block, () for one block or (b,)."""
    g, w = g.reshape(len(g), -1), w.reshape(len(w), -1)
    if g.is_cpu and len(g) <= _FEW_BLOCKS and not torch.is_grad_enabled():
        if len(g) == 1:
            return _inner_product_of_matrices(g, w)
        return torch.stack([torch.vdot(*pair) for pair in zip(g, w, strict=True)]).real
    # A batched product, because multiplying and summing would first make a third such tensor.
    inner: Tensor = torch.bmm(g.conj()[:, None], w[:, :, None]).flatten().real
    return inner.reshape(()) if len(g) == 1 else inner


def _differentiable_divisor(
    weight: Tensor, divisor: Divisor, u: Tensor, v: Tensor, view: WeightView
) -> Divisor:
    """Return the divisor with the same value, but dependent on the weight for autograd."""
    sigma = view.inner(u, weight, v)
    if len(sigma) == 1:
        sigma = sigma.reshape(())
    value = divisor.value + divisor.slope * (sigma - sigma.detach())
    return Divisor(value, divisor.slope, divisor.numerator)  # torch 2.8 cannot trace `_replace`
