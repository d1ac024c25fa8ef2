"""The Lipschitz constants of operations, by their names in torch: the rules of `certify`.

A rule takes an `Operation`, one call in an exported graph, and returns a bound for its result: the
Lipschitz constant of that result as a function of the network's input, in the 2-norm over all
entries, as a logarithm rounded up. Where there is none, it raises `NoConstant` with the reason.

Constants are sharp for the operation alone unless the rule says otherwise. Those of scalar
functions are the largest slope, rounded up; of linear ones, the norm; of what picks or copies
entries, the square root of the largest number of copies of one entry, since the squared norm of the
result counts each entry as often as it is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from snparam.matrices.convolutions import Geometry
from snparam.matrices.torch_private import schema_of
from snparam.spectrum.linear_norms import (
    ConvolutionMap,
    LinearMap,
    MatrixMap,
    as_float64,
    axis_matrix,
    certified,
    kronecker_norm,
)

# What a few operations in float64 are off by, relatively.
_SLACK = 2.0**-48


class NoConstant(Exception):  # noqa: N818 - it is an answer, not a mistake
    """An operation has no Lipschitz constant that is known, for the reason that it carries."""


# Logarithms, rounded up


def log_up(value: float) -> float:
    """Return the natural logarithm of a number, 0 and inf included, rounded up."""
    if value == 0 or value == math.inf:
        return -math.inf if value == 0 else math.inf
    return _up(math.log(value))


def log_product(*logs: float) -> float:
    """Return the logarithm of a product from those of its factors, rounded up.

    Zero times an unknown constant is zero: what is multiplied by it are numbers, whatever they are.
    """
    return -math.inf if -math.inf in logs else _up(math.fsum(logs))


def log_sum(*logs: float) -> float:
    """Return the logarithm of a sum from those of its terms, rounded up."""
    largest = max(logs, default=-math.inf)
    if math.isinf(largest):
        return largest
    return _up(largest + math.log(math.fsum(math.exp(log - largest) for log in logs)))


def log_root_sum_of_squares(*logs: float) -> float:
    """Return the logarithm of the root of a sum of squares, rounded up."""
    return log_sum(*(2 * log for log in logs)) / 2


def _up(log: float) -> float:
    return log if math.isinf(log) else log + _SLACK * max(1.0, abs(log))


# What the walk knows of a value, and of an operation


@dataclass(frozen=True)
class Bound:
    """What is known of the result of an operation.

    Attributes:
        log_constant: logarithm of an upper bound of its Lipschitz constant with respect to the
            network's input.
        magnitude: an upper bound of the absolute values of its entries, whatever the input.
        formula: the operation's own constant, or how several inputs are joined, as it is printed.
    """

    log_constant: float
    magnitude: float = math.inf
    formula: str = ""


@dataclass(frozen=True)
class Composition:
    """A linear map of a value whose bound is computed when it is asked for, or never.

    Attributes:
        source: the value that the map takes.
        linear_map: the map, without its bias.
    """

    source: Operand
    linear_map: LinearMap

    def bound(self) -> Bound:
        """Return the bound of the map's output."""
        norm = self.linear_map.norm()
        log = log_product(self.source.log_constant, log_up(norm))
        return Bound(log, formula=f"σ = {_shown(norm)}")


@dataclass(eq=False)
class Operand:
    """A value of the network that depends on the network's input.

    Attributes:
        shape: its shape; () for several tensors.
        dtype: its dtype; None for several tensors.
        known: its bound, or the linear map from which that follows.
        device: its device; None for several tensors.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    known: Bound | Composition
    device: torch.device | None = None

    @cached_property
    def bound(self) -> Bound:
        """Its bound."""
        return self.known.bound() if isinstance(self.known, Composition) else self.known

    @property
    def log_constant(self) -> float:
        """Logarithm of its Lipschitz constant."""
        return self.bound.log_constant

    @property
    def magnitude(self) -> float:
        """Upper bound of the absolute values of its entries."""
        return math.inf if isinstance(self.known, Composition) else self.bound.magnitude

    @property
    def is_used(self) -> bool:
        """Whether its bound was asked for."""
        return "bound" in self.__dict__

    @property
    def is_discrete(self) -> bool:
        """Whether its entries are integers or booleans."""
        dtype = self.dtype
        return dtype is not None and not (dtype.is_floating_point or dtype.is_complex)


@dataclass(eq=False)
class Operation:
    """One call of an operation of torch in an exported graph.

    Attributes:
        name: name of the operation without its overload, such as `aten::relu`.
        target: the overload.
        schema: its schema.
        arguments: each argument by its name in the operation's schema, defaults included. A value
            that depends on the network's input is an `Operand`, every other one is itself.
        nodes: the same, as nodes of the graph.
        shape: shape of the result, of the first one of several.
        tightness: how far the bound of a large convolution may be above its norm.
        producers: the operations whose results are arguments, by the names of those.
    """

    name: str
    target: Any
    schema: Any
    arguments: Mapping[str, Any]
    nodes: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    tightness: float = 1.05
    producers: Mapping[str, Operation] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """Return an argument that must not depend on the network's input.

        Raises:
            NoConstant: if it does.
        """
        value = self.arguments.get(name)
        if any(True for _ in operands_in(value)):
            raise NoConstant(f"its {name} depends on the network's input")
        return value

    @property
    def first(self) -> Operand:
        """The first argument, where it alone depends on the network's input.

        Raises:
            NoConstant: if another one depends on it.
        """
        name = next(iter(self.arguments))
        for other in self.arguments:
            if other != name:
                self[other]
        value = self.arguments[name]
        if not isinstance(value, Operand):
            raise NoConstant(f"its {name} does not depend on the network's input as one tensor")
        return value

    def evaluated(self, value: Tensor) -> Any:
        """Return what the operation makes of `value` in the place of the one operand, on a CPU."""

        def filled_in(argument: Any) -> Any:
            if isinstance(argument, Operand):
                return value
            return argument.cpu() if isinstance(argument, Tensor) else argument

        arguments = {name: [argument] for name, argument in self.arguments.items()}
        filled = {n: map_aggregate(a, filled_in)[0] for n, a in arguments.items()}
        schema = self.schema.arguments
        positional = [filled[argument.name] for argument in schema if not argument.kwarg_only]
        named = {argument.name: filled[argument.name] for argument in schema if argument.kwarg_only}
        return self.target(*positional, **named)


def operations(names: str) -> frozenset[str]:
    """Return the names of operations, as torch has them in schemas, from a list with spaces."""
    return frozenset(f"aten::{name}" for name in names.split())


def operands_in(value: Any) -> Iterator[Operand]:
    """Yield the operands in an argument, which may be a list of them."""
    if isinstance(value, Operand):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from operands_in(entry)


Rule: TypeAlias = Callable[[Operation], Bound | Composition]

RULES: dict[str, Rule] = {}

# Operations that put the entries of their input elsewhere, in another shape, or leave some out.
REARRANGEMENTS = operations(
    """
    _conj _reshape_alias _to_copy _unsafe_view adjoint alias channel_shuffle chunk clone conj
    contiguous detach diagonal flatten flip fliplr flipud hsplit imag lift_fresh_copy movedim
    moveaxis mH mT narrow permute pixel_shuffle pixel_unshuffle ravel real reshape
    reshape_as resolve_conj resolve_neg roll rot90 select slice split split_with_sizes squeeze
    swapaxes swapdims t tensor_split to transpose tril triu type_as unbind unflatten
    unsafe_chunk unsafe_split unsqueeze vsplit view view_as view_as_complex view_as_real
    """
)
# Those whose second argument gives nothing but a shape or a dtype.
_LIKE = operations("view_as reshape_as type_as expand_as")


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule under the names of the operations that it is for, with spaces between."""

    def register(function: Rule) -> Rule:
        for name in operations(names):
            RULES[name] = function
        return function

    return register


def unbounded(names: str, reason: str) -> None:
    """Register operations that have no constant, with the reason."""

    def none(_: Operation) -> Bound:
        raise NoConstant(reason)

    rule(names)(none)


def _times(operand: Operand, constant: float, magnitude: float = math.inf) -> Bound:
    """Return the bound of a function with a Lipschitz constant of a value."""
    if math.isnan(constant):
        raise NoConstant("its parameters are not finite")
    if math.isinf(constant):
        raise NoConstant("its slope is unbounded")
    log = log_product(operand.log_constant, log_up(constant))
    return Bound(log, magnitude, _shown(constant))


def _shown(constant: float) -> str:
    return f"{constant:.6g}"


def bound_of_rearrangement(operation: Operation) -> Bound:
    """Return the bound of a result whose entries are different entries of the first argument."""
    operand = _self_of(operation) if operation.name in _LIKE else operation.first
    if operation.name == "aten::view" and operation.arguments.get("dtype") is not None:
        raise NoConstant("it reads the bits of its input as another dtype")
    return Bound(operand.log_constant, operand.magnitude)


def _self_of(operation: Operation) -> Operand:
    operand = next(iter(operation.arguments.values()))
    if not isinstance(operand, Operand):
        raise NoConstant("it takes more than one tensor")
    return operand


for _name in REARRANGEMENTS:
    RULES[_name] = bound_of_rearrangement


# Functions of one number


@dataclass(frozen=True)
class Slope:
    """A function of one number, applied to each entry.

    Attributes:
        steepest: largest absolute value of its slope, rounded up.
        magnitude: upper bound of its absolute value.
        shrinks: whether |f(x)| ≤ |x|.
        takes_complex: whether all that holds for complex numbers too, as it does not for functions
            with poles or periods off the real axis.
    """

    steepest: float
    magnitude: float = math.inf
    shrinks: bool = False
    takes_complex: bool = False


# The extrema of the slopes of gelu, silu, mish and selu were found by bisection of the second
# derivative, and are rounded up in the last digit. silu is steepest where x tanh(x/2) = 2.
SLOPES = {
    "relu": Slope(1.0, shrinks=True),
    "relu6": Slope(1.0, 6.0, shrinks=True),
    "tanh": Slope(1.0, 1.0, shrinks=True),
    "log_sigmoid": Slope(1.0),
    "log_sigmoid_forward": Slope(1.0),
    "softshrink": Slope(1.0, shrinks=True),
    "abs": Slope(1.0, shrinks=True, takes_complex=True),
    "neg": Slope(1.0, shrinks=True, takes_complex=True),
    "negative": Slope(1.0, shrinks=True, takes_complex=True),
    "sigmoid": Slope(1 / 4, 1.0),
    "hardsigmoid": Slope(1 / 6 * (1 + _SLACK), 1.0),
    "silu": Slope(1.0998394, shrinks=True),
    "mish": Slope(1.0884982, shrinks=True),
    "selu": Slope(1.7580994),
    "hardswish": Slope(1.5, shrinks=True),
    "sin": Slope(1.0, 1.0, shrinks=True),
    "cos": Slope(1.0, 1.0),
    "atan": Slope(1.0, math.pi / 2 * (1 + _SLACK), shrinks=True),
    "asinh": Slope(1.0, shrinks=True),
    "erf": Slope(2 / math.sqrt(math.pi) * (1 + _SLACK), 1.0),
}


def _refuse_complex(operand: Operand) -> None:
    if operand.dtype is not None and operand.dtype.is_complex:
        raise NoConstant("its slope is that of real values, and these are complex")


def _bound_of_slope(operation: Operation) -> Bound:
    slope = SLOPES[operation.name.removeprefix("aten::")]
    return _of_slope(operation.first, slope)


def _of_slope(operand: Operand, slope: Slope) -> Bound:
    if not slope.takes_complex:
        _refuse_complex(operand)
    magnitude = min(slope.magnitude, operand.magnitude) if slope.shrinks else slope.magnitude
    return _times(operand, slope.steepest, magnitude)


rule(" ".join(SLOPES))(_bound_of_slope)


@rule("gelu")
def _gelu(operation: Operation) -> Bound:
    steepest = 1.1289931 if operation["approximate"] == "tanh" else 1.1289042
    return _of_slope(operation.first, Slope(steepest, shrinks=True))


@rule("softplus")
def _softplus(operation: Operation) -> Bound:
    """Softplus has slope 1, and torch's is the identity beyond a threshold, where it jumps.

    The height of the jump, log1p(exp(−t))/β, is below the rounding of float32 from t = 16 on.
    """
    if operation["threshold"] < 16:
        raise NoConstant(f"it jumps at its threshold={operation['threshold']:g}, which is below 16")
    return _times(operation.first, 1.0)


@rule("elu")
def _elu(operation: Operation) -> Bound:
    """scale · x above 0, and scale · α(exp(βx) − 1) below, with slopes up to scale · αβ."""
    if operation["input_scale"] < 0:
        raise NoConstant("it grows exponentially for a negative input_scale")
    steepest = max(1.0, abs(operation["alpha"] * operation["input_scale"]))
    return _times(operation.first, abs(operation["scale"]) * steepest)


@rule("celu")
def _celu(operation: Operation) -> Bound:
    if not operation["alpha"] > 0:
        raise NoConstant(f"its slope is unbounded for alpha={operation['alpha']:g}")
    return _times(operation.first, 1.0)


@rule("leaky_relu")
def _leaky_relu(operation: Operation) -> Bound:
    slope = max(1.0, abs(operation["negative_slope"]))
    return _times(operation.first, slope, slope * operation.first.magnitude)


@rule("prelu _prelu_kernel")
def _prelu(operation: Operation) -> Bound:
    slope = max(_largest(operation["weight"]), 1.0)  # in this order NaN stays NaN
    return _times(operation.first, slope, slope * operation.first.magnitude)


@rule("rrelu")
def _rrelu(operation: Operation) -> Bound:
    if operation["training"]:
        raise NoConstant("it is random")
    slope = max(1.0, abs((operation["lower"] + operation["upper"]) / 2))
    return _times(operation.first, slope * (1 + _SLACK))


@rule("hardtanh")
def _hardtanh(operation: Operation) -> Bound:
    largest = max(abs(operation["min_val"]), abs(operation["max_val"]))
    return _times(operation.first, 1.0, largest)


@rule("threshold")
def _threshold(operation: Operation) -> Bound:
    """x above t and v elsewhere: continuous for v = t alone, as in relu."""
    if operation["threshold"] != operation["value"]:
        raise NoConstant("it jumps at its threshold")
    return _times(operation.first, 1.0)


@rule("dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout")
def _dropout(operation: Operation) -> Bound:
    if operation["train"] and operation["p"] > 0:
        raise NoConstant("it is random, also in eval mode")
    return Bound(operation.first.log_constant, operation.first.magnitude)


@rule("pow square")
def _pow(operation: Operation) -> Bound:
    """n |x|ⁿ⁻¹ for n ≥ 1, which is bounded where x is."""
    operand = operation.first
    _refuse_complex(operand)
    exponent = operation["exponent"] if operation.name == "aten::pow" else 2
    if not isinstance(exponent, int | float) or exponent < 1:
        raise NoConstant("its slope is unbounded")
    if exponent == 1:
        return _times(operand, 1.0, operand.magnitude)
    if math.isinf(operand.magnitude):
        raise NoConstant("it is a power of a value without a bound")
    try:
        slope = exponent * operand.magnitude ** (exponent - 1) * (1 + _SLACK)
        magnitude = operand.magnitude**exponent * (1 + _SLACK)
    except OverflowError:
        raise NoConstant("its slope is above the range of floats") from None
    return _times(operand, slope, magnitude)


@rule("exp")
def _exp(operation: Operation) -> Bound:
    operand = operation.first
    _refuse_complex(operand)
    if operand.magnitude > 700:
        raise NoConstant("it is the exponential of a value without a bound")
    largest = math.exp(operand.magnitude) * (1 + _SLACK)
    return _times(operand, largest, largest)


unbounded(
    "hardshrink round floor ceil trunc frac sign sgn fmod remainder heaviside floor_divide",
    "it jumps",
)
unbounded(
    "sqrt rsqrt log log2 log10 log1p reciprocal var var_mean",
    "its slope is unbounded",
)
unbounded(
    """
    scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_attention_math _native_multi_head_attention _transformer_encoder_layer_fwd
    """,
    "dot-product attention multiplies values that depend on the input, and has no Lipschitz "
    "constant (Kim, Papamakarios and Mnih 2021)",
)
unbounded("lstm gru lstm_cell gru_cell", "its gates multiply values that depend on the input")
unbounded("bilinear _trilinear prod", "it multiplies values that depend on the input")
unbounded(
    "_native_batch_norm_legit _native_batch_norm_legit_functional _batch_norm_with_update",
    "it normalises by the statistics of its input, without running ones",
)


# Vectors to numbers, and back


@rule("softmax _softmax _safe_softmax")
def _softmax(operation: Operation) -> Bound:
    """The Jacobian diag(p) − ppᵀ has its largest norm, 1/2, at two equal values (Gao and Pavel)."""
    return _times(operation.first, 0.5, 1.0)


@rule("log_softmax _log_softmax")
def _log_softmax(operation: Operation) -> Bound:
    """The Jacobian I − 1pᵀ has norm √n where p is one-hot, its supremum: MMᵀ is I + 11ᵀ there."""
    operand = operation.first
    return _times(operand, math.sqrt(_length(operand, operation["dim"])) * (1 + _SLACK))


@rule("logsumexp amax amin sort topk median nanmedian msort")
def _of_largest(operation: Operation) -> Bound:
    """Order statistics move by no more than the largest difference; logsumexp has slope p."""
    _refuse_complex(operation.first)
    return _times(operation.first, 1.0)


@rule("max min maximum minimum fmax fmin")
def _extremum(operation: Operation) -> Bound:
    if "other" not in operation.arguments:
        return _times(operation.first, 1.0, operation.first.magnitude)
    return _join(operation, ("self", "other"), "√ΣL²")


@rule("linalg_vector_norm norm")
def _norm(operation: Operation) -> Bound:
    """|‖x‖ₚ − ‖y‖ₚ| ≤ ‖x − y‖ₚ, which is at most n^(1/p − 1/2) ‖x − y‖₂ for 1 ≤ p ≤ 2."""
    operand = operation.first
    name = "ord" if operation.name == "aten::linalg_vector_norm" else "p"
    order = 2 if operation[name] is None else operation[name]
    if not order >= 1:
        raise NoConstant(f"a norm of order {order} has none")
    entries = _numel(operand.shape) / max(1, _numel(operation.shape))
    return _times(operand, max(1.0, entries ** (1 / order - 1 / 2) * (1 + _SLACK)))


@rule("mean sum std cumsum nansum")
def _reduction(operation: Operation) -> Bound:
    """The sum over n entries has norm √n, their mean 1/√n; the others are said where they stand."""
    operand = operation.first
    kind = operation.name.removeprefix("aten::")
    if kind == "cumsum":
        # The inverse of the triangular matrix of ones is a second difference matrix, whose smallest
        # singular value is known in closed form.
        size = _length(operand, operation["dim"])
        return _times(operand, (1 + _SLACK) / (2 * math.sin(math.pi / (4 * size + 2))))
    entries = _numel(operand.shape) / max(1, _numel(operation.shape))
    if kind == "mean":
        return _times(operand, (1 + _SLACK) / math.sqrt(entries), operand.magnitude)
    if kind == "std":
        # ‖Px‖ / √(n − c), P the projection that takes the mean away.
        correction = operation.arguments.get("correction")
        if correction is None:
            correction = 0 if operation.arguments.get("unbiased") is False else 1
        if entries <= correction:
            raise NoConstant(f"it is not finite for {entries:g} entries")
        return _times(operand, (1 + _SLACK) / math.sqrt(entries - correction))
    magnitude = operand.magnitude * entries * (1 + _SLACK)
    return _times(operand, math.sqrt(entries) * (1 + _SLACK), magnitude)


# Several inputs

_GATE = (
    "it multiplies two values that depend on the input, at least one of which is unbounded (a "
    "gate, as in squeeze-and-excitation)"
)


@rule("add sub subtract rsub")
def _add(operation: Operation) -> Bound:
    """‖Δ(f + αg)‖ ≤ ‖Δf‖ + |α| ‖Δg‖."""
    if operation.name in ("aten::sub", "aten::subtract") and _is_tanhshrink(operation):
        return _of_slope(operation.arguments["self"], Slope(1.0, shrinks=True))
    alpha = abs(operation["alpha"]) if operation["alpha"] is not None else 1
    scales = {"self": 1.0, "other": float(alpha)}
    if operation.name == "aten::rsub":
        scales = {"self": float(alpha), "other": 1.0}
    logs, magnitude = [], 0.0
    for name, scale in scales.items():
        value = operation.arguments[name]
        magnitude += scale * _magnitude(value) if scale else 0.0
        if isinstance(value, Operand):
            copies = _broadcast_copies(value.shape, operation.shape)
            logs.append(log_product(value.log_constant, log_up(math.sqrt(copies) * scale)))
    both = len(logs) > 1
    return Bound(log_sum(*logs), magnitude * (1 + _SLACK), "ΣL" if both else "1")


@rule("cat concat concatenate stack hstack vstack dstack column_stack")
def _concatenation(operation: Operation) -> Bound:
    """‖Δ(f, g)‖² = ‖Δf‖² + ‖Δg‖²."""
    parts = list(operation.arguments["tensors"])
    logs = [part.log_constant for part in parts if isinstance(part, Operand)]
    magnitude = max(map(_magnitude, parts))
    return Bound(log_root_sum_of_squares(*logs), magnitude, "√ΣL²")


@rule("where")
def _where(operation: Operation) -> Bound:
    if operation.arguments["condition"].__class__ is Operand:
        raise NoConstant("it chooses by a condition that depends on the input, and jumps")
    return _join(operation, ("self", "other"), "√ΣL²")


@rule("masked_fill clamp clip clamp_min clamp_max copy")
def _fill(operation: Operation) -> Bound:
    names = [name for name in ("self", "value", "min", "max", "src") if name in operation.arguments]
    if operation.name == "aten::masked_fill":
        operation["mask"]
    if operation.name == "aten::copy":
        names = ["src"]
    return _join(operation, names, "√ΣL²")


@rule("slice_scatter select_scatter diagonal_scatter")
def _scatter(operation: Operation) -> Bound:
    """Each entry is one of either value, and none is there twice."""
    values = [operation.arguments[name] for name in ("self", "src")]
    logs = [value.log_constant for value in values if isinstance(value, Operand)]
    magnitude = max(map(_magnitude, values))
    return Bound(log_root_sum_of_squares(*logs), magnitude, "√ΣL²" if len(logs) > 1 else "1")


def _join(operation: Operation, names: Sequence[str], formula: str) -> Bound:
    """Return the bound of a result each of whose entries follows one of several values.

    |Δmax(f, g)| ≤ max(|Δf|, |Δg|), entry by entry, and likewise for clamping and for
    choosing, so that the squares of all add up. (The maximum of both constants is no bound: two
    functions of different inputs may both be the maximum, in different entries.)
    """
    values = [operation.arguments[name] for name in names]
    logs = [
        log_product(
            value.log_constant, log_up(math.sqrt(_broadcast_copies(value.shape, operation.shape)))
        )
        for value in values
        if isinstance(value, Operand)
    ]
    if operation.name.startswith("aten::clamp") or operation.name == "aten::clip":
        magnitude = _clamped(operation)
    else:
        magnitude = max(_magnitude(value) for value in values if value is not None)
    return Bound(log_root_sum_of_squares(*logs), magnitude, formula if len(logs) > 1 else "1")


def _clamped(operation: Operation) -> float:
    """Return an upper bound of the absolute value of a value that was clamped."""
    low, high = operation.arguments.get("min"), operation.arguments.get("max")
    limits = [_magnitude(limit) for limit in (low, high) if limit is not None]
    within = max(limits) if len(limits) == 2 else math.inf
    return min(within, max([_magnitude(operation.arguments["self"]), *limits]))


@rule("mul multiply")
def _mul(operation: Operation) -> Bound | Composition:
    left, right = operation.arguments["self"], operation.arguments["other"]
    if isinstance(left, Operand) and isinstance(right, Operand):
        slope = _slope_of_product(operation)
        if slope is not None and left.shape == operation.shape:
            return _of_slope(left, slope)
        return _product(operation, left, right)
    operand, factor = (left, right) if isinstance(left, Operand) else (right, left)
    return _scaled(operation, operand, _as_tensor(factor))


def _product(operation: Operation, left: Operand, right: Operand) -> Bound:
    """‖Δ(fg)‖ ≤ sup|f| ‖Δg‖ + sup|g| ‖Δf‖."""
    if math.isinf(left.magnitude) or math.isinf(right.magnitude):
        raise NoConstant(_GATE)
    logs = []
    for one, other in ((left, right), (right, left)):
        copies = _broadcast_copies(one.shape, operation.shape)
        factor = log_up(other.magnitude * math.sqrt(copies) * (1 + _SLACK))
        logs.append(log_product(one.log_constant, factor))
    magnitude = left.magnitude * right.magnitude * (1 + _SLACK)
    return Bound(log_sum(*logs), magnitude, "sup|f| L + sup|g| L")


@rule("addcmul")
def _addcmul(operation: Operation) -> Bound:
    """f + value · c · g, with a constant tensor c."""
    added, left, right = (operation.arguments[n] for n in ("self", "tensor1", "tensor2"))
    if isinstance(left, Operand) and isinstance(right, Operand):
        raise NoConstant(_GATE)
    logs = []
    if isinstance(added, Operand):
        copies = _broadcast_copies(added.shape, operation.shape)
        logs.append(log_product(added.log_constant, log_up(math.sqrt(copies))))
    operand, factor = (left, right) if isinstance(left, Operand) else (right, left)
    if isinstance(operand, Operand):
        product = _scaled(operation, operand, _as_tensor(factor) * operation["value"])
        bound = product.bound() if isinstance(product, Composition) else product
        logs.append(bound.log_constant)
    return Bound(log_sum(*logs), formula="ΣL" if len(logs) > 1 else "1")


@rule("glu")
def _glu(operation: Operation) -> Bound:
    """f σ(g), where f and g are halves of one value: √(1 + (sup|f| / 4)²) where f is bounded."""
    operand = operation.first
    if math.isinf(operand.magnitude):
        raise NoConstant(_GATE)
    constant = math.sqrt(1 + (operand.magnitude / 4) ** 2) * (1 + _SLACK)
    return _times(operand, constant, operand.magnitude)


@rule("div divide true_divide")
def _div(operation: Operation) -> Bound | Composition:
    if operation.arguments.get("rounding_mode") is not None:
        raise NoConstant("it rounds, and jumps")
    if isinstance(operation.arguments["other"], Operand):
        slope, operand = _slope_of_quotient(operation), operation.arguments["self"]
        if slope is not None and operand.shape == operation.shape:
            return _of_slope(operand, slope)
        raise NoConstant("it divides by a value that depends on the input")
    divisor = as_float64(_as_tensor(operation["other"]))
    if not divisor.all():
        raise NoConstant("it divides by zero")
    return _scaled(operation, operation.arguments["self"], 1 / divisor)


def _scaled(operation: Operation, operand: Operand, factor: Tensor) -> Bound | Composition:
    """Return the bound of a value times a constant tensor.

    The entry x of the value is in the result as c₁x, …, c_r x, where the value is broadcast: the
    norm is the largest √Σc². A factor of each channel behind a linear map is folded into the map.
    """
    factor = as_float64(factor)
    if not _is_finite(factor):
        raise NoConstant("its factor is not finite")
    if operand.shape == operation.shape:
        folded = _folded(operand, factor)
        if folded is not None:
            return folded
        largest = _largest(factor)
        return _times(operand, largest * (1 + _SLACK), _scaled_magnitude(operand, largest))
    squares = (factor.abs() ** 2).expand(operation.shape)
    largest = float(squares.sum_to_size(operand.shape).max().sqrt())
    magnitude = _scaled_magnitude(operand, _largest(factor))
    return _times(operand, largest * (1 + _SLACK), magnitude)


def _scaled_magnitude(operand: Operand, factor: float) -> float:
    return factor * operand.magnitude * (1 + _SLACK) if factor else 0.0


def _folded(operand: Operand, factor: Tensor) -> Composition | None:
    """Return a linear map with its output channels scaled, if the factor is one of channels."""
    if not isinstance(operand.known, Composition):
        return None
    linear_map = operand.known.linear_map
    shape = [1] * (len(operand.shape) - factor.ndim) + list(factor.shape)
    axis = len(shape) + linear_map.channel_axis
    if len(shape) != len(operand.shape) or axis < 0 or math.prod(shape) != shape[axis]:
        return None
    factors = factor.reshape(-1)
    scaled = linear_map.scaled(factors if len(factors) > 1 else factors[0])
    return Composition(operand.known.source, scaled) if _is_finite(scaled.weight) else None


# Patterns: functions of one value that are written as products, quotients and differences


def _name_of(node: Any) -> str:
    """Return the name of the operation of a node, "" for anything else."""
    schema = schema_of(node.target) if isinstance(node, fx.Node) else None
    return str(schema.name).removeprefix("aten::") if schema is not None else ""


def _without_copies(node: Any) -> Any:
    while _name_of(node) in ("clone", "alias", "contiguous", "detach", "lift_fresh_copy"):
        node = node.args[0]
    return node


def _is_number(value: Any, number: float) -> bool:
    return isinstance(value, int | float) and value == number


def _is_sum_with(node: Any, operand: Any, number: float) -> bool:
    """Return whether a node is `operand` + `number`."""
    if _name_of(node) != "add" or node.kwargs.get("alpha", 1) != 1:
        return False
    left, right = map(_without_copies, node.args[:2])
    return (left is operand and _is_number(right, number)) or (
        right is operand and _is_number(left, number)
    )


def _slope_of_product(operation: Operation) -> Slope | None:
    """Return the slope of x g(x) for the g that are written out: swish, hardswish and mish."""
    nodes = [_without_copies(operation.nodes[name]) for name in ("self", "other")]
    for x, gate in (nodes, nodes[::-1]):
        slope = _slope_of_gated(x, gate)
        if slope is not None:
            return slope
    return None


def _slope_of_gated(x: Any, gate: Any) -> Slope | None:
    kind = _name_of(gate)
    argument: Any = _without_copies(gate.args[0]) if kind else None
    if kind == "sigmoid" and (argument is x or _is_multiple(argument, x)):
        return SLOPES["silu"]  # x·sigmoid(ax) has the slope of silu at ax
    if kind == "hardsigmoid" and argument is x:
        return SLOPES["hardswish"]
    if kind == "tanh" and _name_of(argument) == "softplus" and len(argument.args) == 1:
        return SLOPES["mish"] if _without_copies(argument.args[0]) is x else None
    if kind == "relu6" and _is_sum_with(argument, x, 3):
        return Slope(9.0)  # six times hardswish
    if kind == "div" and _is_number(gate.args[1], 6) and _name_of(argument) == "relu6":
        return SLOPES["hardswish"] if _is_sum_with(argument.args[0], x, 3) else None
    return None


def _is_multiple(node: Any, x: Any) -> bool:
    if _name_of(node) != "mul":
        return False
    left, right = map(_without_copies, node.args[:2])
    return (left is x and isinstance(right, int | float)) or (
        right is x and isinstance(left, int | float)
    )


def _slope_of_quotient(operation: Operation) -> Slope | None:
    """Return the slope of x / max(‖x‖, eps), as `F.normalize` is, or x / (|x| + 1), softsign.

    x / max(‖x‖, eps) is the projection of x / eps onto the unit ball, which has the constant 1.
    """
    x, divisor = (_without_copies(operation.nodes[name]) for name in ("self", "other"))
    if _name_of(divisor) == "add":
        absolute = _without_copies(divisor.args[0])
        if _name_of(absolute) == "abs" and _without_copies(absolute.args[0]) is x:
            return Slope(1.0, 1.0, shrinks=True) if _is_sum_with(divisor, absolute, 1) else None
    while _name_of(divisor) in ("expand_as", "expand", "clone", "alias"):
        divisor = divisor.args[0]
    if _name_of(divisor) not in ("clamp_min", "clamp") or len(divisor.args) != 2:
        return None
    norm, least = divisor.args
    if _name_of(norm) != "linalg_vector_norm" or _without_copies(norm.args[0]) is not x:
        return None
    if norm.meta["val"].ndim not in (0, x.meta["val"].ndim):
        return None  # broadcasting then divides by the norm of something else
    is_euclidean = len(norm.args) < 2 or _is_number(norm.args[1], 2)
    if not is_euclidean or not isinstance(least, int | float) or not least > 0:
        return None
    return Slope((1 + _SLACK) / least, 1.0, takes_complex=True)


def _is_tanhshrink(operation: Operation) -> bool:
    x, other = (_without_copies(operation.nodes[name]) for name in ("self", "other"))
    if operation["alpha"] not in (None, 1):
        return False
    return _name_of(other) == "tanh" and _without_copies(other.args[0]) is x


# Copies


@rule("expand expand_as broadcast_to")
def _expand(operation: Operation) -> Bound:
    operand = _self_of(operation) if operation.name in _LIKE else operation.first
    copies = _broadcast_copies(operand.shape, operation.shape)
    return _times(operand, math.sqrt(copies) * (1 + (copies > 1) * _SLACK), operand.magnitude)


@rule(
    """
    embedding gather im2col index index_select repeat repeat_interleave take take_along_dim tile
    unfold reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d _pad_circular
    """
)
def _copied(operation: Operation) -> Bound:
    return _most_copies(operation)


def _most_copies(operation: Operation) -> Bound:
    """The entries are numbered, and the copies of each number in the result are counted."""
    operand = operation.first
    count = _numel(operand.shape)
    numbers = torch.arange(1, count + 1, dtype=torch.float64).reshape(operand.shape)
    image = operation.evaluated(numbers)
    found = torch.bincount(image.reshape(-1).long(), minlength=count + 1)[1:]  # 0 is padding
    copies = int(found.max()) if count else 0
    return _times(operand, math.sqrt(copies) * (1 + (copies > 1) * _SLACK), operand.magnitude)


@rule("pad constant_pad_nd")
def _pad(operation: Operation) -> Bound:
    if operation.name == "aten::pad" and operation["mode"] != "constant":
        return _most_copies(operation)
    value = operation.arguments.get("value") or 0.0
    return _times(operation.first, 1.0, max(operation.first.magnitude, abs(value)))


# Linear maps


@rule("linear")
def _linear(operation: Operation) -> Composition:
    operation["bias"]
    return _matrix(operation.arguments["input"], _finite(operation["weight"]))


@rule("matmul mm bmm mv")
def _matmul(operation: Operation) -> Bound | Composition:
    left, right = operation.arguments.values()
    return _matrix_product(left, right)


@rule("addmm baddbmm addmv")
def _addmm(operation: Operation) -> Bound | Composition:
    added, left, right = list(operation.arguments.values())[:3]
    beta, alpha = float(operation["beta"]), float(operation["alpha"])
    product: Bound | Composition = Bound(-math.inf)
    if isinstance(left, Operand) or isinstance(right, Operand):
        product = _matrix_product(left, right)
    if isinstance(product, Composition) and not isinstance(added, Operand):
        factor = torch.tensor(alpha, dtype=torch.float64)
        scaled = product.linear_map.scaled(factor) if alpha != 1 else product.linear_map
        return Composition(product.source, scaled)
    bound = product.bound() if isinstance(product, Composition) else product
    logs = [log_product(bound.log_constant, log_up(abs(alpha)))]
    if isinstance(added, Operand):
        copies = _broadcast_copies(added.shape, operation.shape)
        logs.append(log_product(added.log_constant, log_up(abs(beta) * math.sqrt(copies))))
    return Bound(log_sum(*logs), formula="ΣL")


def _matrix(operand: Any, weight: Tensor) -> Composition:
    """Return the composition of a value with x → W x along its last axis."""
    if not isinstance(operand, Operand):
        raise NoConstant("its weight depends on the network's input")
    return Composition(operand, MatrixMap(weight))


def _matrix_product(left: Any, right: Any) -> Bound | Composition:
    """Return the bound of a product of matrices, one of which is constant.

    Of a stack of constant matrices the largest norm counts; a value that is broadcast over them is
    there in as many copies.
    """
    if isinstance(left, Operand) and isinstance(right, Operand):
        raise NoConstant("it multiplies two matrices that both depend on the input")
    operand, matrix = (left, right) if isinstance(left, Operand) else (right, left)
    matrix = _finite(matrix)
    is_left = operand is left
    if is_left and matrix.ndim == 2:
        return _matrix(operand, matrix.T)
    if matrix.ndim == 1:
        matrix = matrix.unsqueeze(-1)
    norm = certified(matrix.reshape(-1, *matrix.shape[-2:]))
    own = operand.shape[:-2]
    batch: torch.Size = torch.broadcast_shapes(matrix.shape[:-2], own)  # type: ignore[no-untyped-call]
    copies = _broadcast_copies(own, batch)
    return _times(operand, norm * math.sqrt(copies) * (1 + _SLACK))


@rule("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution")
def _convolution(operation: Operation) -> Composition:
    operation["bias"]
    operand = operation.arguments["input"]
    if not isinstance(operand, Operand):
        raise NoConstant("its weight depends on the network's input")
    weight = _finite(operation["weight"])
    axes = weight.ndim - 2
    kernel = tuple(weight.shape[2:])
    stride = _per_axis(operation["stride"], axes)
    dilation = _per_axis(operation["dilation"], axes)
    transposed = operation.name.startswith("aten::conv_transpose") or bool(operation["transposed"])
    output_padding = _per_axis(operation["output_padding"] or 0, axes) if transposed else ()
    geometry = Geometry(
        stride,
        _padding(operation["padding"], kernel, dilation),
        dilation,
        operation["groups"],
        transposed,
        output_padding,
    )
    padded = operation.producers.get("input")
    if padded is not None and not transposed:
        folded = _with_padding(geometry, padded)
        if folded is not None:
            geometry, operand = folded
    size = operand.shape[-axes:]
    return Composition(operand, ConvolutionMap(weight, geometry, size, operation.tightness))


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * axes if len(values) == 1 else values


def _padding(
    padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Return the zeros before and after each axis; "same" puts the odd one after."""
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in _per_axis(padding, len(kernel)))


def _with_padding(geometry: Geometry, pad: Operation) -> tuple[Geometry, Operand] | None:
    """Return a convolution with the padding before it, and the value that is padded.

    A constant padding adds to zeros, since differences do not see the constant; any other one
    replaces a padding of nothing.
    """
    if pad.name not in ("aten::pad", "aten::constant_pad_nd"):
        return None
    mode = pad.arguments.get("mode", "constant")
    sides, axes = list(pad["pad"]), len(geometry.stride)
    if min(sides, default=0) < 0 or len(sides) > 2 * axes:
        return None
    sides += [0] * (2 * axes - len(sides))
    pairs = [(sides[2 * i], sides[2 * i + 1]) for i in reversed(range(axes))]
    if mode != "constant" and any(pair != (0, 0) for pair in geometry.padding):
        return None
    padding = tuple(
        (before + own[0], after + own[1])
        for (before, after), own in zip(pairs, geometry.padding, strict=True)
    )
    padding_mode = "zeros" if mode == "constant" else mode
    folded = Geometry(
        geometry.stride, padding, geometry.dilation, geometry.groups, padding_mode=padding_mode
    )
    return folded, pad.first


def _finite(weight: Tensor) -> Tensor:
    """Return a weight in float64, or complex128.

    Raises:
        NoConstant: if it has NaN or inf.
    """
    weight = as_float64(weight)
    if not _is_finite(weight):
        raise NoConstant(f"its weight {tuple(weight.shape)} has NaN or inf")
    return weight


# Normalisation


@rule(
    """
    batch_norm native_batch_norm _native_batch_norm_legit_no_training _batch_norm_no_update
    instance_norm
    """
)
def _batch_norm(operation: Operation) -> Bound | Composition:
    """By running statistics it is linear: γ / √(var + eps) for each channel."""
    mean, variance = operation["running_mean"], operation["running_var"]
    by_its_input = operation.arguments.get("training") or operation.arguments.get("use_input_stats")
    if by_its_input and operation.name == "aten::instance_norm":
        return _statistics(operation)
    if by_its_input or mean is None or variance is None:
        raise NoConstant("it normalises by the statistics of its input, without running ones")
    operand = operation.arguments["input"]
    operation["bias"]
    if not isinstance(operand, Operand):
        raise NoConstant("its parameters depend on the network's input")
    factors = 1 / (as_float64(variance) + operation["eps"]).sqrt()
    if operation["weight"] is not None:
        factors = factors * as_float64(operation["weight"])
    if not torch.isfinite(factors).all():
        raise NoConstant("its factors γ/√(var + eps) are not finite")
    shape = [1] * len(operand.shape)
    shape[1] = -1
    folded = _folded(operand, factors.reshape(shape))
    if folded is not None:
        return folded
    return _times(operand, _largest(factors) * (1 + _SLACK))


@rule("layer_norm native_layer_norm group_norm native_group_norm rms_norm")
def _statistics(operation: Operation) -> Bound:
    """Normalisation by the root of a mean square plus eps: max|γ| / √eps.

    The Jacobian of x / √(mean(x²) + eps), behind the projection that takes the mean away, is
    (I − x̂x̂ᵀ/n) / √(… + eps), of norm at most 1/√eps, and that at x = 0. In use, where the variance
    is far above eps, it is loose. The squares of the n normalised entries add up to at most n.
    """
    operand = operation.arguments["input"]
    if not isinstance(operand, Operand):
        raise NoConstant("its parameters depend on the network's input")
    eps = operation["eps"]
    if eps is None and operand.dtype is not None:
        eps = torch.finfo(operand.dtype).eps  # torch's rms_norm
    if not eps or not eps > 0:
        raise NoConstant("eps=0: its slope is unbounded")
    weight, bias = operation["weight"], operation["bias"]
    gain = 1.0 if weight is None else _largest(weight)
    offset = 0.0 if bias is None else _largest(bias)
    entries = _normalised_entries(operation, operand.shape)
    magnitude = (gain * math.sqrt(entries) + offset) * (1 + _SLACK)
    bound = _times(operand, gain / math.sqrt(eps) * (1 + _SLACK), magnitude)
    return Bound(bound.log_constant, magnitude, f"max|γ|/√eps = {bound.formula}, loose")


def _normalised_entries(operation: Operation, shape: tuple[int, ...]) -> int:
    """Return how many entries are normalised together, or more."""
    lengths = operation.arguments.get("normalized_shape")
    if lengths is not None:
        return math.prod(lengths)
    return _numel(shape[1:])


# Pooling and interpolation


@rule("max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices")
def _max_pool(operation: Operation) -> Bound:
    """|Δmax| is at most the largest |Δx| in a window, and an entry is in several windows."""
    operand = operation.first
    kernel, axes = operation["kernel_size"], int(operation.name.split("pool")[1][0])
    sizes, counts = operand.shape[-axes:], operation.shape[-axes:]
    stride = _per_axis(operation["stride"] or kernel, axes)
    windows = zip(
        sizes,
        counts,
        _per_axis(kernel, axes),
        stride,
        _per_axis(operation["padding"], axes),
        _per_axis(operation["dilation"], axes),
        strict=True,
    )
    copies = math.prod(
        _most_windows(n, [range(i * s - p, i * s - p + k * d, d) for i in range(count)])
        for n, count, k, s, p, d in windows
    )
    return _times(operand, math.sqrt(copies) * (1 + (copies > 1) * _SLACK), operand.magnitude)


@rule("adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d")
def _adaptive_max_pool(operation: Operation) -> Bound:
    operand = operation.first
    axes = int(operation.name[-2])
    copies = math.prod(
        _most_windows(n, [range(i * n // m, -(-(i + 1) * n // m)) for i in range(m)])
        for n, m in zip(operand.shape[-axes:], operation.shape[-axes:], strict=True)
    )
    return _times(operand, math.sqrt(copies) * (1 + (copies > 1) * _SLACK), operand.magnitude)


def _most_windows(size: int, windows: Sequence[range]) -> int:
    """Return the largest number of windows that one of `size` positions is in."""
    counts = [0] * size
    for window in windows:
        for position in window:
            if 0 <= position < size:
                counts[position] += 1
    return max(counts, default=0)


@rule("avg_pool1d avg_pool2d avg_pool3d")
def _avg_pool(operation: Operation) -> Bound:
    """The Kronecker product of the averages along each axis."""
    operand = operation.first
    axes = int(operation.name[-2])
    kernel = _per_axis(operation["kernel_size"], axes)
    stride = _per_axis(operation["stride"] or kernel, axes)
    padding = _per_axis(operation["padding"], axes)
    divisor = operation["divisor_override"]
    sizes, matrices = operand.shape[-axes:], []
    for axis in range(axes):

        def average(x: Tensor, axis: int = axis) -> Tensor:
            return torch.nn.functional.avg_pool1d(
                x,
                kernel[axis],
                stride[axis],
                padding[axis],
                operation["ceil_mode"],
                operation["count_include_pad"],
            )

        matrix = axis_matrix(average, sizes[axis])
        matrices.append((matrix > 0).double() if divisor else matrix)
    constant = kronecker_norm(matrices) / (abs(divisor) if divisor else 1)
    return _times(operand, constant * (1 + _SLACK), math.inf if divisor else operand.magnitude)


@rule(
    """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
    _adaptive_avg_pool3d
    """
)
def _adaptive_avg_pool(operation: Operation) -> Bound:
    operand = operation.first
    axes = int(operation.name[-2])
    pool = torch.nn.functional.adaptive_avg_pool1d
    matrices = [
        axis_matrix(lambda x, m=m: pool(x, m), n)  # type: ignore[misc]
        for n, m in zip(operand.shape[-axes:], operation.shape[-axes:], strict=True)
    ]
    return _times(operand, kronecker_norm(matrices) * (1 + _SLACK), operand.magnitude)


@rule(
    """
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d
    upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    _upsample_lanczos2d_aa
    """
)
def _interpolation(operation: Operation) -> Bound:
    """The Kronecker product of the interpolations along each axis.

    The matrix of one axis is found by interpolating what does not vary along the others, whose size
    of 2 stays 2. (At 1, some kernels of torch take the memory format of their input for another.)
    """
    operand = operation.first
    axes = int(operation.name.split("_aa")[0][-2])
    matrices = []
    for axis in range(axes):

        def interpolate(x: Tensor, axis: int = axis) -> Tensor:
            alone = dict(operation.arguments)
            for name in ("output_size", "scale_factors"):
                if alone.get(name) is not None:
                    same = 2 if name == "output_size" else 1.0
                    alone[name] = [v if i == axis else same for i, v in enumerate(alone[name])]
            for i, name in enumerate(("scales_d", "scales_h", "scales_w")[3 - axes :]):
                if alone.get(name) is not None and i != axis:
                    alone[name] = 1.0
            sizes = [x.shape[0] if i == axis else 2 for i in range(axes)]
            constant = x.reshape(-1, 1, *(1 if n == 2 else n for n in sizes)).expand(-1, 1, *sizes)
            image: Tensor = replace(operation, arguments=alone).evaluated(constant)
            return image.movedim(2 + axis, 2).flatten(3).select(3, 0) if axes > 1 else image

        matrices.append(axis_matrix(interpolate, operand.shape[axis - axes]))
    return _times(operand, kronecker_norm(matrices) * (1 + _SLACK))


# Sizes


def _numel(shape: Sequence[int]) -> int:
    return math.prod(shape)


def _length(operand: Operand, axis: int) -> int:
    return operand.shape[axis] if operand.shape else 1


def _broadcast_copies(shape: Sequence[int], result: Sequence[int]) -> int:
    """Return how often each entry of a value of a shape is in the broadcast one."""
    return math.prod(result) // max(1, math.prod(shape))


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    dtype = torch.complex128 if isinstance(value, complex) else torch.float64
    return torch.tensor(value, dtype=dtype)


def _is_finite(tensor: Tensor) -> bool:
    return bool((torch.view_as_real(tensor) if tensor.is_complex() else tensor).isfinite().all())


def _largest(tensor: Tensor) -> float:
    """Return the largest absolute value, as a float."""
    return float(as_float64(tensor).abs().max()) if tensor.numel() else 0.0


def _magnitude(value: Any) -> float:
    """Return an upper bound of the absolute values of a value, or of a constant."""
    if isinstance(value, Operand):
        return value.magnitude
    if value is None:
        return math.inf
    return _largest(_as_tensor(value))
