"""A module that is nothing but a weight, and the state of its normalisation."""

import torch
from torch import Tensor, nn

from snparam import SpectralNorm, register_sn


class Holder(nn.Module):
    """Its forward is its weight: whatever shape, dtype and strides the weight has."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return self.weight


def held(weight: Tensor, num_svs: int = 1, num_itrs: int = 1, **options) -> Holder:
    """A holder of the weight, registered; the weight itself is left alone."""
    return register_sn(
        Holder(weight.detach().clone(memory_format=torch.preserve_format)),
        num_svs,
        num_itrs,
        name="weight",
        **options,
    )


def norm_of(module: nn.Module, name: str = "weight") -> SpectralNorm:
    return module.parametrizations[name][0]


def original_of(module: nn.Module, name: str = "weight") -> nn.Parameter:
    return module.parametrizations[name].original


def used(module: nn.Module, name: str = "weight") -> Tensor:
    """The weight that eval mode uses."""
    mode = norm_of(module, name).training
    norm_of(module, name).eval()
    with torch.no_grad():
        weight = getattr(module, name)
    norm_of(module, name).train(mode)
    return weight


def matrix_of(weight: Tensor) -> Tensor:
    """Dimension 0 as rows, in float64 (complex128)."""
    wide = torch.complex128 if weight.is_complex() else torch.float64
    return weight.detach().to(wide).reshape(weight.shape[0], -1)


def exact(weight: Tensor) -> Tensor:
    """All singular values, largest first, by a full decomposition in float64."""
    return torch.linalg.svdvals(matrix_of(weight))
