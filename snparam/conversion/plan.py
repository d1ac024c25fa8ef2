"""The plan of a conversion: for each weight of a model, the decision about it and the reason."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import Unpack

from snparam.constraints.constraint import CONSTRAINTS
from snparam.conversion.arguments import documents_arguments
from snparam.conversion.input_sizes import Sizes, recorded_sizes
from snparam.conversion.selection import Filter, Selection, Selectors
from snparam.conversion.tables import aligned_table
from snparam.conversion.weights import Weight, weights_in
from snparam.layers.rows import qualified_class_name
from snparam.parametrization.arguments import check_flag, check_model
from snparam.parametrization.find import normalised_weights
from snparam.parametrization.options import Options, Settings, documents_options, settings_from
from snparam.parametrization.spectral_norm import SpectralNorm

CONVERT, SKIP, REFUSE = "convert", "skip", "refuse"

# Names of tensors that are added, or put beside others, and not multiplied: position embeddings and
# tokens (`pos_embed`, `relative_position_bias_table`, `cls_token`), as the code of papers, timm,
# torchvision and transformers calls them.
_ADDED = re.compile(
    r"(\w+_)?((pos|positions?|positional)(_?(emb|enc|bias)\w*|_[hw])?|tokens?)", re.IGNORECASE
)


@dataclass(frozen=True)
class PlanRow:
    """The row of one weight in the plan of a conversion.

    Attributes:
        name: qualified name of the module that has the weight.
        tensor: name of the tensor in the module; the property `weight` joins both names.
        layer_type: name of the module's class.
        shape: shape of the weight, () where it has none.
        matrices: shape (b, m, n) of the stack that the weight is read as, or None where it is not
            read as one.
        sigma: largest σ of all blocks before the conversion, or None where the weight is not to be
            converted.
        decision: `"convert"`, `"skip"` or `"refuse"` (the conversion raises).
        reason: why, in words; empty for an ordinary conversion.
        record: where the weight is and how it is read.
        estimate: u (b, k, m) and sv (b, k) that the conversion starts from, or None.
        shares: the SpectralNorm of a converted weight with the same Parameter, whose state this
            weight will share, or None.
        is_unknown: whether the weight is skipped because the layer table does not know the layer's
            type.
    """

    name: str
    tensor: str
    layer_type: str
    shape: tuple[int, ...]
    matrices: tuple[int, int, int] | None
    sigma: float | None
    decision: str
    reason: str
    record: Weight = field(repr=False, compare=False)
    estimate: tuple[Tensor, Tensor] | None = field(repr=False, compare=False, default=None)
    shares: SpectralNorm | None = field(repr=False, compare=False, default=None)
    is_unknown: bool = field(repr=False, compare=False, default=False)

    @property
    def weight(self) -> str:
        """Qualified name of the weight."""
        return self.record.name

    @property
    def is_normalised(self) -> bool:
        """True where the weight is under SpectralNorm already."""
        return self.record.norm is not None


class ConversionPlan(list[PlanRow]):
    """The rows of a conversion, one per weight, in the model's order; `print` shows a table."""

    @property
    def to_convert(self) -> list[PlanRow]:
        """The rows of the weights that will be converted."""
        return [row for row in self if row.decision == CONVERT]

    @property
    def share(self) -> float:
        """Share of the entries of parameters of two or more dimensions that will be normalised."""
        total = sum(_entry_counts(self).values())
        normalised = _entry_counts([r for r in self if r.decision == CONVERT or r.is_normalised])
        return sum(normalised.values()) / total if total else 0.0

    @property
    def unknown(self) -> list[PlanRow]:
        """The rows that are skipped because the layer table does not know the layers' types.

        Those of position embeddings and tokens, by their names, are not among them: they are added
        and not multiplied.
        """
        return [row for row in self if row.is_unknown and not _ADDED.fullmatch(row.tensor)]

    @property
    def unknown_share(self) -> float:
        """Share of the entries of parameters of two or more dimensions in `unknown` rows."""
        total = sum(_entry_counts(self).values())
        return sum(_entry_counts(self.unknown).values()) / total if total else 0.0

    @property
    def registrations(self) -> list[str]:
        """The calls that would add the types of the `unknown` rows to the layer table.

        They say that dimension 0 counts the rows. The entries of a ParameterList or ParameterDict
        are named in the row of the module around it, and no call is for a type of torch itself,
        because it would hold for all networks.
        """
        types: dict[str, dict[str, None]] = {}
        for row in self.unknown:
            path, name = row.record.path, row.tensor
            if isinstance(path[-1][1], nn.ParameterList | nn.ParameterDict) and len(path) > 1:
                name = path[-1][0].rpartition(".")[2] + ".*"
                path = path[:-1]
            kind = qualified_class_name(parametrize.type_before_parametrizations(path[-1][1]))
            if not kind.startswith("torch.nn."):
                types.setdefault(kind, {})[name] = None
        return [
            f'snparam.register_layer_type("{kind}", {{'
            + ", ".join(f'"{name}": "rows"' for name in names)
            + "})"
            for kind, names in types.items()
        ]

    def __str__(self) -> str:
        """Return an aligned table, and below it the share of the parameters that is normalised.

        If a weight is refused, the last line says that `convert_model` would raise, instead. Of a
        weight that is read as several blocks, σ is the largest.
        """
        hint = ""
        if calls := self.registrations:
            hint = 'to add a type ("columns" where its weight is stored input-first):\n'
            hint += "".join(f"  {call}\n" for call in calls)
        blocks = any(row.sigma is not None and row.matrices and row.matrices[0] > 1 for row in self)
        sigma = "largest σ now" if blocks else "σ now"
        header = ["weight", "layer", "shape", "matrices", sigma, "decision", "reason"]
        rows = [
            [
                row.weight,
                row.layer_type,
                " x ".join(map(str, row.shape)),
                "" if row.matrices is None else " x ".join(map(str, row.matrices)),
                "" if row.sigma is None else f"{row.sigma:.6g}",
                row.decision,
                row.reason,
            ]
            for row in self
        ]
        table = f"{aligned_table(header, rows)}\n{hint}"
        if refused := sum(row.decision == REFUSE for row in self):
            weights = "1 weight is" if refused == 1 else f"{refused} weights are"
            return f"{table}convert_model would raise: {weights} refused"
        total = sum(_entry_counts(self).values())
        return (
            f"{table}{len(self.to_convert)} of {len(self)} weights to convert; then "
            f"{self.share:.1%} of the {total:,} parameters of two or more dimensions are normalised"
        )

    __repr__ = __str__


def _entry_counts(rows: Iterable[PlanRow]) -> dict[int, int]:
    """Return the number of entries of each distinct parameter, by its identity."""
    return {row.record.key: prod(row.shape) if row.shape else 0 for row in rows}


@documents_options
@documents_arguments
def plan_conversion(
    model: nn.Module,
    num_svs: int = 1,
    num_itrs: int = 1,
    *,
    include: Selectors = None,
    exclude: Selectors = None,
    filter_fn: Filter | None = None,
    preset: str | None = None,
    example_inputs: Any = None,
    replace: bool = True,
    progress: bool | None = None,
    **options: Unpack[Options],
) -> ConversionPlan:
    """Return what `convert_model` would do with the same arguments, and change nothing.

    Every parameter of two or more dimensions is in the plan, to be converted, or with the reason
    why not. Where `convert_model` would raise an error because of a weight, the weight is in the
    plan with the decision `"refuse"` and that error.

    Where a weight has fewer than `num_svs` singular values, all of them are tracked: the number is
    given for layers of all sizes. (`register_sn`, where it is given for one layer, raises.)

    Args:
        model: the network.
        {arguments}
        {options}

    Returns:
        The plan, a list of rows; `print(plan)` shows it as a table.

    Raises:
        ValueError: if a pattern or type matches nothing, a preset is unknown or recognises no head
            to leave alone, an option is out of range, or `example_inputs` is passed without
            `norm="operator"`, or cannot be recorded.
        TypeError: for an unknown option, a selector or option of a wrong type, or a `model` that is
            no module.
        ImportError: if `progress=True` and tqdm is not installed.
    """
    check_model(model, "plan_conversion")
    check_flag("replace", replace)
    settings = settings_from(num_svs, num_itrs, options)
    selection = Selection.from_arguments(include, exclude, filter_fn, model, preset)
    sizes = _recorded_sizes(model, settings, example_inputs)
    weights = list(weights_in(model, settings, take_over=replace, sizes=sizes))
    norms = {id(weight.original): weight.norm for weight in normalised_weights(model)}
    plan = plan_of(weights, selection, norms, progress)
    return _with_other_options_refused(plan, selection, norms)


def _recorded_sizes(model: nn.Module, settings: Settings, example_inputs: Any) -> Sizes | None:
    """Return the sizes of the inputs of each convolution, or None without example inputs.

    Raises:
        ValueError: if there are example inputs, and no norm depends on them.
    """
    if example_inputs is None:
        return None
    if settings.norm != "operator":
        raise ValueError(
            f"example_inputs with norm={settings.norm!r}: no norm depends on them; pass "
            "norm='operator', or leave them out"
        )
    return recorded_sizes(model, example_inputs)


def plan_of(
    weights: Sequence[Weight],
    selection: Selection,
    norms: Mapping[int, SpectralNorm],
    progress: bool | None = False,
) -> ConversionPlan:
    """Return the plan of converting the selected weights of a model.

    Args:
        weights: all weights of the model, with the options of the conversion as their settings.
        selection: which of them to convert.
        norms: the SpectralNorms in the model, by the identity of their weights' originals.
        progress: as in `plan_conversion`.
    """
    by_tensor: dict[int, list[Weight]] = {}
    for weight in weights:
        by_tensor.setdefault(weight.key, []).append(weight)
    rows = [_decide(w, selection, by_tensor[w.key], norms.get(w.key)) for w in weights]
    estimates: dict[int, tuple[Tensor, Tensor] | ValueError] = {}
    plan = ConversionPlan()
    for row in _with_progress(rows, progress):
        plan.append(_with_estimate(row, estimates) if row.decision == CONVERT else row)
    return plan


# Options of an earlier conversion


def _with_other_options_refused(
    plan: ConversionPlan, selection: Selection, norms: Mapping[int, SpectralNorm]
) -> ConversionPlan:
    """Return a plan with a refusal for each weight that `_other_options` has an error for."""
    faults = [(row, _other_options(row.record, selection, norms)) for row in plan]
    return ConversionPlan(
        row if fault is None else replace(row, decision=REFUSE, reason=fault)
        for row, fault in faults
    )


def _other_options(
    weight: Weight, selection: Selection, norms: Mapping[int, SpectralNorm]
) -> str | None:
    """Return the error for a selected weight that is normalised already with other options.

    The error has both values of each of them; None is returned where there is nothing to refuse.
    """
    norm = norms.get(weight.key)
    if norm is None or weight.layout is None or _reason_against(weight, selection) is not None:
        return None
    differing = ", ".join(
        f"{option}={registered!r} (asked for: {option}={requested!r})"
        for option, registered, requested in _differences(weight, norm)
    )
    if not differing:
        return None
    return (
        f"SpectralNorm on {weight.label} {weight.shape}: registered with {differing}; a conversion "
        "changes no options: call restore_model(model) first, or leave it out by exclude=."
    )


def _differences(weight: Weight, norm: SpectralNorm) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, registered value, requested value) of each option whose values disagree.

    Values that read the weight as the same matrices, or track as many singular values, agree.
    """
    for name in (option.name for option in fields(Settings)):
        registered, requested = getattr(norm.settings, name), getattr(weight.settings, name)
        if name == "blocks" and weight.reads_as(norm.view):
            continue
        if name == "num_svs" and min(requested, *norm.view.matrices[1:]) == norm.u.shape[1]:
            continue
        if registered != requested:
            yield name, registered, requested


# Deciding


def _decide(
    weight: Weight, selection: Selection, sharers: Sequence[Weight], norm: SpectralNorm | None
) -> PlanRow:
    """Return the row of a weight, decided without its values, so that `sigma` is None.

    Args:
        weight: the weight.
        selection: which weights to convert.
        sharers: all weights with the same tensor, this one included.
        norm: the SpectralNorm that a weight with the same original is under already, or None.
    """
    row = PlanRow(
        name=weight.module_name,
        tensor=weight.tensor_name,
        layer_type=parametrize.type_before_parametrizations(weight.owner).__name__,
        shape=weight.shape,
        matrices=None if weight.view is None else weight.view.matrices,
        sigma=None,
        decision=SKIP,
        reason="" if weight.problem is None else weight.problem.plan_reason,
        record=weight,
        shares=norm,
    )
    if weight.norm is not None:
        return replace(row, reason="already normalised")
    if weight.layout is None:
        # filter_fn is called for eligible weights alone, and may rely on the attributes of their
        # modules.
        unfiltered = replace(selection, filter_fn=None)
        refuses = weight.problem is not None and weight.problem.refuses
        is_unknown = weight.problem is not None and weight.problem.unknown_type
        if refuses or is_unknown:
            reason = _reason_against(weight, unfiltered)
            if reason is not None:
                return replace(row, reason=reason)
        return _refused_row(row) if refuses else replace(row, is_unknown=is_unknown)
    reason = _reason_against(weight, selection)
    if reason is not None:
        return replace(row, reason=reason)
    if weight.problem is not None:
        return _refused_row(row) if weight.problem.refuses else row
    obstacle, notes = _sharing(weight, sharers, selection)
    if obstacle:
        return replace(row, reason=obstacle)
    if weight.view is not None and weight.view.input_size is not None:
        size = " x ".join(map(str, weight.view.input_size))
        notes = [f"the convolution itself, on inputs of {size}", *notes]
    if weight.settings.num_svs > weight.available:
        plural = "s" if weight.available > 1 else ""
        notes = [f"tracks {weight.available} singular value{plural}, all it has", *notes]
    if weight.spectral is not None:
        notes = ["takes over torch's spectral norm", *notes]
    return replace(row, decision=CONVERT, reason="; ".join(notes))


def _refused_row(row: PlanRow) -> PlanRow:
    problem = row.record.problem
    assert problem is not None
    return replace(row, decision=REFUSE, reason=row.record.message(problem))


def _reason_against(weight: Weight, selection: Selection) -> str | None:
    return selection.reason_against(
        weight.path, weight.owner, weight.module_name, weight.tensor_name
    )


def _sharing(
    weight: Weight, sharers: Sequence[Weight], selection: Selection
) -> tuple[str, list[str]]:
    """Return what follows for a weight from the other uses of its Parameter.

    Returns:
        The reason not to convert it ("" where there is none), and notes for the row of the plan.
    """
    notes, sharing_names = [], []
    for other in sharers:
        if other is weight:
            continue
        if other.view is None:
            problem = "" if other.problem is None else other.problem.reason
            return f"shared with {other.name}, which is not normalised: {problem}", []
        if other.view != weight.view:
            return f"shared with {other.name}, which reads it as other matrices", []
        reason = _reason_against(other, selection)
        if other.norm is None and reason is not None:
            notes.append(f"shares its parameter with {other.name}, left alone ({reason})")
        else:
            sharing_names.append(other.name)
    if sharing_names:
        notes.append(f"shares its state with {', '.join(sharing_names)}")
    return "", notes


def _with_estimate(
    row: PlanRow, estimates: dict[int, tuple[Tensor, Tensor] | ValueError]
) -> PlanRow:
    """Return the row of a weight to convert with its σ and the estimate to start from.

    A weight whose values cannot be used is refused.

    Args:
        row: the row, from `_decide`.
        estimates: the estimate, or the error, of each tensor so far, by identity; filled here, so
            that tied weights are computed once.
    """
    weight = row.record
    if row.shares is not None:
        return _with_note(row, row.shares.sv)
    if weight.key not in estimates:
        try:
            estimates[weight.key] = weight.estimate()
        except ValueError as error:
            estimates[weight.key] = error
    estimate = estimates[weight.key]
    if isinstance(estimate, ValueError):
        return replace(row, decision=REFUSE, reason=str(estimate))
    return replace(_with_note(row, estimate[1]), estimate=estimate)


def _with_note(row: PlanRow, sv: Tensor) -> PlanRow:
    """Return the row of a weight to convert with its σ and what its constraint says of it.

    Args:
        row: the row.
        sv: (b, k), the tracked singular values of the weight.
    """
    weight = row.record
    assert weight.view is not None
    options = weight.settings.for_matrices(weight.view.matrices)
    note = CONSTRAINTS[options.constraint_name].note(sv, options, weight.available)
    if weight.settings.coeff == "mup":
        note = f"{note}; " * bool(note) + f"coeff={options.coeff:.4g}, √(rows / columns)"
    reason = "; ".join(part for part in (row.reason, note) if part)
    return replace(row, sigma=float(sv[:, 0].max()), reason=reason)


def _with_progress(rows: Sequence[PlanRow], progress: bool | None) -> Iterable[PlanRow]:
    if progress is False:
        return rows
    try:
        from tqdm import tqdm
    except ImportError:
        if progress:
            raise ImportError("progress=True needs tqdm: pip install 'snparam[progress]'") from None
        return rows
    # tqdm with disable=None is silent where stderr is no terminal.
    display: Any = {"disable": False} if progress else {"disable": None, "delay": 2.0}
    bar: Iterable[PlanRow] = tqdm(
        rows, desc="singular values", unit="weight", file=sys.stderr, leave=False, **display
    )
    return bar
