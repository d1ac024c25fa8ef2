"""The arguments of a conversion: documented once, and checked for usual mistakes of callers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from snparam.parametrization.arguments import put_into_docstring

_Function = TypeVar("_Function", bound=Callable[..., Any])

_ARGUMENTS_DOC = """\
include: module types and name patterns, one or several; only the weights inside modules
    that match one are converted, and weights that a pattern names. A pattern is matched by
    whole path segments from the root: `layers.1` does not match `layers.10`; `*` matches
    anything within a segment, `**` any number of segments. None (the default) includes
    everything.
exclude: module types and name patterns of what is left alone; it wins over `include`.
filter_fn: `filter_fn(module, qualified_name) -> bool`, called for modules with eligible
    weights; True means convert.
example_inputs: with `norm="operator"`, what the network is called with: one tensor, a
    sequence of positional arguments, or a mapping of keyword arguments. One forward in eval
    mode and without gradients, which moves and changes nothing, records the size of the
    inputs of each convolution; of one that is called at several sizes, the one with the
    largest σ. See `record_input_sizes`. None (the default) with `norm="matrix"`.
preset: name of a choice of what is left alone, see docs/presets.md: "gan-discriminator",
    "gan-generator", "keep-head", "attention", "sigma-reparam" or "sngp". `include`,
    `exclude` and `filter_fn` leave out more. None (the default) leaves out nothing.
replace: whether to take over weights that are under torch's own spectral norm
    (`parametrizations.spectral_norm` or the deprecated hook), with the same Parameter and
    its u, instead of skipping them. Default True. Weights under any other parametrization
    are always skipped.
progress: a progress bar on stderr (tqdm, extra `progress`): None (the default) shows it on
    a terminal once the work has taken two seconds, True always, False never."""


def documents_arguments(function: _Function) -> _Function:
    """Put what `plan_conversion` and `convert_model` share into a docstring, at `{arguments}`."""
    return put_into_docstring(function, "arguments", _ARGUMENTS_DOC)


def check_count_is_no_name(num_svs: Any) -> None:
    """Raise if the name of a tensor was passed in the place of the number of singular values.

    The second argument of torch's own `spectral_norm(module, "weight")` is the name.

    Raises:
        TypeError: with the argument that takes the name.
    """
    if isinstance(num_svs, str):
        raise TypeError(
            f"register_sn: num_svs={num_svs!r}: expected an int; pass the name of a tensor as "
            f"name={num_svs!r}."
        )


def check_passed_by_keyword(misplaced: tuple[Any, ...]) -> None:
    """Raise if `remove_sn` was given more than the module by position.

    The second argument of torch's own `remove_parametrizations(module, "weight")` is the name.

    Raises:
        TypeError: with the argument that takes the value.
    """
    if misplaced:
        value = misplaced[0]
        option = "bake" if isinstance(value, bool) else "name"
        raise TypeError(
            f"remove_sn: {value!r} was passed by position; expected the module alone: pass it as "
            f"{option}={value!r}."
        )
