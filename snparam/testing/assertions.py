"""Assertions about networks, checked by exact computation; they need torch alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from snparam.conversion.plan import CONVERT, REFUSE, plan_of
from snparam.conversion.selection import Filter, Selection, Selectors
from snparam.conversion.weights import Weight, weights_in
from snparam.estimators import convergence
from snparam.matrices.products import Stack
from snparam.matrices.stacks import compute_dtype, is_finite
from snparam.parametrization.arguments import check_model
from snparam.parametrization.attachment import read_as_eval
from snparam.parametrization.find import normalised_weights
from snparam.parametrization.options import Settings


@torch.no_grad()
def assert_spectral_norm(
    model: nn.Module,
    at_most: float = 1.0,
    rtol: float = 1e-3,
    *,
    include: Selectors = None,
    exclude: Selectors = None,
    blocks: int | Literal["auto"] | None = None,
    only_converted: bool = False,
) -> None:
    """Assert that σ of every weight in use is at most `at_most`.

    σ is computed exactly, by a full decomposition in float64, for the weight that eval mode uses,
    whatever mode the model is in. A convolution with `norm="operator"` is checked as such, at the
    recorded size of its inputs. No state moves.

    Args:
        model: a network, or a single layer. Every weight under SpectralNorm is checked, each of its
            blocks separately, and every other weight that the layer table lists: in a network
            before its conversion or after `restore_model`, under another library's parametrization,
            or left out by a conversion.
        at_most: the bound on σ.
        rtol: relative tolerance on the bound. Default 1e-3, the accuracy of a fresh estimate, which
            also covers the rounding of float32 weights; that of bfloat16 weights needs about 1e-2.
        include: module types and name patterns, as in `convert_model`; only the weights inside
            modules that match one are checked, and weights that a pattern names.
        exclude: module types and name patterns of what is not checked.
        blocks: number of matrices that a weight without SpectralNorm is read as, as in
            `register_sn`. After `restore_model`, pass the value that the conversion had.
        only_converted: whether to check the weights under SpectralNorm alone. Default False,
            because a network with a layer that is not converted is not bounded.

    Raises:
        AssertionError: if a σ exceeds the bound, or a weight has NaN or inf, naming each such
            weight with its shape and σ; also if the model has no weight to check.
        ValueError: if a pattern or type matches nothing, or a weight does not split into `blocks`.
        TypeError: if `model` is no module.
    """
    check_model(model, "assert_spectral_norm")
    selection = Selection.from_arguments(include, exclude, None, model)
    weights = [
        weight
        for weight in weights_in(model, Settings())
        if selection.reason_against(
            weight.path, weight.owner, weight.module_name, weight.tensor_name
        )
        is None
    ]
    if only_converted:
        weights = [weight for weight in weights if weight.norm is not None]
    bound = at_most * (1 + rtol)
    checked, faults = 0, []
    for weight in weights:
        value_and_matrices = _weight_in_use(weight, blocks)
        if value_and_matrices is None:
            continue
        checked += 1
        value, matrices = value_and_matrices
        kind = parametrize.type_before_parametrizations(weight.owner).__name__
        faults += _lines_above(matrices, bound, f"{weight.name} {kind} {tuple(value.shape)}")
    if not checked:
        under = " under SpectralNorm" if only_converted else ""
        kind = type(model).__name__
        raise AssertionError(f"{kind} has no weight{under} whose spectral norm to check")
    if faults:
        raise AssertionError(
            f"spectral norm above {at_most:g} (rtol={rtol:g}, so bound {bound:.8g}):\n  "
            + "\n  ".join(faults)
        )


def assert_converted(
    model: nn.Module,
    *,
    include: Selectors = None,
    exclude: Selectors = None,
    filter_fn: Filter | None = None,
) -> None:
    """Assert that every weight that `convert_model` would convert is under SpectralNorm.

    Args:
        model: a network, or a single layer.
        include: as in `convert_model`.
        exclude: as in `convert_model`.
        filter_fn: as in `convert_model`.

    Raises:
        AssertionError: if an eligible weight is not, naming each with its layer and shape; also if
            the model has no weight under SpectralNorm at all.
        ValueError: if a pattern or type matches nothing.
        TypeError: if `model` is no module.
    """
    check_model(model, "assert_converted")
    selection = Selection.from_arguments(include, exclude, filter_fn, model)
    norms = {id(weight.original): weight.norm for weight in normalised_weights(model)}
    plan = plan_of(list(weights_in(model, Settings(), take_over=True)), selection, norms)
    missing = [row for row in plan if row.decision in (CONVERT, REFUSE)]
    if missing:
        eligible = len(missing) + sum(row.is_normalised for row in plan)
        rows = "\n  ".join(f"{row.weight} {row.layer_type} {row.shape}" for row in missing)
        raise AssertionError(
            f"{len(missing)} of {eligible} eligible weights of {type(model).__name__} are not "
            f"under SpectralNorm (expected all):\n  {rows}"
        )
    if not any(row.is_normalised for row in plan):
        reasons = "".join(f"\n  {row.weight} {row.shape}: {row.reason}" for row in plan)
        raise AssertionError(
            f"{type(model).__name__} has no weight under SpectralNorm, and none eligible{reasons}"
        )


@torch.no_grad()
def assert_same_function(
    a: Callable[..., Any],
    b: Callable[..., Any],
    inputs: Any,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Assert that two networks compute the same outputs from the same inputs, in eval mode.

    Both networks are in eval mode for the comparison, so that no state moves and nothing random
    happens, and have their own modes back afterwards. Outputs may be tensors, or sequences,
    mappings and dataclasses of them; NaN equals NaN.

    Args:
        a: a network, or any function.
        b: the network or function to compare it with.
        inputs: one tensor, a sequence of positional arguments, or a mapping of keyword arguments.
        rtol: relative tolerance: |a − b| ≤ atol + rtol · |b| must hold for each entry of an output.
            With None for both (the default), rtol and atol are those of
            `torch.testing.assert_close` for the outputs' dtype. Pass 0 and 0 for equal values.
        atol: absolute tolerance, see `rtol`.

    Raises:
        AssertionError: if an output differs, with its shape and torch's account of the difference,
            and, if both are networks, the first layer call of the same name whose output differs.
    """
    with _eval_mode(a, b):
        pairs = _pair_outputs(_outputs(_call(a, inputs)), _outputs(_call(b, inputs)))
        for path, x, y in pairs:
            difference = _difference(x, y, rtol, atol)
            if difference is not None:
                raise AssertionError(
                    f"{path} differs between {_name(a)} and {_name(b)}: {difference}"
                    + _first_layer_at_fault(a, b, inputs, rtol, atol)
                )


# Spectral norms


def _weight_in_use(
    weight: Weight, blocks: int | Literal["auto"] | None
) -> tuple[Tensor, Tensor | Stack] | None:
    """Return the weight that eval mode uses and its matrices (b, m, n), or None.

    None: the layer table does not list the weight, or it cannot be normalised.
    """
    owner, name = weight.owner, weight.tensor_name
    if weight.norm is not None:
        value = read_as_eval(owner, name)
        return value, weight.norm.view.stack(value, compute_dtype(value.dtype))
    if weight.layout is None:
        return None
    if parametrize.is_parametrized(owner, name):
        with _eval_mode(owner.parametrizations[name]):  # type: ignore[index]
            value = getattr(owner, name)
    elif weight.problem is not None or weight.tensor is None:
        return None
    else:
        value = weight.tensor
    try:
        return value, weight.layout.view(value.shape, blocks).to_matrices(value)
    except ValueError as error:
        raise ValueError(f"{weight.name} {tuple(value.shape)}: {error}") from None


def _lines_above(matrices: Tensor | Stack, bound: float, description: str) -> list[str]:
    """Return an error line for each block of a weight with σ above the bound, or for NaN or inf."""
    if not is_finite(matrices):
        return [f"{description}: has NaN or inf"]
    sigma = convergence.exact_sigma(matrices).tolist()
    return [
        f"{description}{f' block {index}' if len(sigma) > 1 else ''}: {value:.8g}"
        for index, value in enumerate(sigma)
        if not value <= bound
    ]


# Functions


def _call(function: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(*inputs)


def _outputs(value: Any, path: str = "output") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested output, each after its place, such as `output['logits'][0]`."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _outputs(item, f"{path}[{key!r}]")
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for index, item in enumerate(value):
            yield from _outputs(item, f"{path}[{index}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _outputs(getattr(value, field.name), f"{path}.{field.name}")
    else:
        yield path, value


def _pair_outputs(
    a: Iterator[tuple[str, Any]], b: Iterator[tuple[str, Any]]
) -> Iterator[tuple[str, Any, Any]]:
    outputs_of_a, outputs_of_b = dict(a), dict(b)
    if outputs_of_a.keys() != outputs_of_b.keys():
        raise AssertionError(
            f"outputs of another structure: {list(outputs_of_a)} and {list(outputs_of_b)}"
        )
    for path, value in outputs_of_a.items():
        yield path, value, outputs_of_b[path]


def _difference(x: Any, y: Any, rtol: float | None, atol: float | None) -> str | None:
    """Return how two leaves of outputs differ, in words, or None."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        equal = isinstance(x, Tensor) == isinstance(y, Tensor) and x == y
        return None if equal else f"{_short_text(x)} and {_short_text(y)}"
    try:
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, equal_nan=True)
    except AssertionError as error:
        return f"shape {tuple(x.shape)}: {error}"
    return None


def _short_text(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _first_layer_at_fault(a: Any, b: Any, inputs: Any, rtol: Any, atol: Any) -> str:
    if not isinstance(a, nn.Module) or not isinstance(b, nn.Module):
        return ""
    calls_of_b = dict(_layer_calls(b, inputs))
    for call, (layer, output) in _layer_calls(a, inputs):
        if call not in calls_of_b:
            continue
        x, y = dict(_outputs(output)), dict(_outputs(calls_of_b[call][1]))
        if x.keys() != y.keys() or any(_difference(x[w], y[w], rtol, atol) for w in x):
            weight = getattr(layer, "weight", None)
            shape = f" {tuple(weight.shape)}" if isinstance(weight, Tensor) else ""
            kind = parametrize.type_before_parametrizations(layer).__name__
            return f"\nThe first layer that differs: '{call[0]}' {kind}{shape}"
    return ""


def _layer_calls(
    model: nn.Module, inputs: Any
) -> list[tuple[tuple[str, int], tuple[nn.Module, Any]]]:
    """Call a model and return the calls of the layers inside it, in the order in which they end.

    Returns:
        Pairs of (qualified name, number of the call, from 1) and (layer, output).
    """
    calls: list[tuple[tuple[str, int], tuple[nn.Module, Any]]] = []
    counts: dict[str, int] = {}

    def recorder(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(layer: nn.Module, _: Any, output: Any) -> None:
            counts[name] = counts.get(name, 0) + 1
            calls.append(((name, counts[name]), (layer, output)))

        return record

    with contextlib.ExitStack() as stack:
        for name, layer in model.named_modules():
            if name and "parametrizations" not in name.split("."):
                handle = layer.register_forward_hook(recorder(name))
                stack.callback(handle.remove)
        _call(model, inputs)
    return calls


@contextlib.contextmanager
def _eval_mode(*models: Any) -> Iterator[None]:
    """Put modules into eval mode, and put each one's own mode back afterwards."""
    modules = [m for model in models if isinstance(model, nn.Module) for m in model.modules()]
    modes = [(module, module.training) for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _name(function: Any) -> str:
    if isinstance(function, nn.Module):
        return parametrize.type_before_parametrizations(function).__name__
    return getattr(function, "__name__", repr(function))
