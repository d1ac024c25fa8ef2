"""The class of a parametrized module, which torch makes for it and a deepcopy shares.

What we change about a module is in its class and never in the module itself: torch takes that
class away with the last parametrization, whoever removes it. The classes of models are other
people's, and stay; what their methods do for other models does not change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def give_own_class(owner: nn.Module) -> None:
    """Make the class that holds a parametrized module's properties its own.

    A deepcopy shares that class with its model, and would lose or gain properties with it.
    """
    if parametrize.is_parametrized(owner):
        cls = type(owner)
        own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        owner.__class__ = type(cls.__name__, cls.__bases__, own)


def wrap(cls: type, name: str, around: Callable[..., Any]) -> None:
    """Let a method of a class run within a function, once, however often this is called.

    Args:
        cls: the class; it gets a method of its own, with the other's signature and documentation.
        name: name of the method, which the class has or inherits.
        around: is called as `around(method, module, *arguments)`, and calls the method itself.
    """
    if around in _arounds(vars(cls).get(name)):
        return
    method = getattr(cls, name)

    @functools.wraps(method)
    def within(module: Any, *args: Any, **kwargs: Any) -> Any:
        return around(method, module, *args, **kwargs)

    within._snparam_around = around  # type: ignore[attr-defined]
    within._snparam_own = name in vars(cls)  # type: ignore[attr-defined]
    setattr(cls, name, within)


def unwrap(cls: type, name: str, around: Callable[..., Any]) -> None:
    """Undo `wrap`, if it was called on this very class."""
    kept = []
    while around in _arounds(vars(cls).get(name)):
        within: Any = vars(cls)[name]
        kept.append(within._snparam_around)
        if within._snparam_own:
            setattr(cls, name, within.__wrapped__)
        else:
            delattr(cls, name)
    for other in reversed(kept[:-1]):
        wrap(cls, name, other)


def definitions(cls: type, name: str) -> Iterator[type]:
    """The classes, from this one upwards, that define a method of a name."""
    return (base for base in cls.__mro__ if isinstance(vars(base).get(name), FunctionType))


def _arounds(method: Any) -> list[Callable[..., Any]]:
    """The functions that a method runs within, outermost first."""
    found = []
    while hasattr(method, "_snparam_around"):
        found.append(method._snparam_around)
        method = method.__wrapped__
    return found
