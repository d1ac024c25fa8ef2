"""One tensor of one module: checking it, registering SpectralNorm on it, removing it again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from torch import nn
from typing_extensions import Unpack

from snparam.conversion.candidates import Candidate, is_lazy
from snparam.layers.table import (
    Weight,
    is_packed,
    packed_message,
    weight_named,
    weights_of,
)
from snparam.layers.torch_norms import hook_behind
from snparam.matrices.views import View
from snparam.parametrization.attachment import attach, detach, read_as_eval
from snparam.parametrization.baking import check_alone
from snparam.parametrization.find import norm_on, norms_of
from snparam.parametrization.options import Options, documents_options, settings_from
from snparam.parametrization.scopes import (
    close_scope,
    expect_idle_scopes,
)
from snparam.parametrization.spectral_norm import SpectralNorm
from snparam.parametrization.undoing import all_or_nothing

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
