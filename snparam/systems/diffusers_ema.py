"""diffusers' `EMAModel.save_pretrained`, which would write averaged originals as the weights.

It makes an ordinary model, copies the averages of a network's Parameters into it by position, and
saves that model. For a converted network these are averages of originals, in another order: what is
written is wrong and, where all tensors happen to fit, wrong in silence. Neither the EMAModel nor
the ordinary model has a reference to the network; but the model is of the network's class, and
methods of that class configure and save it, which can find the EMAModel on the call stack.
diffusers is not imported; the names of those methods and of the EMAModel's list of tensors are all
that is looked for.

The shapes of the Parameters of each converted network are kept in a global table, by its class,
because an EMAModel has no reference to the network whose Parameters it averages, and that network
may have been restored since, or be gone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from snparam.parametrization.classes import definitions, wrap
from snparam.parametrization.extensions import System, register_system
from snparam.parametrization.find import is_normalised
from snparam.parametrization.frames import outward

_SAVE = "save_pretrained"
# The ordinary model's methods that the EMAModel calls, before it copies the averages and after.
_MODEL_METHODS = ("register_to_config", _SAVE)
_AVERAGES = "shadow_params"

Shapes = tuple[tuple[int, ...], ...]

_converted: WeakKeyDictionary[type, set[Shapes]] = WeakKeyDictionary()


def refuse_averages(model: nn.Module) -> None:
    """Let models of a converted model's class refuse to be filled with averages of such a model."""
    methods = [(cls, name) for name in _MODEL_METHODS for cls in definitions(type(model), name)]
    if {name for _, name in methods} == set(_MODEL_METHODS) and is_normalised(model):
        _converted.setdefault(type(model), set()).add(_shapes(model.parameters()))
        for cls, name in methods:
            wrap(cls, name, _run_unless_averages)


def _run_unless_averages(
    method: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    averages = _averages_being_saved(type(model))
    # `register_to_config` also runs before the model is initialised, when it has no `_modules`.
    is_ordinary = "_modules" in vars(model) and not is_normalised(model)
    if averages is not None and is_ordinary and _is_of_converted(averages, type(model)):
        kind = type(model).__name__
        raise RuntimeError(
            f"EMAModel.{_SAVE} of a converted {kind} would write averages of original weights as "
            f"the weights of an ordinary {kind}; put them into a copy of the network whose "
            "parameters they average (converted again, if it has been restored since), and save "
            "that: average = copy.deepcopy(model); ema.copy_to(average.parameters()); "
            f"average.{_SAVE}(path). To go on averaging later, save and load ema.state_dict()."
        )
    return method(model, *args, **kwargs)


def _averages_being_saved(kind: type) -> list[Tensor] | None:
    """Return the averages that are being saved as a model of class `kind`, or None without any."""
    for frame in outward(sys._getframe(1)):
        if frame.f_code.co_name == _SAVE:
            saver = frame.f_locals.get("self")
            averages = getattr(saver, "__dict__", {}).get(_AVERAGES)
            if averages is not None and getattr(saver, "model_cls", None) is kind:
                return list(averages)
    return None


def _is_of_converted(averages: list[Tensor], kind: type) -> bool:
    """Return whether averages have the shapes of a converted network's Parameters, of one class."""
    return _shapes(averages) in _converted.get(kind, set())


def _shapes(tensors: Iterable[Tensor]) -> Shapes:
    return tuple(tuple(tensor.shape) for tensor in tensors)


class _DiffusersEMA(System):
    def on_model(self, model: nn.Module) -> None:
        for module in model.modules():
            refuse_averages(module)


register_system(_DiffusersEMA())
