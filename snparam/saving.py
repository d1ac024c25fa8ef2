"""Models that save themselves: a state dict that is passed to `save_pretrained` is made plain.

`save_pretrained` asks for `model.state_dict()` where it is given none; see `pretrained` for that.
Where trainers pass one, gathered from many ranks, say, only the method itself sees it. A converted
model therefore has a `save_pretrained` of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from torch import nn

from .baking import check_shared
from .checkpoints import plain_state_dict
from .pretrained import METHOD, make_plain
from .scopes import is_normalised, norms_of


def save_plain(model: nn.Module) -> None:
    """Let every module with normalised weights inside, and a `save_pretrained`, save plain ones."""
    for module in model.modules():
        original = getattr(type(module), METHOD, None)
        if callable(original) and METHOD not in vars(module) and is_normalised(module):
            signature = inspect.signature(original)
            if "state_dict" in signature.parameters:
                # A bound method in the instance: deepcopy binds it to the copy.
                vars(module)[METHOD] = MethodType(_saver(original, signature), module)


def save_as_before(model: nn.Module) -> None:
    """Undo `save_plain`, wherever no normalised weight is left."""
    for module in model.modules():
        own = vars(module).get(METHOD)
        if hasattr(own, "_snparam") and not is_normalised(module):
            del vars(module)[METHOD]


def _saver(original: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    """A `save_pretrained` around another; it has the other's signature and documentation."""

    @functools.wraps(original)
    def save(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not is_normalised(self):
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        state_dict = given.arguments.get("state_dict")
        given.arguments["state_dict"] = (
            plain_state_dict(self) if state_dict is None else _plain(self, state_dict)
        )
        return original(*given.args, **given.kwargs)

    save._snparam = True  # type: ignore[attr-defined]
    return save


def _plain(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of a model with the ordinary keys, from one with snparam's or with those."""
    check_shared(model)
    plain = dict(state_dict)
    for name, module in model.named_modules(remove_duplicate=False):
        if any(True for _ in norms_of(module)):
            make_plain(module, plain, f"{name}." if name else "")
    return plain
