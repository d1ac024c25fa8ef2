"""Activation checkpointing: a recomputed forward uses the estimates of the first forward.

`torch.utils.checkpoint` runs a region of a network in the forward pass, and again in the backward
pass. Both runs must use the same weights, but the state has moved in between, by several steps if
the region ran several times before the backward. Each run of a region therefore keeps the estimates
that it used, on the object that checkpointing itself keeps for that run, and the recomputation
reads them from there, in the order in which they were used. Regions nest: an estimate that is used
in an inner region is kept for the outer one as well, because a recomputation of the outer region
runs the inner one as if for the first time.

Where torch keeps those objects is private to it; `torch_private` finds them.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import is_grad_enabled

from snparam.estimators.estimate import Estimate
from snparam.matrices import torch_private
from snparam.parametrization.frames import outward

_ATTRIBUTE = "_snparam_estimates"


class _Estimates:
    """The estimates that one run of a region used for one weight, in order, and the next to repeat.

    Attributes:
        entries: each estimate, and whether σ was applied at the linear map.
        backward: torch's number of the backward pass that recomputes the run, -1 before any.
        position: how many reads that backward pass has repeated.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[Estimate, bool]] = []
        self.backward = -1
        self.position = 0

    def next_entry(self) -> tuple[Estimate, bool]:
        """Return the entry of the read that is now repeated, and advance to the next."""
        backward = torch_private.backward_pass()
        if self.backward != backward:  # a region is recomputed once for each backward pass
            self.backward, self.position = backward, 0
        entry = self.entries[self.position % len(self.entries)]
        self.position += 1
        return entry


class _Regions(NamedTuple):
    """The checkpointed runs in which the current code executes.

    Attributes:
        running: the runs that are in their forward; within a recomputation, those that it starts.
        recomputed: the innermost run that is being recomputed, or None.
    """

    running: list[Any]
    recomputed: Any


def in_backward() -> bool:
    """Return whether this thread runs a backward pass, in which a forward is a recomputation."""
    return torch_private.backward_pass() != -1


def saved_tensors_hook() -> Any:
    """Return the innermost hook that packs saved tensors: each checkpointed region has another."""
    return torch_private.innermost_saved_tensors_hook()


def keep_estimate(
    state: object, estimate: Estimate, at_map: bool, holding_regions: list[Any]
) -> None:
    """Keep the estimate that a read used, for recomputations of the checkpointed regions around it.

    Args:
        state: the SpectralNorm whose weight was read.
        estimate: the estimate that the read used.
        at_map: whether the read applied σ at the linear map, which saves other tensors for backward
            than computing the weight in use does.
        holding_regions: the regions in which the same forward of the layer has kept it already;
            those that keep it now are appended.
    """
    if saved_tensors_hook() is None and is_grad_enabled() and not in_backward():
        return  # no region runs: most reads are over here
    regions = _regions()
    if regions.running:
        _keep_entry(regions, state, (estimate, at_map), holding_regions)


def repeated_estimate(
    state: object, last: Estimate | None, at_map: bool, holding_regions: list[Any]
) -> tuple[Estimate | None, bool]:
    """Return, within a recomputation, the estimate and the form that the repeated read used.

    Both are unknown where a mechanism other than torch's recomputes. The estimate is then `last`,
    which is right for one forward in each backward, and the form is `at_map` as given.

    Args:
        state: the SpectralNorm whose weight is read.
        last: the estimate of its last training forward, or None.
        at_map: whether σ could be applied at the linear map now.
        holding_regions: as for `keep_estimate`: regions that are in their forward again keep the
            estimate once more.

    Returns:
        the estimate, or None if none is known, and whether to apply σ at the linear map.
    """
    regions = _regions()
    estimates: dict[int, _Estimates] = getattr(regions.recomputed, _ATTRIBUTE, {})
    estimate = last
    if id(state) in estimates:
        estimate, at_map = estimates[id(state)].next_entry()
    if estimate is not None:
        _keep_entry(regions, state, (estimate, at_map), holding_regions)
    return estimate, at_map


def without_selective_checkpointing() -> AbstractContextManager[object]:
    """Return a context in which selective checkpointing neither saves nor replays operations.

    It replays the i-th product of a region with the result that the i-th product had in the first
    run, and a recomputation of a weight takes fewer products than its first computation.
    """
    if torch_private.dispatch_mode_count() and any(
        map(torch_private.is_selective, torch_private.dispatch_modes())
    ):
        return torch_private.without_dispatch_modes()
    return nullcontext()


@torch_private.constant_while_compiling
def region_around_compilation() -> str | None:
    """Return how a checkpointed region encloses the module that is being compiled, or None.

    "within": the region is in the same graph, whose recomputation repeats everything in it.
    "around": the region runs outside of the graph, and the compiled module was called in it.
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

    Args:
        name: name of the weight, for the error.
        shape: shape of the weight, for the error.

    Raises:
        RuntimeError: if the module that is being compiled lies in such a region.
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


def _keep_entry(
    regions: _Regions, state: object, entry: tuple[Estimate, bool], holding_regions: list[Any]
) -> None:
    for region in regions.running:
        if any(region is held for held in holding_regions):
            continue
        holding_regions.append(region)
        estimates: dict[int, _Estimates] = region.__dict__.setdefault(_ATTRIBUTE, {})
        estimates.setdefault(id(state), _Estimates()).entries.append(entry)


def _regions() -> _Regions:
    """Return the runs around the current code, out to the first that is being recomputed."""
    running: list[Any] = []
    recomputed = None
    for region, is_recomputed in torch_private.checkpointed_runs():
        if is_recomputed:
            recomputed = region
            break
        running.append(region)
    for frame in outward(sys._getframe(1)):
        if recomputed is not None and torch_private.begins_recomputation(frame, recomputed):
            break  # frames further out belong to the backward pass that started it
        run = torch_private.reentrant_run(frame)
        if run is not None and run[1]:
            return _Regions(running, run[0])
        if run is not None:
            running.append(run[0])
    return _Regions(running, recomputed)
