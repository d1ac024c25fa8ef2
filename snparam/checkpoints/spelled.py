"""Functions that the spellings share for writing a weight, or for refusing to."""

from __future__ import annotations

from torch import Tensor, nn

from snparam.constraints.constraint import CONSTRAINTS
from snparam.estimators.estimate import ESTIMATORS
from snparam.parametrization.extensions import Spelled
from snparam.parametrization.find import NormalisedWeight
from snparam.parametrization.options import Settings


def ordinary_entries(
    weight: NormalisedWeight, value: Tensor, buffers: dict[str, Tensor] | None = None
) -> Spelled:
    """Return a value as the entry of a weight under its own name, as if never parametrized.

    Args:
        weight: the weight.
        value: the tensor to write, of the weight's shape.
        buffers: further tensors to write among the owner's buffers, by local name.
    """
    name, buffers = weight.tensor_name, buffers or {}
    if isinstance(weight.original, nn.Parameter):
        return Spelled(parameters={name: value}, buffers=buffers)
    if "original" in weight.parametrization_list._non_persistent_buffers_set:
        return Spelled(buffers=buffers)
    return Spelled(buffers={name: value, **buffers})


def check_norm_is_one(weight: NormalisedWeight, spelling: str) -> None:
    """Refuse a weight that is not divided by one σ, and by that alone, as its constraint says.

    Args:
        weight: the weight.
        spelling: name of the spelling, for the error.

    Raises:
        ValueError: if the weight has several blocks, is read as a convolution, is divided by a
            bound, or has another constraint; the error says which.
    """
    settings, blocks = weight.norm.settings, weight.norm.view.matrices[0]
    target = f"spelling {spelling!r}"
    if not weight.norm.view.is_dense:
        size = weight.norm.view.input_size
        reason = f"norm='operator' divides it by the norm of its convolution at input_size={size}"
        raise inexpressible(weight, target, f"{reason}, not by that of a matrix")
    if blocks > 1:
        raise inexpressible(weight, target, f"it has blocks={blocks} with a σ each, not one")
    if ESTIMATORS[settings.sigma].side == "above":
        reason = f"sigma={settings.sigma!r} divides it by a certified bound, not by an estimate"
        raise inexpressible(weight, target, reason)
    constraint = settings.constraint_name
    options = settings.for_matrices(weight.norm.view.matrices)
    if not CONSTRAINTS[constraint].divides_by_sigma(options):
        default = Settings()
        given = ", ".join(
            f"{name}={getattr(settings, name)!r}"
            for name in ("constraint", "coeff", "soft", "gain", "clip", "stable_rank")
            if getattr(settings, name) != getattr(default, name)
        )
        raise inexpressible(weight, target, f"{given}: it makes another weight than W / σ")


def inexpressible(weight: NormalisedWeight, target: str, reason: str) -> ValueError:
    """Return the error for a weight that another implementation cannot express.

    Args:
        weight: the weight.
        target: the spelling or implementation that it was to be expressed in.
        reason: why it cannot be.
    """
    return ValueError(
        f"SpectralNorm on {weight} cannot be expressed as {target}: {reason}; use "
        "plain_state_dict(model), which has the normalised weights themselves."
    )
