"""Telling states with `update="step"` that an optimizer is about to change their weight.

A hook on all optimizers, because neither a forward nor the weight shows at no cost that the weight
has changed: fused optimizers leave its version counter alone, and comparing values would wait for
the device.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

from torch.optim.optimizer import register_optimizer_step_pre_hook

from .memory import Passes


class Watch:
    """Whether the weight of one state has changed since the state was last updated.

    Attributes:
        weight_id: identity of the Parameter, once known.
        behind: whether an optimizer has changed it.
    """

    __slots__ = ("__weakref__", "_passes", "_warned", "_what", "behind", "weight_id")

    def __init__(self, what: str, passes: Passes) -> None:
        """Watch nothing yet.

        Args:
            what: name and shape of the weight, for the warning.
            passes: what is to end before the weight changes.
        """
        self._what, self._passes = what, passes
        self.weight_id: int | None = None
        self.behind = self._warned = False

    def begin(self) -> None:
        """Be told before each optimizer step that concerns the weight."""
        _watching.add(self)
        if not _handles:
            _handles.append(register_optimizer_step_pre_hook(_before_step))

    def expect_update(self) -> None:
        """Note that an optimizer is about to change the weight."""
        if self.behind:  # since the step before: nobody updates
            self.warn()
        self._passes.end()
        self.behind = True

    def warn(self) -> None:
        """Warn, once, that the weight has changed and nobody has updated the state."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"SpectralNorm on {self._what}: the weight has changed since its singular values "
                "were last updated, and update='step' leaves that to you; call "
                "update_after_step(optimizer, model) once, or update(model) after each step.",
                UserWarning,
                stacklevel=2,
            )


_watching: WeakSet[Watch] = WeakSet()
_handles: list[object] = []


def _before_step(optimizer: Any, _args: Any, _kwargs: Any) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for watch in list(_watching):
        if watch.weight_id in stepped:
            watch.expect_update()
