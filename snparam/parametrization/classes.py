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
        attributes = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        owner.__class__ = type(cls.__name__, cls.__bases__, attributes)


def wrap(cls: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Run a method of a class within a function; wrapping it in the same function again is a no-op.

    Args:
        cls: the class; a method with the same signature and documentation is defined in it.
        name: name of the method, which the class defines or inherits.
        wrapper: the function; it is called as `wrapper(method, module, *args, **kwargs)`, and has
            to call the method itself.
    """
    if wrapper in _wrappers(vars(cls).get(name)):
        return
    method = getattr(cls, name)

    @functools.wraps(method)
    def wrapped(module: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(method, module, *args, **kwargs)

    wrapped._snparam_wrapper = wrapper  # type: ignore[attr-defined]
    wrapped._snparam_defined = name in vars(cls)  # type: ignore[attr-defined]
    setattr(cls, name, wrapped)


def unwrap(cls: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Undo `wrap`, if it was called on this class and not on a base of it alone."""
    removed = []
    while wrapper in _wrappers(vars(cls).get(name)):
        wrapped: Any = vars(cls)[name]
        removed.append(wrapped._snparam_wrapper)
        if wrapped._snparam_defined:
            setattr(cls, name, wrapped.__wrapped__)
        else:
            delattr(cls, name)
    for other in reversed(removed[:-1]):
        wrap(cls, name, other)


def definitions(cls: type, name: str) -> Iterator[type]:
    """Yield the classes, from this one up through its bases, that define a method of a name."""
    return (base for base in cls.__mro__ if isinstance(vars(base).get(name), FunctionType))


def _wrappers(method: Any) -> list[Callable[..., Any]]:
    """Return the functions that a method runs within, outermost first."""
    wrappers = []
    while hasattr(method, "_snparam_wrapper"):
        wrappers.append(method._snparam_wrapper)
        method = method.__wrapped__
    return wrappers
