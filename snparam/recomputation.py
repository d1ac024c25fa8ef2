"""Activation checkpointing: giving a recomputed forward the estimate that it had at first.

`torch.utils.checkpoint` runs a region of a network forward, and in the backward pass once more. The
weights of both runs must agree, but the state has moved in between, by several steps if the region
ran several times before the backward. So each run of a region keeps the singular vectors that it
used, on the object that checkpointing itself keeps for that run, and the recomputation finds them
there.
"""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any
from weakref import ref

import torch
from torch import Tensor

_ATTRIBUTE = "_snparam_vectors"


class _Vectors:
    """What one run of a region used for one weight, in order, and how far it is recomputed."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.repeat: object = None
        self.next = 0


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread: a forward here is recomputed."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def keep(state: object, v: Tensor) -> None:
    """Keep, within a checkpointed region, what a read of a state's weight has used."""
    region, _ = _region()
    if region is not None:
        vectors: dict[int, _Vectors] = region.__dict__.setdefault(_ATTRIBUTE, {})
        vectors.setdefault(id(state), _Vectors()).kept.append(v)


def kept(state: object, last: Tensor | None) -> Tensor | None:
    """Within a recomputation, what the read now being repeated has used.

    Where that is unknown, because some other mechanism recomputes, it is what was used `last`:
    right for one forward in each backward.
    """
    region, repeat = _region()
    vectors: dict[int, _Vectors] = getattr(region, _ATTRIBUTE, {})
    found = vectors.get(id(state))
    if found is None:
        if last is not None:  # a region within a region that is being recomputed
            keep(state, last)
        return last
    if found.repeat is not repeat:  # a region is recomputed once for each backward pass
        found.repeat, found.next = repeat, 0
    v = found.kept[found.next % len(found.kept)]
    found.next += 1
    return v


def _region() -> tuple[Any, object]:
    """The checkpointed run that is going on, or being recomputed, and what tells repeats apart."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None:
        for cell in getattr(inspect.unwrap(hooks[0]), "__closure__", None) or ():
            content = cell.cell_contents
            frame = content() if isinstance(content, ref) else content
            if hasattr(frame, "recompute_fn"):  # not reentrant: the frame that its hooks refer to
                return frame, hooks[0]
    if in_backward() or not torch.is_grad_enabled():
        return _reentrant(), None
    return None, None


def _reentrant() -> Any:
    """The context of the reentrant CheckpointFunction further up the stack, or None.

    Recognised by what it keeps rather than by its class, as other libraries have their own.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("forward", "backward") and "ctx" in code.co_varnames:
            ctx = frame.f_locals.get("ctx")
            if hasattr(ctx, "run_function"):
                return ctx
        frame = frame.f_back
    return None
