"""Tying and resizing: methods of a model that replace its weights by other Parameters.

transformers ties by `setattr(module, "weight", other.get_parameter("weight"))`, and resizes an
embedding and its head by writing to `weight.data` and by making a new head. On a converted model
there is no Parameter of that name: assigning to it would copy values, and what is written to it
would be lost. Both methods therefore run on the ordinary modules. Weights that share a Parameter
afterwards share one state; weights that have another shape get a state of that shape, with the
options that they had. Neither transformers nor any other library is imported; the names of the
methods are all that is looked for.

The methods are wrapped in the classes that define them, once a model of such a class was converted,
and in the base class of transformers' models, if it is loaded, once any weight was registered; for
models without normalised weights they do what they did.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from snparam.matrices.views import WeightView
from snparam.parametrization.attachment import attach, detach, read_as_eval
from snparam.parametrization.baking import check_alone
from snparam.parametrization.classes import definitions, wrap
from snparam.parametrization.extensions import System, register_system
from snparam.parametrization.find import (
    NormalisedWeight,
    is_normalised,
    norm_on,
    normalised_weights,
)
from snparam.parametrization.spectral_norm import SpectralNorm

# The base class of transformers' models.
_MODELS, _MODEL = "transformers.modeling_utils", "PreTrainedModel"

_TIE = "tie_weights"
_RESIZE = "resize_token_embeddings"
# What transformers' models call the modules that are resized.
_EMBEDDING_METHODS = ("get_input_embeddings", "get_output_embeddings")


def replace_normalised(model: nn.Module) -> None:
    """Let every module of a model with normalised weights inside tie and resize its originals.

    The methods are wrapped in the classes that define them.
    """
    for module in model.modules():
        for name, wrapper in _WRAPPERS.items():
            cls = next(definitions(type(module), name), None)
            if cls is not None and is_normalised(module):
                wrap(cls, name, wrapper)


def _resize(resize: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    for weight in _embeddings(model):
        if weight.norm.view.matrices[0] > 1:
            raise ValueError(_several_matrices_message(weight))
    return _run_on_ordinary_modules(resize, model, *args, **kwargs)


def _run_on_ordinary_modules(
    method: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """Run a method of a model on the ordinary modules, and normalise their weights again."""
    weights = list(normalised_weights(model))
    if not weights:
        return method(model, *args, **kwargs)
    for weight in weights:
        check_alone(weight.owner, weight.tensor_name)
    named_weights = list(normalised_weights(model, every_name=True))
    originals = {id(weight.original): weight.original for weight in weights}
    states = {id(weight.original): weight.norm for weight in weights}
    scales = {id(w.norm): _scale(w) for w in weights if w.norm.has_gain}
    for weight in weights:
        detach(weight.owner, weight.tensor_name, None)
    try:
        result = method(model, *args, **kwargs)
    finally:
        places = [_Place.in_model(model, weight) for weight in named_weights]
        left_ordinary = _attach_states(places, states, scales)
        # Kept until here, or a new Parameter could have got the id of one that is gone.
        del originals
    if left_ordinary:
        raise ValueError("\n".join(map(_several_matrices_message, left_ordinary)))
    return result


_WRAPPERS: dict[str, Callable[..., Any]] = {_TIE: _run_on_ordinary_modules, _RESIZE: _resize}


@dataclass(frozen=True)
class _Place:
    """A place in a model where a weight was normalised, and the tensor that is there now.

    Attributes:
        weight: the normalised weight that was there.
        owner: the module that now has the name of its owner, or None.
        tensor: the tensor that now has its name in that module, or None.
    """

    weight: NormalisedWeight
    owner: nn.Module | None
    tensor: Tensor | None

    @classmethod
    def in_model(cls, model: nn.Module, weight: NormalisedWeight) -> _Place:
        try:
            owner = model.get_submodule(weight.module_name)
        except AttributeError:
            return cls(weight, None, None)
        tensors = {**owner._parameters, **owner._buffers}
        return cls(weight, owner, tensors.get(weight.tensor_name))


def _attach_states(
    places: list[_Place], states: dict[int, SpectralNorm], scales: dict[int, float]
) -> list[NormalisedWeight]:
    """Attach to each tensor the state that it had, or else the one that its place had.

    Args:
        places: the places to attach states at.
        states: the state of each tensor that had one, by the tensor's id; states of new tensors are
            added.
        scales: the factor γ / σ of each state with a gain, by the state's id.

    Returns:
        The weights left ordinary, because their view cannot read the shape that they have now.
    """
    left_ordinary = []
    used_states = {id(states[id(p.tensor)]) for p in places if id(p.tensor) in states}
    for place in places:
        weight, owner, tensor = place.weight, place.owner, place.tensor
        if owner is None or tensor is None or norm_on(owner, weight.tensor_name) is not None:
            continue
        shape = tuple(tensor.shape)
        view = _view_of_shape(weight.norm.view, shape)
        if view is None:
            left_ordinary.append(weight)
            continue
        norm = states.get(id(tensor))
        if norm is None or _view_of_shape(norm.view, shape) != view:
            # Another tensor may have kept the state that this place had.
            norm = copy.deepcopy(weight.norm) if id(weight.norm) in used_states else weight.norm
            used_states.add(id(norm))
            states[id(tensor)] = norm
            if norm.view == view:
                norm.refresh(tensor)
        if norm.view != view:
            _start_anew(norm, view, tensor, scales.get(id(norm)))
        if owner is not weight.owner:
            owner.train(weight.owner.training)
        attach(owner, weight.tensor_name, norm)
    return left_ordinary


@torch.no_grad()
def _start_anew(norm: SpectralNorm, view: WeightView, weight: Tensor, scale: float | None) -> None:
    """Start a state anew for a weight of another shape, with the same options.

    Args:
        norm: the SpectralNorm with the state.
        view: how the weight is read now.
        weight: the original.
        scale: the factor γ / σ that the gain is to keep, or None without a gain.
    """
    norm.read_as(view, weight)
    if scale is not None:
        norm.gain.copy_(norm.sv[:, 0] * scale)


def _scale(weight: NormalisedWeight) -> float:
    """Return the γ / σ by which eval mode multiplies a weight of one block; 1 for a zero weight."""
    weight_in_use = read_as_eval(weight.owner, weight.tensor_name)
    lengths = [
        torch.linalg.vector_norm(w.detach().double()) for w in (weight_in_use, weight.original)
    ]
    return float(lengths[0] / lengths[1]) if lengths[1] else 1.0


def _view_of_shape(view: WeightView, shape: tuple[int, ...]) -> WeightView | None:
    """Return the view that reads the axes of another shape in the same way, or None without one."""
    if shape == view.shape:
        return view
    entries = view.entries
    if not view.is_dense or entries.split != view.shape or len(shape) != len(view.shape):
        return None
    return replace(entries, shape=shape, split=shape)


def _embeddings(model: nn.Module) -> Iterator[NormalisedWeight]:
    """Return the normalised weights of a model's embeddings, and those that share a Parameter."""
    modules = [getattr(model, name)() for name in _EMBEDDING_METHODS if hasattr(model, name)]
    weights = list(normalised_weights(model))
    originals = {id(w.original) for w in weights if any(w.owner is module for module in modules)}
    return (weight for weight in weights if id(weight.original) in originals)


def _several_matrices_message(weight: NormalisedWeight) -> str:
    return (
        f"SpectralNorm on {weight}: it is read as {weight.norm.view.matrices[0]} matrices, and "
        f"{_RESIZE} leaves open which rows belong to each; call restore_model(model, bake=False), "
        "resize, and convert again."
    )


class _ReplacedWeights(System):
    def on_attach(self, _owner: nn.Module) -> None:
        # The models that have this module, or will have it, cannot be asked for.
        models = sys.modules.get(_MODELS)
        for name, wrapper in _WRAPPERS.items():
            cls = next(definitions(getattr(models, _MODEL, nn.Module), name), None)
            if cls is not None:
                wrap(cls, name, wrapper)

    def on_model(self, model: nn.Module) -> None:
        replace_normalised(model)


register_system(_ReplacedWeights())
