"""What files above this folder register with it: other people's systems, and spellings.

Both lists are empty here. `snparam/__init__.py` imports the files that fill them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from snparam.parametrization.find import NormalisedWeight


class System:
    """Somebody else's system around normalised modules; each method is called where it says.

    A system overrides what it needs. Its methods may be called again for the same module. They put
    nothing on a module or a model itself: `classes.wrap` puts it into the class.
    """

    def on_attach(self, owner: nn.Module) -> None:
        """Called after a SpectralNorm was put on a tensor of a module, whose class is its own."""

    def on_detach(self, owner: nn.Module) -> None:
        """Called after the last SpectralNorm of a module was taken off."""

    def on_model(self, model: nn.Module) -> None:
        """Called after a model was converted."""

    def on_restore(self, model: nn.Module) -> None:
        """Called after SpectralNorm was taken off a whole model, not off its layers one by one."""


SYSTEMS: list[System] = []


def register_system(system: System) -> None:
    """Let a system know of each module and model that is normalised from now on."""
    SYSTEMS.append(system)


class Misfit(NamedTuple):
    """A tensor in a state dict that is no state of the weight that it comes with.

    Attributes:
        key: local key to report it under: the one that it came by, or that of our own tensor.
        value: the tensor, or what is in its place.
        expected: the shape that it would have to have.
    """

    key: str
    value: Any
    expected: tuple[int, ...]


@dataclass(frozen=True)
class State:
    """What a state dict has of the state of one weight, as one spelling reads it.

    Attributes:
        u: left singular vectors, (b, j, m) for any j; None if there are none of our matrices.
        sv: singular values, (b, i) for any i, or None.
        keys: the local keys that it is read from, and that nobody else is to see any more.
        sigma: what the network that wrote it divides the weight by: a function from the weight to
            σ (); None if that is what our u gives.
        misfits: the tensors of a wrong kind or shape among it, for which nothing of the weight is
            loaded.
    """

    u: Tensor | None = None
    sv: Tensor | None = None
    keys: tuple[str, ...] = ()
    sigma: Callable[[Tensor], Tensor] | None = None
    misfits: tuple[Misfit, ...] = ()


@dataclass(frozen=True)
class Spelled:
    """What stands for one weight in a state dict, in the place of the keys that it has there.

    Attributes:
        parameters: local names and tensors among its owner's parameters.
        buffers: the same, among its owner's buffers.
        inner: the same, below `parametrizations.<tensor>.`.
        metadata: what torch notes for the owner beside them.
    """

    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    inner: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


class Spelling:
    """One way of writing a normalised weight, and its state, under the keys of a state dict.

    Keys are local here: what follows the owner's prefix, `weight` and not `layer4.2.conv3.weight`.

    Attributes:
        name: what `state_dict_for` calls it.
    """

    name: str

    def weight_key(self, tensor_name: str) -> str:
        """The key of the weight. One that is not `tensor_name` itself counts before it."""
        return tensor_name

    def read(self, weight: NormalisedWeight, tensors: Mapping[str, Any]) -> State | None:
        """The state of a weight, or None where it is not in this spelling.

        Args:
            weight: the weight, as it is in the model.
            tensors: what the state dict has for the weight's owner, by local key, as it was passed;
                without the owner's other tensors.
        """

    def write(self, weight: NormalisedWeight) -> Spelled:
        """What stands for a weight.

        Raises:
            ValueError: if it cannot be expressed.
        """
        raise NotImplementedError

    def writer(
        self,
        model: nn.Module,  # noqa: ARG002 - for the spellings that override this
    ) -> Callable[[NormalisedWeight], Spelled]:
        """What writes each weight of a model: `write`, unless they have something in common.

        Raises:
            ValueError: if the model cannot be expressed.
        """
        return self.write


SPELLINGS: list[Spelling] = []


def register_spelling(spelling: Spelling) -> None:
    """Let `load_state_dict` of normalised modules read a spelling, and `state_dict_for` write it.

    Where two can read a state, that one does whose key the weight came under, or else the one that
    was registered first.

    Raises:
        ValueError: if the name is taken.
    """
    if any(other.name == spelling.name for other in SPELLINGS):
        raise ValueError(f"a spelling named {spelling.name!r} is registered already")
    SPELLINGS.append(spelling)
