"""The layer's own forward: what it reads several times moves the state once.

Attention reads a projection weight several times in a call, and a recurrent layer each of its
weights. So `forward` is overridden in the class that torch's parametrize has made for the module,
which makes nothing of an exception and leaves nothing behind when torch removes that class. A read
by somebody else's forward counts as a forward of its own.
"""

from __future__ import annotations

import functools
from threading import get_ident
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils import parametrize

from snparam.parametrization.activation_checkpointing import in_backward
from snparam.parametrization.find import norms_of
from snparam.parametrization.linear_maps import is_linear_map, linear_map, may_be_used
from snparam.parametrization.spectral_norm import SpectralNorm


def bracket_forward(owner: nn.Module) -> None:
    """Let each forward of a module, whose class is its own, count as one for its weights."""
    cls: Any = type(owner)
    base = cls.__bases__[0]

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        norms = own_norms(self)
        if is_compiling():
            return _traced(self, norms, base, args, kwargs)
        thread = get_ident()
        around = [norm.enter(thread) for norm in norms]
        try:
            mapped = _at_the_map(self, norms, base, args, kwargs)
            return mapped if mapped is not None else base.forward(self, *args, **kwargs)
        finally:
            for norm, reading in zip(norms, around, strict=True):
                norm.leave(thread, reading)

    cls.forward = forward


def release_forward(owner: nn.Module) -> None:
    """Undo `bracket_forward` on a module that other parametrizations are still on."""
    if parametrize.is_parametrized(owner) and "forward" in vars(type(owner)):
        del type(owner).forward


def _at_the_map(
    owner: nn.Module, norms: list[SpectralNorm], base: Any, args: Any, kwargs: Any
) -> Tensor | None:
    """Return the output with σ at the linear map, or None where the weight in use is needed."""
    if len(norms) != 1 or len(args) != 1 or kwargs or not norms[0].training:
        return None
    (norm,), (x,) = norms, args
    if not is_linear_map(owner, base):
        return None
    usable = may_be_used(owner, norm, x)
    if not usable and not in_backward():
        return None
    reading = norm.reading()
    reading.at_map = usable
    lists: Any = owner._modules["parametrizations"]
    norm.estimate(lists._modules["weight"].original, reading)
    return linear_map(owner, norm, x, reading) if reading.at_map else None


def own_norms(owner: nn.Module) -> list[SpectralNorm]:
    """Return the different states of a module's own weights."""
    return list({id(norm): norm for _, norm in norms_of(owner)}.values())


def _traced(owner: nn.Module, norms: list[SpectralNorm], base: Any, args: Any, kwargs: Any) -> Any:
    # It matters only where a read moves the state which forward it belongs to, and a checkpointed
    # region in a graph may not change anything in Python.
    moving = [norm for norm in norms if norm.moves_traced()]
    for norm in moving:
        norm.enter_traced()
    try:
        return base.forward(owner, *args, **kwargs)
    finally:
        for norm in moving:
            norm.leave_traced()
