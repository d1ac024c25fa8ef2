"""All or nothing: modules are put back as they were if something fails on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import nn

# Where a module keeps its tensors, its children and its hooks, and which buffers are not saved.
_TABLES = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)]


@contextmanager
def all_or_nothing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, modules change together: an exception leaves each as it was at the beginning.

    That is its class, its attributes, and which tensors, children and hooks it has, in their order.
    Values of tensors are not looked at.
    """
    before = [_Module(module) for module in modules]
    try:
        yield
    except BaseException:
        for module in before:
            module.put_back()
        raise


class _Module:
    """What a module was."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.type, self.attributes = module, type(module), dict(vars(module))
        tables = (self.attributes.get(name) for name in _TABLES)
        self.tables = [(table, copy(table)) for table in tables if isinstance(table, dict | set)]

    def put_back(self) -> None:
        if type(self.module) is not self.type:
            self.module.__class__ = self.type
        _fill(vars(self.module), self.attributes)
        for table, content in self.tables:
            # In place: handles of hooks know the tables, not the module.
            _fill(table, content)


def _fill(table: Any, content: Any) -> None:
    table.clear()
    table.update(content)
