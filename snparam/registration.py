"""One tensor of one module: checking it, registering SpectralNorm on it, removing it again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import Unpack

from .adapters import refuse_merging
from .baking import check_alone
from .candidates import Candidate, is_lazy
from .classes import give_own_class
from .layers import Weight, is_packed, layer_type, packed_message, weight_named, weights_of
from .options import Options, documents_options, settings_from
from .parametrization import SpectralNorm
from .pickling import refuse_pickling
from .pretrained import spell_as_before, spell_for_pretrained
from .scopes import (
    close_own_scope,
    close_scope,
    expect_idle_scopes,
    norm_on,
    norms_of,
    open_own_scope,
)
from .spellings import accept_spellings, forget_spellings
from .takeover import hook_behind
from .undoing import all_or_nothing
from .views import View

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


@documents_options
def register_sn(
    module: _ModuleT,
    num_svs: int = 1,
    num_itrs: int = 1,
    *,
    name: str | None = None,
    **options: Unpack[Options],
) -> _ModuleT:
    """Hold the spectral norm of a module's weights at 1, by a parametrization.

    Each weight W is used as W / σ(W), where σ, the largest singular value of W read as a matrix, is
    estimated by power iteration: `num_itrs` steps per training forward, one unstored step per eval
    forward. The state, `u` (b, k, m) and `sv` (b, k), is in buffers of
    `module.parametrizations[name][0]`; the trained Parameter is the same object as before, now
    `module.parametrizations[name].original`. Dividing by σ changes what the module computes.

    Args:
        module: the module to change, in place.
        name: which tensor, such as `"weight"` or `"out_proj.weight"`. None (the default) registers
            on every weight that the layer table lists for this type of module.
    {options}

    Returns:
        The module.

    Raises:
        ValueError: if there is no such tensor or none is eligible, if it is registered already, is
            uninitialised, on the meta device, empty, of one dimension, or has NaN or inf, if it
            does not split into `blocks`, or if `num_svs` exceeds min(rows, columns).
        TypeError: if the tensor is quantised, sparse, or of a dtype without singular values.
        Either way nothing has been changed.

    Source: Miyato et al. 2018, "Spectral normalization for generative adversarial networks";
    for several singular values, Brock, Donahue and Simonyan 2019 (BigGAN).
    """
    settings = settings_from(num_svs, num_itrs, options)
    weights = weights_of(module) if name is None else [weight_named(module, name)]
    if not weights:
        raise _nothing_known(module)
    candidates = [Candidate.of(w, settings, _name_of(module, w)) for w in weights]
    for candidate in candidates:
        candidate.check()
    states: dict[tuple[int, View | None], SpectralNorm] = {}
    pairs = []
    for candidate in candidates:
        key = (id(candidate.tensor), candidate.view)  # tied tensors share their state
        if key not in states:
            states[key] = candidate.make()
        pairs.append((candidate, states[key]))
    with all_or_nothing(module.modules()):
        attach_all(pairs)
    return module


def remove_sn(module: _ModuleT, *, name: str | None = None, bake: bool = True) -> _ModuleT:
    """Leave an ordinary module behind.

    Args:
        module: a module that `register_sn` or `convert_model` changed; changed back in place.
        name: which tensor; None (the default) for all of this module's.
        bake: True (the default) leaves the normalised weight, to the bit the one that eval mode
            uses, without a further step. False leaves the original parameter, to the bit.

    Returns:
        The module, with the same Parameter objects, of its original class.

    Raises:
        ValueError: if the tensor, or the module, does not carry SpectralNorm, or carries another
            parametrization on the same tensor; nothing has been changed.
    """
    weights = weights_of(module) if name is None else [weight_named(module, name)]
    owners = {(id(w.owner), w.tensor_name): (w.owner, w.tensor_name) for w in weights}
    if name is None:
        owners |= {(id(module), tensor): (module, tensor) for tensor, _ in norms_of(module)}
    carried = [(owner, tensor) for owner, tensor in owners.values() if norm_on(owner, tensor)]
    if not carried:
        what = "no weight" if name is None else f"{name!r} not"
        raise ValueError(
            f"{type(module).__name__} has {what} registered with SpectralNorm; "
            "for a whole network use restore_model"
        )
    for owner, tensor in carried:
        check_alone(owner, tensor)
    baked = [read_as_eval(owner, tensor) if bake else None for owner, tensor in carried]
    with all_or_nothing(module.modules()):
        for (owner, tensor), value in zip(carried, baked, strict=True):
            detach(owner, tensor, value)
        close_scope(module)
    expect_idle_scopes()
    return module


def attach_all(pairs: Iterable[tuple[Candidate, SpectralNorm]]) -> None:
    """Attach each."""
    for candidate, norm in pairs:
        attach(candidate.weight, norm)


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
    refuse_pickling(owner)
    refuse_merging(owner)
    row = layer_type(owner)
    if row is not None:
        for attribute, value in row.overrides.items():
            setattr(type(owner), attribute, value)
    open_own_scope(owner)
    accept_spellings(owner)
    spell_for_pretrained(owner)


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
    if not any(True for _ in norms_of(owner)):
        close_scope(owner)
        forget_spellings(owner)
        spell_as_before(owner)


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


def _name_of(module: nn.Module, weight: Weight) -> str:
    return f"'{weight.path}' of {type(module).__name__}"


def _nothing_known(module: nn.Module) -> Exception:
    kind = type(module).__name__
    if is_packed(module):
        return TypeError(packed_message(module))
    for name in module._parameters:
        hook = hook_behind(module, name)
        if hook is not None:
            return ValueError(f"{kind} is under {hook}; remove that first")
    own = [n for n, p in module.named_parameters(recurse=False) if not is_lazy(p) and p.ndim >= 2]
    if own:
        return ValueError(f"{kind} is not in the layer table; pass name=, one of {own}")
    if next(module.parameters(), None) is not None and next(module.children(), None) is not None:
        return ValueError(f"{kind} has no weight of its own; for layers inside use convert_model")
    return ValueError(f"{kind} has no weight of two or more dimensions")
