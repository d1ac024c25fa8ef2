"""One call that adds a row to the layer table: how a module type of one's own is read."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

from torch import nn

from snparam.layers.rows import LayerType, LayoutOf, Note, qualified
from snparam.layers.table import USER_ROWS
from snparam.matrices.views import KINDS, Layout

_TypeT = TypeVar("_TypeT", bound=type[nn.Module])

Weights = Mapping[str, str | LayoutOf]


@overload
def register_layer_type(
    kind: _TypeT,
    weights: Weights | None = ...,
    *,
    skip: str | None = ...,
    inside: Mapping[str, Note] | None = ...,
) -> _TypeT: ...
@overload
def register_layer_type(
    kind: str,
    weights: Weights | None = ...,
    *,
    skip: str | None = ...,
    inside: Mapping[str, Note] | None = ...,
) -> str: ...
@overload
def register_layer_type(
    kind: None = ...,
    weights: Weights | None = ...,
    *,
    skip: str | None = ...,
    inside: Mapping[str, Note] | None = ...,
) -> Callable[[_TypeT], _TypeT]: ...


def register_layer_type(
    kind: Any = None,
    weights: Weights | None = None,
    *,
    skip: Any = None,
    inside: Mapping[str, Note] | None = None,
) -> Any:
    """Tell snparam how the weights of a module type are read as matrices.

    As a call, `register_layer_type(Dense, {"kernel": "columns"})`, or as a decorator of the class,
    `@register_layer_type(weights={"kernel": "columns"})`. It holds for later conversions, for
    subclasses too, and before what snparam knows itself; the last registration for a type counts.

    Args:
        kind: the module type, or its qualified name, such as `"library.layers.Dense"`, for one
            that may not be imported yet; `*` stands for anything in such a name. Leave it out to
            decorate.
        weights: name of a tensor of the module (a glob; dotted for one of a submodule that the
            module reads itself) to how it is read: `"rows"` (out, in, ...), `"columns"`
            (in, out, ...), `"stack"` (matrices, out, in, ...), `"stack_columns"`
            (matrices, in, out, ...), a `Layout`, or a function from the module to a `Layout`.
        skip: leave the weights alone, with this reason in the plan.
        inside: name of a tensor of the module or of any module inside it (a glob, dotted; `*`
            stands for dots too) to what this type knows about it: a reason to leave it alone, a
            `Layout` instead of the tensor's own, or None, nothing; the first that matches counts.

    Returns:
        `kind`, or, without it, a decorator that returns the class.

    Raises:
        TypeError: if `kind` is no module type or name, or a value is none of those above.
        ValueError: for an unknown way of reading, an empty reason, or if there is nothing to say.
    """
    if weights is None and inside is None:
        raise ValueError(
            "register_layer_type: pass weights={tensor name: 'rows' or 'columns' or ...}, or "
            "inside={...}"
        )
    read = {name: _layout(name, layout) for name, layout in _items("weights", weights)}
    notes = dict(_checked_notes(inside))
    if skip is not None and (not isinstance(skip, str) or not skip):
        raise ValueError(f"register_layer_type: skip={skip!r}: expected a reason, in words")
    obstacle = None if skip is None else lambda _: skip

    def register(given: Any) -> Any:
        types, names = _type_or_name(given)
        row = LayerType(types, read, obstacle, names=names, inside=notes)
        USER_ROWS.insert(0, row)
        return given

    return register if kind is None else register(kind)


def _type_or_name(given: Any) -> tuple[tuple[type[nn.Module], ...], tuple[str, ...]]:
    if isinstance(given, type) and issubclass(given, nn.Module):
        if given is nn.Module:
            raise ValueError("register_layer_type: nn.Module itself would be every module")
        return (given,), ()
    if isinstance(given, str):
        if "." not in given:
            raise ValueError(
                f"register_layer_type: kind={given!r}: expected a qualified name, such as "
                f"{qualified(nn.Linear)!r}"
            )
        return (), (given,)
    raise TypeError(
        f"register_layer_type: kind={given!r}: expected a module type or its qualified name"
    )


def _items(option: str, given: Any) -> list[tuple[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, Mapping) or not given:
        raise TypeError(f"register_layer_type: {option}={given!r}: expected names to values")
    for name in given:
        if not isinstance(name, str) or not name:
            raise TypeError(f"register_layer_type: {option} has {name!r}: expected a tensor's name")
    return list(given.items())


def _layout(name: str, given: Any) -> Any:
    if isinstance(given, str):
        if given not in KINDS:
            close = difflib.get_close_matches(given, KINDS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"register_layer_type: weights[{name!r}]={given!r}{hint}: expected one of "
                + ", ".join(map(repr, KINDS))
            )
        return Layout(given)
    if isinstance(given, Layout) or callable(given):
        return given
    raise TypeError(
        f"register_layer_type: weights[{name!r}]={given!r}: expected 'rows', 'columns', 'stack', "
        "'stack_columns', a Layout, or a function from the module to a Layout"
    )


def _checked_notes(given: Any) -> list[tuple[str, Note]]:
    for name, note in _items("inside", given):
        if note == "":
            raise ValueError(f"register_layer_type: inside[{name!r}]='': expected a reason")
        if not (note is None or isinstance(note, str | Layout) or callable(note)):
            raise TypeError(
                f"register_layer_type: inside[{name!r}]={note!r}: expected a reason, a Layout, a "
                "function from the module to a Layout, or None"
            )
    return _items("inside", given)
