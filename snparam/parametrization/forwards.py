"""The override of a layer's forward, by which one forward moves a state once.

Attention reads a projection weight several times in one call, and a recurrent layer reads each of
its weights several times. So `forward` is overridden in the class that torch's parametrize has made
for the module: the override ends each forward even if it raises, and nothing of it is left when
torch removes that class. A read by the forward of another module counts as a separate forward.
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
from snparam.parametrization.linear_maps import can_use_linear_map, is_linear_map, linear_map
from snparam.parametrization.spectral_norm import SpectralNorm


def bracket_forward(owner: nn.Module) -> None:
    """Override the forward of a module, whose class is its own, to be one forward for its weights.

    All reads of a weight in one call then share one estimate, and move its state once.
    """
    cls: Any = type(owner)
    base = cls.__bases__[0]

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        norms = distinct_norms(self)
        if is_compiling():
            return _traced_forward(self, norms, base, args, kwargs)
        thread = get_ident()
        outer_readings = [norm.enter_forward(thread) for norm in norms]
        try:
            output = _output_at_linear_map(self, norms, base, args, kwargs)
            return output if output is not None else base.forward(self, *args, **kwargs)
        finally:
            for norm, outer in zip(norms, outer_readings, strict=True):
                norm.leave_forward(thread, outer)

    cls.forward = forward


def release_forward(owner: nn.Module) -> None:
    """Undo `bracket_forward` on a module that still has other parametrizations."""
    if parametrize.is_parametrized(owner) and "forward" in vars(type(owner)):
        del type(owner).forward


def _output_at_linear_map(
    owner: nn.Module, norms: list[SpectralNorm], base: Any, args: Any, kwargs: Any
) -> Tensor | None:
    """Return the output with σ applied at the linear map, or None where the weight is needed."""
    if len(norms) != 1 or len(args) != 1 or kwargs or not norms[0].training:
        return None
    (norm,), (x,) = norms, args
    if not is_linear_map(owner, base):
        return None
    can_use_map = can_use_linear_map(owner, norm, x)
    if not can_use_map and not in_backward():
        return None
    reading = norm.reading()
    reading.at_map = can_use_map
    lists: Any = owner._modules["parametrizations"]
    norm.estimate(lists._modules["weight"].original, reading)
    return linear_map(owner, norm, x, reading) if reading.at_map else None


def distinct_norms(owner: nn.Module) -> list[SpectralNorm]:
    """Return the states of a module's own weights, each once."""
    norms = [norm for _, norm in norms_of(owner)]
    return norms if len(norms) < 2 else list(dict.fromkeys(norms))


def _traced_forward(
    owner: nn.Module, norms: list[SpectralNorm], base: Any, args: Any, kwargs: Any
) -> Any:
    # Which forward a read belongs to matters only where it moves the state, and a checkpointed
    # region in a graph may change nothing in Python: no other state begins a forward.
    moving = [norm for norm in norms if norm.moves_traced()]
    for norm in moving:
        norm.enter_traced_forward()
    try:
        return base.forward(owner, *args, **kwargs)
    finally:
        for norm in moving:
            norm.leave_traced_forward()
