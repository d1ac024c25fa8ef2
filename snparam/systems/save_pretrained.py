"""Inside a library's `save_pretrained`, the state dict of a normalised module is plain.

transformers and diffusers write `model.state_dict()`, and their `from_pretrained` initialises
weights anew that it does not find under their ordinary names. A layer does not know the models that
it is a part of, but whoever asks for its state dict is on the call stack. Neither library is
imported; a method of that name is all that is looked for.

Where trainers pass a state dict, gathered from many ranks, say, only the method itself sees it. The
class that defines it therefore makes the state dict plain, once a model of that class was
converted; for models without normalised weights it does what it did. No model has anything of its
own that would have to be undone, or that a copy or a pickle would take along.
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

METHOD = "save_pretrained"
# peft's two that say which tensors an adapter has of modules that are trained whole
# (`modules_to_save`), when it is saved and when it is read: by the keys of those modules' state
# dicts, which have to agree. What the adapter is put on is no part of it.
_OF_ADAPTERS = ("get_peft_model_state_dict", "adapter_state_dict_load_map")


_SPELLED = "state_dict"
_GIVEN = "state_dict"


def spell_for_pretrained(owner: nn.Module) -> None:
    """Let `state_dict` of a module be plain, with its normalised weights, in `save_pretrained`.

    Its class has to be its own.
    """
    wrap(type(owner), _SPELLED, _state_dict)


def spell_as_before(owner: nn.Module) -> None:
    """Undo `spell_for_pretrained`."""
    unwrap(type(owner), _SPELLED, _state_dict)


def make_plain(owner: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Replace snparam's keys of a module by those of the ordinary one.

    Args:
        owner: a module with normalised weights.
        state_dict: with its tensors, or with others for it; changed in place. A weight that it has
            under another name, or that is no part of state dicts, is left as it is.
        prefix: that of the module's keys.

    Raises:
        ValueError: if a weight carries another parametrization as well.
    """
    for name, norm in norms_of(owner):
        inside = f"{prefix}parametrizations.{name}."
        theirs = {k: v for k, v in state_dict.items() if k.startswith(inside)}
        if f"{inside}original" in theirs:
            check_alone(owner, name)
            state_dict[prefix + name] = _normalised(norm, theirs, inside)
        for key in theirs:
            del state_dict[key]


def _normalised(norm: SpectralNorm, state: dict[str, Any], inside: str) -> Tensor:
    """What eval mode makes of a weight, by the state beside it."""
    own = {key.removeprefix(f"{inside}0."): value for key, value in state.items()}
    tensors = {key: own[key] for key in norm.state_dict(keep_vars=True) if key in own}
    training = norm.training
    try:
        norm.training = False
        value: Tensor = functional_call(norm, tensors, (state[f"{inside}original"].detach(),))
    finally:
        norm.training = training
    return value.detach()


def _state_dict(
    state_dict: Callable[..., dict[str, Any]], owner: nn.Module, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    state = state_dict(owner, *args, **kwargs)
    saved, method = _being_saved()
    if saved is not None:
        if method == METHOD:
            check_shared(saved, owner)
        # torch still takes its arguments by position: destination, prefix, keep_vars.
        make_plain(owner, state, args[1] if len(args) > 1 else kwargs.get("prefix", ""))
    return state


def _being_saved() -> tuple[nn.Module | None, str]:
    """The model that is being saved, and the function that does it, the innermost of several."""
    for frame in outward(sys._getframe(1)):
        code = frame.f_code
        if code.co_argcount and (code.co_name == METHOD or code.co_name in _OF_ADAPTERS):
            model = frame.f_locals.get(code.co_varnames[0])
            if isinstance(model, nn.Module):
                return model, code.co_name
    return None, ""


def save_plain(model: nn.Module) -> None:
    """Let `save_pretrained` of modules with normalised weights inside write plain ones.

    By the classes that define it, where it takes a state dict.
    """
    for module in model.modules():
        for cls in definitions(type(module), METHOD):
            takes_one = _GIVEN in inspect.signature(vars(cls)[METHOD]).parameters
            if takes_one and is_normalised(module):
                wrap(cls, METHOD, _save)


def _save(save: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not is_normalised(model):
        return save(model, *args, **kwargs)
    given = inspect.signature(save).bind(model, *args, **kwargs)
    state_dict = given.arguments.get(_GIVEN)
    given.arguments[_GIVEN] = (
        plain_state_dict(model) if state_dict is None else _plain(model, state_dict)
    )
    return save(*given.args, **given.kwargs)


def _plain(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of a model with the ordinary keys, from one with snparam's or with those."""
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
        save_plain(model)


register_system(_SavePretrained())
