"""Looking at singular values: the tracked estimates, and how far they are from the exact ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snparam.conversion.convert import plan_conversion
from snparam.conversion.plan import REFUSE
from snparam.conversion.tables import aligned
from snparam.estimators import convergence
from snparam.matrices.sharded import ShardedStack, gathered
from snparam.matrices.stacks import is_finite, stack_of
from snparam.parametrization.attachment import read_as_eval
from snparam.parametrization.find import normalised_weights


def singular_values(model: nn.Module) -> dict[str, Tensor]:
    """The tracked singular values of a network's weights, by qualified weight name.

    On a converted network: copies of the estimates that the last training forward left, each
    (b, k), largest first once converged, on the weight's device; nothing is computed and no device
    is waited for. They are estimates: the first is never above σ by more than rounding.

    On a network without SpectralNorm: the largest singular value of every weight that
    `convert_model` would convert, (b, 1), computed now. Nothing is registered or changed. A weight
    with NaN or inf gives NaN.
    """
    tracked = {found.name: found.norm.sv.detach().clone() for found in normalised_weights(model)}
    if tracked:
        return tracked
    computed = {}
    for row in plan_conversion(model, progress=False):
        if row.estimate is not None:
            computed[row.weight] = row.estimate[1]
        elif row.decision == REFUSE and row.matrices is not None:
            computed[row.weight] = torch.full((row.matrices[0], 1), torch.nan)
    return computed


@dataclass(frozen=True)
class VerificationRow:
    """The check of one weight; of several blocks, the one that drifts most.

    Attributes:
        name: qualified weight name.
        shape: shape of the weight.
        matrices: (b, m, n), how it is read.
        estimate: σ̂ of the original, as eval mode estimates it.
        exact: σ, in float64, of the weight that eval mode uses.
        intended: what it is to be: 1 or, by the constraint, c, min(σ, c) or |γ|; 0 for a zero
            matrix, which stays zero.
        drift: |exact / intended − 1|.
    """

    name: str
    shape: tuple[int, ...]
    matrices: tuple[int, int, int]
    estimate: float
    exact: float
    intended: float
    drift: float


class Verification(list[VerificationRow]):
    """One row per weight; `print` shows an aligned table."""

    @property
    def worst(self) -> float:
        """The largest drift."""
        return max(row.drift for row in self)

    def __str__(self) -> str:
        """An aligned table."""
        rows = [
            [
                row.name,
                " x ".join(map(str, row.shape)),
                f"{row.estimate:.6g}",
                f"{row.exact:.6f}",
                f"{row.intended:g}",
                f"{row.drift:.1e}",
            ]
            for row in self
        ]
        return aligned(["weight", "shape", "estimated σ", "σ in use", "intended", "drift"], rows)

    __repr__ = __str__


@torch.no_grad()
def verify(model: nn.Module, tolerance: float | None = None) -> Verification:
    """Measure, per weight, how far the norm of the weight in use is from what it is to be.

    That is 1; with other constraints c, min(σ, c) or |γ|.

    The weight in use is the one that eval mode uses, whatever mode the model is in; its norm is
    computed exactly (a full decomposition in float64). No state moves.

    Args:
        model: a network with SpectralNorm on some weights.
        tolerance: largest relative drift to accept; None (the default) accepts any.

    Raises:
        RuntimeError: with the rows at fault, if a drift exceeds the tolerance or is NaN.
        ValueError: if the model has no weight under SpectralNorm.
    """
    rows = Verification()
    for found in normalised_weights(model):
        norm = found.norm
        used = stack_of(read_as_eval(found.owner, found.tensor_name), norm.view, torch.float64)
        original = stack_of(found.original, norm.view, torch.float64)
        exact = _sigma_or_nan(used)
        gain = None if norm.settings.gain is None else gathered(norm.gain)
        intended = norm.constraint.norm_of(_sigma_or_nan(original), gain)
        estimate = norm.estimate(found.original)
        drift = torch.where(exact == intended, 0.0, (exact / intended - 1).abs())
        drift = torch.where(drift.isnan(), torch.inf, drift)
        at = int(drift.argmax())
        rows.append(
            VerificationRow(
                name=found.name,
                shape=norm.view.shape,
                matrices=norm.view.matrices,
                estimate=float(estimate[at]),
                exact=float(exact[at]),
                intended=float(intended[at]),
                drift=float(drift[at]),
            )
        )
    if not rows:
        raise ValueError(
            f"verify: {type(model).__name__} has no weight under SpectralNorm; convert_model first"
        )
    if tolerance is not None:
        _check_drift(rows, tolerance)
    return rows


def _check_drift(rows: Verification, tolerance: float) -> None:
    offending = Verification(row for row in rows if not row.drift <= tolerance)
    if offending:
        raise RuntimeError(
            f"{len(offending)} of {len(rows)} weights drift by more than {tolerance:g}; "
            f"more num_itrs, or a smaller learning rate, keeps the estimate closer:\n{offending}"
        )


def _sigma_or_nan(stack: Tensor | ShardedStack) -> Tensor:
    if is_finite(stack):
        return convergence.exact_sigma(stack)
    return torch.full((stack.shape[0],), torch.nan, dtype=torch.float64)
