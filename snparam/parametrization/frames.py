"""What is running: the frames of the interpreter, from one to those that called it."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType


def outward(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame, the one that called it, and so on."""
    while frame is not None:
        yield frame
        frame = frame.f_back
