"""The registries of systems and of spellings, which files above this folder fill.

Both lists are empty here. `snparam/__init__.py` imports the files that register themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from snparam.parametrization.find import NormalisedWeight


class System:
    """Adaptation to one system of other people's: callbacks around attachment and removal.

    A subclass overrides the methods that it needs. Each of them may be called again for the same
    module or model. None of them sets anything on a module or a model itself: `classes.wrap`
    changes the class instead, so that an instance carries nothing that would have to be undone.
    """

    def on_attach(self, owner: nn.Module) -> None:
        """Adapt a module, whose class is its own, after SpectralNorm was put on a tensor of it."""

    def on_detach(self, owner: nn.Module) -> None:
        """Undo `on_attach`, after the last SpectralNorm of a module was taken off."""

    def on_model(self, model: nn.Module) -> None:
        """Adapt a model after it was converted."""

    def on_restore(self, model: nn.Module) -> None:
        """Undo `on_model`, after a whole model, and not only a layer of it, was restored."""


SYSTEMS: list[System] = []


def register_system(system: System) -> None:
    """Call a system's methods for every module and model that is normalised from now on."""
    SYSTEMS.append(system)


class Misfit(NamedTuple):
    """An entry of a state dict that cannot be part of the state of its weight.

    Attributes:
        key: the local key to report it under: its own, or that of snparam's tensor for it.
        value: the tensor, or the object in its place.
        expected: the shape that the tensor would have to have.
        advice: what to do about it, as a sentence that names the weight; "" for nothing.
    """

    key: str
    value: Any
    expected: tuple[int, ...]
    advice: str = ""


@dataclass(frozen=True)
class State:
    """The state of one weight in a state dict, as far as one spelling can read it.

    Attributes:
        u: left singular vectors, (b, j, m) for any j; None if the state dict has none that belong
            to the matrices of the weight's view.
        sv: singular values, (b, i) for any i, or None.
        keys: the local keys that it was read from, which are removed from the state dict.
        sigma: a function from the weight to the σ () that the network which wrote the state divides
            it by; None if that is the σ that `u` gives.
        misfits: the entries of a wrong kind or shape; if there are any, nothing of the weight is
            loaded.
    """

    u: Tensor | None = None
    sv: Tensor | None = None
    keys: tuple[str, ...] = ()
    sigma: Callable[[Tensor], Tensor] | None = None
    misfits: tuple[Misfit, ...] = ()


@dataclass(frozen=True)
class Spelled:
    """The entries that a spelling writes for one weight, instead of those that a state dict has.

    Attributes:
        parameters: tensors by local name, to be placed among the owner's parameters.
        buffers: the same, among the owner's buffers.
        inner: the same, below `parametrizations.<tensor>.`.
        metadata: additions to the owner's entry in the `_metadata` of the state dict.
    """

    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    inner: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


class Spelling:
    """One way of writing a normalised weight, and its state, under the keys of a state dict.

    Keys are local here: they follow the owner's prefix, `weight` and not `layer4.2.conv3.weight`.

    Attributes:
        name: the name by which `state_dict_for` selects it.
    """

    name: str

    def weight_key(self, tensor_name: str) -> str:
        """Return the key of the weight; keys other than `tensor_name` itself take precedence."""
        return tensor_name

    def read(self, weight: NormalisedWeight, tensors: Mapping[str, Any]) -> State | None:
        """Return the state of a weight, or None where it is not in this spelling.

        Args:
            weight: the weight in the model that loads.
            tensors: the entries of the state dict for the weight's owner, by local key, as they
                were passed, without those of the owner's other tensors.
        """

    def write(self, weight: NormalisedWeight) -> Spelled:
        """Return the entries for a weight.

        Raises:
            ValueError: if the weight cannot be expressed in this spelling.
        """
        raise NotImplementedError

    def writer(
        self,
        model: nn.Module,  # noqa: ARG002 - for the spellings that override this
    ) -> Callable[[NormalisedWeight], Spelled]:
        """Return the function that writes each weight of one model: `write`, by default.

        A spelling overrides it if what it writes for one weight depends on the rest of the model.

        Raises:
            ValueError: if the model cannot be expressed in this spelling.
        """
        return self.write


SPELLINGS: list[Spelling] = []


def register_spelling(spelling: Spelling) -> None:
    """Let `load_state_dict` of normalised modules read a spelling, and `state_dict_for` write it.

    The spellings under whose key the weight stands are asked first, then the others, each in the
    order of registration; the first that finds a state reads it.

    Raises:
        ValueError: if the name is taken.
    """
    if any(other.name == spelling.name for other in SPELLINGS):
        raise ValueError(f"a spelling named {spelling.name!r} is registered already")
    SPELLINGS.append(spelling)
