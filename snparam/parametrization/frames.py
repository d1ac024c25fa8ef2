"""Frames of the Python interpreter, from one of them out to its callers."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType


def outward(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame, the frame that called it, and so on to the outermost."""
    while frame is not None:
        yield frame
        frame = frame.f_back
