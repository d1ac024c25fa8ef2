"""The contenders: ways of normalising every layer of a network."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import snparam

Convert = Callable[[nn.Module], nn.Module]
_LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding)


class Sequential(nn.Module):
    """The BigGAN layer, vector by vector, from its maths (DESIGN: the reference semantics)."""

    def __init__(self, weight: Tensor, num_svs: int, num_itrs: int = 1) -> None:
        super().__init__()
        rows = weight.flatten(1).shape[0]
        self.num_itrs = num_itrs
        start = torch.randn(rows, num_svs, dtype=weight.dtype)
        self.register_buffer("u", torch.linalg.qr(start)[0].T.contiguous())
        self.register_buffer("sv", torch.ones(num_svs))

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1)
        with torch.no_grad():
            us = [u.clone() for u in self.u]
            for _ in range(self.num_itrs):
                us, vs = self.step(matrix, us)
            self.u.copy_(torch.stack(us))
        values = [u @ matrix @ v for u, v in zip(us, vs, strict=True)]
        with torch.no_grad():
            self.sv.copy_(torch.stack(values))
        return weight / values[0]

    @staticmethod
    def step(matrix: Tensor, us: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        new_us: list[Tensor] = []
        vs: list[Tensor] = []
        for u in us:
            v = matrix.T @ u
            for earlier in vs:
                v = v - (v @ earlier) * earlier
            v = v / v.norm().clamp_min(1e-12)
            vs.append(v)
            u = matrix @ v
            for earlier in new_us:
                u = u - (u @ earlier) * earlier
            new_us.append(u / u.norm().clamp_min(1e-12))
        return new_us, vs


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _LAYERS)]


def plain(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def torch_parametrization(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in layers(model):
        nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=1)
    return model


def torch_hook(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for layer in layers(model):
            nn.utils.spectral_norm(layer, n_power_iterations=1)
    return model


def sequential(num_svs: int) -> Convert:
    def convert(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        for layer in layers(model):
            part = Sequential(layer.weight.detach(), num_svs)
            parametrize.register_parametrization(layer, "weight", part.to(layer.weight.device))
        return model

    return convert


def ours(num_svs: int = 1, **options: object) -> Convert:
    def convert(model: nn.Module) -> nn.Module:
        return snparam.convert_model(copy.deepcopy(model), num_svs, progress=False, **options)

    return convert
