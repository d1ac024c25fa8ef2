"""The error where a new Parameter is assigned to a normalised weight.

`layer.weight = nn.Parameter(...)` is how tools replace weights, those that quantise or fold batch
norm among them. A normalised weight is computed, so that there is no Parameter of its name to
replace. torch raises a KeyError, "attribute 'weight' already exists"; the KeyError here also says
what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from snparam.parametrization.classes import unwrap, wrap
from snparam.parametrization.extensions import System, register_system
from snparam.parametrization.find import norm_on

_METHOD = "register_parameter"


def _refuse(method: Callable[..., Any], module: nn.Module, name: str, param: Any) -> None:
    """Run `register_parameter`, and refuse the name of a normalised weight."""
    norm = norm_on(module, name)
    if norm is not None:
        raise KeyError(
            f"SpectralNorm on {norm.name} {norm.view.shape}: a Parameter was assigned to a weight "
            f"that is computed; assign a tensor (module.{name} = tensor), which is written to the "
            "Parameter behind it, or call restore_model(model) first, as before quantising or "
            "folding batch norm."
        )
    method(module, name, param)


class _AssignedParameters(System):
    def on_attach(self, owner: nn.Module) -> None:
        wrap(type(owner), _METHOD, _refuse)

    def on_detach(self, owner: nn.Module) -> None:
        unwrap(type(owner), _METHOD, _refuse)


register_system(_AssignedParameters())
