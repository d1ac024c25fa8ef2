"""When the state moves: `frozen`, `cached`, and updates once per optimizer step."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from snparam.constraints import cpu
from snparam.constraints.division import without_autocast
from snparam.matrices import linalg
from snparam.matrices.sharded import ShardedStack, is_sharded, steps_together
from snparam.matrices.stacks import Estimate, stack_of
from snparam.parametrization.find import normalised_weights, norms_of
from snparam.parametrization.scopes import without_scopes
from snparam.parametrization.spectral_norm import SpectralNorm

# Matrices of at most this many entries are updated together with others of their shape. Stacking
# copies them, which costs less than an update's operations one by one only while they are small:
# a step on a CPU, and a launch on an accelerator, cost as much as this many entries copied.
_STACKED_ENTRIES = {"cpu": 1 << 14}
_ELSEWHERE = 1 << 21

# On a CPU, fewer than this many are sooner updated one by one: a stack of two 64x64 takes as long
# as four of them, a stack of eight as long as eight.
_WORTH_STACKING = 8


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within it, no forward of the model moves a state of the power iteration.

    Training forwards then use the weights that eval forwards use (with `update="step"`: those of
    the last update, which eval forwards take one step from). For evaluation in training mode,
    probes, and the second network of a gradient penalty. May be nested.

    Raises:
        ValueError: if the model has no weight under SpectralNorm.
    """
    norms = _norms(model, "frozen")
    for norm in norms:
        norm.freeze(True)
    try:
        yield
    finally:
        for norm in norms:
            norm.freeze(False)


@contextmanager
def cached(model: nn.Module) -> Iterator[None]:
    """Within it, each normalised weight is computed once, at its first read, and then reused.

    For inference over many batches, in any number of threads. A weight changed inside goes
    unnoticed. In training mode the state moves at most once, and all forwards share one graph, so
    that they need one common backward. May be nested.

    Raises:
        ValueError: if the model has no weight under SpectralNorm.
    """
    norms = _norms(model, "cached")
    for norm in norms:
        norm.forwards.share(True)
    try:
        with without_scopes(model):
            yield
    finally:
        for norm in norms:
            norm.forwards.share(False)


def update(model: nn.Module) -> None:
    """Move every state with `update="step"` by `num_itrs` steps, on the weights as they are now.

    To be called after each optimizer step; `update_after_step` does it by itself. Layers whose
    weights have the same shape are updated together, as one stack.

    Raises:
        ValueError: if the model has no weight registered with `update="step"`.
    """
    _update_all(_stepwise(model))


@torch.no_grad()
def _update_all(stepwise: list[tuple[SpectralNorm, Tensor]]) -> None:
    groups: dict[Hashable, list[tuple[SpectralNorm, Tensor]]] = {}
    for norm, weight in stepwise:
        groups.setdefault(_company(norm, weight), []).append((norm, weight))
    for group in groups.values():
        _update_together(group)


def update_after_step(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Call `update(model)` after every step of an optimizer, from now on.

    Args:
        optimizer: the one that trains the model, whatever else it trains, or what wraps it and
            has it as `optimizer`, as accelerate's does.
        model: a network converted with `update="step"`.

    All weights move together, whichever the optimizer trains: where several train one model, pass
    the one that steps last.

    Returns:
        A handle; its `remove()` ends it. It does nothing once the model is restored.

    Raises:
        ValueError: if the model has no weight registered with `update="step"`, or the optimizer
            trains none of those weights.
    """
    stepping: Any = optimizer
    while "_optimizer_step_post_hooks" not in vars(stepping) and hasattr(stepping, "optimizer"):
        stepping = stepping.optimizer  # of a wrapper that calls no hooks itself
    trained = {id(parameter) for group in stepping.param_groups for parameter in group["params"]}
    if not any(id(weight) in trained for _, weight in _stepwise(model)):
        raise ValueError(
            f"update_after_step: the {type(optimizer).__name__} trains no weight of "
            f"{type(model).__name__} that is under SpectralNorm; pass the optimizer made of "
            "model.parameters()"
        )

    def after_step(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        _update_all(_find_stepwise(model))  # none once the model is restored

    handle: RemovableHandle = stepping.register_step_post_hook(after_step)
    return handle


def parameter_groups(model: nn.Module, **for_gains: Any) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, with the learned gains in one of their own.

        torch.optim.AdamW(snparam.parameter_groups(model, weight_decay=0.0, lr=1e-4))

    An optimizer that was built before the conversion takes the last of them by
    `optimizer.add_param_group(snparam.parameter_groups(model, weight_decay=0.0)[1])`.

    Args:
        model: a network converted with `gain="learned"`.
        for_gains: options of the gains' group. γ is the norm of a weight: weight decay on it
            shrinks the layer, which is usually not meant.

    Returns:
        Two groups: all other parameters, and the gains.

    Raises:
        ValueError: if the model has no learned gain.
    """
    gains = {
        id(found.norm.gain): found.norm.gain
        for found in normalised_weights(model)
        if found.norm.settings.gain == "learned"
    }
    if not gains:
        raise ValueError(
            f"{type(model).__name__} has no learned gain; "
            "convert_model(model, gain='learned') first"
        )
    others = [parameter for parameter in model.parameters() if id(parameter) not in gains]
    return [{"params": others}, {"params": list(gains.values()), **for_gains}]


def _stepwise(model: nn.Module) -> list[tuple[SpectralNorm, Tensor]]:
    """`_find_stepwise`, of which there has to be one."""
    found = _find_stepwise(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no weight registered with update='step'; "
            "convert_model(model, update='step') first"
        )
    return found


def _find_stepwise(model: nn.Module) -> list[tuple[SpectralNorm, Tensor]]:
    """The different states with `update="step"`, and the Parameter behind each."""
    found = {}
    # Not `modules`, which is slower and goes into every SpectralNorm.
    ahead: list[nn.Module] = [model]
    seen = set()
    while ahead:
        module = ahead.pop()
        children = module._modules
        for child in children.values():
            if child is not None and id(child) not in seen and type(child) is not SpectralNorm:
                seen.add(id(child))
                ahead.append(child)
        for tensor, norm in norms_of(module):
            if norm.settings.update == "step":
                lists: Any = children["parametrizations"]
                found[id(norm)] = (norm, lists[tensor].original)
    return list(found.values())


def _company(norm: SpectralNorm, weight: Tensor) -> Hashable:
    """What states that are updated together have in common."""
    settings = norm.settings
    common = (weight.dtype, weight.device, settings.num_itrs, settings.eps)
    if is_sharded(weight):
        groups = ShardedStack(weight, norm.view, weight.dtype).tile.groups  # type: ignore[arg-type]
        return (*common, *groups)
    if prod(norm.view.matrices) > _STACKED_ENTRIES.get(weight.device.type, _ELSEWHERE):
        return id(norm)
    return (*common, norm.view.matrices, norm.u.shape[1])


def _update_together(group: list[tuple[SpectralNorm, Tensor]]) -> None:
    """One update for states that are alike as `_company` tells."""
    _, weight = group[0]
    with without_autocast(weight):
        if not all(norm.is_one_number(weight) for norm, weight in group):
            _update_stacks(group)
        elif len(group) >= _WORTH_STACKING:
            _update_matrices(group)
        else:
            for norm, weight in group:
                norm.update_by_numbers(weight)


def _update_stacks(group: list[tuple[SpectralNorm, Tensor]]) -> None:
    """One update for any states that are alike, each with one block or several."""
    settings = group[0][0].settings
    stacks = [stack_of(weight.detach(), norm.view) for norm, weight in group]
    us = [norm.u.to(stack.dtype) for (norm, _), stack in zip(group, stacks, strict=True)]
    for _ in range(settings.num_itrs):
        found = _steps(stacks, us, settings.eps)
        us = [u for u, _, _ in found]
    _store(group, [x for step in found for x in step])
    for (norm, weight), step in zip(group, found, strict=True):
        norm.note_update(weight, Estimate(*step))


def _update_matrices(group: list[tuple[SpectralNorm, Tensor]]) -> None:
    """One update for states that are alike, where `is_one_number`."""
    settings = group[0][0].settings
    matrices = torch.stack([norm.derived.matrix_of(w, norm.view).matrix for norm, w in group])
    u = torch.cat([norm.stored().u for norm, _ in group]).to(matrices.dtype)
    for _ in range(settings.num_itrs):
        u, v, sv = linalg.power_step(matrices, u, settings.eps)
    parts = zip(*(torch.split(part, 1) for part in (u, v, sv)), strict=True)
    _store(group, [x for part in parts for x in part])
    vectors = u.squeeze(1).unbind(), v.squeeze(1).unbind()
    for (norm, weight), sigma, t, x in zip(group, sv.squeeze(1).tolist(), *vectors, strict=True):
        norm.note_update(weight, cpu.Step(sigma, t, x, size=1.0, length=1.0))


def _store(group: list[tuple[SpectralNorm, Tensor]], found: list[Tensor]) -> None:
    """Write u, v and sv of each state into its buffers, at once on accelerators."""
    torch._foreach_copy_([buffer for norm, _ in group for buffer in norm.stored()], found)


def _steps(
    stacks: list[Tensor | ShardedStack], us: list[Tensor], eps: float
) -> list[tuple[Tensor, Tensor, Tensor]]:
    sharded = [stack for stack in stacks if isinstance(stack, ShardedStack)]
    if sharded:
        return steps_together(sharded, us, eps)
    dense = [stack for stack in stacks if isinstance(stack, Tensor)]
    if len(dense) == 1:
        return [linalg.power_step(dense[0], us[0], eps)]
    found = linalg.power_step(torch.cat(dense), torch.cat(us), eps)
    parts = [torch.split(part, dense[0].shape[0]) for part in found]
    return list(zip(*parts, strict=True))


def _norms(model: nn.Module, what: str) -> list[SpectralNorm]:
    norms = list({id(found.norm): found.norm for found in normalised_weights(model)}.values())
    if not norms:
        raise ValueError(
            f"{what}: {type(model).__name__} has no weight under SpectralNorm; convert_model first"
        )
    return norms
