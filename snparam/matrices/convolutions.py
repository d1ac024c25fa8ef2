"""Convolutions as stacks of one matrix, known by the convolution itself and its adjoint.

A convolution of inputs of one size is a linear map from the N = in_channels · ∏ input_size entries
of an input to the M = out_channels · ∏ output_size entries of an output. Its padding is a part of
the map, its bias is not. The products with
its matrix are the layer's own convolution and the adjoint of that; the matrix itself is formed for
`verify` alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from snparam.matrices.views import Layout, View

PADDING_MODES = ("zeros", "circular", "reflect", "replicate")

# The size up to which the matrix of a convolution is formed to be decomposed. Forming it takes one
# convolution for each entry of the shorter side, and Lanczos about 150; the matrix takes 128 MiB in
# float64 at most.
_LONGEST_SIDE, _MOST_ENTRIES = 1024, 1 << 24

# The number of unit vectors that are convolved at once to form a matrix.
_IMPULSES = 256


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


@dataclass(frozen=True)
class ConvolutionView:
    """The reading of a convolution's weight as its operator on inputs of one size, (1, M, N).

    Rows are the entries of an output, columns those of an input, channels first, in the order of
    contiguous tensors. The weight's entries are not those of the matrix: each stands in it once for
    each place of the kernel, and padding that repeats entries of the input adds some of them up.

    Attributes:
        shape: shape of the weight, (out_channels, in_channels / groups, *kernel_size), or for a
            transposed convolution (in_channels, out_channels / groups, *kernel_size).
        geometry: all else that the convolution does.
        input_size: lengths of an input, without batch and channels.
    """

    shape: tuple[int, ...]
    geometry: Geometry
    input_size: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that inputs of this size can be convolved.

        Raises:
            ValueError: if the size has another number of axes than the convolution, is below 1, is
                shorter than its padding can repeat, or leaves an output without entries.
        """
        padding = self.geometry.padding
        given = f"input_size={self.input_size}"
        if len(self.input_size) != len(padding):
            raise ValueError(f"{given}: expected {len(padding)} numbers, one for each axis")
        if min(self.input_size) < 1:
            raise ValueError(f"{given}: expected numbers of at least 1")
        mode = self.geometry.padding_mode
        for size, (before, after) in zip(self.input_size, padding, strict=True):
            most = {"circular": size, "reflect": size - 1}.get(mode, math.inf)
            if max(before, after) > most:
                raise ValueError(f"{given}: too small for {mode} padding by {max(before, after)}")
        if min(self.output_size) < 1:
            raise ValueError(f"{given}: the output would have the size {self.output_size}")

    @cached_property
    def output_size(self) -> tuple[int, ...]:
        """Lengths of an output, without batch and channels."""
        return self.geometry.output_size(self.input_size, self.shape[2:])

    @cached_property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of an input, (in_channels, *input_size)."""
        groups = 1 if self.geometry.transposed else self.geometry.groups
        return (self.shape[0 if self.geometry.transposed else 1] * groups, *self.input_size)

    @cached_property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of an output, (out_channels, *output_size)."""
        groups = self.geometry.groups if self.geometry.transposed else 1
        return (self.shape[1 if self.geometry.transposed else 0] * groups, *self.output_size)

    @cached_property
    def matrices(self) -> tuple[int, int, int]:
        """Shape (1, M, N) of the stack: M entries of an output, N of an input."""
        return 1, math.prod(self.output_shape), math.prod(self.input_shape)

    @property
    def is_dense(self) -> bool:
        """False: the entries of the matrix are not those of the weight."""
        return False

    @cached_property
    def entries(self) -> View:
        """The view that reads the weight's own entries as one matrix."""
        return Layout("rows").view(self.shape)

    def order_for(self, weight: Tensor) -> tuple[int, ...]:  # noqa: ARG002 - a view's may use it
        """Return (): the order of the columns is that of a contiguous input."""
        return ()

    def stack(self, weight: Tensor, dtype: torch.dtype) -> ConvolutionStack:
        """Return the operator of a weight, in a dtype."""
        return ConvolutionStack(weight.to(dtype), self)

    def inner(self, u: Tensor, weight: Tensor, v: Tensor) -> Tensor:
        """Return Re(uᴴ W v), (1,), by differentiable operations.

        Args:
            u: (1, m) or (1, 1, m).
            weight: of the view's shape.
            v: (1, n) or (1, 1, n).
        """
        image = self.convolve(weight.to(u.dtype), v.reshape(1, *self.input_shape))
        return (u.reshape(1, -1).conj() * image.reshape(1, -1)).sum(-1).real

    def minus_outer(self, g: Tensor, u: Tensor, v: Tensor, rate: Tensor, like: Tensor) -> Tensor:
        """Return G − rate · ∂Re(uᴴ W v)/∂W, with G and the result as `entries` reads them.

        Args:
            g: G, (1, m', n'), the entries of a tensor of the weight's shape.
            u: (1, m) or (1, 1, m).
            v: (1, n) or (1, 1, n).
            rate: (), real.
            like: the weight, whose memory format `entries` follows.
        """
        return g - rate.to(g.dtype) * self.entries.to_matrices(self.outer(u, v, like), like=like)

    def minus_outer_by_numbers(
        self, matrix: Tensor, u: Tensor, v: Tensor, scale: float, rate: float, like: Tensor
    ) -> Tensor:
        """Return scale · G − rate · ∂Re(uᴴ W v)/∂W, as `minus_outer` does, for one matrix G."""
        return matrix * scale - rate * self.entries.to_matrix(self.outer(u, v, like), like=like)

    def outer(self, u: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of Re(uᴴ W v) with respect to the weight, of its shape.

        With C(y, x) for the gradient of ⟨y, x ⋆ W⟩, bilinear in real y and x, it is C(u, v̄): for
        complex vectors C(Re u, Re v) + C(Im u, Im v) + i (C(Im u, Re v) − C(Re u, Im v)).

        Args:
            u: (1, m) or (1, 1, m).
            v: (1, n) or (1, 1, n).
            weight: of the view's shape; only its shape and device count.
        """
        y, x = u.reshape(1, *self.output_shape), self._padded(v.reshape(1, *self.input_shape))
        shape_alone = torch.empty(self.shape, dtype=u.real.dtype, device=weight.device)
        if not u.is_complex():
            return self._weight_gradient(y, x, shape_alone)
        # The convolution sums over its batch, and so adds up both products of each part.
        inputs = torch.cat([x.real, x.imag])
        return torch.complex(
            self._weight_gradient(torch.cat([y.real, y.imag]), inputs, shape_alone),
            self._weight_gradient(torch.cat([y.imag, -y.real]), inputs, shape_alone),
        )

    def _weight_gradient(self, y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        geometry = self.geometry
        gradient: Tensor = torch.ops.aten.convolution_backward(
            y, x, weight, None, geometry.stride, self._inner_padding, geometry.dilation,
            geometry.transposed, geometry.output_padding or (0,) * len(geometry.stride),
            geometry.groups, [False, True, False],
        )[1]  # fmt: skip
        return gradient

    def convolve(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return what the layer computes without its bias.

        Args:
            weight: of the view's shape.
            x: (batch, in_channels, *input_size), of the weight's dtype.
        """
        geometry = self.geometry
        if geometry.transposed:
            return self._transposed_convolution(x, weight, geometry.output_padding)
        return self._convolution(self._padded(x), weight)

    def adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        """Return what the adjoint of `convolve` computes, Wᴴ y.

        The adjoint of a convolution is a transposed convolution, and the other way round, with the
        conjugate weight and the same stride, padding and dilation; then padding that repeats
        entries adds up what came from each of them.

        Args:
            weight: of the view's shape.
            y: (batch, out_channels, *output_size), of the weight's dtype.
        """
        geometry = self.geometry
        weight = weight.conj().resolve_conj() if weight.is_complex() else weight
        if geometry.transposed:
            x = self._convolution(y, weight)
            for axis, size in enumerate(self.input_size, 2):
                # With output_padding ≥ stride an output has entries beyond those that a further
                # input would reach.
                x = x.narrow(axis, 0, size)
            return x
        x = self._transposed_convolution(y, weight, self._unreached)
        for axis, (before, after) in enumerate(self._outer_padding, 2):
            x = _padding_adjoint(x, axis, before, after, geometry.padding_mode)
        return x

    def _convolution(self, x: Tensor, weight: Tensor) -> Tensor:
        geometry = self.geometry
        function = (F.conv1d, F.conv2d, F.conv3d)[len(geometry.stride) - 1]
        return function(
            x, weight, None, geometry.stride, self._inner_padding, geometry.dilation,
            geometry.groups,
        )  # fmt: skip

    def _transposed_convolution(
        self, x: Tensor, weight: Tensor, output_padding: tuple[int, ...]
    ) -> Tensor:
        geometry = self.geometry
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[
            len(geometry.stride) - 1
        ]
        return function(
            x, weight, None, geometry.stride, self._inner_padding, output_padding,
            geometry.groups, geometry.dilation,
        )  # fmt: skip

    @cached_property
    def _pads_outside(self) -> bool:
        """Whether padding is an operation of its own, since convolutions pad both sides alike."""
        padding = self.geometry.padding
        return self.geometry.padding_mode != "zeros" or any(
            before != after for before, after in padding
        )

    @cached_property
    def _inner_padding(self) -> tuple[int, ...]:
        """Zeros that the convolution itself adds on both sides of each axis."""
        return tuple(0 if self._pads_outside else before for before, _ in self.geometry.padding)

    @cached_property
    def _outer_padding(self) -> tuple[tuple[int, int], ...]:
        """Entries that are added (before, after) each axis ahead of the convolution."""
        padding = self.geometry.padding
        return padding if self._pads_outside else ((0, 0),) * len(padding)

    @cached_property
    def _unreached(self) -> tuple[int, ...]:
        """Entries at the end of each padded axis that no place of the kernel reaches."""
        return tuple(
            (size + before + after - dilation * (taps - 1) - 1) % stride
            for size, (before, after), dilation, taps, stride in zip(
                self.input_size,
                self.geometry.padding,
                self.geometry.dilation,
                self.shape[2:],
                self.geometry.stride,
                strict=True,
            )
        )

    def _padded(self, x: Tensor) -> Tensor:
        """Return an input with the padding that is not the convolution's own."""
        pairs = reversed(self._outer_padding)  # torch pads the last axis first
        padding = [number for pair in pairs for number in pair]
        if not any(padding):
            return x
        mode = self.geometry.padding_mode
        return F.pad(x, padding, mode="constant" if mode == "zeros" else mode)


def _padding_adjoint(y: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """Return the adjoint of padding along one axis, applied to a padded tensor."""
    size = y.shape[axis] - before - after
    x = y.narrow(axis, before, size)
    if mode == "zeros" or not before + after:
        return x
    x = x.clone()
    head, tail = y.narrow(axis, 0, before), y.narrow(axis, before + size, after)
    if mode == "circular":
        x.narrow(axis, size - before, before).add_(head)
        x.narrow(axis, 0, after).add_(tail)
    elif mode == "reflect":
        x.narrow(axis, 1, before).add_(head.flip(axis))
        x.narrow(axis, size - 1 - after, after).add_(tail.flip(axis))
    else:
        x.narrow(axis, 0, 1).add_(head.sum(axis, keepdim=True))
        x.narrow(axis, size - 1, 1).add_(tail.sum(axis, keepdim=True))
    return x


class ConvolutionStack:
    """The operator of a convolution as a stack of one matrix (1, M, N), known by its products.

    Attributes:
        shape: (1, M, N).
        dtype: dtype of the arithmetic, that of the weight.
        device: device of the weight.
        weight: the convolution's weight.
        view: how the weight is read.
        least_steps: see `Stack`.
        guard_vectors: see `Stack`.
    """

    # The largest singular values of convolutions lie close together. After this many steps, and as
    # many more as the residual asks for, the σ of 500 drawn convolutions on inputs of 80 to 700
    # entries was at most 3.3e-4 too low. A further vector takes more time than it saves in steps.
    least_steps, guard_vectors = 48, 0

    def __init__(self, weight: Tensor, view: ConvolutionView) -> None:
        """Read a weight, in the dtype of the arithmetic, as the operator of its convolution."""
        self.shape = torch.Size(view.matrices)
        self.dtype, self.device = weight.dtype, weight.device
        self.weight, self.view = weight, view

    def left(self, u: Tensor) -> Tensor:
        """Return U conj(W), (1, k, n), for u (1, k, m): all k by one convolution."""
        images = self.view.adjoint(self.weight, u.reshape(-1, *self.view.output_shape))
        return images.reshape(1, u.shape[1], self.shape[2])

    def right(self, v: Tensor) -> Tensor:
        """Return V Wᵀ, (1, k, m), for v (1, k, n): all k by one convolution."""
        images = self.view.convolve(self.weight, v.reshape(-1, *self.view.input_shape))
        return images.reshape(1, v.shape[1], self.shape[1])

    def outer(self, u: Tensor, v: Tensor) -> Tensor:
        """Return the gradient of Re(uᴴ W v) with respect to the weight, of its shape.

        Args:
            u: (1, m).
            v: (1, n).
        """
        return self.view.outer(u, v, self.weight)

    def largest(self) -> float:
        """Return the largest magnitude of an entry of the weight; not finite for NaN or inf."""
        return float(self.weight.abs().amax())

    @property
    def is_small(self) -> bool:
        """Whether the matrix is small enough to be decomposed in about a second."""
        _, rows, columns = self.shape
        return min(rows, columns) <= _LONGEST_SIDE and rows * columns <= _MOST_ENTRIES

    def to_dense(self) -> Tensor:
        """Return the matrix (1, M, N).

        The identity is pushed through the convolution, or through its adjoint if that has fewer
        columns.
        """
        _, rows, columns = self.shape
        side = min(rows, columns)
        product = self.right if columns <= rows else self.left
        identity = torch.eye(side, dtype=self.dtype, device=self.device)
        pieces = [product(piece[None])[0] for piece in torch.split(identity, _IMPULSES)]
        images = torch.cat(pieces)
        # U conj(W) with U = I is conj(W); V Wᵀ with V = I is Wᵀ.
        return (images.mT if columns <= rows else images.conj().resolve_conj())[None]
