"""Which forward a read of a weight belongs to, so that one forward moves a state once.

A layer's own forward may read its weight several times (attention, recurrent layers), and the
modules around it may read it too (a dtype, usually, or to compute with it themselves).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Hashable, Sequence
from types import FrameType

import torch
from torch import Tensor, nn


class Reading:
    """What one forward has read of one weight.

    Attributes:
        values: the normalised weight, by (gradients enabled, inference mode, what tensors are saved
            by): a tensor made without a graph cannot stand in for one with a graph, nor the
            reverse, nor one made outside of a checkpointed region for one made in it.
    """

    __slots__ = ("_like", "_v", "values")

    def __init__(self, like: Reading | None = None) -> None:
        """Begin with nothing, or with the vectors of another reading, once that knows them."""
        self.values: dict[Hashable, Tensor] = {}
        self._v: Tensor | None = None
        self._like = like

    @property
    def v(self) -> Tensor | None:
        """The right singular vectors that the weight was normalised with, once known."""
        return self._v if self._like is None else self._like.v

    @v.setter
    def v(self, v: Tensor) -> None:
        self._v = v


class Forwards:
    """The forwards that read one weight.

    Attributes:
        last_v: the right singular vectors that the last moving read has used, or None.
    """

    def __init__(self) -> None:
        self.last_v: Tensor | None = None
        self._traced: list[tuple[Reading, bool]] = []
        self._shared: Reading | None = None
        self._sharing = 0

    def current(self) -> Reading | None:
        """The reading that a read now belongs to, or None outside of every forward."""
        if self._shared is not None:
            return self._shared
        if torch.compiler.is_compiling():
            return self._traced[-1][0] if self._traced else None
        running = _running.get(threading.get_ident())
        if not running:
            return None
        for forward in reversed(running):
            if self in forward.readings:
                if not forward.is_alive():
                    _forget_the_dead(running)
                    return self.current()
                if forward is running[-1]:
                    return forward.readings[self]
                found = None if self in forward.handed_on else forward.readings[self]
                return self._begun(running, found or Reading())
        return self._begun(running, Reading())

    def _begun(self, running: list[_Forward], reading: Reading) -> Reading:
        """Let the innermost forward have a reading; if the weight is its own, those around too."""
        inner = running[-1]
        inner.readings[self] = reading
        if self in inner.own:
            handed_on = reading
            for forward in reversed(running[:-1]):
                forward.handed_on.add(self)
                forward.readings.setdefault(self, handed_on)
                # Further out the vectors are enough to give the same weight again, and holding all
                # weights of a network until its forward ends would double its memory.
                handed_on = Reading(like=reading)
        return reading

    def share(self, on: bool) -> None:
        """Begin or end a stretch in which all reads, in all threads, are one; stretches nest."""
        self._sharing += 1 if on else -1
        if not self._sharing:
            self._shared = None
        elif self._shared is None:
            self._shared = Reading()

    # Inside a compiled graph there are no frames, and a list for each weight, unlike one for all,
    # lets layers that are alike share their graph.

    def enter_traced(self, *, own: bool) -> None:
        """Begin a forward of the layer itself (`own`) or of the module around it."""
        running = self._traced
        reading = Reading()
        if own and running:
            around, handed_on = running[-1]
            if not handed_on:
                # What the module around has read before this call is the weight of this forward.
                reading = around
                running[-1] = (around, True)
        running.append((reading, False))

    def leave_traced(self) -> None:
        """End what the last `enter_traced` began."""
        if self._traced:
            self._traced.pop()


class _Forward:
    """A running forward of a module that has normalised weights, in it or inside it.

    Attributes:
        module: whose forward it is.
        own: of the module's own weights.
        readings: what it has read.
        handed_on: what a layer inside has had for its own forward: its next one is another.
    """

    __slots__ = ("_frame", "handed_on", "module", "own", "readings")

    def __init__(self, module: nn.Module, own: Sequence[Forwards], frame: FrameType) -> None:
        self.module = module
        self.own = own
        self.readings: dict[Forwards, Reading] = {}
        self.handed_on: set[Forwards] = set()
        self._frame = frame

    def is_alive(self, of: set[FrameType] | None = None) -> bool:
        """Whether it is running still, and was not broken off by a KeyboardInterrupt."""
        if of is not None:
            return self._frame in of
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None


# The running forwards of each thread, innermost last.
_running: dict[int, list[_Forward]] = {}


def begin(module: nn.Module, own: Sequence[Forwards]) -> None:
    """Begin a forward of a module; to be called by a hook on it."""
    _running.setdefault(threading.get_ident(), []).append(_Forward(module, own, sys._getframe(2)))


def end(module: nn.Module) -> None:
    """End what the last `begin` of this module in this thread began, and all inside it."""
    thread = threading.get_ident()
    running = _running.get(thread, [])
    for at in reversed(range(len(running))):
        if running[at].module is module:
            del running[at:]
            break
    if not running:
        _running.pop(thread, None)


def _forget_the_dead(running: list[_Forward]) -> None:
    """Drop forwards that no hook has ended."""
    frames = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        frames.add(frame)
        frame = frame.f_back
    running[:] = [forward for forward in running if forward.is_alive(frames)]
