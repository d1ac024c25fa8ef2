"""Recognition of torch's own tools that compute a weight from another tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from snparam.layers.torch_reading import left_vector, torch_sigma
from snparam.matrices.torch_private import is_torch_spectral_norm
from snparam.matrices.views import WeightView

_SPECTRAL = "torch's spectral norm"
_WEIGHT_NORM = "torch's weight_norm, which sets the length of every row"
_PRUNING = "torch's pruning (torch.nn.utils.prune), which multiplies it by a mask"
# Descriptions of torch's parametrizations by the names of their classes, which are private.
_KINDS = {
    "_SpectralNorm": _SPECTRAL,
    "_WeightNorm": _WEIGHT_NORM,
    "_Orthogonal": "torch's orthogonal, whose singular values are 1 already",
}


@dataclass(frozen=True)
class TorchSpectralNorm:
    """torch's spectral norm on a tensor, as a parametrization or as the deprecated hook.

    Attributes:
        owner: the module that has the tensor.
        name: name of the tensor in it.
        original: the Parameter behind the tensor.
        u: torch's estimate of the left singular vector of its matrix.
        v: torch's estimate of the right singular vector of its matrix.
        axis: the axis that counts the rows of its matrix.
        hook: the deprecated hook, or None for a parametrization.
    """

    owner: nn.Module
    name: str
    original: Tensor
    u: Tensor
    v: Tensor
    axis: int
    hook: SpectralNorm | None

    def left_vector(self, view: WeightView) -> Tensor | None:
        """Return the u (1, 1, m) of a view, from torch's vectors.

        The result is None if torch reads other matrices, or the vector is not finite.
        """
        vector = left_vector(view, self.axis, self.u, self.v)
        return vector if vector is not None and bool(vector.isfinite().all()) else None

    def sigma(self) -> Tensor:
        """Return the σ () that torch divides by in eval mode."""
        return torch_sigma(self.original, self.axis, self.u, self.v)


def torch_spectral_norm_on(owner: nn.Module, name: str) -> TorchSpectralNorm | None:
    """Return torch's spectral norm on a tensor of a module, or None if it is not there alone."""
    if parametrize.is_parametrized(owner, name):
        lists: Any = owner.parametrizations
        norm = lists[name][0]
        is_alone = len(lists[name]) == 1 and is_torch_spectral_norm(norm)
        if not is_alone or not hasattr(norm, "_u"):  # torch keeps no u for tensors of one dimension
            return None
        return TorchSpectralNorm(
            owner, name, lists[name].original, norm._u, norm._v, norm.dim, None
        )
    for hook in owner._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm) and hook.name == name:
            original = owner._parameters.get(f"{name}_orig")
            u, v = (owner._buffers.get(f"{name}_{vector}") for vector in "uv")
            if original is None or u is None or v is None:
                return None
            axis = hook.dim % original.ndim
            return TorchSpectralNorm(owner, name, original, u, v, axis, hook)
    return None


def hook_tensors(owner: nn.Module) -> Iterator[str]:
    """Yield the names of the tensors of a module that torch's deprecated spectral norm computes."""
    for hook in owner._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm) and torch_spectral_norm_on(owner, hook.name) is not None:
            yield hook.name


def parametrizations_on(owner: nn.Module, name: str) -> str:
    """Return, in words, the parametrizations of a tensor."""
    lists: Any = owner.parametrizations
    kinds = [type(part).__name__ for part in lists[name]]
    return ", ".join(_KINDS.get(kind, kind) for kind in kinds)


def hook_using(owner: nn.Module, name: str) -> str | None:
    """Return, in words, the hook that computes with a Parameter such as `weight_v`, or None."""
    for hook in owner._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and name in (f"{hook.name}_g", f"{hook.name}_v"):
            return _WEIGHT_NORM
        if isinstance(hook, BasePruningMethod) and name == f"{hook._tensor_name}_orig":
            return _PRUNING
    return None


def hook_computing(owner: nn.Module, name: str) -> str | None:
    """Return, in words, the hook that computes a tensor such as `weight`, or None."""
    return hook_using(owner, f"{name}_v") or hook_using(owner, f"{name}_orig")
