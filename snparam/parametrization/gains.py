"""Learned gains, and the optimizers that have to train them.

A conversion with `gain="learned"` makes new Parameters. An optimizer that was built before the
conversion has the weights and not the gains, and would silently leave the gains where they started.
torch keeps no list of optimizers, but a global hook sees each one that steps.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from snparam.parametrization.arguments import check_model
from snparam.parametrization.extensions import System, register_system
from snparam.parametrization.find import norm_on, normalised_states, norms_of
from snparam.parametrization.spectral_norm import SpectralNorm


def gain_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the learned gains of a network, each once, in the model's order.

    They are among `model.parameters()` too. An optimizer that was built before the conversion does
    not have them; add them by
    `optimizer.add_param_group({"params": snparam.gain_parameters(model), "weight_decay": 0.0})`.

    Args:
        model: a network.

    Returns:
        The Parameters γ, each (b,); an empty list if nothing was converted with `gain="learned"`.

    Raises:
        TypeError: if `model` is no module.
    """
    check_model(model, "gain_parameters")
    gains: list[Any] = [
        weight.norm.gain
        for weight in normalised_states(model)
        if weight.norm.settings.gain == "learned"
    ]
    return gains


def parameter_groups(model: nn.Module, **for_gains: Any) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: all other parameters, and the learned gains.

        torch.optim.AdamW(snparam.parameter_groups(model, weight_decay=0.0), weight_decay=0.1)

    The options that are passed here apply to the gains alone, and the optimizer's own to all other
    parameters: in the line above the weights decay and the gains do not. A network without learned
    gains has one group, of all its parameters, so that the line serves it too.

    Args:
        model: a network, converted or not.
        for_gains: options of the group of the gains, by the names that optimizers of `torch.optim`
            have for them. γ is the norm of a weight, so that weight decay on it shrinks the layer,
            which is usually not meant.

    Returns:
        The group of all other parameters, without options, and, if there are learned gains, their
        group, with `for_gains`.

    Raises:
        TypeError: if no optimizer of `torch.optim` has an option of that name, or `model` is no
            module.
    """
    check_model(model, "parameter_groups")
    _check_optimizer_options(for_gains)
    gains = gain_parameters(model)
    gain_ids = {id(gain) for gain in gains}
    others = [parameter for parameter in model.parameters() if id(parameter) not in gain_ids]
    return [{"params": others}, {"params": gains, **for_gains}] if gains else [{"params": others}]


def _check_optimizer_options(options: dict[str, Any]) -> None:
    """Refuse options that no optimizer has, since an optimizer ignores what it does not know.

    Raises:
        TypeError: with the most similar option, and what to do for other libraries' optimizers.
    """
    optimizers = [
        kind
        for kind in vars(torch.optim).values()
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
    ]
    choices = {name for kind in optimizers for name in inspect.signature(kind).parameters}
    choices.discard("params")
    for name in options:
        if name not in choices:
            matches = difflib.get_close_matches(name, choices, n=1)
            hint = f"; did you mean {matches[0]!r}?" if matches else "."
            raise TypeError(
                f"parameter_groups: no optimizer of torch.optim has the option {name!r}{hint} For "
                "an optimizer of another library, write it into the group of the gains: "
                f"parameter_groups(model)[-1][{name!r}] = ..."
            )


# The states whose gain no optimizer has been seen to train: for each, the module and the tensor
# that it is on, and the optimizers that have stepped the weight once without the gain. `_settled`
# has those that are no longer watched: trained, frozen, removed, or warned about.
_watched: WeakKeyDictionary[SpectralNorm, tuple[ref[nn.Module], str, WeakSet[Optimizer]]] = (
    WeakKeyDictionary()
)
_settled: WeakSet[SpectralNorm] = WeakSet()
_handles: list[object] = []


class _WatchedGains(System):
    def on_attach(self, owner: nn.Module) -> None:
        for name, norm in norms_of(owner):
            if norm.settings.gain == "learned" and norm not in _settled and norm not in _watched:
                _watched[norm] = ref(owner), name, WeakSet()
        if _watched and not _handles:
            # A compiled optimizer step leaves its graph for the hook.
            disable: Any = torch.compiler.disable
            _handles.append(register_optimizer_step_pre_hook(disable(_before_step)))


register_system(_WatchedGains())


def _before_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    """Warn if an optimizer steps a weight for the second time, and none has stepped its gain.

    The first step is too early: the gains may be in another optimizer, which steps after this one.
    """
    if not _watched:
        return
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    untrained = []
    for norm, (owner_ref, name, optimizers) in list(_watched.items()):
        owner: Any = owner_ref()
        removed = owner is None or norm_on(owner, name) is not norm
        if removed or id(norm.gain) in trained or not norm.gain.requires_grad:
            _settle(norm)
            continue
        lists = owner.parametrizations
        if id(lists[name].original) not in trained:
            continue
        if optimizer in optimizers:
            untrained.append(norm)
            _settle(norm)
        optimizers.add(optimizer)
    if untrained:
        first = untrained[0]
        others = f" and {len(untrained) - 1} more" if len(untrained) > 1 else ""
        warnings.warn(
            f"SpectralNorm on {first.name} {first.view.shape}{others}: the learned gain is in no "
            f"optimizer that has stepped. Was this {type(optimizer).__name__}, which trains the "
            "weight, built before the conversion? Call optimizer.add_param_group("
            '{"params": snparam.gain_parameters(model), "weight_decay": 0.0}), or convert with '
            'gain="fixed".',
            UserWarning,
            stacklevel=4,
        )


def _settle(norm: SpectralNorm) -> None:
    del _watched[norm]
    _settled.add(norm)
