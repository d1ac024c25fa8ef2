"""The exact norms of the weights in use, beside the norms that their constraints promise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snparam.conversion.tables import aligned_table
from snparam.estimators import convergence
from snparam.estimators.estimate import ESTIMATORS
from snparam.matrices.products import Stack
from snparam.matrices.stacks import is_finite, stack_of
from snparam.parametrization.arguments import check_model
from snparam.parametrization.attachment import read_as_eval
from snparam.parametrization.find import normalised_weights, qualified_name


@dataclass(frozen=True)
class VerificationRow:
    """The check of one weight: the numbers of its block with the largest drift.

    Attributes:
        name: qualified name of the module that has the weight.
        tensor: name of the tensor in the module; the property `weight` joins both names.
        shape: shape of the weight.
        matrices: shape (b, m, n) of the stack that the weight is read as; of the convolution
            itself, entries of an output and of an input.
        block: which of the b blocks the numbers are of, counted from 0.
        estimate: σ̂ of the original, as eval mode estimates it; 0 for a zero matrix, and not finite
            for one with NaN or inf, both of which are left undivided.
        exact: σ of the weight that eval mode uses, in float64.
        intended: the norm that the constraint promises for the weight in use: 1, c, min(σ, c) or
            |γ|; 0 for a zero matrix, which stays zero.
        method: how `exact` was found: by `"decomposition"`, or, for the convolution on large inputs
            and for sharded weights, by a long `"Lanczos"`, which approaches it from below.
        drift: |exact / intended − 1|; 0 where both are equal, inf where it is NaN. With an
            estimator that gives an upper bound, `sigma="upper"`, only what exceeds the promise
            counts: max(0, exact / intended − 1).
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    matrices: tuple[int, int, int]
    block: int
    estimate: float
    exact: float
    intended: float
    drift: float
    method: str = "decomposition"

    @property
    def weight(self) -> str:
        """Qualified name of the weight."""
        return qualified_name(self.name, self.tensor)


class Verification(list[VerificationRow]):
    """The checks of a network's normalised weights, one row per weight; `print` shows a table."""

    @property
    def worst(self) -> float:
        """The largest drift."""
        return max(row.drift for row in self)

    def __str__(self) -> str:
        """Return an aligned table, which says of several blocks the one with the largest drift."""
        header = ["weight", "shape", "estimated σ", "σ in use", "intended", "drift"]
        rows = [
            [
                row.weight,
                " x ".join(map(str, row.shape)),
                f"{row.estimate:.6g}",
                f"{row.exact:.6g}",
                f"{row.intended:.6g}",
                f"{row.drift:.1e}",
            ]
            for row in self
        ]
        if any(row.matrices[0] > 1 for row in self):
            header.insert(2, "worst block")
            for cells, row in zip(rows, self, strict=True):
                blocks = row.matrices[0]
                cells.insert(2, f"{row.block} of 0 to {blocks - 1}" if blocks > 1 else "")
        if any(row.method != "decomposition" for row in self):
            header.append("σ in use by")
            for cells, row in zip(rows, self, strict=True):
                cells.append(row.method)
        return aligned_table(header, rows)

    __repr__ = __str__


@torch.no_grad()
def verify(model: nn.Module, tolerance: float | None = None) -> Verification:
    """Measure how far the norm of each weight in use is from the norm that its constraint promises.

    The promised norm is 1 by default, and c, min(σ, c) or |γ| with `coeff`, `soft` or `gain`. The
    weight in use is the one that eval mode uses, whatever mode the model is in; its norm is
    computed in float64, by a full decomposition, or, where that would be too large, by a long
    Lanczos (a row says which). Of a convolution with `norm="operator"` it is the norm of the
    convolution itself, at the recorded size of its inputs. No state moves. Where a trained network
    drifts, `refresh(model)` converges its estimates.

    Args:
        model: a network with SpectralNorm on some weights.
        tolerance: largest relative drift to accept; None (the default) accepts any.

    Returns:
        A list of rows, one per normalised weight.

    Raises:
        RuntimeError: if a drift exceeds the tolerance, with the rows of those weights. The drift of
            a weight with NaN is inf.
        ValueError: if the model has no weight under SpectralNorm.
        TypeError: if `model` is no module.
    """
    check_model(model, "verify")
    rows = Verification()
    for weight in normalised_weights(model):
        norm = weight.norm
        in_use = stack_of(read_as_eval(weight.owner, weight.tensor_name), norm.view, torch.float64)
        original = stack_of(weight.original, norm.view, torch.float64)
        exact = _sigma_or_nan(in_use)
        intended = norm.promised_norm(_sigma_or_nan(original))
        estimate = norm.estimated_norm(weight.original)
        excess = exact / intended - 1
        is_bound = ESTIMATORS[norm.settings.sigma].side == "above"
        drift = excess.clamp_min(0.0) if is_bound else excess.abs()
        drift = torch.where(exact == intended, 0.0, drift)
        drift = torch.where(drift.isnan(), torch.inf, drift)
        block = int(drift.argmax())
        rows.append(
            VerificationRow(
                name=weight.module_name,
                tensor=weight.tensor_name,
                shape=norm.view.shape,
                matrices=norm.view.matrices,
                block=block,
                estimate=float(estimate[block]),
                exact=float(exact[block]),
                intended=float(intended[block]),
                drift=float(drift[block]),
                method=convergence.exact_method(in_use),
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
            "while it trains, more num_itrs or a smaller learning rate keeps the estimate closer; "
            f"once it is trained, refresh(model) converges it:\n{offending}"
        )


def _sigma_or_nan(stack: Tensor | Stack) -> Tensor:
    if is_finite(stack):
        return convergence.exact_sigma(stack)
    return torch.full((stack.shape[0],), torch.nan, dtype=torch.float64)
