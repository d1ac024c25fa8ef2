"""Putting a SpectralNorm on a tensor of a module, and taking it off again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from snparam.layers.table import Weight, layer_type
from snparam.parametrization.classes import give_own_class
from snparam.parametrization.extensions import SYSTEMS
from snparam.parametrization.find import has_norms, norms_of
from snparam.parametrization.scopes import close_own_scope, close_scope, open_own_scope
from snparam.parametrization.spectral_norm import SpectralNorm


def attach(weight: Weight, norm: SpectralNorm) -> None:
    """Put a SpectralNorm on a tensor. The Parameter stays the same object."""
    owner, name = weight.owner, weight.tensor_name
    names = (*owner._parameters, *owner._buffers)
    order = next((p._snparam_order for p in _lists(owner)), names)
    # Stand-ins go in first: for the state, because registration would call right_inverse, which
    # converges anew, and forward, which moves it; for the tensor, because registration would set
    # it to itself, which tensors of some subclasses do not survive.
    tensors = owner._parameters if name in owner._parameters else owner._buffers
    original = tensors[name]
    assert original is not None
    persistent = name not in owner._non_persistent_buffers_set
    tensors[name] = nn.Parameter(torch.empty(0))
    give_own_class(owner)
    parametrize.register_parametrization(owner, name, nn.Module(), unsafe=True)
    lists: Any = owner.parametrizations
    del lists[name]._parameters["original"]
    parametrize._register_parameter_or_buffer(lists[name], "original", original)
    if not persistent:
        lists[name]._non_persistent_buffers_set.add("original")
    lists[name][0] = norm.train(owner.training)
    lists[name].unsafe = False
    lists[name]._snparam_order = order
    lists[name].register_load_state_dict_post_hook(_derive_after_load)
    _read_directly(owner, name)
    row = layer_type(owner)
    if row is not None:
        for attribute, value in row.overrides.items():
            setattr(type(owner), attribute, value)
    open_own_scope(owner)
    for system in SYSTEMS:
        system.on_attach(owner)


def _read_directly(owner: nn.Module, name: str) -> None:
    """Let reading the weight call SpectralNorm itself, where nothing else is to be called.

    Through the lists of torch's parametrizations it takes as long as a small layer's whole step.
    """
    through_lists: Any = vars(type(owner))[name]

    def read(module: nn.Module) -> Tensor:
        lists: Any = module._modules["parametrizations"]
        parametrizations = lists._modules[name]
        norm = parametrizations._modules["0"]
        original = parametrizations._parameters.get("original")
        hooked = norm._forward_hooks or norm._forward_pre_hooks
        if (
            original is None
            or hooked
            or len(parametrizations._modules) > 1
            or parametrize._cache_enabled
        ):
            value: Tensor = through_lists.fget(module)
            return value
        found: Tensor = norm.read(original, module)
        return found

    setattr(type(owner), name, property(read, through_lists.fset))


def detach(owner: nn.Module, name: str, value: Tensor | None) -> None:
    """Take SpectralNorm off a tensor, leaving the original or, in it, `value`."""
    lists: Any = owner.parametrizations
    order = lists[name]._snparam_order
    original = lists[name].original
    persistent = "original" not in lists[name]._non_persistent_buffers_set
    give_own_class(owner)
    if len(list(norms_of(owner))) == 1:
        close_own_scope(owner)
    parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
    if not persistent:
        owner._non_persistent_buffers_set.add(name)
    if value is not None:
        with torch.no_grad():
            original.copy_(value)
    tables: list[dict[str, Any]] = [owner._parameters, owner._buffers]
    for tensors in tables:
        for tensor in sorted(tensors, key=lambda n: order.index(n) if n in order else len(order)):
            tensors[tensor] = tensors.pop(tensor)
    if not parametrize.is_parametrized(owner):
        row = layer_type(owner)
        if row is not None and row.restored is not None:
            row.restored(owner)
    if not has_norms(owner):
        close_scope(owner)
        for system in SYSTEMS:
            system.on_detach(owner)


def _derive_after_load(parametrizations: Any, _keys: object) -> None:
    for norm in parametrizations:
        if isinstance(norm, SpectralNorm):
            if norm.settings.update == "step":  # with assign=True, u may be of another kind now
                norm.v = norm.v.new_zeros(norm.v.shape, dtype=norm.u.dtype, device=norm.u.device)
            norm.derive(parametrizations.original)


@torch.no_grad()
def read_as_eval(owner: nn.Module, name: str) -> Tensor:
    """The weight that eval mode uses, whatever the mode; no state moves."""
    lists: Any = owner.parametrizations
    modes = [(part, part.training) for part in lists[name]]
    try:
        for part, _ in modes:
            part.training = False
        value: Tensor = lists[name]()
    finally:
        for part, mode in modes:
            part.training = mode
    return value


def _lists(owner: nn.Module) -> Iterator[Any]:
    lists: Any = owner._modules.get("parametrizations")
    for parametrizations in lists.values() if isinstance(lists, nn.ModuleDict) else ():
        if hasattr(parametrizations, "_snparam_order"):
            yield parametrizations
