"""`update="step"`: states move once after each step of an optimizer, all of them together.

Two hooks for all optimizers are registered with torch when the first such state is attached.
Only a hook sees every step: fused optimizers leave a weight's version counter alone, and comparing
values would wait for the device. The hooks look up the Parameter behind each state at the time of
the step, because wrappers replace Parameters.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import count
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from snparam.constraints.division import without_autocast
from snparam.estimators.estimate import ESTIMATORS
from snparam.matrices import torch_private
from snparam.matrices.sharded import ShardedStack, is_sharded
from snparam.matrices.stacks import stack_of
from snparam.parametrization.arguments import check_model
from snparam.parametrization.find import normalised_states
from snparam.parametrization.spectral_norm import CERTIFIED, STEPWISE, SpectralNorm

# Weights of at most this many entries, by device type (`_OTHER_STACKED_ENTRIES` for all other
# types), are moved together with others of their shape. Stacking copies them, which costs less than
# the operations of a step for each of them only while they are small: a step on a CPU, and a launch
# on an accelerator, cost as much as copying this many entries.
_STACKED_ENTRIES = {"cpu": 1 << 14}
_OTHER_STACKED_ENTRIES = 1 << 21

# The time at which each optimizer began its step, by a clock that counts, and the handles of the
# hooks. They are global because torch's optimizers do not know the modules that they train.
_step_starts: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
_clock = count()
_handles: list[object] = []


def watch_optimizers() -> None:
    """Register the hooks by which the steps of all optimizers move states, if they are not yet."""
    if not _handles:
        # A compiled optimizer step leaves its graph for the hooks.
        disable: Any = torch.compiler.disable
        pre_hook, post_hook = disable(_before_step), disable(_after_step)
        _handles.append(register_optimizer_step_pre_hook(pre_hook))
        _handles.append(register_optimizer_step_post_hook(post_hook))


def update(model: nn.Module) -> None:
    """Move every state with `update="step"` by `num_itrs` steps, on the weights as they are now.

    A step of one of torch's optimizers does this by itself. Call it after writes that torch does
    not count, by `.data` or from numpy, to weights that an optimizer trains.

    Args:
        model: a network with weights that were registered with `update="step"`.

    Raises:
        ValueError: if the model has no weight registered with `update="step"`.
        TypeError: if `model` is no module.
    """
    check_model(model, "update")
    pairs = [
        (weight.norm, weight.original)
        for weight in normalised_states(model)
        if weight.norm.settings.update == "step"
    ]
    if not pairs:
        raise ValueError(
            f"{type(model).__name__} has no weight registered with update='step'; "
            "convert_model(model, update='step') first"
        )
    _move_all(pairs)


def _before_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    _end_certificates()  # a step that raises has written to some weights, and has no end
    if STEPWISE:
        _step_starts[optimizer] = next(_clock)


def _after_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    _end_certificates()
    if not STEPWISE:
        return
    start = _step_starts.pop(optimizer, -1)
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    due = []
    for norm in list(STEPWISE):
        original = next((p for p in norm.originals() if id(p) in stepped), None)
        if original is None:
            continue
        if is_sharded(original) and norm.needs_whole_weight:
            # No rank has the whole weight. FSDP2 gathers it for the forwards, which go on
            # moving a state that trusts no hook.
            continue
        # Optimizers nest: a state that an inner one has moved in this step is up to date, unless
        # its weight has changed since.
        if not norm.is_up_to_date_since(start, original):
            due.append((norm, original))
    _move_all(due)


def _end_certificates() -> None:
    """End all certificates: the weights may be others' now, whom no state knows."""
    for norm in list(CERTIFIED):
        norm.end_certificate()
    CERTIFIED.clear()


@torch.no_grad()
def _move_all(pairs: Iterable[tuple[SpectralNorm, Tensor]]) -> None:
    """Move states on their weights, one group after another, and let them trust the hooks."""
    groups: dict[Hashable, list[tuple[SpectralNorm, Tensor]]] = {}
    for norm, weight in sorted(pairs, key=lambda pair: pair[0].number):
        groups.setdefault(_group_key(norm, weight), []).append((norm, weight))
    now = next(_clock)
    for group in groups.values():
        _move_together(group)
        for norm, _ in group:
            norm.trust_hooks(now)


def _group_key(norm: SpectralNorm, weight: Tensor) -> Hashable:
    """Return a key by which states are grouped: those with equal keys are moved together."""
    settings = norm.settings
    common = (weight.dtype, weight.device, settings.num_itrs, settings.eps, settings.sigma)
    if is_sharded(weight):
        groups = ShardedStack(weight, norm.view.entries, weight.dtype).tile.groups  # type: ignore[arg-type]
        return (*common, *groups)
    most_entries = _STACKED_ENTRIES.get(weight.device.type, _OTHER_STACKED_ENTRIES)
    if not norm.view.is_dense or prod(norm.view.matrices) > most_entries:
        return id(norm)
    return (*common, norm.view.matrices, norm.u.shape[1])


def _move_together(group: list[tuple[SpectralNorm, Tensor]]) -> None:
    """Move the states of one group, on their weights, and store what was found."""
    settings, (_, weight) = group[0][0].settings, group[0]
    with without_autocast(weight):
        stacks = [stack_of(weight.detach(), norm.view) for norm, weight in group]
        us = [norm.u.to(stack.dtype) for (norm, _), stack in zip(group, stacks, strict=True)]
        estimator = ESTIMATORS[settings.sigma]
        estimates = estimator.move(stacks, us, settings.num_itrs, settings.eps)
        if estimator.side == "above":
            estimates = [
                norm.certify(weight, stack, estimate)
                for (norm, weight), stack, estimate in zip(group, stacks, estimates, strict=True)
            ]
        buffers: list[Tensor] = []
        values: list[Tensor] = []
        for (norm, _), estimate in zip(group, estimates, strict=True):
            buffers += norm.state_buffers()
            values += estimate[:3]
        torch_private.copy_each(buffers, values)
        for (norm, weight), estimate in zip(group, estimates, strict=True):
            norm.note_estimate(weight, estimate)
