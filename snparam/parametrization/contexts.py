"""Stretches in which forwards move no state, or compute each weight once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from snparam.parametrization.find import normalised_states
from snparam.parametrization.spectral_norm import SpectralNorm


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within it, no forward of the model moves a state of the power iteration.

    Training forwards then use the weights that eval forwards use (with `update="step"`, where
    optimizers move the state: those of the last update, which eval forwards take one step from).
    For evaluation in training mode, probes, reading `layer.weight` to log it, and the second
    network of a gradient penalty. May be nested.

    Raises:
        ValueError: if the model has no weight under SpectralNorm.
    """
    norms = _norms(model, "frozen")
    for norm in norms:
        norm.freeze(True)
    try:
        yield
    finally:
        for norm in norms:
            norm.freeze(False)


@contextmanager
def cached(model: nn.Module) -> Iterator[None]:
    """Within it, each normalised weight is computed once, at its first read, and then reused.

    For inference over many batches, in any number of threads. A weight changed inside goes
    unnoticed. In training mode the state moves at most once, and all forwards share one graph, so
    that they need one common backward. May be nested.

    Raises:
        ValueError: if the model has no weight under SpectralNorm.
    """
    norms = _norms(model, "cached")
    for norm in norms:
        norm.share(True)
    try:
        yield
    finally:
        for norm in norms:
            norm.share(False)


def _norms(model: nn.Module, what: str) -> list[SpectralNorm]:
    norms = [found.norm for found in normalised_states(model)]
    if not norms:
        raise ValueError(
            f"{what}: {type(model).__name__} has no weight under SpectralNorm; convert_model first"
        )
    return norms
