"""Certified bounds of the norm of the linear map that a single layer computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from snparam.estimators.certified import matrix_bounds
from snparam.estimators.convolution_bounds import Bounds, convolution_bounds
from snparam.layers.convolutions import geometry_of, is_convolution
from snparam.layers.table import layout_named, layouts_of
from snparam.layers.tensors import is_lazy, tensor_problem
from snparam.matrices.sharded import is_sharded
from snparam.parametrization.arguments import check_model
from snparam.parametrization.attachment import read_as_eval


@torch.no_grad()
def norm_bounds(
    layer: nn.Module,
    input_size: Sequence[int] | None = None,
    tightness: float = 1.05,
    *,
    name: str | None = None,
) -> Bounds:
    """Return certified bounds of the norm of a layer's linear map, without its bias.

    Of a convolution that is the norm of the convolution itself, with its stride, padding, dilation
    and groups, and not that of its reshaped weight, from which it differs by up to √(kernel
    entries) in either direction. For all other layers of the layer table it is the largest singular
    value of the weight, read as one matrix, or as several in a stack of experts.

    The weight is the one in use in eval mode: the normalised one of a converted layer, and what
    other parametrizations give. Nothing moves and nothing is registered. The bounds are those of
    exact arithmetic with that weight: the rounding of the layer's own forward is not in them.

    Args:
        layer: a layer of a type in the layer table, such as `nn.Linear`, `nn.Embedding`, or
            `nn.Conv2d`, converted or not.
        input_size: for a convolution, the spatial size of its input, such as (32, 32); None (the
            default) for a bound that holds at every size. Other layers do not use it.
        tightness: for a convolution, how far the upper bound may exceed the supremum over all
            sizes, as a ratio of at least 1.0001. Default 1.05; 1.01 takes about three times as
            long.
        name: which weight of a layer with several, such as `"weight_hh_l0"`.

    Returns:
        lower, upper and method: two numbers with the norm between them, and how the upper one was
        found.

    Raises:
        ValueError: if the layer has no weight in the layer table, several of them and no `name`, or
            none of that name; if a hook computes the weight, or it has NaN or inf, no values, or is
            sharded; if `input_size` does not fit the layer, or `tightness` is below 1.0001.
        TypeError: if `layer` is no module, if its weight is quantised or of a dtype without
            singular values, if it is a convolution with a forward that is not torch's own, or if
            `input_size` is no tuple of numbers.
    """
    check_model(layer, "norm_bounds")
    name = _weight_name(layer, name)
    weight = _weight_in_use(layer, name)
    label = f"norm_bounds: '{name}' of {type(layer).__name__} {tuple(weight.shape)}"
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{label} has NaN or inf; repair or re-initialise it first")
    geometry = geometry_of(layer)
    if geometry is not None and name == "weight":
        try:
            return convolution_bounds(weight, geometry, input_size, tightness)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from None
    if is_convolution(layer):
        raise TypeError(
            f"{label}: a convolution with a forward of its own, of which it is not known what it "
            "does with the weight; pass a layer with torch's forward, or call "
            "torch.linalg.matrix_norm on the matrix that it applies"
        )
    view = layout_named(layer, name).view(weight.shape, None)
    bounds = matrix_bounds(view.to_matrices(weight))
    lower, upper = float(bounds.lower.max()), float(bounds.upper.max())
    return Bounds(lower, upper, "certified norm of a matrix")


def _weight_name(layer: nn.Module, name: str | None) -> str:
    """Return the name of the weight that is meant.

    Raises:
        ValueError: if there is none, or there are several and no name.
        TypeError: if the layer is quantised.
    """
    kind = type(layer).__name__
    if name is not None:
        layout_named(layer, name)  # raises where there is no such tensor
        return name
    names = list(layouts_of(layer))
    if len(names) == 1:
        return names[0]
    if names:
        raise ValueError(f"norm_bounds: {kind} has several weights; pass name=, one of {names}")
    if next(layer.children(), None) is not None:
        raise ValueError(
            f"norm_bounds: {kind} is not in the layer table; call it for each layer inside, or add "
            "its type with register_layer_type"
        )
    layout_named(layer, "weight")  # raises where there is no such tensor
    raise ValueError(
        f"norm_bounds: {kind} is not in the layer table; pass name='weight', or add its type with "
        "register_layer_type"
    )


def _weight_in_use(layer: nn.Module, name: str) -> Tensor:
    """Return the weight that the layer computes with in eval mode, detached.

    Raises:
        ValueError: if it has no values, fewer than two dimensions, or is sharded.
        TypeError: if it is quantised, or has a dtype without singular values.
    """
    inner, _, tensor_name = name.rpartition(".")
    owner = layer.get_submodule(inner)
    if parametrize.is_parametrized(owner, tensor_name):
        weight = read_as_eval(owner, tensor_name)
    else:
        weight = getattr(owner, tensor_name)
    label = f"norm_bounds: '{name}' of {type(layer).__name__}"
    if not isinstance(weight, Tensor):
        raise ValueError(f"{label} is {weight!r}, and no tensor; pass a layer that has one")
    if is_lazy(weight):
        raise ValueError(f"{label} has no shape yet; run one forward first")
    problem = tensor_problem(weight)
    if problem is not None:
        raise problem.error(f"{label} {tuple(weight.shape)}: {problem.reason}; {problem.remedy}.")
    if is_sharded(weight):
        raise ValueError(
            f"{label} {tuple(weight.shape)} is sharded; pass a layer with the whole weight, from "
            "full_tensor()"
        )
    return weight.detach()
