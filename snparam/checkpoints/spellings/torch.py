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
    """The spelling `parametrizations.weight.original`, `.0._u` (m,) and `.0._v` (n,)."""

    name = "torch"

    def weight_key(self, tensor_name: str) -> str:
        """Return the key under which torch's parametrize keeps the original, the same as ours."""
        return f"parametrizations.{tensor_name}.original"

    def read(self, weight: NormalisedWeight, tensors: Mapping[str, Any]) -> State | None:
        """Return the state by torch's vectors, or None where neither is there; see `state_in`."""
        prefix = f"parametrizations.{weight.tensor_name}.0."
        keys = f"{prefix}_u", f"{prefix}_v"
        return None if tensors.keys().isdisjoint(keys) else state_in(weight, tensors, *keys)

    def write(self, weight: NormalisedWeight) -> Spelled:
        """Return the original with torch's vectors, after the step that eval takes here.

        torch takes no step in eval mode, and keeps one singular vector on each side.

        Raises:
            ValueError: for a weight whose norm is not 1, or that torch reads as another matrix.
        """
        check_norm_is_one(weight, self.name)
        u, v = vectors_for(weight, "torch's spectral_norm")
        return Spelled(inner={"original": weight.original.detach(), "0._u": u, "0._v": v})


def state_in(weight: NormalisedWeight, tensors: Mapping[str, Any], u_key: str, v_key: str) -> State:
    """Return the state by the vectors that torch keeps, of which at least one is there.

    Its u is torch's u where torch reads the matrix of the view, and torch's v where it reads the
    transpose; the other vector is not needed, because it follows. Where torch reads another matrix,
    the state has no u, but still the σ that torch divides by. Vectors that fit the weight by no
    axis are reported as misfits.

    Args:
        weight: the weight in the model that loads.
        tensors: the entries for the weight's owner, by local key.
        u_key: local key of torch's u (m,).
        v_key: local key of torch's v (n,).
    """
    u, v, axis = tensors.get(u_key), tensors.get(v_key), torch_axis(weight.owner)
    shape = weight.norm.view.shape
    axis_that_fits = fitting_axis(shape, axis, u, v)
    if axis_that_fits is not None:
        return State(
            u=left_vector(weight.norm.view, axis_that_fits, u, v),
            keys=(u_key, v_key),
            sigma=partial(torch_sigma, axis=axis_that_fits, u=u, v=v),
        )
    if u is not None and fitting_axis(shape, axis, u, None) is None:
        key = f"parametrizations.{weight.tensor_name}.0.u"
        misfit = Misfit(key, u, tuple(weight.norm.u.shape))
    else:
        columns = prod(shape) // (shape[axis] if u is None else len(u))
        misfit = Misfit(v_key, v, (columns,))
    return State(keys=(u_key, v_key), misfits=(misfit,))


def vectors_for(weight: NormalisedWeight, target: str) -> tuple[Tensor, Tensor]:
    """Return the u (m,) and v (n,) with which torch divides by the σ that eval divides by here.

    Args:
        weight: the weight.
        target: torch's implementation that they are for, as the error names it.

    Raises:
        ValueError: if torch reads another matrix.
    """
    axis = torch_axis(weight.owner)
    vectors = torch_vectors(weight.original, weight.norm.view, axis, weight.norm.u)
    if vectors is None:
        raise inexpressible(weight, target, f"torch takes axis {axis} as rows, another matrix")
    return vectors


register_spelling(Torch())
