"""What stands against leaving a normalised weight behind as an ordinary one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from snparam.parametrization.find import norms_of
from snparam.parametrization.spectral_norm import SpectralNorm


def check_alone(owner: nn.Module, name: str) -> None:
    """Refuse to take SpectralNorm off a tensor that carries another parametrization as well.

    Raises:
        ValueError: with what it carries.
    """
    lists: Any = owner.parametrizations
    others = [type(p).__name__ for p in lists[name] if not isinstance(p, SpectralNorm)]
    if others:
        raise ValueError(
            f"SpectralNorm on '{name}' of {type(owner).__name__}: {', '.join(others)} is "
            "parametrized together with it; remove that first, with "
            "torch.nn.utils.parametrize.remove_parametrizations, or rebuild the module."
        )


def check_shared(model: nn.Module, within: nn.Module | None = None) -> None:
    """Refuse to bake one of two uses of a Parameter.

    Args:
        model: where to look for uses.
        within: whose normalised weights are asked about; the whole model's, if not given.

    Raises:
        ValueError: with both names.
    """
    normalised = {}
    for name, owner in model.named_modules():
        if within is None or owner is within:
            lists: Any = owner._modules.get("parametrizations")
            for tensor, norm in norms_of(owner):
                original = lists[tensor].original
                normalised[id(original)] = (_join(name, tensor), tuple(norm.view.shape))
    for weight, key in _plain_uses(model):
        if key in normalised:
            ours, shape = normalised[key]
            raise ValueError(
                f"SpectralNorm on '{ours}' {shape}: it is shared with '{weight}', which uses it as "
                "it is, and one tensor cannot be both; pass bake=False, or convert both."
            )


def _plain_uses(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Names and identities of the Parameters that modules use as they are."""
    for name, module in model.named_modules():
        if not isinstance(module, ParametrizationList):
            for tensor, parameter in module._parameters.items():
                if parameter is not None:
                    yield _join(name, tensor), id(parameter)


def _join(name: str, tensor: str) -> str:
    return f"{name}.{tensor}" if name else tensor
