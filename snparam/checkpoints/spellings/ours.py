"""snparam's own spelling, in which `state_dict` of a converted network is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snparam.checkpoints.shapes import has_shape
from snparam.layers.convolutions import is_convolution, output_channels
from snparam.parametrization.extensions import (
    Misfit,
    Spelled,
    Spelling,
    State,
    register_spelling,
)
from snparam.parametrization.find import NormalisedWeight


class Ours(Spelling):
    """The spelling `parametrizations.weight.original`, `.0.u`, `.0.sv`; `.0.gain` with a gain."""

    name = "snparam"

    def weight_key(self, tensor_name: str) -> str:
        """Return the key under which torch's parametrize keeps the original."""
        return f"parametrizations.{tensor_name}.original"

    def read(self, weight: NormalisedWeight, tensors: Mapping[str, Any]) -> State | None:
        """Return the state, of any number of singular values; torch loads its entries itself.

        The state of a convolution that was read as another map, the reshaped weight or the operator
        at another input size, is removed, and then estimated anew.
        """
        prefix = f"parametrizations.{weight.tensor_name}.0."
        u, sv = tensors.get(f"{prefix}u"), tensors.get(f"{prefix}sv")
        if u is None and sv is None:
            return None
        if _is_of_another_map(weight, u, sv):
            return State(keys=(f"{prefix}u", f"{prefix}sv"))
        blocks, rows, _ = weight.norm.view.matrices
        misfits: list[Misfit] = []
        advice = _advice(weight, u, sv)
        for name, value, shape in (("u", u, (blocks, None, rows)), ("sv", sv, (blocks, None))):
            if value is not None and not has_shape(value, shape):
                expected = tuple(getattr(weight.norm, name).shape)
                misfits.append(Misfit(prefix + name, value, expected, advice))
                advice = ""  # given once
        return State(u, sv, misfits=tuple(misfits))

    def write(self, weight: NormalisedWeight) -> Spelled:
        """Return the entries that `state_dict` has."""
        state = weight.norm.state_dict()
        inner = {f"0.{name}": tensor for name, tensor in state.items()}
        return Spelled(inner={"original": weight.original.detach(), **inner})


def _is_of_another_map(weight: NormalisedWeight, u: Any, sv: Any) -> bool:
    """Return whether a state is whole, but that of a convolution read as another map than here.

    In a matrix of it, as in its operator, each output channel has equally many rows.
    """
    view = weight.norm.view
    if not is_convolution(weight.owner) or not has_shape(u, (None, None, None)):
        return False
    blocks, rows = len(u), u.shape[2]
    if not has_shape(sv, u.shape[:2]) or (blocks, rows) == (view.matrices[0], view.matrices[1]):
        return False
    channels = output_channels(weight.owner)
    if blocks * rows % channels:
        return False
    return not view.is_dense or (blocks == 1 and rows > channels)


def _advice(weight: NormalisedWeight, u: Any, sv: Any) -> str:
    """Return what to do about a state that is whole, but of another number of blocks; else ""."""
    blocks, rows, _ = weight.norm.view.matrices
    if not (has_shape(u, (None, None, None)) and has_shape(sv, u.shape[:2])):
        return ""
    if len(u) == blocks or len(u) * u.shape[2] != blocks * rows:
        return ""
    return (
        f"SpectralNorm on {weight}: the network that was saved read it in {len(u)} block(s), and "
        f"this one reads it in {blocks}; convert this one with the same option blocks= "
        f"(blocks={len(u)} for this weight)."
    )


register_spelling(Ours())
