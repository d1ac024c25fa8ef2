"""A whole model: the plan of a conversion, the conversion, and the way back."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import Unpack

from snparam.conversion.candidates import FULLY_SHARDED, Candidate
from snparam.conversion.plan import (
    ALREADY,
    CONVERT,
    REFUSE,
    SKIP,
    ConversionPlan,
    PlanRow,
    Site,
    carried_norms,
    sites_of,
)
from snparam.conversion.register import attach_all
from snparam.conversion.selection import Filter, Selection, Selectors
from snparam.conversion.takeover import take_off
from snparam.matrices.sharded import is_fully_sharded
from snparam.parametrization.extensions import SYSTEMS
from snparam.parametrization.find import norm_on
from snparam.parametrization.options import Options, documents_options, settings_from
from snparam.parametrization.scopes import open_scopes
from snparam.parametrization.spectral_norm import SpectralNorm
from snparam.parametrization.undoing import all_or_nothing

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


@documents_options
def plan_conversion(
    model: nn.Module,
    num_svs: int = 1,
    num_itrs: int = 1,
    *,
    include: Selectors = None,
    exclude: Selectors = None,
    filter_fn: Filter | None = None,
    preset: str | None = None,
    replace: bool = True,
    progress: bool | None = None,
    **options: Unpack[Options],
) -> ConversionPlan:
    """What `convert_model` would do with the same arguments; nothing is changed.

    Every parameter of two or more dimensions is in the plan, converted or skipped with a reason.

    Args:
        model: the network.
        include: module types and name patterns, one or several; only weights inside what they pick
            are converted. Patterns are matched by whole path segments from the root: `layers.1` is
            not `layers.10`, `*` is anything within a segment, `**` any number of segments. None
            (the default) includes everything.
        exclude: the same, for what is left alone; it wins over `include`.
        filter_fn: `filter_fn(module, qualified_name) -> bool`, True means convert.
        preset: the name of a choice of what is left alone, see docs/presets.md:
            "gan-discriminator", "gan-generator", "keep-head", "attention", "sigma-reparam" or
            "sngp". `include`, `exclude` and `filter_fn` leave out more. None (the default) leaves
            out nothing.
        replace: whether to take over weights that are under torch's own spectral norm
            (`parametrizations.spectral_norm` or the deprecated hook), with the same Parameter and
            its u, instead of skipping them. Default True. Weights that are parametrized otherwise
            are always skipped.
        progress: a progress bar on stderr (tqdm, extra `progress`): None (the default) shows it on
            a terminal once the work has taken two seconds, True always, False never.
    {options}

    Returns:
        The plan, a list of rows; `print(plan)` shows it as a table.

    Raises:
        ValueError: if a pattern or type matches nothing, a preset is unknown or finds nothing to
            leave alone, or an option is out of range.
        TypeError: for an unknown option or a selector of a wrong type.
        ImportError: if `progress=True` and tqdm is not installed.
    """
    settings = settings_from(num_svs, num_itrs, options)
    selection = Selection.of(include, exclude, filter_fn, model, preset)
    sites = list(sites_of(model, settings, replace))
    together: dict[int, list[Site]] = {}
    for site in sites:
        together.setdefault(site.key, []).append(site)
    carried = carried_norms(model)
    rows = [_decide(s, selection, together[s.key], carried.get(s.key)) for s in sites]
    estimates: dict[int, tuple[Tensor, Tensor] | ValueError] = {}
    plan = ConversionPlan()
    for row in _with_progress(rows, progress):
        plan.append(_estimated(row, estimates) if row.decision == CONVERT else row)
    return plan


@documents_options
def convert_model(
    model: _ModuleT,
    num_svs: int = 1,
    num_itrs: int = 1,
    *,
    include: Selectors = None,
    exclude: Selectors = None,
    filter_fn: Filter | None = None,
    preset: str | None = None,
    replace: bool = True,
    progress: bool | None = None,
    **options: Unpack[Options],
) -> _ModuleT:
    """Hold the spectral norm of every eligible weight of a network at 1, in place.

    Carries out exactly what `plan_conversion` with the same arguments shows; see `register_sn` for
    what happens to one weight. The Parameters stay the same objects, so that an optimizer made
    before still trains them. Converting again changes nothing. Weights that modules share stay
    shared, with one state. Dividing by σ changes the function that the network computes.

    Args:
        model: the network, changed in place.
        include: module types and name patterns, one or several; only weights inside what they pick
            are converted. Patterns are matched by whole path segments from the root: `layers.1` is
            not `layers.10`, `*` is anything within a segment, `**` any number of segments. None
            (the default) includes everything.
        exclude: the same, for what is left alone; it wins over `include`.
        filter_fn: `filter_fn(module, qualified_name) -> bool`, True means convert.
        preset: the name of a choice of what is left alone, see docs/presets.md:
            "gan-discriminator", "gan-generator", "keep-head", "attention", "sigma-reparam" or
            "sngp". `include`, `exclude` and `filter_fn` leave out more. None (the default) leaves
            out nothing.
        replace: whether to take over weights that are under torch's own spectral norm
            (`parametrizations.spectral_norm` or the deprecated hook), with the same Parameter and
            its u, instead of skipping them. Default True. Weights that are parametrized otherwise
            are always skipped.
        progress: a progress bar on stderr (tqdm, extra `progress`): None (the default) shows it on
            a terminal once the work has taken two seconds, True always, False never.
    {options}

    Returns:
        The model.

    Warns:
        UserWarning: if nothing was converted, with the module types seen.

    Raises:
        ValueError: if a pattern or type matches nothing, a preset is unknown or finds nothing to
            leave alone, an option is out of range, or a weight to be converted has NaN or inf; the
            model is then as it was.
        TypeError: for an unknown option or a selector of a wrong type.
        ImportError: if `progress=True` and tqdm is not installed.
    """
    plan = plan_conversion(
        model,
        num_svs,
        num_itrs,
        include=include,
        exclude=exclude,
        filter_fn=filter_fn,
        preset=preset,
        replace=replace,
        progress=progress,
        **options,
    )
    refused = [row for row in plan if row.decision == REFUSE]
    if refused:
        raise ValueError("\n".join(row.reason for row in refused))
    if not plan.to_convert and not any(row.reason == ALREADY for row in plan):
        warnings.warn(_nothing_converted(model, plan), UserWarning, stacklevel=2)
    with all_or_nothing(model.modules()):
        _carry_out(plan)
        open_scopes(model)
        for system in SYSTEMS:
            system.on_model(model)
    return model


# Deciding


def _decide(
    site: Site, selection: Selection, sharers: Sequence[Site], carried: SpectralNorm | None
) -> PlanRow:
    """The row of a site, before its values are looked at."""
    candidate = site.candidate
    row = PlanRow(
        name=site.name,
        tensor=site.tensor,
        layer_type=parametrize.type_before_parametrizations(site.owner).__name__,
        shape=site.shape,
        matrices=candidate.view.matrices if candidate and candidate.view else None,
        sigma=None,
        decision=SKIP,
        reason=site.reason,
        site=site,
        shares=carried,
    )
    if candidate is None:
        return row
    norm = norm_on(site.owner, site.tensor)
    if norm is not None:
        return replace(row, matrices=norm.view.matrices, reason=ALREADY)
    against = selection.reason_against(site.path, site.owner, site.name, site.tensor)
    if against is not None:
        return replace(row, reason=against)
    unfit = candidate.problem
    if unfit is None and is_fully_sharded(candidate.tensor, (module for _, module in site.path)):
        unfit = FULLY_SHARDED
    if unfit is FULLY_SHARDED:  # not left out silently: the order of calls is wrong
        return replace(row, decision=REFUSE, reason=candidate.message(unfit))
    if unfit is not None:
        return replace(row, reason=unfit.what)
    obstacle, note = _sharing(site, sharers, selection)
    if obstacle:
        return replace(row, reason=obstacle)
    if candidate.settings.num_svs > candidate.available:
        note = [f"tracks {candidate.available} singular values, all it has", *note]
    if candidate.spectral is not None:
        note = ["takes over torch's spectral norm", *note]
    return replace(row, decision=CONVERT, reason="; ".join(note))


def _sharing(site: Site, sharers: Sequence[Site], selection: Selection) -> tuple[str, list[str]]:
    """What sharing its Parameter means for a site: why not to convert it, or notes."""
    assert site.candidate is not None
    note, together = [], []
    for other in sharers:
        if other is site:
            continue
        norm = norm_on(other.owner, other.tensor)
        view = norm.view if norm is not None else other.candidate and other.candidate.view
        if other.candidate is None or view is None:
            return f"shared with {other.weight_name}, which is not normalised: {_why(other)}", []
        if view != site.candidate.view:
            return f"shared with {other.weight_name}, which reads it as other matrices", []
        against = selection.reason_against(other.path, other.owner, other.name, other.tensor)
        if norm is None and against is not None:
            note.append(f"shares its parameter with {other.weight_name}, left alone ({against})")
        else:
            together.append(other.weight_name)
    if together:
        note.append(f"shares its state with {', '.join(together)}")
    return "", note


def _why(site: Site) -> str:
    if site.candidate is not None and site.candidate.problem is not None:
        return site.candidate.problem.what
    return site.reason


def _estimated(row: PlanRow, known: dict[int, tuple[Tensor, Tensor] | ValueError]) -> PlanRow:
    """A row to convert, with σ and the estimate that the conversion will use."""
    site = row.site
    assert site.candidate is not None
    if row.shares is not None:
        return replace(row, sigma=float(row.shares.sv[:, 0].max()))
    if site.key not in known:
        try:
            known[site.key] = site.candidate.estimate()
        except ValueError as error:
            known[site.key] = error
    estimate = known[site.key]
    if isinstance(estimate, ValueError):
        return replace(row, decision=REFUSE, reason=str(estimate))
    return replace(row, sigma=float(estimate[1][:, 0].max()), estimate=estimate)


def _with_progress(rows: Sequence[PlanRow], progress: bool | None) -> Iterable[PlanRow]:
    if progress is False:
        return rows
    try:
        from tqdm import tqdm
    except ImportError:
        if progress:
            raise ImportError("progress=True needs tqdm: pip install 'snparam[progress]'") from None
        return rows
    # disable=None: only where stderr is a terminal.
    shown: Any = {"disable": False} if progress else {"disable": None, "delay": 2.0}
    bar: Iterable[PlanRow] = tqdm(
        rows, desc="singular values", unit="weight", file=sys.stderr, leave=False, **shown
    )
    return bar


# Doing


def _carry_out(plan: ConversionPlan) -> None:
    rows = plan.to_convert
    norms: dict[int, SpectralNorm] = {}
    pairs: list[tuple[Candidate, SpectralNorm]] = []
    for row in rows:
        candidate = row.site.candidate
        assert candidate is not None
        key = row.site.key
        if key not in norms:
            norms[key] = row.shares or candidate.make(row.estimate)
        pairs.append((candidate, norms[key]))
    for candidate, _ in pairs:
        if candidate.spectral is not None:
            take_off(candidate.spectral)
    attach_all(pairs)


def _nothing_converted(model: nn.Module, plan: ConversionPlan) -> str:
    if plan:
        reasons = sorted({f"{row.weight}: {row.reason}" for row in plan})
        seen = "; ".join(reasons[:5]) + ("; ..." if len(reasons) > 5 else "")
    else:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        seen = "no parameter of two or more dimensions in " + ", ".join(kinds[:8])
    return f"convert_model converted nothing in {type(model).__name__} ({seen})"
