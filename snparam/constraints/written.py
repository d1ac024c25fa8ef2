"""Telling whether tensors are what they were when something was derived from them."""

from __future__ import annotations

import torch
from torch import Tensor


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written to, or None where that is not counted."""
    return None if tensor.is_inference() else tensor._version


def may_be_kept() -> bool:
    """Whether tensors made now are of use later: no transform's, and none of inference mode."""
    return not (torch.is_inference_mode_enabled() or torch._C._are_functorch_transforms_active())


class Written:
    """What buffers were, so that it can be told whether they are so still.

    Others may write to them, or have `torch.func.functional_call` pass others in.
    """

    __slots__ = ("_sv", "_u", "_v", "_versions")

    def __init__(self, stored: tuple[Tensor, Tensor, Tensor]) -> None:
        """Note u, v and sv as they are."""
        self._u, self._v, self._sv = u, v, sv = stored
        self._versions = version_of(u), version_of(v), version_of(sv)

    def are(self, stored: tuple[Tensor, Tensor, Tensor]) -> bool:
        """Whether they are the same still and have not been written to."""
        u, v, sv = stored
        return (
            sv is self._sv
            and u is self._u
            and v is self._v
            and (version_of(u), version_of(v), version_of(sv)) == self._versions
        )
