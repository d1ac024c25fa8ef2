"""Convolutions as stacks of one matrix, known by the convolution itself and its adjoint.

A convolution of inputs of one size is a linear map from the N = in_channels · ∏ input_size entries
of an input to the M = out_channels · ∏ output_size entries of an output. Its padding is a part of
the map, its bias is not. Its matrix is never formed: the products are the layer's own convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PADDING_MODES = ("zeros", "circular", "reflect", "replicate")


@dataclass(frozen=True)
class Geometry:
    """All that the operator of a convolution depends on besides its weight and its input size.

    Attributes:
        stride: step between the places at which an output is computed, for each axis.
        padding: entries added (before, after) each axis; of a transposed convolution torch's own
            padding, which is cut off on both sides.
        dilation: distance between the taps of the kernel, for each axis.
        groups: number of groups of channels that are convolved separately.
        transposed: whether it is a transposed convolution.
        output_padding: entries by which each axis of the output of a transposed convolution is
            longer; () otherwise.
        padding_mode: what the added entries are: `"zeros"`, `"circular"`, `"reflect"` or
            `"replicate"`.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    padding_mode: str = "zeros"

    def output_size(self, input_size: Sequence[int], kernel_size: Sequence[int]) -> tuple[int, ...]:
        """Return the size of the output, without batch and channels.

        It is the formula of `torch.nn.Conv2d` and of `torch.nn.ConvTranspose2d`, whose results
        below 1 mean that the input is too small.

        Args:
            input_size: length of the input along each axis, without batch and channels.
            kernel_size: number of taps along each axis.

        Raises:
            ValueError: if there are more or fewer lengths, or taps, than axes.
        """
        if not len(input_size) == len(kernel_size) == len(self.stride):
            raise ValueError(
                f"input_size={tuple(input_size)} and kernel_size={tuple(kernel_size)}: expected "
                f"{len(self.stride)} numbers each, one for each axis of the convolution"
            )
        sizes = []
        for axis, (size, taps) in enumerate(zip(input_size, kernel_size, strict=True)):
            stride, (before, after) = self.stride[axis], self.padding[axis]
            reach = self.dilation[axis] * (taps - 1) + 1
            if self.transposed:
                longer = self.output_padding[axis] if self.output_padding else 0
                sizes.append((size - 1) * stride - before - after + reach + longer)
            else:
                sizes.append((size + before + after - reach) // stride + 1)
        return tuple(sizes)
