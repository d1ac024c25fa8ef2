"""Which forward a read of a weight belongs to, so that one forward moves a state once.

A layer's own forward may read its weight several times (attention, recurrent layers), and the
modules around it may read it too (a dtype, usually, or to compute with it themselves).

What happens here happens for every layer in every forward, between large products that have pushed
everything else out of the processor's caches: each Python object that is touched costs.
"""

from __future__ import annotations

import sys
from itertools import count
from threading import get_ident
from types import FrameType
from typing import Any

from torch import Tensor, nn


class Reading:
    """What one forward has read of one weight.

    Attributes:
        values: the normalised weight, by whether gradients are enabled, inference mode, what
            tensors are saved by, and whether it is sharded: one made without a graph cannot stand
            in for one with a graph, nor the reverse, nor one made outside of a checkpointed region
            for one made in it.
        v: the right singular vectors that the weight was normalised with, once known.
        taken: whether a layer's own forward has had it: its next one is another.
    """

    __slots__ = ("taken", "v", "values")

    def __init__(self, v: Tensor | None = None, *, taken: bool = False) -> None:
        """Begin with nothing, or with the vectors that an earlier read has used."""
        self.values: dict[object, Tensor] = {}
        self.v = v
        self.taken = taken


class Forwards:
    """The forwards that read one weight.

    Attributes:
        last_v: the right singular vectors that the last moving read has used, or None.
        shared: the one reading that all reads are now, or None.
    """

    def __init__(self) -> None:
        self.last_v: Tensor | None = None
        self._moved_in: tuple[int, int] | None = None
        self._is_read_around = False
        self._traced: list[tuple[Reading, bool]] = []
        self.shared: Reading | None = None
        self._sharing = 0

    def current(self, state: nn.Module, owner: nn.Module | None = None) -> Reading | None:
        """The reading that a read now belongs to, or None outside of every forward.

        Args:
            state: the SpectralNorm of the weight, by which the layers whose own it is are known.
            owner: the layer that it is read from, where that is known.
        """
        if self.shared is not None:
            return self.shared
        forward = _running.get(get_ident())
        if forward is not None and forward.frame is not None:
            forward = _innermost()
        if forward is None:
            return None
        reading = forward.readings.get(self)
        if reading is None:
            if forward.module is owner and not self._is_read_around and not self._traced:
                reading = Reading()
            elif forward.module is owner or _has(forward.module, state):
                reading = self._taken(forward)
            else:
                reading = self._of_another(forward)
            forward.readings[self] = reading
        return reading

    def _taken(self, forward: _Forward) -> Reading:
        """The reading of a layer's own forward."""
        around = self._read_around(forward)
        if around is None and self._traced:
            around = self._handed_on()
        if around is None or around.taken:
            return Reading()
        # What a module around has read before this call is the weight of this forward.
        around.taken = True
        return around

    def _of_another(self, forward: _Forward) -> Reading:
        """The reading of a forward of a module around the layer."""
        self._is_read_around = True
        if self._has_moved_in(forward):
            return Reading(self.last_v, taken=True)
        around = self._read_around(forward)
        return Reading() if around is None or around.taken else around

    def _handed_on(self) -> Reading | None:
        """What a compiled forward has read that calls the layer where no compiler looks."""
        around, handed_on = self._traced[-1]
        self._traced[-1] = (around, True)
        return None if handed_on else around

    def moved(self, v: Tensor) -> None:
        """Note that a read moves the state, and the vectors it uses."""
        self.last_v = v
        forward = _running.get(get_ident())
        self._moved_in = None if forward is None else (get_ident(), forward.number)

    def _read_around(self, forward: _Forward) -> Reading | None:
        """What the nearest forward around another has read of the weight itself."""
        around = forward.around
        while around is not None:
            if self in around.readings and around.is_alive():
                return around.readings[self]
            around = around.around
        return None

    def _has_moved_in(self, forward: _Forward) -> bool:
        """Whether the state has moved within a running forward."""
        if self._moved_in is None:
            return False
        thread, number = self._moved_in
        return thread == get_ident() and number > forward.number

    def share(self, on: bool) -> None:
        """Begin or end a stretch in which all reads, in all threads, are one; stretches nest."""
        self._sharing += 1 if on else -1
        if not self._sharing:
            self.shared = None
        elif self.shared is None:
            self.shared = Reading()

    # Inside a compiled graph there are no frames, and a list for each weight, unlike one for all,
    # lets layers that are alike share their graph.

    def current_traced(self) -> Reading | None:
        """`current` inside a compiled graph."""
        if self.shared is not None:
            return self.shared
        return self._traced[-1][0] if self._traced else None

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
            reading, _ = self._traced.pop()
            # The module around may have the same reading, whose vectors are enough to give the same
            # weight again; tensors held where a graph ends would be outputs of it.
            reading.values.clear()


class _Forward:
    """A running forward of a module that has normalised weights, in it or inside it.

    Attributes:
        module: whose forward it is.
        around: the running forward around it in the same thread, or None.
        number: later forwards have higher ones.
        readings: what it has read.
        frame: what it runs in, where it may be broken off without an end.
    """

    __slots__ = ("around", "frame", "module", "number", "readings")

    def __init__(self, module: nn.Module, around: _Forward | None, frame: FrameType | None) -> None:
        self.module = module
        self.around = around
        self.number = next(_numbers)
        self.readings: dict[Forwards, Reading] = {}
        self.frame = frame

    def is_alive(self) -> bool:
        """Whether it is running still, and was not broken off by a KeyboardInterrupt."""
        if self.frame is None:
            return True
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None


_numbers = count()

# The innermost running forward of each thread.
_running: dict[int, _Forward] = {}


def begin(module: nn.Module, *, by_hook: bool = False) -> None:
    """Begin a forward of a module.

    Args:
        module: whose forward it is.
        by_hook: whether a hook on it calls this: a KeyboardInterrupt skips the hook that would call
            `end`.
    """
    thread = get_ident()
    frame = sys._getframe(2) if by_hook else None
    _running[thread] = _Forward(module, _running.get(thread), frame)


def end(module: nn.Module) -> None:
    """End what the last `begin` of this module in this thread began, and all inside it."""
    thread = get_ident()
    forward = _running.get(thread)
    while forward is not None and forward.module is not module:
        forward = forward.around
    if forward is not None:
        _become_innermost(thread, forward.around)


def _innermost() -> _Forward | None:
    """The innermost forward that is running in this thread."""
    thread = get_ident()
    forward = _running.get(thread)
    while forward is not None and not forward.is_alive():
        forward = forward.around
        _become_innermost(thread, forward)
    return forward


def _become_innermost(thread: int, forward: _Forward | None) -> None:
    if forward is None:
        del _running[thread]
    else:
        _running[thread] = forward


def _has(module: nn.Module, state: nn.Module) -> bool:
    """Whether a state is that of one of a module's own weights."""
    lists: Any = module._modules.get("parametrizations")
    for parts in () if lists is None else lists._modules.values():
        for part in parts._modules.values():
            if part is state:
                return True
    return False
