"""`save_pretrained`: inside this method of a library's, the state dict of a module is plain.

transformers and diffusers write `model.state_dict()`, and their `from_pretrained` initialises
weights anew that it does not find under their ordinary names. A layer does not know the models that
it is a part of, but the method that asks for its state dict is on the call stack. Neither library
is imported; a method named `save_pretrained` is all that is looked for.

Where trainers pass a state dict (gathered from many ranks, say), only the method itself sees it.
The method is therefore wrapped in the class that defines it, once a model of that class was
converted, and makes that state dict plain; for models without normalised weights it does what it
did. Nothing is set on a model that would have to be undone, or that a copy or a pickle would take
along.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from snparam.checkpoints.save import plain_state_dict
from snparam.parametrization.baking import check_alone, check_shared
from snparam.parametrization.classes import definitions, unwrap, wrap
from snparam.parametrization.extensions import System, register_system
from snparam.parametrization.find import is_normalised, normalised_weights, norms_of
from snparam.parametrization.frames import outward
from snparam.parametrization.spectral_norm import SpectralNorm

_METHOD = "save_pretrained"
# peft's two functions that say which tensors an adapter has of modules that are trained whole
# (`modules_to_save`), when it is saved and when it is read. Both go by the keys of those modules'
# state dicts, which have to agree. The layers that the adapter is put on are no part of it.
_ADAPTER_FUNCTIONS = ("get_peft_model_state_dict", "adapter_state_dict_load_map")


_STATE_DICT_METHOD = "state_dict"
_STATE_DICT_ARGUMENT = "state_dict"


def spell_for_pretrained(owner: nn.Module) -> None:
    """Let `state_dict` of a module, whose class is its own, be plain in `save_pretrained`."""
    wrap(type(owner), _STATE_DICT_METHOD, _spell_state_dict)


def spell_as_before(owner: nn.Module) -> None:
    """Undo `spell_for_pretrained`."""
    unwrap(type(owner), _STATE_DICT_METHOD, _spell_state_dict)


def make_plain(owner: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Replace a module's entries in snparam's spelling by those of the ordinary module, baked.

    Args:
        owner: a module with normalised weights.
        state_dict: a state dict with tensors for the module, its own or others; changed in place.
            Of a weight whose original it does not have under snparam's key, such as one that is no
            part of state dicts, only the entries of the state are removed.
        prefix: the prefix of the module's keys.

    Raises:
        ValueError: if a weight carries another parametrization as well.
    """
    for name, norm in norms_of(owner):
        inner_prefix = f"{prefix}parametrizations.{name}."
        entries = {k: v for k, v in state_dict.items() if k.startswith(inner_prefix)}
        if f"{inner_prefix}original" in entries:
            check_alone(owner, name)
            state_dict[prefix + name] = _weight_in_eval(norm, entries, inner_prefix)
        for key in entries:
            del state_dict[key]


def _weight_in_eval(norm: SpectralNorm, state: dict[str, Any], inner_prefix: str) -> Tensor:
    """Return the weight that eval mode computes from an original and a state in a state dict.

    Args:
        norm: the SpectralNorm on the weight.
        state: the entries of the weight.
        inner_prefix: the prefix that their keys have in common.
    """
    norm_entries = {key.removeprefix(f"{inner_prefix}0."): value for key, value in state.items()}
    tensors = {
        key: norm_entries[key] for key in norm.state_dict(keep_vars=True) if key in norm_entries
    }
    training = norm.training
    try:
        norm.training = False
        value: Tensor = functional_call(norm, tensors, (state[f"{inner_prefix}original"].detach(),))
    finally:
        norm.training = training
    return value.detach()


def _spell_state_dict(
    state_dict: Callable[..., dict[str, Any]], owner: nn.Module, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    state = state_dict(owner, *args, **kwargs)
    saved_model, method = _model_being_saved()
    if saved_model is not None:
        if method == _METHOD:
            check_shared(saved_model, owner)
        # torch still takes its arguments by position: destination, prefix, keep_vars.
        make_plain(owner, state, args[1] if len(args) > 1 else kwargs.get("prefix", ""))
    return state


def _model_being_saved() -> tuple[nn.Module | None, str]:
    """Return the model that is being saved, and the name of the innermost function that saves it.

    Without one, they are None and "".
    """
    for frame in outward(sys._getframe(1)):
        code = frame.f_code
        if code.co_argcount and (code.co_name == _METHOD or code.co_name in _ADAPTER_FUNCTIONS):
            model = frame.f_locals.get(code.co_varnames[0])
            if isinstance(model, nn.Module):
                return model, code.co_name
    return None, ""


def wrap_saving(model: nn.Module) -> None:
    """Let `save_pretrained` of a model's modules with normalised weights inside write plain ones.

    It is wrapped in the classes that define it, where it takes a state dict.
    """
    for module in model.modules():
        for cls in definitions(type(module), _METHOD):
            has_argument = _STATE_DICT_ARGUMENT in inspect.signature(vars(cls)[_METHOD]).parameters
            if has_argument and is_normalised(module):
                wrap(cls, _METHOD, _save_plain)


def _save_plain(save: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not is_normalised(model):
        return save(model, *args, **kwargs)
    call = inspect.signature(save).bind(model, *args, **kwargs)
    state_dict = call.arguments.get(_STATE_DICT_ARGUMENT)
    call.arguments[_STATE_DICT_ARGUMENT] = (
        plain_state_dict(model) if state_dict is None else _make_all_plain(model, state_dict)
    )
    return save(*call.args, **call.kwargs)


def _make_all_plain(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with the ordinary keys, from one with snparam's keys or with those."""
    check_shared(model)
    plain = dict(state_dict)
    for weight in normalised_weights(model, every_name=True):
        make_plain(weight.owner, plain, weight.prefix)
    return plain


class _SavePretrained(System):
    def on_attach(self, owner: nn.Module) -> None:
        spell_for_pretrained(owner)

    def on_detach(self, owner: nn.Module) -> None:
        spell_as_before(owner)

    def on_model(self, model: nn.Module) -> None:
        wrap_saving(model)


register_system(_SavePretrained())
