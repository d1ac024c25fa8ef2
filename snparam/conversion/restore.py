"""The inverse of a conversion: an ordinary network, with normalised or with original weights."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from snparam.parametrization.arguments import check_flag, check_model
from snparam.parametrization.attachment import detach, read_as_eval
from snparam.parametrization.baking import check_alone, check_shared
from snparam.parametrization.extensions import SYSTEMS
from snparam.parametrization.find import normalised_weights
from snparam.parametrization.undoing import all_or_nothing

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


def restore_model(model: _ModuleT, bake: bool = True) -> _ModuleT:
    """Remove SpectralNorm from a network, which leaves an ordinary network.

    It has the same Parameters, the original classes, and plain state-dict keys.

    Args:
        model: a network with SpectralNorm on some of its weights, changed back in place. A network
            without any is left as it is.
        bake: True (the default) leaves the normalised weights, equal to the bit to those that eval
            mode uses. False leaves the original parameters, to the bit.

    Returns:
        The model.

    Raises:
        ValueError: if a weight carries another parametrization as well, or, with `bake=True`, its
            Parameter is shared with a module that uses it without normalisation; nothing has been
            changed.
        TypeError: if `model` is no module, or `bake` is neither True nor False.
    """
    check_model(model, "restore_model")
    check_flag("bake", bake)
    weights = [(weight.owner, weight.tensor_name) for weight in normalised_weights(model)]
    for module, tensor in weights:
        check_alone(module, tensor)
    if bake:
        check_shared(model)
    values = [read_as_eval(module, tensor) if bake else None for module, tensor in weights]
    with all_or_nothing(model.modules()):
        for (module, tensor), value in zip(weights, values, strict=True):
            detach(module, tensor, value)
        for system in SYSTEMS:
            system.on_restore(model)
    return model
