"""Activation checkpointing: a recomputed forward uses the estimate that it had at first.

`torch.utils.checkpoint` runs a region of a network forward, and in the backward pass once more. The
weights of both runs must agree, but the state has moved in between, by several steps if the region
ran several times before the backward. So each run of a region keeps the estimates that it used, on
the object that checkpointing itself keeps for that run, and the recomputation finds them there, in
the order in which they were used. Regions nest: what a region within a region uses is kept on both,
for the recomputation of the outer one runs the inner one as if for the first time.

Where those objects are is private to torch; `torch_private` knows it.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from snparam.estimators.estimate import Estimate
from snparam.matrices import torch_private
from snparam.parametrization.frames import outward

_ATTRIBUTE = "_snparam_estimates"


class _Estimates:
    """What one run of a region used for one weight, in order, and how far it is recomputed."""

    def __init__(self) -> None:
        self.kept: list[tuple[Estimate, bool]] = []
        self.backward = -1
        self.next = 0

    def again(self) -> tuple[Estimate, bool]:
        """Return what the read that is now repeated has used."""
        backward = torch_private.backward_pass()
        if self.backward != backward:  # a region is recomputed once for each backward pass
            self.backward, self.next = backward, 0
        entry = self.kept[self.next % len(self.kept)]
        self.next += 1
        return entry


class _Regions(NamedTuple):
    """The checkpointed runs that are going on.

    Attributes:
        running: those that run forward, whether for the first time or not.
        recomputed: the one around them that is being recomputed, or None.
    """

    running: list[Any]
    recomputed: Any


_NO_REGIONS = _Regions([], None)


def in_backward() -> bool:
    """Return whether autograd runs a backward pass in this thread: a forward here is recomputed."""
    return torch_private.backward_pass() != -1


def saved_by() -> Any:
    """Return what autograd saves tensors by, which differs in a checkpointed region and outside."""
    return torch_private.innermost_saved_tensors_hook()


def keep(state: object, estimate: Estimate, at_map: bool, known: list[Any]) -> None:
    """Keep, within checkpointed regions, what a read of a state's weight has used.

    Args:
        state: the SpectralNorm.
        estimate: what it has used.
        at_map: whether at the linear map, which saves other tensors than the weight in use does.
        known: the regions in which the same forward of the layer has kept it already, to which the
            others are added.
    """
    regions = _regions()
    if regions.running:
        _keep(regions, state, (estimate, at_map), known)


def kept(
    state: object, last: Estimate | None, at_map: bool, known: list[Any]
) -> tuple[Estimate | None, bool]:
    """Return, within a recomputation, what the read that is now repeated has used.

    Where that is unknown, because some other mechanism recomputes, it is what was used `last`:
    right for one forward in each backward; and `at_map` as it is given. `known` is as for `keep`.
    """
    regions = _regions()
    estimates: dict[int, _Estimates] = getattr(regions.recomputed, _ATTRIBUTE, {})
    estimate = last
    if id(state) in estimates:
        estimate, at_map = estimates[id(state)].again()
    if estimate is not None:
        _keep(regions, state, (estimate, at_map), known)
    return estimate, at_map


def unseen() -> AbstractContextManager[object]:
    """Return a context in which selective checkpointing neither saves nor replays operations.

    It replays the i-th product of a region with what the i-th product was at first, and a
    recomputation of the weight takes fewer of them.
    """
    if torch_private.dispatch_mode_count() and any(
        map(torch_private.is_selective, torch_private.dispatch_modes())
    ):
        return torch_private.without_dispatch_modes()
    return nullcontext()


@torch_private.constant_while_compiling
def region_around_compilation() -> str | None:
    """Return how a module that is being compiled lies in a checkpointed region, or None.

    "within": the region is in the same graph, whose recomputation repeats everything in it.
    "around": what is compiled was called in a region that runs outside of it.
    """
    for frame in outward(sys._getframe(1)):
        if torch_private.compiles_region(frame):
            return "within"
        if torch_private.reentrant_run(frame) is not None:
            return "around"
    return "around" if any(True for _ in torch_private.checkpointed_runs()) else None


@torch_private.constant_while_compiling
def refuse_in_region(name: str, shape: tuple[int, ...]) -> None:
    """Refuse to compile a training forward that moves a state in a checkpointed region.

    A compiled graph cannot tell its recomputation from a forward, and would move the state again.

    Raises:
        RuntimeError: if what is being compiled lies in such a region.
    """
    region = region_around_compilation()
    if region is not None:
        where = "together with" if region == "within" else "by itself and called in"
        raise RuntimeError(
            f"SpectralNorm on {name} {shape}: it is compiled {where} a region that "
            "torch.utils.checkpoint checkpoints, whose recomputation would move the state again "
            "and use another weight; convert with update='step', whose forwards move nothing, or "
            "leave the region or the module uncompiled"
        )


def _keep(regions: _Regions, state: object, entry: tuple[Estimate, bool], known: list[Any]) -> None:
    for region in regions.running:
        if any(region is other for other in known):
            continue
        known.append(region)
        estimates: dict[int, _Estimates] = region.__dict__.setdefault(_ATTRIBUTE, {})
        estimates.setdefault(id(state), _Estimates()).kept.append(entry)


def _regions() -> _Regions:
    """Return the checkpointed runs that are going on, out to the first that is being recomputed."""
    if saved_by() is None and torch.is_grad_enabled() and not in_backward():
        return _NO_REGIONS
    running: list[Any] = []
    recomputed = None
    for region, is_recomputed in torch_private.checkpointed_runs():
        if is_recomputed:
            recomputed = region
            break
        running.append(region)
    for frame in outward(sys._getframe(1)):
        if recomputed is not None and torch_private.begins_recomputation(frame, recomputed):
            break  # what lies further out is the backward pass that asked for it
        run = torch_private.reentrant_run(frame)
        if run is not None and run[1]:
            return _Regions(running, run[0])
        if run is not None:
            running.append(run[0])
    return _Regions(running, recomputed)
