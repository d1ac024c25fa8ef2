"""Activation checkpointing: giving a recomputed forward the estimate that it had at first.

`torch.utils.checkpoint` runs a region of a network forward, and in the backward pass once more. The
weights of both runs must agree, but the state has moved in between, by several steps if the region
ran several times before the backward. So each run of a region keeps the singular vectors that it
used, on the object that checkpointing itself keeps for that run, and the recomputation finds them
there. Regions nest: what a region within a region uses is kept on both, for the recomputation of
the outer one runs the inner one as if for the first time.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snparam.parametrization.frames import outward

_ATTRIBUTE = "_snparam_vectors"

# The modes by which selective checkpointing saves some operations and replays them.
_SELECTIVE = ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")


class _Vectors:
    """What one run of a region used for one weight, in order, and how far it is recomputed."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.backward = -1
        self.next = 0

    def again(self) -> Tensor:
        """What the read now being repeated has used."""
        backward = torch._C._current_graph_task_id()
        if self.backward != backward:  # a region is recomputed once for each backward pass
            self.backward, self.next = backward, 0
        v = self.kept[self.next % len(self.kept)]
        self.next += 1
        return v


class _Regions(NamedTuple):
    """The checkpointed runs that are going on.

    Attributes:
        running: those that run forward, whether for the first time or not.
        recomputed: the one around them that is being recomputed, or None.
    """

    running: list[Any]
    recomputed: Any


_NO_REGIONS = _Regions([], None)

_task: Any = torch._C._current_graph_task_id
_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread: a forward here is recomputed."""
    task: int = _task()
    return task != -1


def saved_by() -> Any:
    """What autograd saves tensors by, which is not the same in a checkpointed region as outside."""
    hooks: Any = _hooks(True)
    return None if hooks is None else hooks[0]


def keep(state: object, v: Tensor) -> None:
    """Keep, within checkpointed regions, what a read of a state's weight has used."""
    regions = _regions()
    if regions.running:
        _keep(regions, state, v)


def kept(state: object, last: Tensor | None) -> Tensor | None:
    """Within a recomputation, what the read now being repeated has used.

    Where that is unknown, because some other mechanism recomputes, it is what was used `last`:
    right for one forward in each backward.
    """
    regions = _regions()
    vectors: dict[int, _Vectors] = getattr(regions.recomputed, _ATTRIBUTE, {})
    v = vectors[id(state)].again() if id(state) in vectors else last
    if v is not None:
        _keep(regions, state, v)
    return v


def unseen() -> AbstractContextManager[object]:
    """A context in which selective checkpointing neither saves nor replays operations.

    It replays the i-th product of a region with what the i-th product was at first, and a
    recomputation of the weight takes fewer of them.
    """
    if torch._C._len_torch_dispatch_stack():
        from torch.utils import _python_dispatch as modes

        stack = modes._get_current_dispatch_mode_stack()
        if any(type(mode).__name__ in _SELECTIVE for mode in stack):
            return modes._disable_current_modes()
    return nullcontext()


def held(u: Tensor, v: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same u (b, m), v (b, n) and σ (b,), kept by a compiler for the backward pass.

    A compiler recomputes what is cheap rather than keep it, here a step, in the backward pass: from
    the buffer, which by then has moved on (github.com/pytorch/pytorch/pull/197039). Concatenations
    it always keeps.
    """
    both = torch.cat([u, v, sigma[:, None].to(u.dtype)], 1)
    rows = u.shape[1]
    return both[:, :rows], both[:, rows:-1], both[:, -1].real


def refuse_in_region(name: str, shape: tuple[int, ...]) -> None:
    """Refuse to compile a training forward that moves a state inside a checkpointed region.

    A compiled graph cannot tell its recomputation from a forward, and would move the state again.

    Raises:
        RuntimeError: if what is being compiled was called in a region that runs outside of it.
    """
    if any(_region_of(frame) is not None for frame in outward(sys._getframe(1))):
        raise RuntimeError(
            f"SpectralNorm on {name} {shape}: a module that torch.compile compiles is called in a "
            "region that torch.utils.checkpoint checkpoints outside of it, whose recomputation "
            "would move the state again and use another weight; convert with update='step', whose "
            "forwards move nothing, or compile the network around the region"
        )


# What `torch.compiler.assume_constant_result` does: it runs once, while the compiler looks.
refuse_in_region._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _keep(regions: _Regions, state: object, v: Tensor) -> None:
    for region in regions.running:
        vectors: dict[int, _Vectors] = region.__dict__.setdefault(_ATTRIBUTE, {})
        known = vectors.setdefault(id(state), _Vectors()).kept
        if all(v is not other for other in known):  # one forward may compute its weight twice
            known.append(v)


def _regions() -> _Regions:
    """The checkpointed runs further up the stack, out to the first that is being recomputed."""
    hook = saved_by()
    if hook is None and torch.is_grad_enabled() and not in_backward():
        return _NO_REGIONS
    running: list[Any] = []
    for frame in outward(sys._getframe(1)):
        region = _region_of(frame)
        if region is not None:
            if frame.f_code.co_name in ("backward", "unpack_hook"):
                return _Regions(running, region)
            running.append(region)
    region = _of_hook(hook)
    if region is not None and all(region is not other for other in running):
        running.append(region)
    return _Regions(running, None)


def _region_of(frame: FrameType) -> Any:
    """The object of the run that a function of torch.utils.checkpoint has begun or repeats.

    Functions are recognised by their names, and the objects by what they have rather than by their
    classes, as other libraries have the like of their own.
    """
    name, variables = frame.f_code.co_name, frame.f_code.co_varnames
    if name in ("forward", "backward") and "ctx" in variables:  # of CheckpointFunction, reentrant
        return _with("run_function", frame.f_locals.get("ctx"))
    if name == "checkpoint" and "gen" in variables:  # not reentrant: begun in a generator
        begun = getattr(frame.f_locals.get("gen"), "gi_frame", None)
        return _with("recompute_fn", None if begun is None else begun.f_locals.get("new_frame"))
    if name == "unpack_hook":
        return _with("recompute_fn", frame.f_locals.get("frame"))
    return None


def _of_hook(hook: Any) -> Any:
    """The same where a module's hooks have begun it, from how tensors are saved."""
    cells = getattr(inspect.unwrap(hook), "__closure__", None) or ()
    found = [_with("recompute_fn", cell.cell_contents) for cell in cells]
    return next((region for region in found if region is not None), None)


def _with(attribute: str, region: Any) -> Any:
    return region if hasattr(region, attribute) else None
