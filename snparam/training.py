"""When the state moves: `frozen`, `cached`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .parametrization import SpectralNorm
from .spectrum import norms_in


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within it, no forward of the model moves a state of the power iteration.

    Training forwards then use the weights that eval forwards use. For evaluation in training mode,
    probes, and the second network of a gradient penalty. May be nested.

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
    norms = list({id(norm): norm for _, norm in norms_in(model)}.values())
    if not norms:
        raise ValueError(
            f"{what}: {type(model).__name__} has no weight under SpectralNorm; convert_model first"
        )
    return norms
