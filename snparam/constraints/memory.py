"""Memory for the values of a normalised weight, kept between forwards.

What a large layer costs on a CPU is memory: how often the weight is read, and how much memory is
asked for anew, each page of which the system first fills with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snparam.constraints.holders import is_shared


class Memory:
    """Memory for the values of one weight, written anew once nobody else holds what it was for.

    A training forward asks for as much memory as the network has weights, all of which is free
    again after the backward. To go back to the system with it, and to be given pages filled with
    zeros for it, takes longer than what is then computed.
    """

    def __init__(self) -> None:
        self._earlier: list[tuple[Tensor, object]] = []

    def like(self, weight: Tensor, kind: object) -> Tensor:
        """An uninitialised tensor like a weight, without a gradient.

        Args:
            weight: whose shape, strides and dtype it has.
            kind: the three, known already.
        """
        try:
            both = self._earlier.pop()  # which no other thread can do with the same one
        except IndexError:
            both = None
        if both is None or both[1] != kind or is_shared(both[0]):
            out = torch.empty_like(weight, requires_grad=False)
            both = out.data, kind
        else:
            out = both[0].data
        self._earlier = [both]
        return out


class Passes:
    """The values of the normalised weight for all passes between two updates.

    The values are shared and nothing else: each pass has a tensor and a node of the graph of its
    own. One node for all would be older than the rest of the later graphs, and autograd goes to the
    oldest nodes last, with the gradients of all weights waiting for them.
    """

    def __init__(self) -> None:
        self._shared: tuple[float, _Sample, Tensor, _Sample] | None = None

    def values(self, weight: Tensor, scale: float) -> Tensor | None:
        """A tensor with the values of an earlier pass, or None if the weight is not as it was."""
        if self._shared is None:
            return None
        earlier, of_weight, values, of_values = self._shared
        if scale == earlier and of_weight.is_of(weight) and of_values.is_of(values):
            return values.detach()
        return None

    def begin(self, weight: Tensor, scale: float, values: Tensor) -> None:
        """Share the values of a first pass."""
        if weight.is_contiguous():
            values = values.detach()
            self._shared = scale, _Sample(weight), values, _Sample(values)

    def end(self) -> None:
        """Forget the values: the weight is about to change, or has changed."""
        self._shared = None


class _Sample:
    """Where a tensor without gaps is and what it holds, as far as a few of its entries tell.

    They tell of who writes past version counters: trains without an optimizer of torch's, or
    changes `layer.weight.data`.
    """

    __slots__ = ("_address", "_entries", "_some", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._address, self._version = tensor.data_ptr(), tensor._version
        self._some = tensor.detach().as_strided((8,), (tensor.numel() // 8,))
        self._entries = self._some.tolist()

    def is_of(self, tensor: Tensor) -> bool:
        """Whether this is of a tensor as it is now."""
        return (
            tensor.data_ptr() == self._address
            and tensor._version == self._version
            and self._some.tolist() == self._entries
        )
