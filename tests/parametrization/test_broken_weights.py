"""Weights with NaN or inf, and weights that start at zero: the state outlives them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.applied import applied, exact_norm
from helpers.holder import norm_of, original_of
from torch import Tensor, nn

import snparam

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_svs": 2},
    {"num_itrs": 2},
    {"eps": 1e-12},
    {"eps": 1e-12, "num_svs": 3},
    {"blocks": 2},
    {"blocks": 2, "num_svs": 2, "eps": 1e-12},
    {"gain": "fixed"},
]
with_options = pytest.mark.parametrize("options", OPTIONS, ids=str)
with_updates = pytest.mark.parametrize("update", ["forward", "step"])


def one_entry(weight: Tensor, bad: float) -> None:
    weight[2, 3] = bad


def all_entries(weight: Tensor, bad: float) -> None:
    weight[:15] = bad


def layer_with(seed: int = 0, **options: Any) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(20, 30, bias=False)
    return snparam.register_sn(layer, **options)


def blocks_of(layer: nn.Module, weight: Tensor) -> tuple[Tensor, ...]:
    return weight.chunk(norm_of(layer).u.shape[0])


def assert_norms(layer: nn.Module, weight: Tensor) -> None:
    norm = norm_of(layer)
    right = norm.gain.tolist() if norm.settings.gain else [1.0] * len(norm.u)
    norms = [exact_norm(block) for block in blocks_of(layer, weight)]
    assert norms == pytest.approx(right, rel=1e-3)


def by_forward(layer: nn.Module) -> None:
    layer(torch.ones(1, 20)).sum().backward()


def without_grad(layer: nn.Module) -> None:
    with torch.no_grad():
        layer(torch.ones(1, 20))


def by_reading(layer: nn.Module) -> None:
    layer.weight  # noqa: B018


def by_update(layer: nn.Module) -> None:
    if norm_of(layer).settings.update == "step":
        snparam.update(layer)
    layer(torch.ones(1, 20))


def by_an_optimizer(layer: nn.Module) -> None:
    original_of(layer).grad = torch.zeros_like(original_of(layer))
    torch.optim.SGD(layer.parameters(), 0.0).step()
    layer(torch.ones(1, 20))


MOVES: list[Callable[[nn.Module], None]] = [
    by_forward,
    without_grad,
    by_reading,
    by_update,
    by_an_optimizer,
]


@pytest.mark.parametrize("move", MOVES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("spread", [one_entry, all_entries], ids=lambda f: f.__name__)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@with_options
@with_updates
def test_a_broken_weight_leaves_u_and_a_repaired_one_is_normalised_at_once(
    update: Any,
    options: dict[str, Any],
    bad: float,
    spread: Callable[[Tensor, float], None],
    move: Callable[[nn.Module], None],
) -> None:
    layer = layer_with(update=update, **options)
    good, u = original_of(layer).detach().clone(), norm_of(layer).u.clone()
    with torch.no_grad():
        spread(original_of(layer), bad)
    for _ in range(2):
        move(layer)
    assert torch.equal(norm_of(layer).u[0], u[0])  # the block that is broken
    assert torch.isfinite(norm_of(layer).u).all()
    with torch.no_grad():
        original_of(layer).copy_(good)
    original_of(layer).grad = None
    move(layer)
    for _ in range(3):
        assert_norms(layer, applied(layer))
    layer.eval()
    assert_norms(layer, layer.weight)
    assert torch.isfinite(norm_of(layer).sv).all()


@with_options
@with_updates
def test_an_eval_read_of_a_broken_weight_changes_nothing(
    update: Any, options: dict[str, Any]
) -> None:
    layer = layer_with(update=update, **options).eval()
    before = [b.clone() for b in layer.buffers()]
    good = original_of(layer).detach().clone()
    with torch.no_grad():
        one_entry(original_of(layer), math.inf)
        layer.weight  # noqa: B018
        original_of(layer).copy_(good)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))
    assert_norms(layer, layer.weight)


# Zero


ZERO_OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_svs": 2},
    {"num_itrs": 2},
    {"eps": 1e-12},
]


@pytest.mark.parametrize("forwards", [1, 4])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("options", ZERO_OPTIONS, ids=str)
@with_updates
def test_a_layer_that_starts_at_zero_behind_a_layer_norm_is_bounded_after_one_step(
    update: Any, options: dict[str, Any], seed: int, forwards: int
) -> None:
    """The rows of what it learns first sum to zero, as those of the normalised activations do. A u
    that was made anew, of equal entries say, would be orthogonal to it, and σ a rounding error."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16))
        zero = nn.Linear(16, 16, bias=False)
        x, y = torch.randn(32, 8), torch.randn(32, 16)
    with torch.no_grad():
        zero.weight.zero_()
    snparam.register_sn(zero, update=update, **options)
    norm, u = norm_of(zero), norm_of(zero).u.clone()
    torch.testing.assert_close(u @ u.mT, torch.eye(u.shape[1]).expand(len(u), -1, -1))
    optimizer = torch.optim.SGD([*body.parameters(), *zero.parameters()], 0.1)
    for _ in range(forwards):
        output = zero(body(x))
        assert not output.any()
        assert torch.equal(norm.u, u)
        assert not norm.sv.any()
    (output - y).square().mean().backward()
    optimizer.step()
    for _ in range(2):
        assert 1 - 1e-4 <= exact_norm(applied(zero)) <= 3
