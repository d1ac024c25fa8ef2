"""Telling whether tensors are what they were when something was derived from them."""

from __future__ import annotations

from torch import Tensor


class Fingerprint:
    """The identity of some tensors, and how often each was written to.

    It is the one rule of what is kept between forwards: it may be used while the fingerprint of
    what it was made of matches. Writes that torch does not count, by `.data` and from numpy, it
    does not see, nor those of fused optimizers.
    """

    __slots__ = ("_tensors", "_versions")

    def __init__(self, *tensors: Tensor) -> None:
        """Take the fingerprint of tensors as they are.

        It holds them: another tensor may come to lie where one that is gone was, and torch swaps no
        tensors that somebody refers to weakly.
        """
        self._tensors = tensors
        self._versions = tuple(map(version_of, tensors))

    def matches(self, *tensors: Tensor) -> bool:
        """Return whether these are the same tensors, unchanged since the fingerprint was taken."""
        same = all(one is other for one, other in zip(self._tensors, tensors, strict=True))
        return same and tuple(map(version_of, tensors)) == self._versions


def version_of(tensor: Tensor) -> int | None:
    """Return how often a tensor was written to, or None where torch does not count that."""
    return None if tensor.is_inference() else tensor._version
