"""Which forward a read of a weight belongs to, so that one forward moves a state once.

A layer's own forward may read its weight several times (attention, recurrent layers), and the
module around it may read it too (a dtype, usually, or to compute with it itself).
"""

from __future__ import annotations

import threading
from collections.abc import Hashable

import torch
from torch import Tensor


class Reading:
    """What one forward has read of one weight.

    Attributes:
        values: the normalised weight, by (gradients enabled, inference mode, what tensors are saved
            by): a tensor made without a graph cannot stand in for one with a graph, nor the
            reverse, nor one made outside of a checkpointed region for one made in it.
        v: the right singular vectors that it was normalised with, once known.
    """

    __slots__ = ("v", "values")

    def __init__(self) -> None:
        self.values: dict[Hashable, Tensor] = {}
        self.v: Tensor | None = None


class Forwards:
    """The running forwards that may read one weight, innermost last, for each thread.

    Attributes:
        last_v: the right singular vectors that the last moving read has used, or None.
    """

    def __init__(self) -> None:
        self.last_v: Tensor | None = None
        self._running: dict[int, list[tuple[Reading, bool]]] = {}
        self._shared: Reading | None = None
        self._sharing = 0

    def current(self) -> Reading | None:
        """The reading that a read now belongs to, or None outside of every forward."""
        if self._shared is not None:
            return self._shared
        running = self._running.get(_thread())
        return running[-1][0] if running else None

    def enter(self, *, own: bool) -> None:
        """Begin a forward of the layer itself (`own`) or of the module around it."""
        running = self._running.setdefault(_thread(), [])
        reading = Reading()
        if own and running:
            around, handed_on = running[-1]
            if not handed_on:
                # What the module around has read before this call is the weight of this forward.
                reading = around
                running[-1] = (around, True)
        running.append((reading, False))

    def leave(self) -> None:
        """End what the last `enter` of this thread began."""
        thread = _thread()
        running = self._running.get(thread)
        if running:
            running.pop()
            if not running:
                del self._running[thread]

    def share(self, on: bool) -> None:
        """Begin or end a stretch in which all reads, in all threads, are one; stretches nest."""
        self._sharing += 1 if on else -1
        if not self._sharing:
            self._shared = None
        elif self._shared is None:
            self._shared = Reading()


def _thread() -> int:
    # Inside a compiled graph there is one thread, and asking for its number would break the graph.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
