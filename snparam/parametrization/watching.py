"""Telling states with `update="step"` that their weight has changed.

Hooks on all optimizers, because fused ones leave a weight's version counter alone, and comparing
values would wait for the device; and the counter, for those who change a weight without one.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from snparam.constraints.memory import Passes
from snparam.constraints.written import version_of

# No tensor's version.
_UNKNOWN = -1


class Watch:
    """Whether the weight of one state has changed since the state was last updated.

    Attributes:
        weight_id: identity of the Parameter, once known.
        behind: whether a step of an optimizer has changed it.
    """

    __slots__ = (
        "__weakref__",
        "_is_stepping",
        "_passes",
        "_version",
        "_warned",
        "_what",
        "behind",
        "weight_id",
    )

    def __init__(self, what: str, passes: Passes) -> None:
        """Watch nothing yet.

        Args:
            what: name and shape of the weight, for the warning.
            passes: what is to end before the weight changes.
        """
        self._what, self._passes = what, passes
        self.weight_id: int | None = None
        self._version: int | None = _UNKNOWN
        self.behind = self._is_stepping = self._warned = False

    def begin(self) -> None:
        """Be told of each optimizer step that concerns the weight."""
        _watching.add(self)
        if not _handles:
            _handles.append(register_optimizer_step_pre_hook(_before_step))
            _handles.append(register_optimizer_step_post_hook(_after_step))

    def know(self, weight: Tensor) -> None:
        """Note the weight that the state has just been made, or updated, for."""
        self.forget()
        self.accept(weight)
        self.behind = self._is_stepping = False

    def accept(self, weight: Tensor) -> None:
        """Note a weight that was replaced, or written to together with its state."""
        if isinstance(weight, nn.Parameter):
            self.weight_id, self._version = id(weight), version_of(weight)

    def forget(self) -> None:
        """Expect the weight to be replaced."""
        self._version = _UNKNOWN

    def check(self, weight: Tensor) -> None:
        """Warn if a training forward's weight is not as it was when the state was updated.

        Within an optimizer's step it may be: closures evaluate a network there.
        """
        if self.weight_id != id(weight) or self._version == _UNKNOWN:
            # New, or a wrapper's, as FSDP2's gathered weight is. What is passed in is no Parameter.
            self.accept(weight)
        elif self._version != version_of(weight) and not self._is_stepping:
            self.warn()
        if self.behind:
            self.warn()

    def begin_step(self) -> None:
        """Note that an optimizer is about to change the weight."""
        if self.behind:  # since the step before: nobody updates
            self.warn()
        self._passes.end()
        self._is_stepping = True

    def end_step(self) -> None:
        """Note that an optimizer has changed the weight, unless the state was updated since."""
        if self._is_stepping:
            self._passes.end()  # those of a closure
            self._is_stepping, self.behind = False, True

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
    for watch in _concerned(optimizer):
        watch.begin_step()


def _after_step(optimizer: Any, _args: Any, _kwargs: Any) -> None:
    for watch in _concerned(optimizer):
        watch.end_step()


def _concerned(optimizer: Any) -> list[Watch]:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [watch for watch in list(_watching) if watch.weight_id in stepped]
