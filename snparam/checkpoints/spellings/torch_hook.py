"""The spelling of the deprecated `torch.nn.utils.spectral_norm`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from snparam.checkpoints.spelled import check_norm_is_one, inexpressible
from snparam.checkpoints.spellings.torch import state_in, vectors_for
from snparam.parametrization.extensions import Spelled, Spelling, State, register_spelling
from snparam.parametrization.find import NormalisedWeight

_TARGET = "torch's deprecated hook"


class TorchHook(Spelling):
    """The spelling `weight_orig`, `weight_u` (m,) and `weight_v` (n,)."""

    name = "torch-hook"

    def weight_key(self, tensor_name: str) -> str:
        """Return the key under which the hook keeps the original."""
        return f"{tensor_name}_orig"

    def read(self, weight: NormalisedWeight, tensors: Mapping[str, Any]) -> State | None:
        """Return the state by torch's vectors, or None where there is no u; see `state_in`."""
        name = weight.tensor_name
        if f"{name}_u" not in tensors:
            return None
        state = state_in(weight, tensors, f"{name}_u", f"{name}_v")
        if f"{name}_orig" in tensors and f"{name}_v" not in tensors:
            # torch before 1.0 saved the normalised weight as well, and no v.
            return replace(state, keys=(*state.keys, name))
        return state

    def write(self, weight: NormalisedWeight) -> Spelled:
        """Return the original with torch's vectors, after the step that eval takes here.

        torch takes no step in eval mode, and keeps one singular vector on each side.

        Raises:
            ValueError: for a weight whose norm is not 1, a complex one, or one that torch reads as
                another matrix.
        """
        check_norm_is_one(weight, self.name)
        if weight.original.is_complex():
            raise inexpressible(weight, _TARGET, "it is complex")
        u, v = vectors_for(weight, _TARGET)
        name = weight.tensor_name
        return Spelled(
            parameters={f"{name}_orig": weight.original.detach()},
            buffers={f"{name}_u": u, f"{name}_v": v},
            metadata={"spectral_norm": {f"{name}.version": 1}},
        )


register_spelling(TorchHook())
