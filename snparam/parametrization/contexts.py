"""Context managers in which forwards move no state, or compute each weight once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from snparam.parametrization.arguments import check_model
from snparam.parametrization.find import normalised_states
from snparam.parametrization.spectral_norm import SpectralNorm


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keep all forwards of a model from moving its states while the context is open.

    Training forwards then use the weights that eval forwards use. With `update="step"`, once
    optimizers move the states, training forwards use the weights of the last update, and eval
    forwards take one step from there.

    Use it for evaluation in training mode, probes, reading `layer.weight` to log it, and the second
    network of a gradient penalty. Contexts may be nested.

    Args:
        model: a network with SpectralNorm on some of its weights.

    Raises:
        ValueError: if the model has no weight under SpectralNorm.
        TypeError: if `model` is no module.
    """
    norms = _states_in(model, "frozen")
    for norm in norms:
        norm.enter_frozen()
    try:
        yield
    finally:
        for norm in norms:
            norm.leave_frozen()


@contextmanager
def cached(model: nn.Module) -> Iterator[None]:
    """Compute each normalised weight once, at its first read in the context, and then reuse it.

    Use it for inference over many batches, in any number of threads. A weight that is changed in
    the context is not computed again. In training mode the state moves at most once, and all
    forwards share one graph, so that they need one common backward. Contexts may be nested.

    Args:
        model: a network with SpectralNorm on some of its weights.

    Raises:
        ValueError: if the model has no weight under SpectralNorm.
        TypeError: if `model` is no module.
    """
    norms = _states_in(model, "cached")
    for norm in norms:
        norm.enter_cached()
    try:
        yield
    finally:
        for norm in norms:
            norm.leave_cached()


def _states_in(model: nn.Module, function: str) -> list[SpectralNorm]:
    """Return the states of a model, or raise the error of a function that needs at least one."""
    check_model(model, function)
    norms = [weight.norm for weight in normalised_states(model)]
    if not norms:
        raise ValueError(
            f"{function}: {type(model).__name__} has no weight under SpectralNorm; "
            "convert_model first"
        )
    return norms
