"""Learned gains and the optimizers that are to train them.

A conversion with `gain="learned"` makes new Parameters. An optimizer that was built before it has
the weights and not the gains, and would leave those where they started without a word. torch does
not say which optimizers there are, but one hook, for all of them, sees each that steps.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from snparam.parametrization.extensions import System, register_system
from snparam.parametrization.find import norm_on, normalised_states, norms_of
from snparam.parametrization.spectral_norm import SpectralNorm


def gain_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the learned gains of a network, each once, in the model's order.

    They are among `model.parameters()` too. An optimizer that was built before the conversion does
    not have them, and takes them by
    `optimizer.add_param_group({"params": snparam.gain_parameters(model), "weight_decay": 0.0})`.

    Args:
        model: a network; without `gain="learned"` it has none, and the list is empty.
    """
    gains: list[Any] = [
        found.norm.gain
        for found in normalised_states(model)
        if found.norm.settings.gain == "learned"
    ]
    return gains


def parameter_groups(model: nn.Module, **for_gains: Any) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: all other parameters, and the learned gains.

        torch.optim.AdamW(snparam.parameter_groups(model, weight_decay=0.0), weight_decay=0.1)

    The options that are passed here hold for the gains alone, and the optimizer's own for all
    others: in the line above the weights decay and the gains do not.

    Args:
        model: a network converted with `gain="learned"`.
        for_gains: options of the gains' group. γ is the norm of a weight: weight decay on it
            shrinks the layer, which is usually not meant.

    Returns:
        Two groups: all other parameters, without options, and the gains, with these.

    Raises:
        ValueError: if the model has no learned gain.
    """
    gains = gain_parameters(model)
    if not gains:
        raise ValueError(
            f"{type(model).__name__} has no learned gain; "
            "convert_model(model, gain='learned') first"
        )
    known = {id(gain) for gain in gains}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [{"params": others}, {"params": gains, **for_gains}]


# Gains that no optimizer has been seen to train yet: the module and tensor that each is for, and
# the optimizers that have trained its weight once without it. And those that are settled.
_unseen: WeakKeyDictionary[SpectralNorm, tuple[ref[nn.Module], str, WeakSet[Optimizer]]] = (
    WeakKeyDictionary()
)
_settled: WeakSet[SpectralNorm] = WeakSet()
_handles: list[object] = []


class _WatchedGains(System):
    def on_attach(self, owner: nn.Module) -> None:
        for name, norm in norms_of(owner):
            if norm.settings.gain == "learned" and norm not in _settled and norm not in _unseen:
                _unseen[norm] = ref(owner), name, WeakSet()
        if _unseen and not _handles:
            # A compiled optimizer step leaves its graph for the hook.
            disable: Any = torch.compiler.disable
            _handles.append(register_optimizer_step_pre_hook(disable(_before_step)))


register_system(_WatchedGains())


def _before_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    """Warn where an optimizer trains a weight again, and nobody its gain.

    Not at its first step: the gains may be in another optimizer, which steps after this one.
    """
    if not _unseen:
        return
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    untrained = []
    for norm, (owner_ref, name, optimizers) in list(_unseen.items()):
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
    del _unseen[norm]
    _settled.add(norm)
