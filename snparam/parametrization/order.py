"""The order that the tensors of a module had before it was parametrized.

torch moves a parametrized tensor out of the tables of its module. The order that the module's
tensors had is recorded on each ParametrizationList, so that all that leaves or writes an ordinary
module has its tensors in that order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

_ATTRIBUTE = "_snparam_order"


def record_order(parametrization_list: Any, names: Sequence[str]) -> None:
    """Record the names of the tensors of the ordinary module, in its order."""
    setattr(parametrization_list, _ATTRIBUTE, names)


def recorded_order(parametrization_list: Any) -> Sequence[str]:
    """Return the names of the tensors of the ordinary module, in its order.

    They are empty for a list without a record, such as one that torch's
    `transfer_parametrizations_and_params` has made.
    """
    order: Sequence[str] = getattr(parametrization_list, _ATTRIBUTE, ())
    return order


def ordinary_order(owner: nn.Module) -> Sequence[str]:
    """Return the order that one of a module's lists has on record, or else its present order."""
    lists: Any = owner._modules.get("parametrizations")
    for parametrization_list in lists.values() if isinstance(lists, nn.ModuleDict) else ():
        order = recorded_order(parametrization_list)
        if order:
            return order
    return (*owner._parameters, *owner._buffers)


def in_order(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Return names sorted by an order of names, with those that it lacks after the others."""
    positions = {name: position for position, name in enumerate(order)}
    return sorted(names, key=lambda name: positions.get(name, len(positions)))


def sort_table(table: dict[str, Any], order: Sequence[str]) -> None:
    """Sort a table of a module by an order of names, in place, as `in_order` does."""
    for name in in_order(table, order):
        table[name] = table.pop(name)
