"""Converging the states of a network anew."""

from __future__ import annotations

from torch import nn

from snparam.matrices.stacks import is_finite, stack_of
from snparam.parametrization.find import normalised_states


def refresh(model: nn.Module) -> None:
    """Converge every state of a network to the weights as they are now, as a conversion does.

    Training does not need it: a state follows its weight from one forward, or optimizer step, to
    the next. Call it once where the state is behind and nothing will move it on: after the last
    training step of a network that `verify` finds too far from what is intended, before it is
    saved, evaluated or restored; and after weights were written to in a way that nobody sees (by
    `.data`, or from numpy). It costs as much as the conversion did. u and sv are written in place;
    the originals, and gains, stay what they are, so that the network computes another function to
    the extent that its estimates were wrong. On sharded weights all ranks have to call it.

    Args:
        model: a network with SpectralNorm on some weights, in either mode.

    Raises:
        ValueError: if it has none, or a weight has NaN or inf; nothing has been changed.
    """
    found = normalised_states(model)
    if not found:
        raise ValueError(
            f"refresh: {type(model).__name__} has no weight under SpectralNorm; convert_model first"
        )
    for weight in found:
        if not is_finite(stack_of(weight.original.detach(), weight.norm.view)):
            raise ValueError(
                f"refresh: {weight} has NaN or inf; repair or re-initialise it first, by "
                "layer.weight = tensor"
            )
    for weight in found:
        weight.norm.refresh(weight.original)
