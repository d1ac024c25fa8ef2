"""Telling states with `update="step"` that an optimizer is about to change their weight.

A hook on all optimizers, because neither a forward nor the weight shows at no cost that the weight
has changed: fused optimizers leave its version counter alone, and comparing values would wait for
the device.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol
from weakref import WeakSet

from torch.optim.optimizer import register_optimizer_step_pre_hook

from .views import View


class Watched(Protocol):
    """A state that belongs to one weight.

    Attributes:
        weight_id: identity of the Parameter, once known.
        name: what to call the weight in warnings.
        view: how it is read.
        warned: whether a missing update has been reported.
    """

    weight_id: int | None
    name: str
    view: View
    warned: bool

    def expect_update(self) -> None:
        """Note that an optimizer is about to change the weight."""


_watched: WeakSet[Watched] = WeakSet()
_handles: list[object] = []


def watch(state: Watched) -> None:
    """Let a state know before each optimizer step that concerns its weight."""
    _watched.add(state)
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: Any, _args: Any, _kwargs: Any) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for state in list(_watched):
        if state.weight_id in stepped:
            state.expect_update()


def warn_behind(state: Watched) -> None:
    """Warn, once for each state, that the weight has changed and nobody has updated the state."""
    if not state.warned:
        state.warned = True
        warnings.warn(
            f"SpectralNorm on {state.name} {state.view.shape}: the weight has changed since its "
            "singular values were last updated, and update='step' leaves that to you; call "
            "update_after_step(optimizer, model) once, or update(model) after each step.",
            UserWarning,
            stacklevel=2,
        )
