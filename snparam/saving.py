"""Models that save themselves: `save_pretrained` writes what `from_pretrained` reads right.

transformers and diffusers write `model.state_dict()`, and their `from_pretrained` initialises
weights anew that it does not find under their ordinary names. A converted model's own
`save_pretrained` therefore writes the plain state dict, with the normalised weights. Neither
library is imported; a method of that name is all that is looked for.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from .checkpoints import plain_state_dict
from .scopes import is_normalised, norms_of

_METHOD = "save_pretrained"


def save_plain(model: nn.Module, restore: Callable[[nn.Module], nn.Module]) -> None:
    """Let every module with normalised weights inside, and a `save_pretrained`, save plain ones.

    Args:
        model: a converted network.
        restore: leaves an ordinary network behind, with the normalised weights.
    """
    for module in model.modules():
        original = getattr(type(module), _METHOD, None)
        if callable(original) and _METHOD not in vars(module) and is_normalised(module):
            # A bound method in the instance: deepcopy binds it to the copy.
            vars(module)[_METHOD] = MethodType(_saver(original, restore), module)


def save_as_before(model: nn.Module) -> None:
    """Undo `save_plain`, wherever no normalised weight is left."""
    for module in model.modules():
        own = vars(module).get(_METHOD)
        if hasattr(own, "_snparam") and not is_normalised(module):
            del vars(module)[_METHOD]


def _saver(original: Callable[..., Any], restore: Callable[[Any], Any]) -> Callable[..., Any]:
    """A `save_pretrained` around another; it has the other's signature and documentation."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not is_normalised(self):
            return original(self, *args, **kwargs)
        if "state_dict" not in signature.parameters:
            ordinary = restore(copy.deepcopy(self))
            return original(ordinary, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        if given.arguments.get("state_dict") is None:
            given.arguments["state_dict"] = plain_state_dict(self)
        else:
            _check_plain(self, given.arguments["state_dict"])
        return original(*given.args, **given.kwargs)

    save._snparam = True  # type: ignore[attr-defined]
    return save


def _check_plain(model: nn.Module, state_dict: Any) -> None:
    """Refuse a state dict that `from_pretrained` would not understand.

    Raises:
        ValueError: with a key at fault.
    """
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for tensor, _ in norms_of(module):
            key = f"{prefix}parametrizations.{tensor}.original"
            if key in state_dict:
                raise ValueError(
                    f"save_pretrained of {type(model).__name__}: the state dict has {key!r}, and "
                    f"from_pretrained would initialise '{prefix}{tensor}' anew; pass "
                    "state_dict=snparam.plain_state_dict(model), or none."
                )
