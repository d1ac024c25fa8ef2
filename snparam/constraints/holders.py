"""Who holds a tensor's memory: what nobody else can see may be overwritten.

torch's engine asks the same before it adds gradients in place (torch/csrc/autograd/
input_buffer.cpp). What a gradient that nobody else can see looks like from the `backward` of an
autograd Function is learned from two: one with memory of its own and one that is a view of a tensor
that nobody holds.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from snparam.constraints.division import without_autocast

# What such gradients look like; empty until it is learned.
ALONE: set[tuple[int, ...]] = set()

# None of these is public. Without them all memory is new.
_has_storage: Any = getattr(torch._C, "_has_storage", None)
_storage_of: Any = getattr(torch._C, "_storage_address", None)
_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)
COUNTS_HOLDERS = hasattr(Tensor, "_use_count") and None not in (
    _has_storage,
    _storage_of,
    _use_count,
)


def is_shared(tensor: Tensor) -> bool:
    """Whether a tensor's memory is held by others too.

    Other tensors count, what autograd saves, and Python's storages.
    """
    count: int = _use_count(_storage_of(tensor))
    return count > 1


def is_alone(grad: Tensor, references: int) -> bool:
    """Whether nobody else can see a gradient that a `backward` is given.

    Args:
        grad: the gradient.
        references: to the Python object, counted by the caller: how many a call adds depends on who
            runs the interpreter's frames, such as torch's compiler.
    """
    return (
        len(ALONE) > 0
        and _has_storage(grad)
        and _holders(grad, references) in ALONE
        # Memory that is not torch's own, such as numpy's, has an owner who is not counted.
        and grad.untyped_storage().resizable()
    )


def learn_what_alone_looks_like() -> None:
    """Fill `ALONE`, if that can be done now."""
    if sys.gettrace() is not None:  # a debugger holds what it shows
        return
    x = torch.ones(2, requires_grad=True, device="cpu")
    probe: Any = super(torch.autograd.Function, _Probe).apply
    torch.autograd.grad((probe(x) * 2.0).sum(), x)
    torch.autograd.grad((probe(x).view(1, 2) * 2.0).sum(), x)


def _holders(grad: Any, references: int) -> tuple[int, ...]:
    """How often a gradient, its memory, and the tensor it is a view of, are referred to."""
    counts = (references, grad._use_count(), _use_count(_storage_of(grad)))
    base = grad._base
    return counts if base is None else (*counts, sys.getrefcount(base), base._use_count())


class _Probe(torch.autograd.Function):
    """Learns what gradients look like that nobody else holds."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        with without_autocast(grad):
            ALONE.add(_holders(grad, sys.getrefcount(grad)))
        return grad.clone()
