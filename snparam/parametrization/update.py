"""`update="step"`: states move once after each step of an optimizer, all of them together.

Two hooks are registered with torch, for all optimizers, when the first such state is made: fused
optimizers leave a weight's version counter alone, and comparing values would wait for the
device, so that nothing else tells every change. They look for the Parameter that each state is on
at the time of the step, because wrappers replace Parameters.
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
from snparam.parametrization.find import normalised_states
from snparam.parametrization.spectral_norm import STEPWISE, SpectralNorm

# Matrices of at most this many entries are moved together with others of their shape. Stacking
# copies them, which costs less than a step's operations one by one only while they are small: a
# step on a CPU, and a launch on an accelerator, cost as much as this many entries copied.
_STACKED_ENTRIES = {"cpu": 1 << 14}
_ELSEWHERE = 1 << 21

# When each optimizer began its step, and the hooks: global, because torch's optimizers do not know
# the modules that they train.
_began: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
_clock = count()
_handles: list[object] = []


def watch_optimizers() -> None:
    """Let the steps of all optimizers move states, from now on."""
    if not _handles:
        # A compiled optimizer step leaves its graph for the hooks.
        disable: Any = torch.compiler.disable
        before, after = disable(_before_step), disable(_after_step)
        _handles.append(register_optimizer_step_pre_hook(before))
        _handles.append(register_optimizer_step_post_hook(after))


def update(model: nn.Module) -> None:
    """Move every state with `update="step"` by `num_itrs` steps, on the weights as they are now.

    torch's optimizers do this by themselves. It is left to you after writes that nobody can see,
    by `.data` or from numpy, to weights that an optimizer trains.

    Raises:
        ValueError: if the model has no weight registered with `update="step"`.
    """
    found = [
        (weight.norm, weight.original)
        for weight in normalised_states(model)
        if weight.norm.settings.update == "step"
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no weight registered with update='step'; "
            "convert_model(model, update='step') first"
        )
    _move_all(found)


def _before_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    if STEPWISE:
        _began[optimizer] = next(_clock)


def _after_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    if not STEPWISE:
        return
    began = _began.pop(optimizer, -1)
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    due = []
    for norm in list(STEPWISE):
        original = next((one for one in norm.originals() if id(one) in stepped), None)
        # Optimizers nest: what an inner one has moved, and nobody has changed since, is up to date.
        if original is not None and not (norm.moved_at > began and norm.knows(original)):
            due.append((norm, original))
    _move_all(due)


@torch.no_grad()
def _move_all(pairs: Iterable[tuple[SpectralNorm, Tensor]]) -> None:
    """Move states on their weights, those that are alike together, and let them trust the hooks."""
    groups: dict[Hashable, list[tuple[SpectralNorm, Tensor]]] = {}
    for norm, weight in sorted(pairs, key=lambda pair: pair[0].number):
        groups.setdefault(_company(norm, weight), []).append((norm, weight))
    now = next(_clock)
    for group in groups.values():
        _move_together(group)
        for norm, _ in group:
            norm.trust(now)


def _company(norm: SpectralNorm, weight: Tensor) -> Hashable:
    """Return what states that are moved together have in common."""
    settings = norm.settings
    common = (weight.dtype, weight.device, settings.num_itrs, settings.eps, settings.sigma)
    if is_sharded(weight):
        groups = ShardedStack(weight, norm.view, weight.dtype).tile.groups  # type: ignore[arg-type]
        return (*common, *groups)
    if prod(norm.view.matrices) > _STACKED_ENTRIES.get(weight.device.type, _ELSEWHERE):
        return id(norm)
    return (*common, norm.view.matrices, norm.u.shape[1])


def _move_together(group: list[tuple[SpectralNorm, Tensor]]) -> None:
    settings, (_, weight) = group[0][0].settings, group[0]
    with without_autocast(weight):
        stacks = [stack_of(weight.detach(), norm.view) for norm, weight in group]
        us = [norm.u.to(stack.dtype) for (norm, _), stack in zip(group, stacks, strict=True)]
        found = ESTIMATORS[settings.sigma].move(stacks, us, settings.num_itrs, settings.eps)
        buffers: list[Tensor] = []
        values: list[Tensor] = []
        for (norm, _), estimate in zip(group, found, strict=True):
            buffers += norm.stored()
            values += estimate[:3]
        torch_private.copy_each(buffers, values)
        for (norm, weight), estimate in zip(group, found, strict=True):
            norm.know(weight, estimate)
