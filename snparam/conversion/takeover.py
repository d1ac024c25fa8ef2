"""Taking torch's own spectral norm off a tensor, before SpectralNorm takes its place."""

from __future__ import annotations

from typing import Any

from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import (
    SpectralNorm,
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)

from snparam.layers.torch_norms import Spectral
from snparam.parametrization.classes import give_own_class


def take_off(spectral: Spectral) -> None:
    """Leave the original as an ordinary Parameter, the same object, behind."""
    owner, name = spectral.owner, spectral.name
    if spectral.hook is None:
        give_own_class(owner)
        parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
        return
    for hooks in (
        owner._forward_pre_hooks,
        owner._state_dict_hooks,
        owner._load_state_dict_pre_hooks,
    ):
        for key in [key for key, hook in hooks.items() if _belongs(hook, spectral.hook)]:
            del hooks[key]
    owner.__dict__.pop(name)
    for vector in "uv":
        del owner._buffers[f"{name}_{vector}"]
    parameters = owner._parameters
    for parameter in list(parameters):  # each anew, so that their order stays
        ordinary = name if parameter == f"{name}_orig" else parameter
        parameters[ordinary] = parameters.pop(parameter)


def _belongs(hook: Any, spectral: SpectralNorm) -> bool:
    """Whether a hook is one of those that the deprecated spectral norm registers."""
    hook = getattr(hook, "hook", hook)  # torch wraps those of load_state_dict
    if isinstance(hook, SpectralNormStateDictHook | SpectralNormLoadStateDictPreHook):
        hook = hook.fn
    return hook is spectral
