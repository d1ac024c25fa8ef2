"""The error where a module with normalised weights would be pickled.

Its class is made at run time, and no other process could find it. torch refuses too, but its error
names `state_dict` alone as the way out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from snparam.parametrization.classes import unwrap, wrap
from snparam.parametrization.extensions import System, register_system
from snparam.parametrization.find import norms_of

_METHOD = "__getstate__"


def refuse_pickling(owner: nn.Module) -> None:
    """Let a module, whose class is its own, refuse pickling and say what to do instead."""
    wrap(type(owner), _METHOD, _refuse)


def allow_pickling(owner: nn.Module) -> None:
    """Undo `refuse_pickling`."""
    unwrap(type(owner), _METHOD, _refuse)


def _refuse(getstate: Callable[[nn.Module], Any], owner: nn.Module) -> Any:
    names = [name for name, _ in norms_of(owner)]
    if not names:
        return getstate(owner)
    kind, weights = type_before_parametrizations(owner).__name__, ", ".join(map(repr, names))
    raise RuntimeError(
        f"{kind} with SpectralNorm on {weights} cannot be pickled, by torch.save(model) or on "
        "the way to another process: save or send model.state_dict(), and load it there into "
        "a network that was built and converted by convert_model; or plain_state_dict(model), "
        "for an ordinary network, with the normalised weights; or call restore_model(model), "
        "and pickle the ordinary network that it leaves. copy.deepcopy(model) works."
    )


class _Pickling(System):
    def on_attach(self, owner: nn.Module) -> None:
        refuse_pickling(owner)

    def on_detach(self, owner: nn.Module) -> None:
        allow_pickling(owner)


register_system(_Pickling())
