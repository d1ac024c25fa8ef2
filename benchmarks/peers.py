"""The contenders: functions that return a copy of a network with every layer normalised."""

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
    """The layer of BigGAN as a parametrization: W / σ₁, by power iteration vector by vector.

    It is written from the paper's mathematics (Brock, Donahue and Simonyan 2019) and shares no code
    with snparam. For i = 1…k in order, with normalize(x) = x / max(‖x‖, 1e-12):

        v_i = normalize(Wᵀ u_i minus its projections on the new v_1…v_{i−1})
        u_i = normalize(W v_i minus its projections on the new u_1…u_{i−1})

    and σ_i = u_iᵀ W v_i, where u and v are constants to autograd.

    Attributes:
        u: left singular vectors as rows (k, m), a buffer.
        sv: singular values (k,), a buffer.
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
        """Return the normalised weight; in training mode u and sv are updated."""
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
        """Return the k new u (m,) and v (n,) of one power step on a matrix (m, n)."""
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
    """Return the layers of a network that every contender normalises."""
    return [module for module in model.modules() if isinstance(module, _LAYERS)]


def plain(model: nn.Module) -> nn.Module:
    """Return an unconverted copy of a network."""
    return copy.deepcopy(model)


def torch_parametrization(model: nn.Module) -> nn.Module:
    """Return a copy with torch.nn.utils.parametrizations.spectral_norm on every layer."""
    model = copy.deepcopy(model)
    for layer in layers(model):
        nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=1)
    return model


def sequential(num_svs: int) -> Convert:
    """Return a function that puts the `Sequential` parametrization on every layer of a copy."""

    def convert(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        for layer in layers(model):
            part = Sequential(layer.weight.detach(), num_svs)
            parametrize.register_parametrization(layer, "weight", part)
        return model

    return convert


def ours(num_svs: int = 1, **options: Any) -> Convert:
    """Return a function that converts a copy by snparam, with options of `convert_model`.

    By default u starts at random, as the other contenders' does. The cost of a step is the same,
    and converging takes a minute for wide matrices with singular values as close together as those
    of random ones.
    """

    def convert(model: nn.Module) -> nn.Module:
        chosen: Any = {"init": "random", **options}
        return snparam.convert_model(copy.deepcopy(model), num_svs, progress=False, **chosen)

    return convert


class Difference(NamedTuple):
    """The largest differences of two iterations: relative in sv, absolute in the entries of u."""

    sv: float
    u: float


# Bounds on the difference that float32 rounding makes, through two products and an
# orthonormalisation of 16 vectors.
SAME = Difference(sv=1e-4, u=1e-3)


def check_same_numbers(block: nn.Module, vectors: nn.Module, steps: int = 3) -> Difference:
    """Return how far snparam's steps and the sequential ones are apart, from the same u.

    Args:
        block: a layer converted by `ours`.
        vectors: a layer of the same weight, converted by `sequential`, whose u both start from.
        steps: how many training forwards to compare.

    Raises:
        AssertionError: if sv or u differ by more than `SAME`.
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
