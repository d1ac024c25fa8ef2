"""The singular values of a network's weights: tracked ones, or computed without SpectralNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from snparam.conversion.plan import REFUSE, plan_conversion
from snparam.parametrization.arguments import check_model
from snparam.parametrization.find import normalised_weights


def singular_values(model: nn.Module) -> dict[str, Tensor]:
    """Return the singular values of a network's weights, by qualified weight name.

    On a network with SpectralNorm, they are copies of the tracked estimates `sv` (b, k) of each
    original, as its state last stored them, largest first once converged, on the weight's device.
    Nothing is computed, and no device is waited for. The first value of a block is never above σ by
    more than rounding, but with `sigma="upper"`, where it is the bound that weights are divided by;
    with `init="random"`, all are 1 until the state first moves.

    On a network without SpectralNorm, they are the σ (b, 1) of every weight that `convert_model`
    would convert, computed now; NaN for a weight with NaN or inf. Nothing is registered or changed.

    Raises:
        TypeError: if `model` is no module.
    """
    check_model(model, "singular_values")
    tracked = {weight.name: weight.norm.sv.detach().clone() for weight in normalised_weights(model)}
    if tracked:
        return tracked
    computed = {}
    for row in plan_conversion(model, progress=False):
        if row.estimate is not None:
            computed[row.weight] = row.estimate[1]
        elif row.decision == REFUSE and row.matrices is not None:
            computed[row.weight] = torch.full((row.matrices[0], 1), torch.nan)
    return computed
