"""One matrix on a CPU, eagerly: a step and a division in as few operations as there can be.

The same mathematics as `linalg` and `division` have for stacks of matrices anywhere. On a CPU a
number can be read at no cost, so that norms are numbers and not tensors of one element; what a step
costs in a small layer is the number of its operations, and in a large one it is memory: how often
the weight is read, and how much memory is asked for anew, each page of which the system first
fills with zeros.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .division import Division, gradients_in_graph, without_autocast
from .views import View

# Vectors of a length between these are left as long as they are. Products of a few such lengths are
# normal numbers, with all their digits, in float32.
_LEAST, _MOST = 1e-4, 1e4

# From this many entries on, memory comes from the system and goes back to it: glibc's malloc begins
# to do so at 128 KiB.
_LARGE = 1 << 15

_DTYPES = (torch.float32, torch.float64)

# For the arguments of the division that are not tensors.
_NO_GRADIENTS = (None, None, None, None)

_C: Any = torch._C


class Step(NamedTuple):
    """What a step finds. Neither vector is made a unit one, which would be an operation more.

    Attributes:
        sigma: σ. Zero for a zero matrix, and not finite for one that is not.
        t: (m,), along u, unless σ is zero.
        x: (n,), along v.
        size: ‖t‖.
        length: ‖x‖.
    """

    sigma: float
    t: Tensor
    x: Tensor
    size: float
    length: float


def is_here(weight: Tensor) -> bool:
    """Whether this file is for a weight: numbers computed from it can be read at no cost."""
    kind = type(weight)
    return (
        (kind is nn.Parameter or (kind is Tensor and forward_ad._current_level < 0))
        and weight.is_cpu
        and weight.dtype in _DTYPES
        and not torch._C._are_functorch_transforms_active()
    )


def is_alone() -> bool:
    """Whether nothing sees or changes operations: no mode, no autocast."""
    return not (torch._C._len_torch_dispatch_stack() or torch.is_autocast_enabled("cpu"))


class Matrix:
    """A weight read as one matrix; where that copies nothing, for as long as it lies where it does.

    Attributes:
        matrix: (m, n).
        transposed: (n, m).
        flat: (m · n,), in the order in which the entries lie, or None where `matrix` is a copy.
        strides: of the weight.
    """

    __slots__ = ("_address", "_contiguous", "flat", "matrix", "strides", "transposed")

    def __init__(self, weight: Tensor, view: View) -> None:
        weight = weight.detach()
        self.matrix = view.to_matrix(weight)
        self.transposed = self.matrix.t()
        self.strides = weight.stride()
        self._address = weight.data_ptr()
        self._contiguous = weight.is_contiguous()
        extent = 1 + sum((n - 1) * step for n, step in zip(weight.shape, self.strides, strict=True))
        is_dense = extent == weight.numel()
        is_alias = self.matrix.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        self.flat = _as_it_lies(weight) if is_dense and is_alias else None

    def is_of(self, weight: Tensor) -> bool:
        """Whether this is a weight as it is now. No other lies where this one keeps its memory."""
        return (
            self.flat is not None
            and weight.data_ptr() == self._address
            and weight.is_contiguous() == self._contiguous
        )


def step(of: Matrix, u: Tensor) -> Step:
    """`linalg.power_step` for one matrix, float32 or float64, and one vector.

    Args:
        of: (m, n).
        u: (m,), of any length.
    """
    return finish_step(of, torch.mv(of.transposed, u))


def finish_step(of: Matrix, x: Tensor) -> Step:
    """The second half of a step, or all of it again, to the bit, from the `x` of an earlier one."""
    matrix = of.matrix
    length = _norm(x)
    if not _LEAST < length < _MOST:
        if length > 0:
            x.div_(length)
        else:  # u is orthogonal to every column: another direction finds the matrix again
            x.fill_(matrix.shape[1] ** -0.5)
        length = _norm(x)
    t = torch.mv(matrix, x)
    size = _norm(t)
    sigma = size / length
    if not _LEAST**2 < size < _MOST**2:
        t.div_(size or 1.0)
        size = 1.0
    return Step(sigma, t, x, size, length)


def _as_it_lies(tensor: Tensor) -> Tensor:
    """All entries of a tensor without gaps, in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _norm(x: Tensor) -> float:
    square = torch.dot(x, x).item()
    if 1e-30 < square < 1e30:
        return math.sqrt(square)
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


class Memory:
    """Memory for the values of one weight, written anew once nobody else holds what it was for.

    A training forward asks for as much memory as the network has weights, all of which is free
    again after the backward. To go back to the system with it, and to be given pages filled with
    zeros for it, takes longer than what is then computed.
    """

    def __init__(self) -> None:
        self._earlier: list[Tensor] = []

    def like(self, weight: Tensor) -> Tensor:
        """An uninitialised tensor of a weight's shape, strides and dtype, without a gradient."""
        try:
            earlier = self._earlier.pop()  # which no other thread can do with the same one
        except IndexError:
            earlier = None
        if (
            earlier is not None
            # One holder is `earlier`: other tensors, what autograd saves, and Python's storages
            # count.
            and _C._storage_Use_Count(_C._storage_address(earlier)) == 1
            and earlier.shape == weight.shape
            and earlier.stride() == weight.stride()
            and earlier.dtype == weight.dtype
        ):
            out = earlier.data
        else:
            out = torch.empty_like(weight, requires_grad=False)
            earlier = out.data
        self._earlier[:] = [earlier]
        return out


class Passes:
    """The values of the normalised weight for all passes between two updates.

    The values are shared and nothing else: each pass has a tensor and a node of the graph of its
    own. One node for all would be older than the rest of the later graphs, and autograd goes to the
    oldest nodes last, with the gradients of all weights waiting for them.
    """

    def __init__(self) -> None:
        self._values: Tensor | None = None
        self._made_of: object = None

    def values(self, weight: Tensor, scale: float) -> Tensor | None:
        """A tensor with the values of an earlier pass, or None if the weight is not as it was."""
        values = self._values
        if values is not None and self._made_of == (_now(weight), scale, _now(values)):
            return values.detach()
        return None

    def begin(self, weight: Tensor, scale: float, values: Tensor) -> None:
        """Share the values of a first pass."""
        if weight.is_contiguous():
            self._values = values.detach()
            self._made_of = (_now(weight), scale, _now(self._values))

    def end(self) -> None:
        """Forget the values: the weight is about to change, or has changed."""
        self._values = None


def _now(tensor: Tensor) -> object:
    """Where a tensor without gaps is and what it holds, as far as a few of its entries tell.

    They tell of who writes past version counters: trains without an optimizer of torch's, or
    changes `layer.weight.data`.
    """
    some = tensor.detach().as_strided((8,), (tensor.numel() // 8,)).tolist()
    return tensor.data_ptr(), tensor._version, some


def divide(
    weight: Tensor,
    gain: Tensor | None,
    by: Division,
    of: Matrix,
    memory: Memory,
    passes: Passes | None = None,
) -> Tensor:
    """`division.divide` for the weights of this file.

    Args:
        weight: of the view's shape.
        gain: γ, (1,), or None.
        by: the divisor, with numbers for its value and its slope.
        of: the weight as a matrix.
        memory: where to write large weights that a gradient flows into.
        passes: what to share their values by.
    """
    scale = 1.0 / float(by.divisor or 1.0)
    if gain is not None:
        # Rounded as γ is, so that a γ that was set to the divisor leaves the weight as it was.
        scale = gain.item() / torch.tensor(by.divisor or 1.0, dtype=gain.dtype).item()
    values, done = None, False
    if (
        weight.numel() >= _LARGE
        and weight.requires_grad
        and torch.is_grad_enabled()
        and _COUNTS_HOLDERS
        and not torch._C._len_torch_dispatch_stack()
    ):
        if not _ALONE and sys.gettrace() is None:  # a debugger holds what it shows
            _learn_what_alone_looks_like()
        if passes is not None:
            values = passes.values(weight, scale)
        done = values is not None
        if values is None:
            values = memory.like(weight)
    # Past Function.apply, which looks for transforms that `is_here` has excluded.
    divided: Tensor = _apply(  # type: ignore[no-untyped-call]
        # A tuple, because autograd would look at a tensor among the arguments.
        weight,
        gain,
        by,
        of,
        scale,
        (values, done),
    )
    if values is not None and not done and passes is not None:
        passes.begin(weight, scale, divided)
    return divided


class _Divide(torch.autograd.Function):
    """`divide` in one pass, and its backward in one dot product and one rank-one update.

    The weight is kept with its version and not as a saved tensor, which would be operations more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        gain: Tensor | None,
        by: Division,
        of: Matrix,
        scale: float,
        into: tuple[Tensor | None, bool],
    ) -> Tensor:
        """To `into` the values go, and it says whether they are there already."""
        ctx.weight, ctx.gain, ctx.by, ctx.of, ctx.scale = weight, gain, by, of, scale
        ctx.version = weight._version
        ctx.gain_version = 0 if gain is None else gain._version
        values, done = into
        if done and values is not None:
            return values
        if gain is None:
            return torch.div(weight, by.divisor or 1.0, out=values)
        return torch.mul(weight, scale, out=values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gain, by = ctx.weight, ctx.gain, ctx.by
        if weight._version != ctx.version:
            raise _changed("weight", weight, ctx.version)
        if torch.is_grad_enabled():
            if gain is not None and gain._version != ctx.gain_version:
                raise _changed("gain", gain, ctx.gain_version)
            with without_autocast(grad):
                return (*gradients_in_graph(grad, weight, gain, by), *_NO_GRADIENTS)
        alone = (
            weight.numel() >= _LARGE
            and len(_ALONE) > 0
            and _C._has_storage(grad)
            # An expanded one has several entries in one place.
            and (grad.stride() == ctx.of.strides or grad.is_contiguous())
            and _holders(grad, sys.getrefcount(grad)) in _ALONE
            # Memory that is not torch's own, such as numpy's, has an owner who is not counted.
            and grad.untyped_storage().resizable()
        )
        if torch.is_autocast_enabled("cpu"):
            with without_autocast(grad):
                return (*_gradients(ctx, grad, alone), *_NO_GRADIENTS)
        return (*_gradients(ctx, grad, alone), *_NO_GRADIENTS)


_apply = super(torch.autograd.Function, _Divide).apply


def _changed(what: str, tensor: Tensor, version: int) -> RuntimeError:
    return RuntimeError(
        f"SpectralNorm: a {what} of shape {tuple(tensor.shape)} that is needed for computing "
        "gradients has been changed by an in-place operation between the forward and the "
        f"backward: it is at version {tensor._version}, expected version {version}. Call "
        "backward before optimizer.step(), or compute the forward again after it."
    )


def _gradients(ctx: Any, grad: Tensor, alone: bool) -> tuple[Tensor, Tensor | None]:
    """γ/d (G − slope · ⟨G, W⟩/d · u vᵀ) for the weight, and ⟨G, W⟩/d for γ."""
    weight, by, of, scale = ctx.weight, ctx.by, ctx.of, ctx.scale
    view, divisor, u = by.view, by.divisor or 1.0, by.u
    g = grad if view.is_plain else view.to_matrix(grad, like=weight)
    if grad.stride() == of.strides and of.flat is not None:
        inner = torch.dot(_as_it_lies(grad), of.flat)
    else:
        inner = torch.dot(g.reshape(-1), view.to_matrix(weight).reshape(-1))
    try:
        # Not slope · ⟨G, W⟩ / d², which underflows first.
        rate = -by.slope * (inner.item() / divisor) * scale
    except RuntimeError:  # a batch of gradients (is_grads_batched) has one for each
        rate, alone, u = -by.slope * scale, False, u * (inner / divisor)
    if alone and g.data_ptr() == grad.data_ptr():
        combined = g.addr_(u, by.v, beta=scale, alpha=rate)
    else:
        combined = torch.addr(g, u, by.v, beta=scale, alpha=rate)
    into_weight = combined if view.is_plain else view.from_matrices(combined, like=weight)
    gain = ctx.gain
    return into_weight, None if gain is None else (inner / divisor).view(1).to(gain.dtype)


# Whether a gradient may be overwritten: only where nobody else can see it. torch's engine asks the
# same before it adds gradients in place (torch/csrc/autograd/input_buffer.cpp). What a gradient
# that nobody else can see looks like from `backward` is learned from two: one with memory of its
# own and one that is a view of a tensor that nobody holds.
_ALONE: set[tuple[int, ...]] = set()

# None of these is public. Without them all memory is new.
_COUNTS_HOLDERS = hasattr(Tensor, "_use_count") and all(
    hasattr(_C, name) for name in ("_has_storage", "_storage_address", "_storage_Use_Count")
)


def _holders(grad: Any, references: int) -> tuple[int, ...]:
    """How often a gradient, its memory, and the tensor it is a view of, are referred to.

    Args:
        grad: the gradient.
        references: to the Python object, counted by the caller: how many a call adds depends on who
            runs the interpreter's frames, such as torch's compiler.
    """
    storage, base = _C._storage_address(grad), grad._base
    counts = (references, grad._use_count(), _C._storage_Use_Count(storage))
    return counts if base is None else (*counts, sys.getrefcount(base), base._use_count())


class _Probe(torch.autograd.Function):
    """Learns what gradients look like that nobody else holds."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        with without_autocast(grad):
            _ALONE.add(_holders(grad, sys.getrefcount(grad)))
        return grad.clone()


def _learn_what_alone_looks_like() -> None:
    x = torch.ones(2, requires_grad=True, device="cpu")
    probe: Any = super(torch.autograd.Function, _Probe).apply
    torch.autograd.grad((probe(x) * 2.0).sum(), x)
    torch.autograd.grad((probe(x).view(1, 2) * 2.0).sum(), x)
