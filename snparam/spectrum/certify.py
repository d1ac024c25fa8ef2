"""An upper bound of a network's Lipschitz constant, from the operations of its exported graph."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.nn.utils import parametrize

from snparam.conversion.tables import aligned_table
from snparam.matrices.torch_private import schema_of
from snparam.parametrization.arguments import check_model
from snparam.spectrum.lipschitz_rules import (
    REARRANGEMENTS,
    RULES,
    Bound,
    Composition,
    NoConstant,
    Operand,
    Operation,
    log_product,
    log_root_sum_of_squares,
    log_up,
    operands_in,
    operations,
)

UserRule: TypeAlias = float | Callable[..., float]

# Operations whose result takes the shape and the dtype of a value, and none of its entries.
_OF_SHAPES = operations(
    """
    zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty
    new_empty_strided zero _shape_as_tensor sym_size sym_numel sym_stride
    """
)
# Operations whose rules look whether they are random.
_RANDOM_IN_TRAINING = operations(
    "dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout rrelu "
    "scaled_dot_product_attention"
)
# What batch norm is called where operations that write in place have been replaced.
_SHOWN = {"aten::_native_batch_norm_legit_no_training": "batch_norm"}
_NO_RULE = "there is no rule for it; pass one, as rules={{torch.ops.{name}: its constant}}"
_DISCRETE = (
    "it takes integers or booleans that depend on the network's input, and jumps where they "
    "change; of a network with integer inputs, certify what follows the embedding"
)


@dataclass(frozen=True)
class CertificateRow:
    """One operation of the network.

    Attributes:
        name: qualified name of the module that calls the operation, "" for the model itself.
        operation: name of the operation in torch, such as "conv2d".
        constant: the operation's own Lipschitz constant, or how it joins several inputs.
        log10_bound: log₁₀ of an upper bound of the Lipschitz constant of its result as a function
            of the network's input; NaN where the operation counts as a part of one that follows.
        reason: why it has no constant; "" where it has one.
    """

    name: str
    operation: str
    constant: str
    log10_bound: float
    reason: str = ""

    def __str__(self) -> str:
        """Return where the operation is, and why it has no constant."""
        return f"{self.name or 'the model itself'}: {self.operation}: {self.reason}"


@dataclass(frozen=True, repr=False)
class Certificate:
    """An upper bound of the Lipschitz constant of a network in the 2-norm; `print` shows a table.

    For any two inputs x and y of the shapes that it was made for, in eval mode,
    ‖f(x) − f(y)‖₂ ≤ `bound` · ‖x − y‖₂, where the norms are over all entries of all inputs, and
    of all outputs. It is a statement on the network in exact arithmetic: the rounding of the
    network's own arithmetic is not covered.

    Attributes:
        rows: the operations, in the order in which they are computed.
        log_bound: natural logarithm of the bound, rounded up; -inf where the output does not depend
            on the input, inf where an operation has no constant.
        input_shapes: the shapes of the inputs.
    """

    rows: tuple[CertificateRow, ...]
    log_bound: float
    input_shapes: tuple[tuple[int, ...], ...]

    @property
    def bound(self) -> float:
        """The bound, rounded up; inf where it is none, or above the range of a float."""
        return _exp_up(self.log_bound)

    @property
    def log10_bound(self) -> float:
        """log₁₀ of the bound, rounded up; finite also where the bound is above a float's range."""
        return _log10(self.log_bound)

    @property
    def without_constant(self) -> tuple[CertificateRow, ...]:
        """The operations that have no constant, each with its reason.

        They make the bound infinite, unless a weight of zero behind them takes them away.
        """
        return tuple(row for row in self.rows if row.reason)

    def radius(self, logits: Tensor) -> Tensor:
        """Return the radii within which no change of an input changes the class that is largest.

        The difference of two logits changes by at most √2 L ‖Δx‖ (the norm of e_i − e_j is √2), so
        the largest one stays the largest within margin / (√2 L), where the margin is its distance
        to the second largest (Tsuzuku, Sato and Sugiyama 2018).

        Args:
            logits: (..., classes), what the network gives for some inputs.

        Returns:
            (...), float64 radii in the 2-norm, rounded down; 0 where the two largest logits are
            equal, the logits have NaN, or the bound is infinite.

        Raises:
            ValueError: if there are fewer than two classes.
        """
        if logits.ndim == 0 or logits.shape[-1] < 2:
            raise ValueError(
                f"radius: logits of shape {tuple(logits.shape)}: expected (..., classes) with two "
                "classes or more"
            )
        largest, second = logits.detach().double().topk(2, dim=-1).values.unbind(-1)
        margin = torch.where(largest > second, largest - second, 0.0)
        # Each of the operations is off by less than 2⁻⁵², relatively.
        log = self.log_bound
        reciprocal = math.inf if log == -math.inf else math.exp(-max(log, -700.0))
        factor = reciprocal / math.sqrt(2) * (1 - 2.0**-50)
        return torch.where(margin > 0, margin * factor, 0.0)

    def __str__(self) -> str:
        """Return an aligned table of the operations, the bound, and what it does not cover."""
        header = ["module", "operation", "constant", "log10 of the bound"]
        cells = [
            [
                row.name,
                row.operation,
                row.constant,
                "" if math.isnan(row.log10_bound) else f"{row.log10_bound:.4f}",
            ]
            for row in self.rows
        ]
        shapes = ", ".join(map(str, self.input_shapes))
        lines = [aligned_table(header, cells), ""]
        lines.append(
            f"Lipschitz constant in the 2-norm, for inputs of shape {shapes}: "
            + (
                f"at most {self.bound:.6g} (log10 {self.log10_bound:.4f})"
                if self.log_bound < math.inf
                else "no bound, because of"
            )
        )
        if self.without_constant and self.log_bound < math.inf:
            lines.append("Without a constant, but multiplied by zero:")
        lines += [f"- {row}" for row in self.without_constant]
        lines.append("The rounding of the network's own arithmetic is not covered.")
        return "\n".join(lines)

    __repr__ = __str__


@torch.no_grad()
def certify(
    model: nn.Module,
    example_inputs: Any,
    *,
    rules: Mapping[Any, UserRule] | None = None,
    tightness: float = 1.05,
) -> Certificate:
    """Bound a network's Lipschitz constant in the 2-norm from above, in eval mode.

    The network is exported by `torch.export`, and its graph is walked: each operation has a rule
    that bounds its result as a function of the network's input. A linear map counts by a certified
    upper bound of its norm, a convolution at the input size that it sees, with a batch norm behind
    it; an activation by its steepest slope; sums and concatenations by the constants of what they
    join. It takes any network, converted or not, with the weights that eval mode uses; neither its
    mode nor its state changes. The bound is one of the network as it is exported for those shapes.

    What has no constant (attention, a gate that multiplies unbounded values, whatever jumps), or no
    rule, makes the bound infinite and is listed in `Certificate.without_constant`.

    Args:
        model: the network.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments,
            which the network is exported with. The bound is with respect to all their
            floating-point entries together; their values do not matter.
        rules: Lipschitz constants of operations, such as `torch.ops.aten.erf` or one of its
            overloads, and of modules, by their type; they come before those that there are. A
            value is the constant, with respect to all tensors together that are passed in and
            depend on the network's input, or a function that returns it: of the module, or of the
            operation's arguments, with tensors on the meta device for those that depend on it.
        tightness: by what factor the bound of a convolution that is too large for its norm to be
            found exactly may be above it; see `norm_bounds`. Nearer to 1 takes longer.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if there is no floating-point tensor among the inputs, the model has weights on
            the meta device, a rule's constant is negative or NaN, or `tightness` is below 1.0001.
        RuntimeError: if `torch.export` does not take the model, with its reason.
    """
    check_model(model, "certify")
    args, kwargs = _as_arguments(example_inputs)
    tensors = list(_tensors_in((args, kwargs)))
    if not any(t.is_floating_point() or t.is_complex() for t in tensors):
        shown = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in tensors)
        shown = shown or type(example_inputs).__name__
        raise ValueError(
            f"certify: example_inputs ({shown}) has no floating-point tensor, and with respect to "
            "integers there is no Lipschitz constant; pass a tensor, a tuple of arguments or a "
            "dict of keyword arguments, and of a network with integer inputs certify what follows "
            "the embedding"
        )
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise ValueError(
                f"certify: {name!r} {tuple(weight.shape)} is on the meta device and has no values; "
                "load the weights first"
            )
    with _eval_mode(model), parametrize.cached():
        _read_parametrized(model)
        walk = _Walk(model, _exported(model, args, kwargs), dict(rules or {}), tightness)
        log_bound = walk.log_bound()
    shapes = tuple(tuple(t.shape) for t in tensors)
    return Certificate(tuple(walk.rows()), log_bound, shapes)


def _as_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _tensors_in(inputs: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping | tuple | list):
        for value in inputs.values() if isinstance(inputs, Mapping) else inputs:
            yield from _tensors_in(value)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and each of its modules back into its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _read_parametrized(model: nn.Module) -> None:
    """Read each parametrized tensor once, which `parametrize.cached` then gives to the export.

    The graph has the weights themselves then, and not what computes them, which takes several times
    as long to export as the network.
    """
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:  # type: ignore[union-attr]
                getattr(module, name)


def _exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.export.ExportedProgram:
    """Return the exported network, without operations that write in place and undecomposed.

    Raises:
        RuntimeError: if `torch.export` does not take it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch to itself
            program: torch.export.ExportedProgram = torch.export.export(model, args, kwargs)
            if _may_write_in_place(program.graph_module):
                # An empty table decomposes nothing: it only replaces what is written in place, so
                # that each node has one value.
                program = program.run_decompositions({})
            return program
    except Exception as error:
        raise RuntimeError(
            f"certify: torch.export does not take {type(model).__name__}: {error}"
        ) from error


def _may_write_in_place(module: fx.GraphModule) -> bool:
    """Return whether a graph, or one within it, has an operation that writes into an argument."""
    inner = [part for part in module.children() if isinstance(part, fx.GraphModule)]
    return any(map(_writes, module.graph.nodes)) or any(map(_may_write_in_place, inner))


def _writes(node: fx.Node) -> bool:
    schema = schema_of(node.target)
    return schema is not None and bool(schema.is_mutable)


@dataclass(eq=False)
class _Region:
    """The nodes of one call of a module for which the user has a rule."""

    module: nn.Module
    rule: UserRule
    operand: Operand | None = None
    nodes: list[fx.Node] = field(default_factory=list)


class _Walk:
    """One pass over an exported network, node by node.

    A value that does not depend on the network's input is computed; every other one becomes an
    `Operand`.
    """

    def __init__(
        self,
        model: nn.Module,
        program: torch.export.ExportedProgram,
        user_rules: dict[Any, UserRule],
        tightness: float,
    ) -> None:
        self.model = model
        self.program = program
        self.user_rules = user_rules
        self.tightness = tightness
        self._entries: list[tuple[str, str, Operand, str]] = []

    def log_bound(self) -> float:
        """Return the logarithm of the bound of all the network's outputs together."""
        module = self.program.graph_module
        inputs = [self._input(spec) for spec in self.program.graph_signature.input_specs]
        kinds = [spec.kind for spec in self.program.graph_signature.output_specs]
        (output,) = (node for node in module.graph.nodes if node.op == "output")
        wanted = [
            value
            for value, kind in zip(output.args[0], kinds, strict=True)
            if kind == OutputKind.USER_OUTPUT
        ]
        values = self._run(module, inputs, wanted)
        logs = []
        for operand in operands_in(values):
            log = operand.log_constant
            if operand.is_discrete:
                self._note(output, "output", operand, "an output of integers or booleans jumps")
                log = math.inf
            logs.append(log)
        return log_root_sum_of_squares(*logs)

    def rows(self) -> Iterator[CertificateRow]:
        """Yield a row for each operation of which the bound was needed."""
        for name, operation, operand, reason in self._entries:
            if reason:
                yield CertificateRow(name, operation, "none", math.inf, reason)
            elif operand.is_used:
                log10 = _log10(operand.log_constant)
                yield CertificateRow(name, operation, operand.bound.formula, log10)
            else:
                yield CertificateRow(name, operation, "in the next", math.nan)

    def _input(self, spec: Any) -> Any:
        """Return what a placeholder of the graph stands for."""
        if spec.kind == InputKind.USER_INPUT:
            constant = isinstance(spec.arg, ConstantArgument)
            return spec.arg.value if constant else _NETWORK_INPUT
        tensors = (self.program.state_dict, self.program.constants)
        for table in tensors:
            if spec.target in table:
                return table[spec.target]
        return None

    def _run(self, module: fx.GraphModule, inputs: list[Any], wanted: list[Any]) -> list[Any]:
        """Return the values of some nodes of a graph for the values of its placeholders."""
        needed = _ancestors(wanted)
        regions = self._regions(module.graph)
        values: dict[fx.Node, Any] = {}
        calls: dict[fx.Node, Operation] = {}
        given = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                value = next(given)
                values[node] = _operand(node, Bound(0.0)) if value is _NETWORK_INPUT else value
            elif node not in needed or node.op == "output":
                continue
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(node.target)(module)
            elif node in regions:
                values[node] = self._in_region(node, regions[node], values)
            else:
                values[node] = self._call(node, values, calls)
        return [values[w] if isinstance(w, fx.Node) else w for w in wanted]

    def _call(
        self, node: fx.Node, values: dict[fx.Node, Any], calls: dict[fx.Node, Operation]
    ) -> Any:
        """Return the value of a call."""
        args, kwargs, target = _arguments_of(node, values)
        name = _operation_name(node)
        if _is_random(target) and name not in _RANDOM_IN_TRAINING:
            return self._without_constant(node, "it is random")
        if _writes(node):
            # Within a region that has a graph of its own, such operations may be left.
            return self._without_constant(node, "it writes into its input")
        operands = list(operands_in([*args, *kwargs.values()]))
        if not operands:
            return target(*args, **kwargs)
        if name in _OF_SHAPES:
            return _evaluated_for_shapes(node, args, kwargs)
        if target is operator.getitem:
            return self._element(node, args[0], calls)
        inner = next((arg for arg in args if isinstance(arg, fx.GraphModule)), None)
        if inner is not None:
            return self._nested(node, inner, args)
        if schema_of(target) is None:
            return self._without_constant(node, "it is no operation of torch that has a rule")
        operation = _operation(node, args, kwargs, calls, self.tightness)
        calls[node] = operation
        try:
            bound = self._bound(node, operation, operands)
        except NoConstant as missing:
            return self._without_constant(node, str(missing))
        if isinstance(bound, Composition):
            bound.source.bound  # noqa: B018 - else a chain of maps is as deep as it is long
        operand = _operand(node, bound)
        if operation.name not in REARRANGEMENTS and not operand.is_discrete:
            self._note(node, name, operand)
        return operand

    def _bound(
        self, node: fx.Node, operation: Operation, operands: list[Operand]
    ) -> Bound | Composition:
        """Return what is known of the result of an operation.

        Raises:
            NoConstant: if it has none.
        """
        target = operation.target
        for key in (target, target.overloadpacket):
            if key in self.user_rules:
                return _by_user(self.user_rules[key], operands, str(key), operation)
        if _is_discrete(node):
            return Bound(math.inf)
        if any(operand.is_discrete for operand in operands):
            raise NoConstant(_DISCRETE)
        rule = RULES.get(operation.name)
        if rule is None:
            raise NoConstant(_NO_RULE.format(name=str(target.overloadpacket)))
        return rule(operation)

    def _element(self, node: fx.Node, value: Any, calls: dict[fx.Node, Operation]) -> Any:
        """Return one of several results; of the first, a linear map in it is kept."""
        source, index = node.args
        if not isinstance(value, Operand):
            return value[index]
        if _is_discrete(node):
            return _operand(node, Bound(math.inf))
        if index == 0:
            return _operand(node, value.known)
        operation = calls.get(source)  # type: ignore[arg-type]
        if operation is None or operation.name in REARRANGEMENTS:
            return _operand(node, Bound(value.log_constant))
        # Such as the mean and the reciprocal deviation that native_layer_norm gives as well.
        return self._without_constant(node, f"the rule of {operation.name} is for its first result")

    def _nested(self, node: fx.Node, inner: fx.GraphModule, args: tuple[Any, ...]) -> Any:
        """Return the values of a region of the graph that has a graph of its own.

        Those are regions without gradients and under autocast, whose inner graph is a call of it.
        """
        if "wrap_with" not in str(node.target):
            return self._without_constant(node, f"it is control flow ({node.target})")
        (output,) = (n for n in inner.graph.nodes if n.op == "output")
        position = next(i for i, arg in enumerate(args) if arg is inner)
        wanted = list(output.args[0])
        return tuple(self._run(inner, list(args[position + 1 :]), wanted))

    # Modules for which the user has a rule

    def _regions(self, graph: fx.Graph) -> dict[fx.Node, _Region]:
        """Return, for each node of a module for which the user has a rule, the call it is in."""
        types = {key: rule for key, rule in self.user_rules.items() if isinstance(key, type)}
        calls: dict[str, _Region] = {}
        regions: dict[fx.Node, _Region] = {}
        if not types:
            return regions
        for node in graph.nodes:
            for path in _module_paths(node):
                module = self._module(path)
                rule = next((types[t] for t in type(module).__mro__ if t in types), None)
                if module is not None and rule is not None:
                    regions[node] = calls.setdefault(path, _Region(module, rule))
                    regions[node].nodes.append(node)
                    break
        return regions

    def _in_region(self, node: fx.Node, region: _Region, values: dict[fx.Node, Any]) -> Any:
        """Return the value of a node in a module's call: the module's bound, or a constant."""
        args, kwargs, target = _arguments_of(node, values)
        if not any(True for _ in operands_in([*args, *kwargs.values()])) and not _writes(node):
            return target(*args, **kwargs)
        if region.operand is None:
            inside = set(region.nodes)
            sources = {s: None for inner in region.nodes for s in inner.all_input_nodes}
            # What was not computed before the first node of the call is needed by none of it.
            outside = [values.get(source) for source in sources if source not in inside]
            operands = list(operands_in(outside))
            name = type(region.module).__name__
            bound = _by_user(region.rule, operands, name, region.module)
            region.operand = Operand((), None, bound)
            self._note(node, name, region.operand)
        return _operand(node, region.operand.bound)

    def _module(self, path: str) -> nn.Module | None:
        try:
            return self.model.get_submodule(path.partition("@")[0])
        except AttributeError:
            return None

    # Notes for the table

    def _without_constant(self, node: fx.Node, reason: str) -> Operand:
        operand = _operand(node, Bound(math.inf))
        self._note(node, _operation_name(node), operand, reason)
        return operand

    def _note(self, node: fx.Node, operation: str, operand: Operand, reason: str = "") -> None:
        paths = _module_paths(node)
        name = paths[-1].partition("@")[0] if paths else ""
        shown = _SHOWN.get(operation, operation.removeprefix("aten::"))
        self._entries.append((name, shown, operand, reason))


_NETWORK_INPUT = object()


def _ancestors(wanted: list[Any]) -> set[fx.Node]:
    """Return the nodes that some nodes are computed from, and those themselves."""
    pending = [value for value in wanted if isinstance(value, fx.Node)]
    found: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _arguments_of(
    node: fx.Node, values: Mapping[fx.Node, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Return the values of the arguments of a call, by position and by name, and what is called."""
    args: Any = fx.node.map_arg(node.args, values.__getitem__)
    kwargs: Any = fx.node.map_arg(node.kwargs, values.__getitem__)
    return args, kwargs, node.target


def _operand(node: fx.Node, known: Bound | Composition) -> Operand:
    """Return the value of a node that depends on the network's input."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return Operand(tuple(value.shape), value.dtype, known, value.device)
    return Operand((), None, known)


def _is_discrete(node: fx.Node) -> bool:
    return _operand(node, Bound(0.0)).is_discrete


def _operation_name(node: fx.Node) -> str:
    schema = schema_of(node.target)
    return str(schema.name) if schema is not None else str(node.target)


def _operation(
    node: fx.Node,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    calls: dict[fx.Node, Operation],
    tightness: float,
) -> Operation:
    """Return a call with its arguments by name, defaults included."""
    schema = schema_of(node.target)
    assert schema is not None
    arguments: dict[str, Any] = {}
    nodes: dict[str, Any] = {}
    for i, argument in enumerate(schema.arguments):
        given = (args, node.args) if i < len(args) else None
        if given is not None:
            arguments[argument.name], nodes[argument.name] = given[0][i], given[1][i]
        elif argument.name in kwargs:
            arguments[argument.name] = kwargs[argument.name]
            nodes[argument.name] = node.kwargs[argument.name]
        else:
            arguments[argument.name] = nodes[argument.name] = argument.default_value
    first = node.meta.get("val")
    if isinstance(first, list | tuple) and first:
        first = first[0]
    return Operation(
        name=str(schema.name),
        target=node.target,
        schema=schema,
        arguments=arguments,
        nodes=nodes,
        shape=tuple(first.shape) if isinstance(first, Tensor) else (),
        tightness=tightness,
        producers={
            name: calls[source]
            for name, source in nodes.items()
            if isinstance(source, fx.Node) and source in calls
        },
    )


def _is_random(target: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def _evaluated_for_shapes(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Return what an operation gives that looks at shapes and dtypes alone."""

    def stand_in(value: Any) -> Any:
        if not isinstance(value, Operand):
            return value
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)

    target: Any = node.target
    return target(*fx.node.map_aggregate(args, stand_in), **fx.node.map_aggregate(kwargs, stand_in))


def _module_paths(node: fx.Node) -> list[str]:
    """Return the qualified names of the modules around a node, from the outermost inwards."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, _ in stack.values() if path]


def _by_user(rule: UserRule, operands: list[Operand], name: str, subject: Any) -> Bound:
    """Return the bound of a result by a user's rule.

    Args:
        rule: the constant, or a function that returns it.
        operands: the values that depend on the network's input.
        name: of the operation or module, for errors.
        subject: the `Operation`, or the module.

    Raises:
        ValueError: if the constant is negative or NaN.
    """
    constant = rule
    if callable(rule):
        constant = rule(*_described(subject)) if isinstance(subject, Operation) else rule(subject)
    constant = float(constant)  # type: ignore[arg-type]
    if not constant >= 0:
        raise ValueError(f"certify: the rule for {name} gave {constant}; expected a number ≥ 0")
    inputs = log_root_sum_of_squares(*(operand.log_constant for operand in operands))
    return Bound(log_product(inputs, log_up(constant)), formula=f"{constant:.6g}, by your rule")


def _described(operation: Operation) -> list[Any]:
    """Return an operation's arguments, with tensors on the meta device for its operands."""

    def described(value: Any) -> Any:
        if not isinstance(value, Operand):
            return value
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    arguments = list(operation.arguments.values())
    values: Any = fx.node.map_aggregate(arguments, described)
    return list(values)


def _exp_up(log: float) -> float:
    """Return exp, rounded up; inf above the range of a float."""
    if log > 709.0:
        return math.inf
    return 0.0 if log == -math.inf else math.exp(log) * (1 + 2.0**-50)


def _log10(log: float) -> float:
    """Return log₁₀ from the natural logarithm, rounded up."""
    return log if not math.isfinite(log) else log / math.log(10) + 2.0**-50 * max(1.0, abs(log))
