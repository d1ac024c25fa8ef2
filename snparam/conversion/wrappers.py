"""Wrappers that hold references to a model's parameters, and so must come after the conversion."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from snparam.layers.tensors import Problem
from snparam.matrices.sharded import is_fully_sharded
from snparam.parametrization.options import Settings

FLAT = "_flat_param"


def flattens(module: nn.Module) -> bool:
    """Return whether a module is a wrapper that flattens its parameters into one (FSDP1).

    It is recognised by the name of its class, which torch's and fairscale's share, because torch
    may be built without `torch.distributed`.
    """
    return any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__)


def wrapper_problem(
    modules: Iterable[nn.Module], tensor: Tensor | None, settings: Settings
) -> Problem | None:
    """Return why a wrapper around a weight must come after its conversion, or None.

    Args:
        modules: the modules from the root of the model to the weight's owner, both included.
        tensor: the tensor to be converted, or None where there is none to look at.
        settings: the options of the conversion; only some need the wrapper to come later.
    """
    modules = list(modules)
    for module in modules:
        if flattens(module):
            kind = type(module).__name__
            reason = f"{kind} has flattened the parameters inside of it"
            return Problem(reason, _convert_first(kind), refuses=True)
    if tensor is not None and is_fully_sharded(tensor, modules):
        reason = "fully_shard has it in hand already"
        return Problem(reason, "convert_model first, then fully_shard", refuses=True)
    if any(isinstance(module, DistributedDataParallel) for module in modules):
        kind = "DistributedDataParallel"
        if settings.gain == "learned":
            reason = f"{kind}, made before, would not reduce the gradient of its gain"
            return Problem(reason, _convert_first(kind), refuses=True)
        if settings.init == "random":
            reason = f"{kind}, made before, would not broadcast its random start"
            return Problem(reason, _convert_first(kind), refuses=True)
    return None


def _convert_first(kind: str) -> str:
    return f"convert_model first, then wrap it in {kind}"
