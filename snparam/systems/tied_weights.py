"""Models that tie their weights themselves: `tie_weights` ties the Parameters, not their values.

transformers ties by `setattr(module, "weight", other.get_parameter("weight"))`. On a converted
model there is no Parameter of that name, and assigning to one would copy values. A converted
model's own `tie_weights` therefore runs on the ordinary modules, and what shares a Parameter
afterwards shares one state. transformers is not imported; a method of that name is all that is
looked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from snparam.layers.table import Weight
from snparam.matrices.views import Layout
from snparam.parametrization.attachment import attach, detach
from snparam.parametrization.baking import check_alone
from snparam.parametrization.extensions import System, register_system
from snparam.parametrization.find import is_normalised, norms_of
from snparam.parametrization.scopes import has_scope, open_scope
from snparam.parametrization.spectral_norm import SpectralNorm

_METHOD = "tie_weights"

_Carrier = tuple[nn.Module, str, SpectralNorm]


def tie_normalised(model: nn.Module) -> None:
    """Let every module with normalised weights inside, and a `tie_weights`, tie their originals."""
    for module in model.modules():
        original = getattr(type(module), _METHOD, None)
        if callable(original) and _METHOD not in vars(module) and is_normalised(module):
            # A bound method in the instance: deepcopy binds it to the copy.
            vars(module)[_METHOD] = MethodType(_tier(original), module)


def tie_as_before(model: nn.Module) -> None:
    """Undo `tie_normalised`, wherever no normalised weight is left."""
    for module in model.modules():
        if hasattr(vars(module).get(_METHOD), "_snparam") and not is_normalised(module):
            del vars(module)[_METHOD]


def _tier(original: Callable[..., Any]) -> Callable[..., Any]:
    """A `tie_weights` around another."""

    @functools.wraps(original)
    def tie(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        carriers = _carriers(self)
        for owner, name, _ in carriers:
            check_alone(owner, name)
        states = {id(_original(owner, name)): norm for owner, name, norm in carriers}
        readers = [module for module in self.modules() if has_scope(module)]
        for owner, name, _ in carriers:
            detach(owner, name, None)
        try:
            return original(self, *args, **kwargs)
        finally:
            for owner, name, norm in carriers:
                _put_back(owner, name, norm, states)
            for module in readers:
                open_scope(module)

    tie._snparam = True  # type: ignore[attr-defined]
    return tie


def _put_back(
    owner: nn.Module, name: str, norm: SpectralNorm, states: dict[int, SpectralNorm]
) -> None:
    """Attach the state that belongs to what is now the Parameter, its own if none does."""
    parameter = owner._parameters[name]
    if parameter is None or tuple(parameter.shape) != norm.view.shape:
        return  # of another size, and so no longer the weight that the state is of
    found = states.get(id(parameter))
    if found is None or found.view != norm.view:
        norm.refresh(parameter)
        found = states[id(parameter)] = norm
    attach(Weight(owner, name, Layout("bare")), found)


def _original(owner: nn.Module, name: str) -> Any:
    lists: Any = owner.parametrizations
    return lists[name].original


def _carriers(model: nn.Module) -> list[_Carrier]:
    return [(module, name, norm) for module in model.modules() for name, norm in norms_of(module)]


class _TiedWeights(System):
    def on_model(self, model: nn.Module) -> None:
        tie_normalised(model)

    def on_restore(self, model: nn.Module) -> None:
        tie_as_before(model)


register_system(_TiedWeights())
