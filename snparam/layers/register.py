"""`register_layer_type`, by which users add rows for their own module types to the layer table."""

from __future__ import annotations

import contextlib
import difflib
import dis
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType
from typing import Any, TypeVar, overload

from torch import nn

from snparam.layers.rows import LayerType, LayoutOf, Note, qualified_class_name
from snparam.layers.table import USER_ROWS
from snparam.matrices.views import KINDS, Layout

_TypeT = TypeVar("_TypeT", bound=type[nn.Module])

Weights = Mapping[str, str | LayoutOf]

# By what a module sets tensors, and how many instructions later its name is loaded.
_NAME_ARGUMENTS: dict[Any, int] = {"register_parameter": 1, "register_buffer": 1, "setattr": 2}
_STRING_BUILDERS = (
    "BUILD_STRING",
    "FORMAT_VALUE",
    "FORMAT_SIMPLE",
    "FORMAT_WITH_SPEC",
    "BINARY_OP",
    "BINARY_ADD",
    "BINARY_MODULO",
)
_NO_ARGUMENTS = ("CACHE", "PUSH_NULL", "PRECALL", "EXTENDED_ARG")


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

    Use it as a call, `register_layer_type(Dense, {"kernel": "columns"})`, or as a decorator of the
    class, `@register_layer_type(weights={"kernel": "columns"})`. The registration holds for later
    conversions, covers subclasses, and takes precedence over snparam's own row for the same type;
    the last registration for a type counts.

    Args:
        kind: the module type, or its qualified name, such as `"library.layers.Dense"`, for one
            that may not be imported yet; `*` matches anything in such a name. Leave it out to
            decorate.
        weights: mapping from the name of a tensor of the module (a glob; dotted for a tensor of a
            submodule that the module reads itself) to how it is read: `"rows"` (out, in, ...),
            `"columns"` (in, out, ...), `"stack"` (matrices, out, in, ...), `"stack_columns"`
            (matrices, in, out, ...), a `Layout`, or a function from the module to a `Layout`.
        skip: reason to leave the weights alone, which the plan shows.
        inside: mapping from the name of a tensor of the module or of any module inside it (a glob,
            dotted; `*` matches dots too) to what this type says about it: a reason to leave it
            alone, a `Layout` (or a function from the module to one) in place of the tensor's own,
            or None where this type says nothing. The first name that matches counts.

    Returns:
        `kind`, or, without it, a decorator that returns the class.

    Raises:
        TypeError: if `kind` is no module type or name, or a value is none of those above.
        ValueError: if a layout or a reason is not valid, the code of the module type does not name
            a tensor (globs and dotted names are not checked), or both `weights` and `inside` are
            left out.
    """
    if weights is None and inside is None:
        raise ValueError(
            "register_layer_type: pass weights={tensor name: 'rows' or 'columns' or ...}, or "
            "inside={...}"
        )
    layouts = {name: _layout(name, layout) for name, layout in _items("weights", weights)}
    notes = dict(_checked_notes(inside))
    if skip is not None and (not isinstance(skip, str) or not skip):
        raise ValueError(f"register_layer_type: skip={skip!r}: expected a reason, in words")
    obstacle = None if skip is None else lambda _: skip

    def register(type_or_name: Any) -> Any:
        _check_kind(type_or_name)
        _check_tensor_names(_class_of(type_or_name), layouts)
        names = (type_or_name,) if isinstance(type_or_name, str) else ()
        USER_ROWS.add(type_or_name, LayerType((), layouts, obstacle, names=names, inside=notes))
        return type_or_name

    return register if kind is None else register(kind)


def _check_kind(kind: Any) -> None:
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        if kind is nn.Module:
            raise ValueError("register_layer_type: nn.Module itself would be every module")
    elif not isinstance(kind, str):
        raise TypeError(
            f"register_layer_type: kind={kind!r}: expected a module type or its qualified name"
        )
    elif "." not in kind:
        raise ValueError(
            f"register_layer_type: kind={kind!r}: expected a qualified name, such as "
            f"{qualified_class_name(nn.Linear)!r}"
        )


def _class_of(kind: Any) -> type | None:
    """Return the module type, looked up if it was given by name, or None if it is not loaded."""
    if isinstance(kind, type):
        return kind
    module, _, name = kind.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    return cls if isinstance(cls, type) else None


def _check_tensor_names(cls: type | None, names: Iterable[str]) -> None:
    """Refuse tensor names that the code of a class does not contain.

    The code is all there is to check, as no module of the class need exist. Where it makes names,
    as `setattr(self, f"kernel{i}", ...)` does, only a name that resembles one in it, and starts
    with none, is refused.

    Raises:
        ValueError: if a name is refused; the message has the most similar name.
    """
    known_names = _names_in(cls)
    if cls is None or not known_names:
        return
    dynamic = any(map(_makes_names, _codes_in(cls)))
    for name in names:
        if name in known_names or any(sign in name for sign in "*?[."):
            continue
        if dynamic and name.startswith(tuple(known_names)):
            continue
        close = difflib.get_close_matches(name, known_names, n=1, cutoff=0.8 if dynamic else 0.6)
        if close or not dynamic:
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"register_layer_type: weights has {name!r}{hint}, which the code of "
                f"{qualified_class_name(cls)} does not name: expected the name of one of its "
                "tensors"
            )


def _names_in(cls: type | None) -> set[str]:
    """Return the names and strings in the methods and annotations of a class and its bases.

    The set is empty where no method is written in Python and nothing is annotated.
    """
    names: set[str] = set()
    attributes: set[str] = set()
    for base in _written_bases(cls):
        attributes.update(vars(base))
        with contextlib.suppress(NameError):  # an annotation may use a name defined later
            names.update(inspect.get_annotations(base))
    for code in _codes_in(cls):
        names.update(_names_in_code(code))
    return names | attributes if names else set()


def _written_bases(cls: type | None) -> Iterator[type]:
    """Yield a class and its bases, but for those that every module has."""
    return (base for base in getattr(cls, "__mro__", ()) if base not in (nn.Module, object))


def _codes_in(cls: type | None) -> Iterator[CodeType]:
    """Yield the code objects of the methods of a class and its bases that are written in Python."""
    for base in _written_bases(cls):
        for value in vars(base).values():
            method = getattr(value, "__func__", getattr(value, "fget", value))
            code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
            if isinstance(code, CodeType):
                yield code


def _makes_names(code: CodeType) -> bool:
    """Return whether code sets tensors under names that are no constants in it.

    The name is the first argument of `register_parameter` and `register_buffer`, and the second of
    `setattr`.
    """
    instructions = [i for i in dis.get_instructions(code) if i.opname not in _NO_ARGUMENTS]
    for position, instruction in enumerate(instructions):
        distance = _NAME_ARGUMENTS.get(instruction.argval) if instruction.argval else None
        if instruction.opname.startswith("LOAD_") and isinstance(distance, int):
            name, *later = instructions[position + distance : position + distance + 5]
            if not (name.opname == "LOAD_CONST" and isinstance(name.argval, str)):
                return True
            # The constant may be a part of the name.
            if any(i.opname in _STRING_BUILDERS or i.argval == "format" for i in later):
                return True
    return any(_makes_names(inner) for inner in code.co_consts if isinstance(inner, CodeType))


def _names_in_code(constant: object) -> Iterator[str]:
    """Yield the names and strings in a code object, or in one of its constants."""
    if isinstance(constant, str) and constant:
        yield constant
    elif isinstance(constant, tuple | frozenset):
        for part in constant:
            yield from _names_in_code(part)
    elif isinstance(constant, CodeType):
        yield from constant.co_names
        yield from _names_in_code(constant.co_consts)


def _items(option: str, mapping: Any) -> list[tuple[str, Any]]:
    """Return the items of an option that maps tensor names to values; refuse what is no name."""
    if mapping is None:
        return []
    if not isinstance(mapping, Mapping) or not mapping:
        raise TypeError(f"register_layer_type: {option}={mapping!r}: expected names to values")
    for name in mapping:
        if not isinstance(name, str) or not name:
            raise TypeError(f"register_layer_type: {option} has {name!r}: expected a tensor's name")
    return list(mapping.items())


def _layout(name: str, value: Any) -> Any:
    """Return the layout, or the function from the module to it, that a value of `weights` means."""
    if isinstance(value, str):
        if value not in KINDS:
            close = difflib.get_close_matches(value, KINDS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"register_layer_type: weights[{name!r}]={value!r}{hint}: expected one of "
                + ", ".join(map(repr, KINDS))
            )
        return Layout(value)
    if isinstance(value, Layout) or callable(value):
        return value
    raise TypeError(
        f"register_layer_type: weights[{name!r}]={value!r}: expected 'rows', 'columns', 'stack', "
        "'stack_columns', a Layout, or a function from the module to a Layout"
    )


def _checked_notes(notes: Any) -> list[tuple[str, Note]]:
    """Return the items of `inside`, after a check of their values."""
    items = _items("inside", notes)
    for name, note in items:
        if note == "":
            raise ValueError(f"register_layer_type: inside[{name!r}]='': expected a reason")
        if not (note is None or isinstance(note, str | Layout) or callable(note)):
            raise TypeError(
                f"register_layer_type: inside[{name!r}]={note!r}: expected a reason, a Layout, a "
                "function from the module to a Layout, or None"
            )
    return items
