"""The arguments of public functions: checked for usual mistakes of callers, and documented once."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

_Function = TypeVar("_Function", bound=Callable[..., Any])


def put_into_docstring(function: _Function, placeholder: str, text: str) -> _Function:
    """Put a text into a function's docstring, in place of the line `{placeholder}`, and return it.

    The text gets the indentation of that line, since Python 3.13 strips the indentation that all
    lines of a docstring have in common.
    """
    if function.__doc__:
        function.__doc__ = re.sub(
            rf"^( *)\{{{placeholder}\}}$",
            lambda line: textwrap.indent(text, line[1]),
            function.__doc__,
            flags=re.MULTILINE,
        )
    return function


def check_model(model: Any, function: str) -> None:
    """Raise if the argument that a function takes for a model is no `nn.Module`.

    Args:
        model: the argument.
        function: name of the function that was called, for the error.

    Raises:
        TypeError: with the argument's type, the expected one, and what to do.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type):
        description, remedy = f"the class {model.__name__}", "make an instance of it first"
    elif model is None:
        description, remedy = (
            "None",
            "check what gave it: a function that changes a network in place may return nothing",
        )
    elif isinstance(model, list | tuple | set | dict):
        description = f"a {type(model).__name__}"
        remedy = (
            "call it for each network in it, or put them into an nn.ModuleList or nn.ModuleDict"
        )
    else:
        description, remedy = f"a {type(model).__name__}", "pass the network itself"
    raise TypeError(f"{function}: expected an nn.Module, not {description}; {remedy}.")


def check_flag(name: str, value: Any) -> None:
    """Raise if the value of an option that is either on or off is neither True nor False.

    Raises:
        TypeError: with the option and the value. Strings such as "no" count as true in Python.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: expected True or False, not {type(value).__name__}")
