"""Dividing one matrix on a CPU by a function of its σ, which is a number there.

The same mathematics as `division` has for stacks of matrices anywhere, in as few operations and as
little memory as there can be.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from snparam.constraints.cpu import Matrix, as_it_lies, is_any_autocast_enabled
from snparam.constraints.division import Division, gradients_in_graph, without_autocast
from snparam.constraints.holders import ALONE, COUNTS_HOLDERS, is_alone, learn_what_alone_looks_like
from snparam.constraints.memory import Memory, Passes
from snparam.constraints.written import version_of

# Names of this file's own, as in `cpu`.
_modes: Any = torch._C._len_torch_dispatch_stack
_is_grad_enabled = torch.is_grad_enabled
_dot = torch.dot

# For the arguments of the division that are not tensors.
_NO_GRADIENTS = (None, None, None, None)


def divide(
    weight: Tensor,
    gain: Tensor | None,
    by: Division,
    of: Matrix,
    memory: Memory,
    passes: Passes | None = None,
) -> Tensor:
    """`division.divide` for weights of which `cpu.is_here` holds.

    Args:
        weight: of the view's shape.
        gain: γ, (1,), or None.
        by: the divisor, with numbers for its value and its slope.
        of: the weight as a matrix.
        memory: where to write large weights that a gradient flows into.
        passes: what to share their values by.
    """
    divisor: Any = by.divisor or 1.0
    if gain is None:
        scale = 1.0 / divisor
    else:
        # Rounded as γ is, so that a γ that was set to the divisor leaves the weight as it was.
        scale = gain.item() / torch.tensor(divisor, dtype=gain.dtype, device="cpu").item()
    values, done = None, False
    if (
        of.is_large
        and COUNTS_HOLDERS
        and weight.requires_grad
        and _is_grad_enabled()
        and not _modes()
    ):
        if not ALONE:
            learn_what_alone_looks_like()
        if passes is not None:
            values = passes.values(weight, scale)
        done = values is not None
        if values is None:
            values = memory.like(weight, of.kind)
    # Past Function.apply, which looks for transforms that `is_here` has excluded.
    divided: Tensor = _apply(  # type: ignore[no-untyped-call]
        # A tuple, because autograd would look at a tensor among the arguments.
        weight,
        gain,
        by,
        of,
        scale,
        (values, done),
    )
    if values is not None and not done and passes is not None:
        passes.begin(weight, scale, divided)
    return divided


class _Divide(torch.autograd.Function):
    """`divide` in one pass, and its backward in one dot product and one rank-one update.

    The weight is kept with its version and not as a saved tensor, which would be operations more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        gain: Tensor | None,
        by: Division,
        of: Matrix,
        scale: float,
        into: tuple[Tensor | None, bool],
    ) -> Tensor:
        """To `into` the values go, and it says whether they are there already."""
        versions = version_of(weight), None if gain is None else version_of(gain)
        ctx.made_of = weight, gain, by, of, scale, versions
        values, done = into
        if done and values is not None:
            return values
        if gain is None:
            return torch.div(weight, by.divisor or 1.0, out=values)
        return torch.mul(weight, scale, out=values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gain, by, of, _, versions = ctx.made_of
        if version_of(weight) != versions[0]:
            raise _changed("weight", weight, versions[0])
        if _is_grad_enabled():
            if gain is not None and version_of(gain) != versions[1]:
                raise _changed("gain", gain, versions[1])
            with without_autocast(grad):
                return (*gradients_in_graph(grad, weight, gain, by), *_NO_GRADIENTS)
        alike = grad.stride() == of.strides
        alone = (
            of.is_large
            # An expanded one has several entries in one place.
            and (alike or grad.is_contiguous())
            and is_alone(grad, sys.getrefcount(grad))
        )
        if is_any_autocast_enabled():
            with without_autocast(grad):
                return (*_gradients(ctx.made_of, grad, alike, alone), *_NO_GRADIENTS)
        return (*_gradients(ctx.made_of, grad, alike, alone), *_NO_GRADIENTS)


_apply = super(torch.autograd.Function, _Divide).apply


def _changed(what: str, tensor: Tensor, version: int | None) -> RuntimeError:
    return RuntimeError(
        f"SpectralNorm: a {what} of shape {tuple(tensor.shape)} that is needed for computing "
        "gradients has been changed by an in-place operation between the forward and the "
        f"backward: it is at version {tensor._version}, expected version {version}. Call "
        "backward before optimizer.step(), or compute the forward again after it."
    )


def _gradients(
    made_of: Any, grad: Tensor, alike: bool, alone: bool
) -> tuple[Tensor, Tensor | None]:
    """γ/d (G − slope · ⟨G, W⟩/d · u vᵀ) for the weight, and ⟨G, W⟩/d for γ.

    Args:
        made_of: what the forward has kept.
        grad: G.
        alike: whether it lies as the weight did.
        alone: whether it may be overwritten.
    """
    weight, gain, by, of, scale, _ = made_of
    view, divisor, u = by.view, by.divisor or 1.0, by.u
    if alike and of.flat is not None:
        g, inner = grad.as_strided(of.shape, of.matrix_strides), _dot(as_it_lies(grad), of.flat)
    else:
        g = view.to_matrix(grad, like=weight)
        inner = _dot(g.reshape(-1), view.to_matrix(weight).reshape(-1))
        alone = alone and g.data_ptr() == grad.data_ptr()
    try:
        # Not slope · ⟨G, W⟩ / d², which underflows first.
        rate = -by.slope * (inner.item() / divisor) * scale
    except RuntimeError:  # a batch of gradients (is_grads_batched) has one for each
        rate, alone, u = -by.slope * scale, False, u * (inner / divisor)
    into_gain = None if gain is None else (inner / divisor).view(1).to(gain.dtype)
    if alone:
        combined = g.addr_(u, by.v, beta=scale, alpha=rate)
        if alike:
            return grad, into_gain
    else:
        combined = torch.addr(g, u, by.v, beta=scale, alpha=rate)
    return view.from_matrices(combined, like=weight), into_gain
