"""The spelling of `torch.nn.utils.parametrizations.spectral_norm`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

from torch import Tensor

from snparam.checkpoints.spelled import check_norm_is_one, inexpressible
from snparam.layers.torch_reading import (
    fitting_axis,
    left_vector,
    torch_axis,
    torch_sigma,
    torch_vectors,
)
from snparam.parametrization.extensions import (
    Misfit,
    Spelled,
    Spelling,
    State,
    register_spelling,
)
from snparam.parametrization.find import NormalisedWeight


class Torch(Spelling):
    """`parametrizations.weight.original`, `.0._u` (m,) and `.0._v` (n,)."""

    name = "torch"

    def weight_key(self, tensor_name: str) -> str:
        """The same as ours."""
        return f"parametrizations.{tensor_name}.original"

    def read(self, weight: NormalisedWeight, tensors: Mapping[str, Any]) -> State | None:
        """torch's u, where it is of our matrix. Its v is not needed: it follows from u."""
        inside = f"parametrizations.{weight.tensor_name}.0."
        keys = f"{inside}_u", f"{inside}_v"
        return None if tensors.keys().isdisjoint(keys) else state_in(weight, tensors, *keys)

    def write(self, weight: NormalisedWeight) -> Spelled:
        """One singular vector, one step ahead: torch takes none in eval mode."""
        check_norm_is_one(weight, self.name)
        u, v = vectors_for(weight, "torch's spectral_norm")
        return Spelled(inner={"original": weight.original.detach(), "0._u": u, "0._v": v})


def state_in(weight: NormalisedWeight, tensors: Mapping[str, Any], u_key: str, v_key: str) -> State:
    """The state by the vectors that torch keeps, of which one at least is there."""
    u, v, axis = tensors.get(u_key), tensors.get(v_key), torch_axis(weight.owner)
    shape = weight.norm.view.shape
    fitting = fitting_axis(shape, axis, u, v)
    if fitting is not None:
        return State(
            u=left_vector(weight.norm.view, fitting, u, v),
            keys=(u_key, v_key),
            sigma=partial(torch_sigma, axis=fitting, u=u, v=v),
        )
    if u is not None and fitting_axis(shape, axis, u, None) is None:
        key = f"parametrizations.{weight.tensor_name}.0.u"
        misfit = Misfit(key, u, tuple(weight.norm.u.shape))
    else:
        columns = prod(shape) // (shape[axis] if u is None else len(u))
        misfit = Misfit(v_key, v, (columns,))
    return State(keys=(u_key, v_key), misfits=(misfit,))


def vectors_for(weight: NormalisedWeight, what: str) -> tuple[Tensor, Tensor]:
    """The vectors for torch to keep.

    Raises:
        ValueError: if torch reads another matrix; `what` tells which of its two it would be for.
    """
    axis = torch_axis(weight.owner)
    vectors = torch_vectors(weight.original, weight.norm.view, axis, weight.norm.u)
    if vectors is None:
        raise inexpressible(weight, what, f"torch takes axis {axis} as rows, another matrix")
    return vectors


register_spelling(Torch())
