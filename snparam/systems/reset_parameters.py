"""`reset_parameters`: a module that initialises itself anew writes to its originals.

`reset_parameters` writes to `self.weight` in place. A normalised weight is computed at each read,
so that what is written to it is lost; and a method that goes through `self.parameters()`, as that
of recurrent layers does, would write to originals and gains and leave the state as it was. Here the
method runs on the ordinary module, and states and gains then start from the weights that it leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from snparam.parametrization.classes import unwrap, wrap
from snparam.parametrization.extensions import System, register_system
from snparam.parametrization.find import norms_of
from snparam.parametrization.order import recorded_order, sort_table

# The method of most modules, and that of nn.MultiheadAttention.
_METHODS = ("reset_parameters", "_reset_parameters")


def _reset(method: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a method that initialises a module on its originals, and start states and gains anew."""
    norms = list(norms_of(module))
    if not norms:
        return method(module, *args, **kwargs)
    with _ordinary_weights(module, [name for name, _ in norms]):
        result = method(module, *args, **kwargs)
    lists: Any = module.parametrizations
    for name, norm in norms:
        original = lists[name].original
        if not original.is_meta:
            norm.refresh(original)
            norm.start_parameters(original)
    return result


@contextmanager
def _ordinary_weights(module: Any, names: list[str]) -> Iterator[None]:
    """Make weights of a module its Parameters (or buffers), as if never normalised, for a while.

    The tensors that have their names at the end of the context are written to the originals.
    """
    cls, lists = type(module), module.parametrizations
    parametrized = {name: lists[name] for name in names}
    plain_order = recorded_order(parametrized[names[0]])
    tables = [module._parameters, module._buffers, module._modules, lists._modules]
    orders = [list(table) for table in tables]
    attributes = {
        key: value for key, value in vars(cls).items() if key not in (*names, *_NOT_COPIED)
    }
    for name, parametrization in parametrized.items():
        _table(parametrization, module)[name] = parametrization.original
        del lists._modules[name]
    if not lists:
        del module._modules["parametrizations"]
    for table in (module._parameters, module._buffers):
        sort_table(table, plain_order)
    module.__class__ = type(cls.__name__, cls.__bases__, attributes)
    written = {}
    try:
        yield
    finally:
        module.__class__ = cls
        module._modules["parametrizations"] = lists
        for name, parametrization in parametrized.items():
            written[name] = _table(parametrization, module).pop(name, None)
            lists._modules[name] = parametrization
        for table, order in zip(tables, orders, strict=True):
            sort_table(table, order)
    with torch.no_grad():
        for name, value in written.items():
            original = parametrized[name].original
            if value is not None and value is not original:
                original.copy_(value)


# Entries of a class's dict that Python makes for each class, and that another class cannot take.
_NOT_COPIED = ("__dict__", "__weakref__")


def _table(parametrization: nn.Module, module: nn.Module) -> dict[str, Any]:
    """Return the table of a module, parameters or buffers, in which a weight's original was."""
    is_buffer = "original" in parametrization._buffers
    return module._buffers if is_buffer else module._parameters


class _ResetParameters(System):
    def on_attach(self, owner: nn.Module) -> None:
        for method in _METHODS:
            if callable(getattr(type(owner), method, None)):
                wrap(type(owner), method, _reset)

    def on_detach(self, owner: nn.Module) -> None:
        for method in _METHODS:
            unwrap(type(owner), method, _reset)


register_system(_ResetParameters())
