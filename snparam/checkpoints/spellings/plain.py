"""The spelling of the ordinary network: the weight under its own name, and no state."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from snparam.checkpoints.spelled import ordinary_entries
from snparam.parametrization.attachment import read_as_eval
from snparam.parametrization.baking import check_shared
from snparam.parametrization.extensions import Spelled, Spelling, register_spelling
from snparam.parametrization.find import NormalisedWeight


class Plain(Spelling):
    """The spelling `weight`: the weight that eval mode uses or, without `bake`, the original."""

    name = "plain"

    def __init__(self, bake: bool = True) -> None:
        """Choose which weights to write; reading does not depend on it."""
        self.bake = bake

    def write(self, weight: NormalisedWeight) -> Spelled:
        """Return the weight under its own name, as if never parametrized."""
        return ordinary_entries(weight, self._value(weight))

    def writer(self, model: nn.Module) -> Callable[[NormalisedWeight], Spelled]:
        """Return a function that writes weights which modules share as one tensor.

        Raises:
            ValueError: with `bake`, if a weight is shared with a module that uses it as it is.
        """
        if self.bake:
            check_shared(model)
        values: dict[tuple[int, int], Tensor] = {}

        def write(weight: NormalisedWeight) -> Spelled:
            key = (id(weight.original), id(weight.norm))
            if key not in values:
                values[key] = self._value(weight)
            return ordinary_entries(weight, values[key])

        return write

    def _value(self, weight: NormalisedWeight) -> Tensor:
        if self.bake:
            return read_as_eval(weight.owner, weight.tensor_name).detach()
        return weight.original.detach()


register_spelling(Plain())
