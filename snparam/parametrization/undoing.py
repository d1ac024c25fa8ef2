"""All-or-nothing changes: modules are put back as they were if an exception interrupts one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# The tables in which a module keeps its tensors, its children, its hooks, and the names of those
# buffers that are not saved.
_TABLES = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)]


@contextmanager
def all_or_nothing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules back as they were at the beginning if an exception ends the context.

    The class of each module, its attributes, and its tensors, children and hooks, in their order,
    are restored. Values of tensors are not.
    """
    snapshots = [_Snapshot(module) for module in modules]
    try:
        yield
    except BaseException:
        for snapshot in snapshots:
            snapshot.restore()
        raise


class _Snapshot:
    """The class, the attributes and the tables of a module at one time."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.type, self.attributes = module, type(module), dict(vars(module))
        tables = (self.attributes.get(name) for name in _TABLES)
        self.tables = [(table, table.copy()) for table in tables if isinstance(table, dict | set)]

    def restore(self) -> None:
        if type(self.module) is not self.type:
            self.module.__class__ = self.type
        _fill(vars(self.module), self.attributes)
        for table, content in self.tables:
            # In place, because handles of hooks refer to the tables and not to the module.
            _fill(table, content)


def _fill(table: Any, content: Any) -> None:
    table.clear()
    table.update(content)
