"""Fingerprints of tensors, which tell a change since something was derived from them."""

from __future__ import annotations

from torch import Tensor


class Fingerprint:
    """The identities of some tensors, and torch's counts of the writes to each.

    All that snparam keeps between forwards follows one rule: it may be used while the fingerprint
    of the tensors it was derived from matches. A fingerprint does not see the writes that torch
    does not count: those by `.data`, from numpy, and of fused optimizers.
    """

    __slots__ = ("_tensors", "_versions")

    def __init__(self, *tensors: Tensor) -> None:
        """Take the fingerprint of tensors as they are now.

        It refers to the tensors themselves, and not to their ids, because a new tensor may get the
        id of one that is gone; and strongly, because torch swaps no tensors that have weak
        references.
        """
        self._tensors = tensors
        self._versions = tuple(map(version_of, tensors))

    def matches(self, *tensors: Tensor) -> bool:
        """Return whether these are the same tensors, unchanged since the fingerprint was taken."""
        for tensor, other, version in zip(self._tensors, tensors, self._versions, strict=True):
            if tensor is not other or version_of(tensor) != version:
                return False
        return True


def version_of(tensor: Tensor) -> int | None:
    """Return torch's count of the writes to a tensor, or None for an inference tensor."""
    return None if tensor.is_inference() else tensor._version
