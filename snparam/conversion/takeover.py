"""Removal of torch's own spectral norm from a tensor, before SpectralNorm takes its place."""

from __future__ import annotations

from typing import Any

from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import (
    SpectralNorm,
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)

from snparam.layers.torch_norms import TorchSpectralNorm
from snparam.parametrization.classes import give_own_class


def remove_torch_norm(spectral: TorchSpectralNorm) -> None:
    """Remove torch's spectral norm from a tensor.

    The original is left as an ordinary Parameter, the same object, in the same place among its
    owner's.
    """
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
        for key in [key for key, hook in hooks.items() if _is_hook_of(hook, spectral.hook)]:
            del hooks[key]
    owner.__dict__.pop(name)
    for vector in "uv":
        del owner._buffers[f"{name}_{vector}"]
    parameters = owner._parameters
    for parameter in list(parameters):  # all are entered anew, which keeps their order
        ordinary = name if parameter == f"{name}_orig" else parameter
        parameters[ordinary] = parameters.pop(parameter)


def _is_hook_of(hook: Any, spectral: SpectralNorm) -> bool:
    """Return whether a hook is one of those that a deprecated spectral norm has registered."""
    hook = getattr(hook, "hook", hook)  # torch wraps load_state_dict hooks
    if isinstance(hook, SpectralNormStateDictHook | SpectralNormLoadStateDictPreHook):
        hook = hook.fn
    return hook is spectral
