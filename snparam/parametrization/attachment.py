"""Attachment: putting a SpectralNorm on a tensor of a module, and taking it off again."""

from __future__ import annotations

from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from snparam.layers.table import layer_type
from snparam.matrices import torch_private
from snparam.parametrization.arguments import check_model
from snparam.parametrization.classes import give_own_class
from snparam.parametrization.extensions import SYSTEMS
from snparam.parametrization.find import has_norms, norm_on, normalised_weights
from snparam.parametrization.forwards import bracket_forward, release_forward
from snparam.parametrization.order import ordinary_order, record_order, recorded_order, sort_table
from snparam.parametrization.spectral_norm import SpectralNorm
from snparam.parametrization.update import watch_optimizers


def attach(owner: nn.Module, name: str, norm: SpectralNorm) -> None:
    """Put a SpectralNorm on a tensor of a module; the Parameter stays the same object.

    Args:
        owner: the module that has the tensor.
        name: name of the tensor in it.
        norm: a SpectralNorm with the state of this tensor; tied weights share one.
    """
    order = ordinary_order(owner)
    # Stand-ins are registered first: a plain module for the SpectralNorm, because registration
    # would call its right_inverse, which converges the state anew, and its forward, which moves it;
    # an empty Parameter for the tensor, because registration would set the tensor to itself, which
    # tensors of some subclasses do not survive.
    tensors = owner._parameters if name in owner._parameters else owner._buffers
    original = tensors[name]
    assert original is not None
    persistent = name not in owner._non_persistent_buffers_set
    tensors[name] = nn.Parameter(torch.empty(0))
    give_own_class(owner)
    parametrize.register_parametrization(owner, name, nn.Module(), unsafe=True)
    lists: Any = owner.parametrizations
    del lists[name]._parameters["original"]
    torch_private.register_original(lists[name], original)
    if not persistent:
        lists[name]._non_persistent_buffers_set.add("original")
    lists[name][0] = norm.train(owner.training)
    lists[name].unsafe = False
    record_order(lists[name], order)
    lists[name].register_load_state_dict_post_hook(_note_load)
    norm.add_owner(owner, name)
    if norm.watches_optimizers:
        watch_optimizers()
    row = layer_type(owner)
    if row is not None:
        for attribute, value in row.overrides.items():
            setattr(type(owner), attribute, value)
    bracket_forward(owner)
    for system in SYSTEMS:
        system.on_attach(owner)


def detach(owner: nn.Module, name: str, value: Tensor | None) -> None:
    """Take SpectralNorm off a tensor, and leave the original behind under the tensor's name.

    Args:
        owner: the module that has the tensor.
        name: name of the tensor in it.
        value: written into the original, of its shape; None leaves the original's values.
    """
    lists: Any = owner.parametrizations
    order = recorded_order(lists[name])
    original = lists[name].original
    persistent = "original" not in lists[name]._non_persistent_buffers_set
    give_own_class(owner)
    norm = norm_on(owner, name)
    if norm is not None:
        norm.remove_owner(owner, name)
    parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
    if not persistent:
        owner._non_persistent_buffers_set.add(name)
    if value is not None:
        with torch.no_grad():
            original.copy_(value)
    for table in (owner._parameters, owner._buffers):
        sort_table(table, order)
    if not parametrize.is_parametrized(owner):
        row = layer_type(owner)
        if row is not None and row.restore is not None:
            row.restore(owner)
    if not has_norms(owner):
        release_forward(owner)
        for system in SYSTEMS:
            system.on_detach(owner)


def _note_load(parametrization_list: Any, _incompatible_keys: object) -> None:
    for norm in parametrization_list:
        if isinstance(norm, SpectralNorm):
            norm.note_loaded(parametrization_list.original)


@torch.no_grad()
def read_as_eval(owner: nn.Module, name: str) -> Tensor:
    """Return the weight that an eval forward would use, in any mode; no state moves.

    Within a forward of the module it is read as in another forward.
    """
    lists: Any = owner.parametrizations
    modes = [(part, part.training) for part in lists[name]]
    norm, thread = norm_on(owner, name), get_ident()
    outer = None if norm is None else norm.enter_forward(thread)
    try:
        for part, _ in modes:
            part.training = False
        value: Tensor = lists[name]()
    finally:
        for part, mode in modes:
            part.training = mode
        if norm is not None:
            norm.leave_forward(thread, outer)
    return value


def weight_in_use(module: nn.Module, name: str = "weight") -> Tensor:
    """Return the normalised weight that an eval forward would use now, detached; no state moves.

    It is meant for logging and inspection, in training and in eval mode. Reading `module.weight` in
    training mode counts as a forward instead, and moves the state.

    Args:
        module: the module that has the weight, or one around it.
        name: name of the weight in it, dotted for a module around: `"0.weight"`.

    Raises:
        ValueError: if the module has no normalised weight of that name; the error lists those that
            it has.
        TypeError: if `module` is no module.
    """
    check_model(module, "weight_in_use")
    inner, _, tensor_name = name.rpartition(".")
    owner = dict(module.named_modules(remove_duplicate=False)).get(inner)
    if owner is None or norm_on(owner, tensor_name) is None:
        names = [weight.name for weight in normalised_weights(module)]
        shown = ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
        raise ValueError(
            f"weight_in_use: {type(module).__name__} has no weight {name!r} under SpectralNorm; "
            + (f"pass one of {shown}" if names else "it has none")
        )
    return read_as_eval(owner, tensor_name).detach()
