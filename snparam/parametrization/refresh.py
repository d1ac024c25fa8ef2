"""Refreshing: converging the states of a network anew."""

from __future__ import annotations

from torch import nn

from snparam.matrices.stacks import is_finite, stack_of
from snparam.parametrization.arguments import check_model
from snparam.parametrization.find import normalised_states


def refresh(model: nn.Module) -> None:
    """Converge every state of a network to the weights as they are now, as a conversion does.

    Training does not need it: a state follows its weight from one forward, or optimizer step, to
    the next. Call it once where the states lag behind and nothing will move them: after the last
    training step of a network whose norms `verify` finds too far from the intended ones, before it
    is saved, evaluated or restored; and after writes to weights that torch does not count (by
    `.data`, or from numpy). It costs as much as the conversion did. u and sv are written in place;
    the originals and the gains stay as they are, so that the network's function changes as far as
    its estimates were wrong. On sharded weights all ranks have to call it.

    Args:
        model: a network with SpectralNorm on some of its weights, in training or eval mode.

    Raises:
        ValueError: if the network has no weight under SpectralNorm, or if a weight has NaN or inf;
            no state has been changed then.
        TypeError: if `model` is no module.
    """
    check_model(model, "refresh")
    weights = normalised_states(model)
    if not weights:
        raise ValueError(
            f"refresh: {type(model).__name__} has no weight under SpectralNorm; convert_model first"
        )
    for weight in weights:
        if not is_finite(stack_of(weight.original.detach(), weight.norm.view)):
            raise ValueError(
                f"refresh: {weight} has NaN or inf; repair or re-initialise it first, by "
                "layer.weight = tensor"
            )
    for weight in weights:
        weight.norm.refresh(weight.original)
