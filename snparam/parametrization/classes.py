"""The class of a parametrized module, which torch makes for it and a deepcopy shares.

snparam changes a module through that class, and sets nothing on the instance: torch removes the
class with the last parametrization, whoever takes that off. The classes of whole models are other
people's, and stay when a model is restored; a wrapped method does what it did for models without
normalised weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def give_own_class(owner: nn.Module) -> None:
    """Give a parametrized module a class that no other module shares.

    Its class holds the properties that compute its parametrized tensors. A deepcopy shares the
    class of the module that was copied, and would gain or lose properties together with it.
    """
    if parametrize.is_parametrized(owner):
        cls = type(owner)
        own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        owner.__class__ = type(cls.__name__, cls.__bases__, own)


def wrap(cls: type, name: str, around: Callable[..., Any]) -> None:
    """Run a method of a class within a function; wrapping it in the same function again is a no-op.

    Args:
        cls: the class; a method with the same signature and documentation is defined in it.
        name: name of the method, which the class defines or inherits.
        around: the function; it is called as `around(method, module, *args, **kwargs)`, and has to
            call the method itself.
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
    """Undo `wrap`, if it was called on this class and not on a base of it alone."""
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
    """Yield the classes, from this one up through its bases, that define a method of a name."""
    return (base for base in cls.__mro__ if isinstance(vars(base).get(name), FunctionType))


def _arounds(method: Any) -> list[Callable[..., Any]]:
    """Return the functions that a method runs within, outermost first."""
    found = []
    while hasattr(method, "_snparam_around"):
        found.append(method._snparam_around)
        method = method.__wrapped__
    return found
