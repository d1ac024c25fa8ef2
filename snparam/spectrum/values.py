"""The singular values that are tracked, or, of an ordinary network, computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from snparam.conversion.arguments import check_model
from snparam.conversion.plan import REFUSE, plan_conversion
from snparam.parametrization.find import normalised_weights


def singular_values(model: nn.Module) -> dict[str, Tensor]:
    """The tracked singular values of a network's weights, by qualified weight name.

    On a converted network: copies of the estimates that the last training forward left, each
    (b, k), largest first once converged, on the weight's device; nothing is computed and no device
    is waited for. They are estimates: the first is never above σ by more than rounding.

    On a network without SpectralNorm: the largest singular value of every weight that
    `convert_model` would convert, (b, 1), computed now. Nothing is registered or changed. A weight
    with NaN or inf gives NaN.

    Raises:
        TypeError: if it is no module.
    """
    check_model(model, "singular_values")
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
