"""What spellings that write a weight have in common."""

from __future__ import annotations

from torch import Tensor, nn

from snparam.parametrization.extensions import Spelled
from snparam.parametrization.find import NormalisedWeight


def as_ordinary(
    weight: NormalisedWeight, value: Tensor, buffers: dict[str, Tensor] | None = None
) -> Spelled:
    """A value for a weight under its own name, where it was before it was parametrized.

    Args:
        weight: the weight.
        value: of its shape.
        buffers: what to write among the buffers of its owner beside it.
    """
    name, buffers = weight.tensor_name, buffers or {}
    if isinstance(weight.original, nn.Parameter):
        return Spelled(parameters={name: value}, buffers=buffers)
    if "original" in weight.list._non_persistent_buffers_set:
        return Spelled(buffers=buffers)
    return Spelled(buffers={name: value, **buffers})


def check_norm_is_one(weight: NormalisedWeight, spelling: str) -> None:
    """Refuse a weight that is not divided by one σ, and by that alone.

    Raises:
        ValueError: with what it is divided by.
    """
    settings, blocks = weight.norm.settings, weight.norm.view.matrices[0]
    what = f"spelling {spelling!r}"
    if blocks > 1:
        raise inexpressible(weight, what, f"it has blocks={blocks} with a σ each, not one")
    if settings.gain is not None:
        raise inexpressible(weight, what, f"gain={settings.gain!r} gives it another norm than 1")
    if settings.soft or settings.coeff != 1:
        given = f"coeff={settings.coeff:g}, soft={settings.soft}"
        raise inexpressible(weight, what, f"{given} gives it another norm than 1")


def inexpressible(weight: NormalisedWeight, what: str, why: str) -> ValueError:
    """The error for a weight that another implementation cannot express.

    Args:
        weight: the weight.
        what: what it was to be expressed as.
        why: what stands against it.
    """
    return ValueError(
        f"SpectralNorm on {weight} cannot be expressed as {what}: {why}; use "
        "plain_state_dict(model), which has the normalised weights themselves."
    )
