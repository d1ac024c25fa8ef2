"""The conversion of a whole model, as its plan says."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from torch import nn
from typing_extensions import Unpack

from snparam.conversion.arguments import documents_arguments
from snparam.conversion.plan import REFUSE, ConversionPlan, plan_conversion
from snparam.conversion.selection import Filter, Selectors
from snparam.conversion.takeover import remove_torch_norm
from snparam.parametrization.arguments import check_model
from snparam.parametrization.attachment import attach
from snparam.parametrization.extensions import SYSTEMS
from snparam.parametrization.options import Options, documents_options
from snparam.parametrization.spectral_norm import SpectralNorm
from snparam.parametrization.undoing import all_or_nothing

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


@documents_options
@documents_arguments
def convert_model(
    model: _ModuleT,
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
) -> _ModuleT:
    """Hold the spectral norm of every eligible weight of a network at 1, in place.

    The conversion does exactly what `plan_conversion` with the same arguments shows; `register_sn`
    says what happens to one weight. The Parameters stay the same objects, so that an optimizer made
    before still trains them. Converting again with the same options changes nothing. Weights that
    modules share stay shared, with one state. Dividing by σ changes the function that the network
    computes.

    Where a weight has fewer than `num_svs` singular values, all of them are tracked, and the plan
    says so: the number is given for layers of all sizes. (`register_sn`, where it is given for one
    layer, raises.)

    Initialise a network before its conversion. Afterwards `layer.weight` is computed at each read,
    so that what `nn.init` or `.data` write to it in place is lost; `layer.weight = tensor` and
    `layer.reset_parameters()` reach the original.

    Args:
        model: the network, changed in place.
        {arguments}
        {options}

    Returns:
        The model.

    Warns:
        UserWarning: if nothing was converted, with the reasons or the module types; or if more than
            half of the entries of all parameters of two or more dimensions belong to layers that
            the layer table does not know, with the calls that would add those.

    Raises:
        ValueError: if a pattern or type matches nothing, a preset is unknown or recognises no head
            to leave alone, an option is out of range, a weight to be converted has NaN or inf, a
            selected weight is normalised already with other options (`restore_model` first, or
            exclude it), or a wrapper such as FSDP or DistributedDataParallel would have to come
            after the conversion; with `norm="operator"`, also if `example_inputs` is missing or
            does not reach a selected convolution. The model is then as it was.
        TypeError: for an unknown option, a selector or option of a wrong type, or a `model` that is
            no module.
        ImportError: if `progress=True` and tqdm is not installed.
    """
    check_model(model, "convert_model")
    plan = plan_conversion(
        model,
        num_svs,
        num_itrs,
        include=include,
        exclude=exclude,
        filter_fn=filter_fn,
        preset=preset,
        example_inputs=example_inputs,
        replace=replace,
        progress=progress,
        **options,
    )
    refused = [row for row in plan if row.decision == REFUSE]
    if refused:
        raise ValueError("\n".join(row.reason for row in refused))
    if not plan.to_convert and not any(row.is_normalised for row in plan):
        warnings.warn(_nothing_converted(model, plan), UserWarning, stacklevel=2)
    elif plan.to_convert and plan.unknown_share > 0.5:
        warnings.warn(_mostly_unknown(model, plan), UserWarning, stacklevel=2)
    with all_or_nothing(model.modules()):
        _carry_out(plan)
        for system in SYSTEMS:
            system.on_model(model)
    return model


def _carry_out(plan: ConversionPlan) -> None:
    norms: dict[int, SpectralNorm] = {}
    for row in plan.to_convert:
        if row.record.key not in norms:
            norms[row.record.key] = row.shares or row.record.new_norm(row.estimate)
    for row in plan.to_convert:
        if row.record.spectral is not None:
            remove_torch_norm(row.record.spectral)
    for row in plan.to_convert:
        weight = row.record
        attach(weight.owner, weight.tensor_name, norms[weight.key])


def _nothing_converted(model: nn.Module, plan: ConversionPlan) -> str:
    if plan:
        reasons = sorted({f"{row.weight}: {row.reason}" for row in plan})
        explanation = "; ".join(reasons[:5]) + ("; ..." if len(reasons) > 5 else "")
    else:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        explanation = "no parameter of two or more dimensions in " + ", ".join(kinds[:8])
        if next(model.parameters(), None) is not None:
            explanation += (
                "; if a wrapper has flattened or partitioned them, convert first, then wrap"
            )
    message = f"convert_model converted nothing in {type(model).__name__} ({explanation})"
    return f"{message}; {_registration_advice(plan)}" if plan.registrations else message


def _mostly_unknown(model: nn.Module, plan: ConversionPlan) -> str:
    return (
        f"convert_model left {plan.unknown_share:.1%} of the parameters of two or more dimensions "
        f"of {type(model).__name__} alone, because their layers are not in the layer table; "
        + _registration_advice(plan)
    )


def _registration_advice(plan: ConversionPlan) -> str:
    calls = plan.registrations
    if not calls:
        return "leave them out by exclude=, or add each one by register_sn(module, name=...)"
    shown = "\n  ".join(calls[:5]) + ("\n  ..." if len(calls) > 5 else "")
    return (
        "before the conversion, add the types that multiply by their weights (with 'columns' where "
        f"one is stored input-first), or leave them out by exclude=:\n  {shown}"
    )
