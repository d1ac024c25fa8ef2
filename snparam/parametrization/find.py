"""The normalised weights of a model: the one place that knows where a SpectralNorm is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from snparam.parametrization.spectral_norm import SpectralNorm


@dataclass(frozen=True)
class NormalisedWeight:
    """A weight under SpectralNorm, and its place in a model.

    Attributes:
        module_name: qualified name of the module that has the weight, "" for the model itself.
        owner: the module that has the weight.
        tensor_name: name of the weight in its owner.
        norm: the SpectralNorm on the weight.
    """

    module_name: str
    owner: nn.Module
    tensor_name: str
    norm: SpectralNorm

    @property
    def name(self) -> str:
        """Qualified name of the weight."""
        return qualified_name(self.module_name, self.tensor_name)

    @property
    def prefix(self) -> str:
        """The prefix of the owner's keys in a state dict."""
        return f"{self.module_name}." if self.module_name else ""

    @property
    def parametrization_list(self) -> Any:
        """The ParametrizationList that contains the SpectralNorm."""
        lists: Any = self.owner.parametrizations
        return lists[self.tensor_name]

    @property
    def original(self) -> Tensor:
        """The Parameter (or buffer) behind the weight."""
        original: Tensor = self.parametrization_list.original
        return original

    def __str__(self) -> str:
        """Return the qualified name and the shape, as errors show them."""
        return f"'{self.name}' {self.norm.view.shape}"


def qualified_name(module_name: str, name: str) -> str:
    """Return the qualified name of what has a name in a module, "" being the name of the root."""
    return f"{module_name}.{name}" if module_name else name


def normalised_weights(model: nn.Module, *, every_name: bool = False) -> Iterator[NormalisedWeight]:
    """Yield every normalised weight of a model, in the model's order.

    Args:
        model: the model to search.
        every_name: whether the weights of a module that has several names are yielded under each of
            them, as a state dict has them, and not under the first name alone (the default).
    """
    for module_name, module in model.named_modules(remove_duplicate=not every_name):
        for tensor_name, norm in norms_of(module):
            yield NormalisedWeight(module_name, module, tensor_name, norm)


def normalised_states(model: nn.Module) -> list[NormalisedWeight]:
    """Return the normalised weights of a model; of those that share a state, only the first."""
    by_state: dict[int, NormalisedWeight] = {}
    for weight in normalised_weights(model):
        by_state.setdefault(id(weight.norm), weight)
    return list(by_state.values())


def norms_of(module: nn.Module) -> Iterator[tuple[str, SpectralNorm]]:
    """Yield the name of each normalised tensor of a module, not of its children, and its norm."""
    children = module._modules
    if "parametrizations" not in children:  # not `get`, which a TorchScript module's table lacks
        return
    lists: Any = children["parametrizations"]
    if isinstance(lists, nn.ModuleDict):
        for name, parametrizations in lists._modules.items():
            for parametrization in parametrizations._modules.values():
                if isinstance(parametrization, SpectralNorm):
                    yield name, parametrization


def norm_on(module: nn.Module, tensor_name: str) -> SpectralNorm | None:
    """Return the SpectralNorm on a tensor of a module, or None."""
    return dict(norms_of(module)).get(tensor_name)


def is_normalised(module: nn.Module) -> bool:
    """Return whether a module, or any of its submodules, has a normalised weight."""
    return any(has_norms(part) for part in module.modules())


def has_norms(module: nn.Module) -> bool:
    """Return whether a module itself, not a submodule of it, has a normalised weight."""
    return any(True for _ in norms_of(module))
