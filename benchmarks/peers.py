"""The contenders: ways of normalising every layer of a network. Each leaves its argument alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import snparam

Convert = Callable[[nn.Module], nn.Module]

PLAIN = "plain"
OURS = "snparam"
TORCH = "torch"
SEQUENTIAL = "sequential"

_LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding)


class Sequential(nn.Module):
    """W → W / σ₁ by power iteration vector by vector, with Gram-Schmidt between the vectors.

    The layer of BigGAN (Brock, Donahue and Simonyan 2019), written from its maths and sharing no
    code with snparam. For i = 1…k in order, with normalize(x) = x / max(‖x‖, 1e-12):

        v_i = normalize(Wᵀ u_i minus its projections on the new v_1…v_{i−1})
        u_i = normalize(W v_i minus its projections on the new u_1…u_{i−1})

    and σ_i = u_iᵀ W v_i, u and v constants to autograd.

    Attributes:
        u: buffer, (k, m).
        sv: buffer, (k,).
    """

    u: Tensor
    sv: Tensor

    def __init__(self, weight: Tensor, num_svs: int, num_itrs: int = 1) -> None:
        super().__init__()
        self.num_itrs = num_itrs
        start = torch.randn(weight.shape[0], num_svs, dtype=weight.dtype)
        u = torch.linalg.qr(start)[0].T.contiguous()
        self.register_buffer("u", u.to(weight.device))
        self.register_buffer("sv", weight.new_ones(num_svs))

    def forward(self, weight: Tensor) -> Tensor:
        """The normalised weight; in training mode u and sv move."""
        matrix = weight.flatten(1)
        with torch.no_grad():
            us = [u.clone() for u in self.u]
            for _ in range(self.num_itrs):
                us, vs = self.step(matrix, us)
        values = [u @ matrix @ v for u, v in zip(us, vs, strict=True)]
        if self.training:
            with torch.no_grad():
                self.u.copy_(torch.stack(us))
                self.sv.copy_(torch.stack(values))
        normalised: Tensor = weight / values[0]
        return normalised

    @staticmethod
    def step(matrix: Tensor, us: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """New u and v, each of k vectors, of a matrix (m, n)."""
        new_us: list[Tensor] = []
        vs: list[Tensor] = []
        for u in us:
            vs.append(_orthonormal_to(vs, matrix.T @ u))
            new_us.append(_orthonormal_to(new_us, matrix @ vs[-1]))
        return new_us, vs


def _orthonormal_to(earlier: list[Tensor], x: Tensor) -> Tensor:
    for other in earlier:
        x = x - (x @ other) * other
    unit: Tensor = x / x.norm().clamp_min(1e-12)
    return unit


def layers(model: nn.Module) -> list[Any]:
    """The layers that every contender normalises."""
    return [module for module in model.modules() if isinstance(module, _LAYERS)]


def plain(model: nn.Module) -> nn.Module:
    """The unconverted network."""
    return copy.deepcopy(model)


def torch_parametrization(model: nn.Module) -> nn.Module:
    """torch.nn.utils.parametrizations.spectral_norm."""
    model = copy.deepcopy(model)
    for layer in layers(model):
        nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=1)
    return model


def sequential(num_svs: int) -> Convert:
    """The vector-by-vector iteration of BigGAN's layer."""

    def convert(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        for layer in layers(model):
            part = Sequential(layer.weight.detach(), num_svs)
            parametrize.register_parametrization(layer, "weight", part)
        return model

    return convert


def ours(num_svs: int = 1, **options: Any) -> Convert:
    """snparam, with options of `convert_model`.

    By default it starts as the others do, at random: a step costs the same, and to converge takes
    a minute for wide matrices whose singular values are as close as those of random ones.
    """

    def convert(model: nn.Module) -> nn.Module:
        chosen: Any = {"init": "random", **options}
        return snparam.convert_model(copy.deepcopy(model), num_svs, progress=False, **chosen)

    return convert


class Difference(NamedTuple):
    """How far two iterations are apart: relative in sv, absolute in the unit vectors u."""

    sv: float
    u: float


# Rounding of float32 through two products and an orthonormalisation of 16 vectors.
SAME = Difference(sv=1e-4, u=1e-3)


def check_same_numbers(block: nn.Module, vectors: nn.Module, steps: int = 3) -> Difference:
    """Take steps with snparam's layer and with the sequential one, from the latter's u.

    Raises:
        AssertionError: if their sv or u differ by more than `SAME`.
    """
    ours_: Any = block.parametrizations["weight"][0]  # type: ignore[index]
    other: Any = vectors.parametrizations["weight"][0]  # type: ignore[index]
    ours_.u.copy_(other.u[None])
    found = Difference(0.0, 0.0)
    for _ in range(steps):
        block.weight, vectors.weight  # noqa: B018
        sv = float(((ours_.sv[0] - other.sv) / other.sv).abs().max())
        u = float((ours_.u[0] - other.u).abs().max())
        found = Difference(max(found.sv, sv), max(found.u, u))
    if not (found.sv <= SAME.sv and found.u <= SAME.u):
        raise AssertionError(f"the two iterations differ: {found}, expected at most {SAME}")
    return found
