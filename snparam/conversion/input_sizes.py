"""The sizes of the inputs that the convolutions of a model see, recorded in one forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from snparam.estimators import convergence
from snparam.layers.convolutions import geometry_of, is_convolution
from snparam.layers.tensors import Problem, is_lazy
from snparam.matrices.convolutions import ConvolutionView, Geometry
from snparam.matrices.stacks import is_finite, stack_of
from snparam.parametrization.arguments import check_model
from snparam.parametrization.find import NormalisedWeight, normalised_weights
from snparam.parametrization.fingerprint import version_of

Size = tuple[int, ...]
Sizes = Mapping[int, Sequence[Size] | Problem]


@torch.no_grad()
def recorded_sizes(model: nn.Module, example_inputs: Any) -> dict[int, list[Size] | Problem]:
    """Return the sizes at which each convolution is called in a forward on example inputs.

    The forward is one in eval mode, without gradients, and leaves the model as it was: its modes,
    its hooks, its buffers and torch's random state.

    Args:
        model: the model.
        example_inputs: one tensor, a sequence of positional arguments, or a mapping of keyword
            arguments.

    Returns:
        by the identity of each of torch's convolutions that was called, the lengths of its inputs,
        without batch and channels, each once, in the order of the calls; or a problem, if it was
        called with an `output_size` that its own `output_padding` does not give.

    Raises:
        ValueError: if the model has uninitialised parameters (lazy modules).
        TypeError: if `example_inputs` is of no such kind.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"example_inputs: '{name}' is uninitialised (a lazy module), and recording the "
                "sizes of inputs must not initialise it; run one forward first"
            )
    sizes: dict[int, list[Size] | Problem] = {}
    with ExitStack() as stack:
        stack.enter_context(_same_modes_and_buffers(model))
        stack.enter_context(torch.random.fork_rng(devices=_devices(model)))
        for module in model.modules():
            module.training = False
            if is_convolution(module):
                record = _Recorder(sizes).record
                stack.enter_context(module.register_forward_hook(record, with_kwargs=True))
        _call(model, example_inputs)
    return sizes


class _Recorder:
    """A forward hook that notes the size of each input of a convolution.

    Attributes:
        sizes: the sizes by the identity of each module, or a problem with one; filled here.
    """

    def __init__(self, sizes: dict[int, list[Size] | Problem]) -> None:
        self.sizes = sizes

    def record(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        recorded = self.sizes.setdefault(id(module), [])
        if isinstance(recorded, Problem):
            return
        x = args[0] if args else next(iter(kwargs.values()))
        axes = len(module.kernel_size)
        size, output_size = tuple(x.shape[-axes:]), tuple(output.shape[-axes:])
        geometry = geometry_of(module)
        expected = (
            output_size if geometry is None else geometry.output_size(size, module.kernel_size)
        )
        if output_size != expected:
            reason = (
                f"an input of size {size} gave an output of size {output_size}, which is "
                f"{expected} by its output_padding"
            )
            remedy = "set output_padding instead of passing output_size"
            self.sizes[id(module)] = Problem(reason, remedy, refuses=True)
        elif size not in recorded:
            recorded.append(size)


def _call(model: nn.Module, inputs: Any) -> None:
    if isinstance(inputs, Tensor):
        model(inputs)
    elif isinstance(inputs, Mapping):
        model(**inputs)
    elif isinstance(inputs, list | tuple):
        model(*inputs)
    else:
        raise TypeError(
            f"example_inputs: expected a tensor, a sequence of positional arguments, or a mapping "
            f"of keyword arguments, not {type(inputs).__name__}"
        )


def _devices(model: nn.Module) -> list[torch.device]:
    """Return the CUDA devices that a model's parameters are on, whose random state may change."""
    return sorted({p.device for p in model.parameters() if p.is_cuda}, key=lambda d: d.index)


@contextmanager
def _same_modes_and_buffers(model: nn.Module) -> Iterator[None]:
    """Give a model its modes back, and its buffers with the values that they had.

    Nothing else is restored: wrappers such as FSDP2 exchange Parameters in a forward, and have to
    find them where they left them.
    """
    before = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    buffers = [buffer for buffer in model.buffers() if not is_lazy(buffer)]
    values = [(buffer, version_of(buffer), buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        for module, mode, table in before:
            module.training = mode
            module._buffers.clear()
            module._buffers.update(table)
        for buffer, version, value in values:
            if version is None or version_of(buffer) != version:
                buffer.copy_(value)


@torch.no_grad()
def largest_view(weight: Tensor, geometry: Geometry, sizes: Sequence[Size]) -> ConvolutionView:
    """Return the view of a convolution at the size, of several, at which its norm is largest.

    Where the weight has NaN or inf, that is the first.

    Args:
        weight: the weight of the convolution.
        geometry: all else that it does.
        sizes: at least one.

    Raises:
        ValueError: if an input of one of the sizes cannot be convolved.
    """
    views = [ConvolutionView(tuple(weight.shape), geometry, size) for size in sizes]
    if len(views) == 1 or not is_finite(stack_of(weight.detach(), views[0])):
        return views[0]

    def norm(view: ConvolutionView) -> float:
        return float(convergence.converged(stack_of(weight.detach(), view), 1)[1])

    return max(views, key=norm)


def record_input_sizes(model: nn.Module, example_inputs: Any) -> None:
    """Record again at which sizes the convolutions of a model are called, and converge to those.

    It is for a network that was converted with `norm="operator"`, and is to be used on inputs of
    another size: σ of a convolution is its norm at the recorded size, and a forward at another size
    uses that. The originals, the gains and all other weights stay as they are.

    Args:
        model: a network with convolutions under SpectralNorm with `norm="operator"`.
        example_inputs: what the network is called with: one tensor, a sequence of positional
            arguments, or a mapping of keyword arguments. The forward is one in eval mode and
            without gradients, and moves nothing. Of a layer that is called at several sizes the one
            with the largest σ is recorded.

    Raises:
        ValueError: if no weight is under SpectralNorm with `norm="operator"`, if such a layer is
            not called, or has a weight with NaN or inf; nothing has been changed then.
        TypeError: if `model` is no module, or `example_inputs` of no such kind.
    """
    check_model(model, "record_input_sizes")
    owners: dict[int, list[NormalisedWeight]] = {}
    for weight in normalised_weights(model):
        if not weight.norm.view.is_dense:
            owners.setdefault(id(weight.norm), []).append(weight)
    if not owners:
        raise ValueError(
            f"record_input_sizes: {type(model).__name__} has no weight registered with "
            "norm='operator'; convert_model(model, norm='operator', example_inputs=...) first"
        )
    sizes = recorded_sizes(model, example_inputs)
    views = [(sharers[0], _recorded_view(sharers, sizes)) for sharers in owners.values()]
    for weight, view in views:
        weight.norm.read_as(view, weight.original)


def _recorded_view(sharers: Sequence[NormalisedWeight], sizes: Sizes) -> ConvolutionView:
    """Return the view of convolutions that share a state, at the sizes recorded for all of them.

    Raises:
        ValueError: if there is a problem with a size, one of them was not called or has no geometry
            any more, or the weight has NaN or inf.
    """
    recorded: dict[Size, None] = {}
    for weight in sharers:
        if id(weight.owner) not in sizes:
            raise ValueError(f"SpectralNorm on {weight}: {NOT_CALLED}; pass inputs that reach it")
        found = sizes[id(weight.owner)]
        if isinstance(found, Problem):
            raise ValueError(f"SpectralNorm on {weight}: {found.reason}; {found.remedy}")
        recorded.update(dict.fromkeys(found))
    weight = sharers[0]
    geometry = geometry_of(weight.owner)
    if geometry is None:
        raise ValueError(
            f"SpectralNorm on {weight}: its forward is no longer torch's own; take that away, or "
            "remove_sn"
        )
    if not is_finite(stack_of(weight.original.detach(), weight.norm.view)):
        raise ValueError(
            f"SpectralNorm on {weight}: it has NaN or inf; repair or re-initialise it first"
        )
    return largest_view(weight.original, geometry, list(recorded))


NOT_CALLED = "its layer was not called in a forward on example_inputs"
NOT_CALLED_REMEDY = "pass inputs that reach it, or leave it out by exclude="
