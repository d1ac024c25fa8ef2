"""What callers pass for a network or for a number, where they mean something else."""

from __future__ import annotations

from typing import Any

from torch import nn


def check_model(model: Any, function: str) -> None:
    """Raise if what a function was called with is no module.

    Raises:
        TypeError: with what it is, what is expected, and what to do.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type):
        what, remedy = f"the class {model.__name__}", "make an instance of it first"
    elif model is None:
        what, remedy = "None", "check what gave it: a function that changes a network in place may"
        remedy += " return nothing"
    elif isinstance(model, list | tuple | set | dict):
        what = f"a {type(model).__name__}"
        remedy = (
            "call it for each network in it, or put them into an nn.ModuleList or nn.ModuleDict"
        )
    else:
        what, remedy = f"a {type(model).__name__}", "pass the network itself"
    raise TypeError(f"{function}: expected an nn.Module, not {what}; {remedy}.")


def check_count_is_no_name(num_svs: Any) -> None:
    """Raise if the name of a tensor was passed in the place of the number of singular values.

    torch's own `spectral_norm(module, "weight")` takes it there.

    Raises:
        TypeError: with the argument that takes the name.
    """
    if isinstance(num_svs, str):
        raise TypeError(
            f"register_sn: num_svs={num_svs!r}: expected an int; pass the name of a tensor as "
            f"name={num_svs!r}."
        )
