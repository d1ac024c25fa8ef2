"""The checks before a normalised weight is left behind, or written, as an ordinary one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from snparam.parametrization.find import norms_of, qualified_name
from snparam.parametrization.spectral_norm import SpectralNorm


def check_alone(owner: nn.Module, name: str) -> None:
    """Refuse to take SpectralNorm off a tensor that carries another parametrization as well.

    Raises:
        ValueError: if it does; the error names the other parametrizations.
    """
    lists: Any = owner.parametrizations
    others = [type(p).__name__ for p in lists[name] if not isinstance(p, SpectralNorm)]
    if others:
        raise ValueError(
            f"SpectralNorm on '{name}' of {type(owner).__name__}: {', '.join(others)} is "
            "parametrized together with it; remove that first, with "
            "torch.nn.utils.parametrize.remove_parametrizations, or rebuild the module."
        )


def check_shared(model: nn.Module, module: nn.Module | None = None) -> None:
    """Refuse to bake a weight whose Parameter another module uses as an ordinary weight.

    Args:
        model: the model whose modules are searched for such a use.
        module: the module whose normalised weights are checked; None (the default) for those of the
            whole model.

    Raises:
        ValueError: if there is one; the error names the weight and the other use.
    """
    normalised = {}
    for name, owner in model.named_modules():
        if module is None or owner is module:
            lists: Any = owner._modules.get("parametrizations")
            for tensor, norm in norms_of(owner):
                original = lists[tensor].original
                normalised[id(original)] = (qualified_name(name, tensor), tuple(norm.view.shape))
    for name, identity in _plain_uses(model):
        if identity in normalised:
            normalised_name, shape = normalised[identity]
            raise ValueError(
                f"SpectralNorm on '{normalised_name}' {shape}: it is shared with '{name}', which "
                "uses it as it is, and one tensor cannot be both; pass bake=False, or convert both."
            )


def _plain_uses(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the name and the identity of each Parameter that a module uses as it is."""
    for name, module in model.named_modules():
        if not isinstance(module, ParametrizationList):
            for tensor, parameter in module._parameters.items():
                if parameter is not None:
                    yield qualified_name(name, tensor), id(parameter)
