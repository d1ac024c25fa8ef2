"""σ at the linear map: y = (x ⋆ W) · γ/d + b, without making the weight in use.

Here x ⋆ W is the product or convolution of the layer, d the constraint's function of σ that divides
W (σ itself by default), and γ the gain (1 without one). The value is that of the layer with W · γ/d
as its weight, and so are all derivatives. In training, for torch's own Linear and Conv1d to Conv3d,
this saves a pass over the weight in the forward and two in the backward, which owns the gradient
that it has made and subtracts the part that flows through d in place. Autograd saves x, the
Parameters, and copies of u, v and d; neither y nor a scaled copy of anything, so that an in-place
activation may follow. Nothing else depends on this file: without it every number is the same, up to
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snparam.constraints.constraint import Division
from snparam.constraints.division import Divisor, divide, is_autocast_on
from snparam.matrices import torch_private
from snparam.matrices.orthonormalisation import is_batched, reads_freely
from snparam.matrices.products import rank_one_update, rank_one_update_by_numbers
from snparam.parametrization.spectral_norm import Reading, SpectralNorm

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FORWARDS = {kind.forward for kind in (nn.Linear, *_CONVOLUTIONS)}

# For each dtype that may be used, the range of a factor that may multiply an input or an output.
_RANGES = {
    dtype: (torch.finfo(dtype).tiny ** 0.75, torch.finfo(dtype).max)
    for dtype in (torch.float32, torch.float64)
}


def is_linear_map(owner: nn.Module, base: type[nn.Module]) -> bool:
    """Return whether a module computes x ⋆ W + b and nothing else, W one matrix under a division.

    The operator of a convolution is no such matrix: the gradient of its σ is not u vᵀ.

    Args:
        owner: a module with normalised weights.
        base: the class of the module from which torch's parametrize has derived its present one.
    """
    parts: Any = owner._modules["parametrizations"]
    lists = parts._modules.get("weight")
    return (
        base.forward in _FORWARDS
        and (base.forward is nn.Linear.forward or _is_plain_convolution(owner, base))
        # Pruning, for one, makes the bias an ordinary attribute.
        and "bias" in owner._parameters
        and "bias" not in owner.__dict__
        and len(parts._modules) == 1
        and lists is not None
        and list(lists._modules) == ["0"]
        and type(norm := lists._modules["0"]) is SpectralNorm
        and norm.view.is_dense
        and norm.view.matrices[0] == 1
        and isinstance(norm._constraint, Division)
    )


def _is_plain_convolution(owner: Any, base: Any) -> bool:
    """Return whether a convolution pads with zeros, and has its geometry as its class made it.

    torch also takes a number, or one for all axes, for a geometry that somebody assigns later.
    """
    dimensions = len(owner.kernel_size)
    return (
        base._conv_forward in torch_private.conv_forwards()
        and owner.padding_mode == "zeros"
        and all(
            isinstance(axes, tuple) and len(axes) == dimensions
            for axes in (owner.stride, owner.padding, owner.dilation)
        )
    )


def can_use_linear_map(owner: nn.Module, norm: SpectralNorm, x: object) -> bool:
    """Return whether a forward of a linear map may now apply σ at the map.

    It may where nobody could tell the difference: gradients are on, the tensors are plain ones of
    one dtype, no tracer, transform, mode, autocast or cache is on, and no hook expects the weight.

    Args:
        owner: a module for which `is_linear_map` holds.
        norm: the SpectralNorm on its weight.
        x: what its forward was called with.
    """
    lists: Any = owner._modules["parametrizations"]._modules["weight"]  # type: ignore[union-attr]
    weight, bias = lists._parameters.get("original"), owner._parameters.get("bias")
    return (
        norm.training
        and norm._shared_reading is None
        and torch.is_grad_enabled()
        and torch_private.tracing_state() is None  # first: a tracer warns of some of the rest
        and type(x) is Tensor
        and type(weight) is nn.Parameter
        and (bias is None or (type(bias) is nn.Parameter and bias.dtype == weight.dtype))
        and x.dtype == weight.dtype
        and x.dtype in _RANGES
        and x.device == weight.device
        and x.numel() > 0
        and x.layout == torch.strided
        and (type(owner).__bases__[0] is nn.Linear or x.ndim == weight.ndim)
        and "forward" not in owner.__dict__
        and not torch_private.parametrizations_are_cached()
        and not any(map(torch_private.has_call_hooks, (lists, norm)))
        and not torch_private.has_global_hooks()
        and not is_autocast_on(x)
        and not torch_private.dispatch_mode_count()
        and not torch_private.function_mode_count()
        and not torch_private.functorch_is_active()
        and not torch_private.forward_ad_is_active()
    )


def linear_map(owner: nn.Module, norm: SpectralNorm, x: Tensor, reading: Reading) -> Tensor:
    """Return the output of a module, with σ of a reading's estimate applied at the linear map."""
    lists: Any = owner._modules["parametrizations"]._modules["weight"]  # type: ignore[union-attr]
    weight, bias, estimate = lists.original, owner._parameters["bias"], reading.estimate
    assert estimate is not None
    constraint: Any = norm._constraint
    divisor = constraint.divisor(
        estimate.sigma, norm.parameters_of_constraint, norm._constraint_options
    )
    out: Tensor = _LinearMap.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, divisor.numerator, divisor, _first_row(estimate.u),
        _first_row(estimate.v), norm.view, _geometry(owner),
    )  # fmt: skip
    return out


def _first_row(vectors: Tensor) -> Tensor:
    """Return the first row of vectors (1, k, n)."""
    return vectors.view(-1) if vectors.shape[1] == 1 else vectors[0, 0]


def _geometry(owner: nn.Module) -> tuple[Any, ...] | None:
    """Return stride, padding, dilation and groups of a convolution; None for a Linear."""
    if isinstance(owner, nn.Linear):
        return None
    return owner.stride, owner.padding, owner.dilation, owner.groups


class _LinearMap(torch.autograd.Function):
    """The linear map of one layer, with its constraint's factor γ/d, as an autograd Function.

    It has no `setup_context`, for the reason that `division._Divide` gives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        numerator: Tensor | None,
        divisor: Divisor,
        u: Tensor,
        v: Tensor,
        view: Any,
        geometry: tuple[Any, ...] | None,
    ) -> Tensor:
        slope = divisor.slope if isinstance(divisor.slope, Tensor) else None
        ctx.slope, ctx.view, ctx.geometry = divisor.slope if slope is None else None, view, geometry
        ctx.save_for_backward(x, weight, bias, numerator, divisor.value, slope, u, v)
        ctx.scale = scale = _scale(divisor)
        if _needs_weight_in_use(scale, weight):
            weight_in_use = divide(weight, divisor, u[None], v[None], view, plain=True)
            return _apply_map(x, weight_in_use, bias, geometry)
        if geometry is not None:
            return _convolve(x, weight, bias, scale, geometry)
        out = x.new_empty((*x.shape[:-1], weight.shape[0]))
        _write_product(_rows(x), weight.t(), scale, _rows(out), bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, numerator, value, slope, u, v = ctx.saved_tensors
        divisor = Divisor(value, ctx.slope if slope is None else slope, numerator)
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or is_batched(grad) or _needs_weight_in_use(ctx.scale, weight):
            inputs = (x, weight, bias, numerator)
            gradients = _ordinary_gradients(
                inputs, divisor, u, v, ctx.view, ctx.geometry, needed, grad
            )
        else:
            scale = ctx.scale if reads_freely(grad) else _scale_tensor(divisor)
            gradients = _gradients(
                x, weight, divisor, scale, u, v, ctx.view, ctx.geometry, needed, grad
            )
        return (*gradients, None, None, None, None, None)


def _scale(divisor: Divisor) -> float | Tensor:
    """Return γ/d: a number where it may be read, and else of shape ()."""
    if not reads_freely(divisor.value):
        return _scale_tensor(divisor)
    value = divisor.value.item()
    numerator = 1.0 if divisor.numerator is None else divisor.numerator.item()
    return numerator / value if value else math.inf


def _scale_tensor(divisor: Divisor) -> Tensor:
    """Return γ/d, of shape ()."""
    if divisor.numerator is None:
        return 1.0 / divisor.value
    return divisor.numerator.detach().reshape(()) / divisor.value


def _gradients(
    x: Tensor,
    weight: Tensor,
    divisor: Divisor,
    scale: float | Tensor,
    u: Tensor,
    v: Tensor,
    view: Any,
    geometry: tuple[Any, ...] | None,
    needed: Sequence[bool],
    grad: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients for x, W, b and γ, None for those that are not needed.

    With g the gradient for the output (`grad`), G the gradient for the weight in use, and s = γ/d,
    they are s (g ⋆ W), s (G − slope · ⟨G, W⟩/d · u vᵀ), the sum of g, and ⟨G, W⟩/d. ⟨s G, W⟩ equals
    ⟨s (g ⋆ W), x⟩; the one over fewer entries is computed.
    """
    grad_x = grad_weight = grad_bias = grad_numerator = None
    needs_map = needed[1] or needed[3]
    # The gradient for γ needs ⟨G, W⟩, without s. Then `_subtract_rank_one` scales G in its update,
    # which takes no further pass on a CPU.
    scaled = not needed[3]
    if geometry is None:
        g, rows = _rows(grad), _rows(x)
        if needed[0]:
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
            _write_product(g, weight, scale, _rows(grad_x))
        if needs_map:
            grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            _write_product(g.t(), rows, scale if scaled else None, grad_weight)
        if needed[2]:
            grad_bias = g.sum(0)
    else:
        grad_x, grad_weight, scaled = _convolution_gradients(
            x, weight, scale, geometry, (needed[0], needs_map), grad, scaled
        )
        if needed[2]:
            grad_bias = grad.sum([0, *range(2, grad.ndim)])
    if grad_weight is not None:
        uses_x = scaled and grad_x is not None and grad_x.numel() < weight.numel()
        pair: Any = (grad_x, x) if uses_x else (grad_weight, weight)
        inner: Any = _inner_product(*pair)
        value: Any = divisor.value
        slope: Any = divisor.slope
        if isinstance(scale, float):
            inner, value = inner.item(), value.item()
            slope = slope.item() if isinstance(slope, Tensor) else slope
        inner_over_d = inner / value  # ⟨s G, W⟩/d if scaled, else ⟨G, W⟩/d
        if divisor.numerator is not None and needed[3]:
            grad_numerator = torch.empty_like(divisor.numerator).fill_(inner_over_d)
        if scaled:
            rate = inner_over_d * slope
            grad_weight = _subtract_rank_one(grad_weight, weight, u, v, None, rate, view)
        else:
            rate = inner_over_d * scale * slope
            grad_weight = _subtract_rank_one(grad_weight, weight, u, v, scale, rate, view)
    return (
        grad_x,
        grad_weight if needed[1] else None,
        grad_bias,
        grad_numerator if needed[3] else None,
    )


def _rows(x: Tensor) -> Tensor:
    """Return a tensor (..., n) as rows (N, n)."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _subtract_rank_one(
    g: Tensor,
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    scale: float | Tensor | None,
    rate: float | Tensor,
    view: Any,
) -> Tensor:
    """Return scale · G − rate · u vᵀ, written into G if its memory is laid out as the weight's."""
    matrix = view.to_matrix(g, like=weight)
    if not isinstance(rate, Tensor):
        factor = 1.0 if scale is None else float(scale)
        if matrix.data_ptr() == g.data_ptr():
            matrix.addr_(u, v, beta=factor, alpha=-rate)
            return g
        matrix = rank_one_update_by_numbers(matrix, u, v, factor, rate)
    else:
        if scale is not None:
            matrix = matrix.mul_(scale)
        matrix = rank_one_update(matrix[None], u[None], v[None], rate)[0]
    difference: Tensor = view.from_matrix(matrix, like=weight)
    return difference


def _inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product ⟨A, B⟩ of two tensors of one shape, whatever their strides."""
    if a.stride() != b.stride():
        a, b = a.contiguous(), b.contiguous()
    if not a.is_contiguous():
        order = sorted(range(a.ndim), key=a.stride, reverse=True)
        a, b = a.permute(order), b.permute(order)
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _write_product(
    a: Tensor, b: Tensor, scale: float | Tensor | None, out: Tensor, bias: Tensor | None = None
) -> None:
    """Write scale · A B + b to `out`, where None is 1.

    On a CPU the scale is the product's alpha. Elsewhere reading it as a number would wait for the
    device, and it multiplies the smallest of A, B and the product.
    """
    if not isinstance(scale, Tensor):
        start, alpha = (out if bias is None else bias), (1.0 if scale is None else scale)
        torch.addmm(start, a, b, beta=bias is not None, alpha=alpha, out=out)
        return
    smallest = min(a.numel(), b.numel(), out.numel())
    if smallest == out.numel():
        torch.mm(a, b, out=out)
        out.mul_(scale)
        if bias is not None:
            out.add_(bias)
        return
    a, b = (a * scale, b) if smallest == a.numel() else (a, b * scale)
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _needs_weight_in_use(scale: float | Tensor, weight: Tensor) -> bool:
    """Return whether γ/d is so far from 1 that x ⋆ W, or x · γ/d, may leave the dtype's range.

    W · γ/d stays within it. On an accelerator this is False without a look at the number, because
    reading it would wait for the device.
    """
    if isinstance(scale, Tensor):
        return False
    smallest, largest = _RANGES[weight.dtype]
    return not smallest <= abs(scale) <= largest


def _apply_map(
    x: Tensor, weight_in_use: Tensor, bias: Tensor | None, geometry: tuple[Any, ...] | None
) -> Tensor:
    """Return x ⋆ W + b for the weight W in use, as the ordinary layer computes it."""
    if geometry is None:
        # For one vector `F.linear` returns a view, which a Function may not return unchanged.
        out = F.linear(_rows(x), weight_in_use, bias)
        return out.reshape(*x.shape[:-1], out.shape[-1])
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    return convolve(x, weight_in_use, bias, *geometry)  # type: ignore[no-any-return]


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float | Tensor,
    geometry: tuple[Any, ...],
) -> Tensor:
    """Return scale · (x ⋆ W) + b, with the scale at the smallest of x, W and the output."""
    stride, padding, dilation, _ = geometry
    outputs = x.shape[0] * weight.shape[0] * math.prod(
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    )  # fmt: skip
    smallest = min(x.numel(), weight.numel(), outputs)
    if smallest == weight.numel():
        return _apply_map(x, weight * scale, bias, geometry)
    if smallest == x.numel():
        return _apply_map(x * scale, weight, bias, geometry)
    out = _apply_map(x, weight, None, geometry).mul_(scale)
    return out if bias is None else out.add_(bias.view(-1, *[1] * (x.ndim - 2)))


def _convolution_gradients(
    x: Tensor,
    weight: Tensor,
    scale: float | Tensor,
    geometry: tuple[Any, ...],
    needed: tuple[bool, bool],
    grad: Tensor,
    scaled: bool,
) -> tuple[Tensor | None, Tensor | None, bool]:
    """Return the scaled gradient for x, the gradient for W, and whether the latter is scaled.

    The scale multiplies `grad` where that is no larger than x, because both gradients are then
    scaled at once.

    Args:
        x: the input.
        weight: W.
        scale: γ/d, a number or of shape ().
        geometry: stride, padding, dilation and groups.
        needed: whether the gradient for x, and that for W, is needed.
        grad: the gradient for the output.
        scaled: whether the gradient for W may be scaled.
    """
    stride, padding, dilation, groups = geometry
    scales_grad = needed[0] and scaled and grad.numel() <= x.numel()
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad * scale if scales_grad else grad, x, weight, None, stride, padding, dilation, False,
        [0] * (x.ndim - 2), groups, [*needed, False],
    )  # fmt: skip
    if grad_x is not None and not scales_grad:
        grad_x.mul_(scale)
    return grad_x, grad_weight, scales_grad


def _ordinary_gradients(
    inputs: tuple[Tensor | None, ...],
    divisor: Divisor,
    u: Tensor,
    v: Tensor,
    view: Any,
    geometry: tuple[Any, ...] | None,
    needed: Sequence[bool],
    grad: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the ordinary layer's gradients for x, W, b and γ, by differentiable operations."""
    differentiable = torch.is_grad_enabled()
    x, weight, bias, numerator = inputs
    assert x is not None and weight is not None  # noqa: PT018
    divisor = Divisor(divisor.value, divisor.slope, numerator)
    with torch.enable_grad():
        weight_in_use = divide(weight, divisor, u[None], v[None], view, plain=True)
        out = _apply_map(x, weight_in_use, bias, geometry)
    required: Any = [tensor for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed]
    gradients = iter(torch.autograd.grad(out, required, grad, create_graph=differentiable))
    return tuple(next(gradients) if is_needed else None for is_needed in needed)
