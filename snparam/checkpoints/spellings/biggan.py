"""The spelling of the layers of Brock, Donahue and Simonyan 2019 (BigGAN)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from snparam.checkpoints.shapes import has_shape
from snparam.checkpoints.spelled import check_norm_is_one, inexpressible, ordinary_entries
from snparam.layers.convolutions import output_channels
from snparam.layers.torch_reading import matrix_relation, torch_axis, torch_sigma
from snparam.parametrization.extensions import (
    Misfit,
    Spelled,
    Spelling,
    State,
    register_spelling,
)
from snparam.parametrization.find import NormalisedWeight

_TENSOR = "weight"
_TARGET = "BigGAN's layer"


class BigGAN(Spelling):
    """The spelling `weight`, `u0` (1, m), `sv0` (1,), `u1`, `sv1`, ...: one weight a layer."""

    name = "biggan"

    def read(self, weight: NormalisedWeight, tensors: Mapping[str, Any]) -> State | None:
        """Return all vectors, up to the first that is missing, and their values if none is missing.

        Vectors of one matrix say nothing of several blocks, nor of a convolution: a weight that is
        read as such gets no u, and only the σ that BigGAN's layer divides by.
        """
        if weight.tensor_name != _TENSOR or "u0" not in tensors:
            return None
        view, axis = weight.norm.view, torch_axis(weight.owner)
        blocks, rows, _ = view.matrices
        length = blocks * rows if view.is_dense else output_channels(weight.owner)
        count = next(i for i in range(len(tensors) + 1) if f"u{i}" not in tensors)
        us = {f"u{i}": tensors[f"u{i}"] for i in range(count)}
        svs = {f"sv{i}": tensors[f"sv{i}"] for i in range(count) if f"sv{i}" in tensors}
        keys, misfits = (*us, *svs), []
        for name, entries in (("u", us), ("sv", svs)):
            for value in entries.values():
                if not (has_shape(value, (1, length)) if name == "u" else _is_number(value)):
                    key = f"parametrizations.{_TENSOR}.0.{name}"
                    misfits.append(Misfit(key, value, tuple(getattr(weight.norm, name).shape)))
                    break
        if misfits:
            return State(keys=keys, misfits=tuple(misfits))
        if blocks > 1 or not view.is_dense:
            u = us["u0"].flatten()
            return State(keys=keys, sigma=partial(torch_sigma, axis=axis, u=u, v=None))
        u = torch.cat(list(us.values())).unsqueeze(0)
        sv = torch.cat([value.reshape(1) for value in svs.values()]) if len(svs) == count else None
        return State(u, None if sv is None else sv.unsqueeze(0), keys)

    def write(self, weight: NormalisedWeight) -> Spelled:
        """Return the original with all the vectors and values that are tracked.

        Raises:
            ValueError: for a weight of another name than `weight`, one whose norm is not 1, a
                complex one, or one with other rows than BigGAN's layer reads.
        """
        check_norm_is_one(weight, self.name)
        if weight.tensor_name != _TENSOR:
            raise inexpressible(weight, _TARGET, f"its one weight is called {_TENSOR!r}")
        if weight.original.is_complex():
            raise inexpressible(weight, _TARGET, "it is complex")
        if matrix_relation(weight.norm.view, torch_axis(weight.owner)) != "same":
            raise inexpressible(weight, _TARGET, "it reads other rows")
        norm, dtype, buffers = weight.norm, weight.original.dtype, {}
        for i in range(norm.u.shape[1]):
            # Copies, because safetensors takes no tensors that share memory.
            buffers[f"u{i}"] = norm.u[:, i].to(dtype, copy=True)
            buffers[f"sv{i}"] = norm.sv[:, i].to(dtype, copy=True)
        return ordinary_entries(weight, weight.original.detach(), buffers)


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


register_spelling(BigGAN())
