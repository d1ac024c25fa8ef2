"""Rayleigh-Ritz steps: against exact decompositions of the span, and of weights that change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.holder import exact, matrix_of, norm_of, original_of
from helpers.matrices import FLOATS, WIDE, gram, matrices, rounding
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import snparam
from snparam.estimators import rayleigh_ritz
from snparam.estimators.estimate import ESTIMATORS, Estimate
from snparam.estimators.power import power_step
from snparam.testing.tensors import weight_with

RITZ = ESTIMATORS["rayleigh-ritz"]


def step(stack: Tensor, u: Tensor, eps: float = 0.0) -> Estimate:
    (found,) = RITZ.move([stack], [u], 1, eps)
    return found


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def wide(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


# The mathematics of one step


@given(W=matrices(), eps=st.sampled_from((0.0, 1e-12)))
def test_with_one_vector_it_is_the_classic_step(W: Tensor, eps: float) -> None:
    u = weight_with("gaussian", (1, 1, W.shape[1]), seed=3, dtype=W.dtype)
    for found, right in zip(step(W, u, eps), power_step(W, u, eps), strict=True):
        assert torch.equal(found, right)


def square_root_of_rounding(W: Tensor) -> float:
    return float(torch.finfo(W.dtype).eps ** 0.5)


@given(W=matrices(max_side=6))
def test_with_all_vectors_it_is_exact_in_one_step(W: Tensor) -> None:
    count = min(W.shape[1:])
    u = weight_with("gaussian", (1, count, W.shape[1]), seed=3, dtype=W.dtype)
    if count < W.shape[1]:
        # A tall matrix is spanned by its columns after one step, whatever u is.
        u = step(W, u).u
    sigma = exact(W[0])
    found = step(W, u).sv[0].double()
    if count == W.shape[1] or square_root_of_rounding(W) < sigma[-1] / sigma[0].clamp_min(1e-300):
        assert_close(found, sigma, rtol=0, atol=8 * rounding(W) * float(sigma[0]))


@given(W=matrices(), count=st.integers(2, 4))
def test_vectors_and_values_belong_together(W: Tensor, count: int) -> None:
    """Rows: conj(U) W Vᵀ = Σ and V Wᵀ = Σ U, with U and V orthonormal."""
    count = min(count, *W.shape[1:])
    u = weight_with("gaussian", (1, count, W.shape[1]), seed=3, dtype=W.dtype)
    u, v, sv, _ = step(W, u)
    sigma = float(exact(W[0])[0])
    eye = torch.eye(count, dtype=W.dtype)
    assert_close(gram(v)[0], eye, rtol=0, atol=rounding(W))
    if sigma > 0:
        assert_close(gram(u)[0], eye, rtol=0, atol=rounding(W))
    assert (sv[0].diff() <= rounding(W) * sigma).all()
    product = wide(v[0]) @ wide(W[0]).mT
    expected = wide(sv[0])[:, None] * wide(u[0])
    assert_close(product, expected, rtol=0, atol=rounding(W) * sigma + 1e-43)


@given(W=matrices(), count=st.integers(2, 4), data=st.data())
def test_the_first_value_is_the_best_in_the_span(W: Tensor, count: int, data: Any) -> None:
    """Of the span of V: no unit combination of its vectors is stretched further."""
    count = min(count, *W.shape[1:])
    u = weight_with("gaussian", (1, count, W.shape[1]), seed=5, dtype=W.dtype)
    classic, found = power_step(W, u), step(W, u)
    stretched = wide(W[0]) @ wide(classic.v[0]).mT
    best = torch.linalg.svdvals(stretched)
    sigma = float(exact(W[0])[0])
    slack = rounding(W) * sigma + 1e-43
    assert_close(found.sv[0].double(), best, rtol=0, atol=slack)
    assert float(found.sv[0, 0]) >= float(classic.sv[0, 0]) - slack
    c = drawn(count, seed=data.draw(st.integers(0, 9)))
    combination = stretched @ (c / c.norm()).to(stretched.dtype)
    assert float(found.sv[0, 0]) >= float(combination.norm()) - slack


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("values", [(2.0, 2.0, 2.0), (2.0, 2.0, 1.0), (3.0, 3.0, 0.0)], ids=str)
def test_equal_values_turn_no_vectors(values: tuple[float, ...], dtype: torch.dtype) -> None:
    """Singular vectors of equal values are any in their span: those that there are stay."""
    left, right = (torch.linalg.qr(drawn(4, 4, seed=s, dtype=dtype))[0] for s in (1, 2))
    diagonal = torch.tensor([*values, 0.0]).to(dtype)
    W = (left * diagonal @ right.mH).unsqueeze(0)
    turned = torch.linalg.qr(drawn(2, 2, seed=3, dtype=dtype))[0]
    u = (left[:, :2] @ turned).mT.unsqueeze(0)  # any orthonormal pair in the span of the first two
    before = u
    for _ in range(20):
        u = step(W, u).u
    assert_close(u, before, rtol=0, atol=rounding(W))


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_identity_is_left_as_it_is_to_the_bit(dtype: torch.dtype) -> None:
    W = torch.eye(5, dtype=dtype)[None]
    u = torch.eye(5, dtype=dtype)[None, 1:4].contiguous()
    found = step(W, u)
    assert torch.equal(found.u, u)
    assert torch.equal(found.sv, torch.ones(1, 3, dtype=dtype))


@pytest.mark.parametrize("broken", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dtype", WIDE)
def test_a_block_of_zeros_or_broken_keeps_its_u(
    dtype: torch.dtype, count: int, broken: float
) -> None:
    W = drawn(3, 5, 4, seed=4).to(dtype)
    W[1] = 0.0
    if broken != 0:
        W[1, 2, 3] = broken
    u = torch.linalg.qr(drawn(3, 5, count, seed=5).to(dtype))[0].mT.contiguous()
    found = step(W, u)
    assert torch.equal(found.u[1], u[1])
    assert float(found.sigma[1]) == 1.0
    if broken == 0:
        assert not found.sv[1].any()
        assert_close(gram(found.v)[1], torch.eye(count, dtype=dtype), rtol=0, atol=rounding(W))
    else:
        assert not found.sv[1, 0].isfinite()
    for block in (0, 2):
        alone = step(W[block : block + 1], u[block : block + 1])
        assert not torch.equal(found.u[block], u[block])
        assert_close(found.u[block], alone.u[0], rtol=0, atol=rounding(W))
        assert_close(found.sv[block], alone.sv[0], rtol=1e-4, atol=0)


@given(W=matrices(), blocks=st.integers(2, 3), count=st.integers(2, 3))
def test_a_stack_is_stepped_as_its_matrices_are(W: Tensor, blocks: int, count: int) -> None:
    count = min(count, *W.shape[1:])
    scales = torch.linspace(1, 0.25, blocks, dtype=W.real.dtype)[:, None, None]
    stack, sigma = W * scales, float(exact(W[0])[0])
    u = weight_with("gaussian", (blocks, count, W.shape[1]), seed=5, dtype=W.dtype)
    together = step(stack, u)
    apart = [step(stack[i : i + 1], u[i : i + 1]) for i in range(blocks)]
    moved = RITZ.move(list(stack.split(1)), list(u.split(1)), 1, 0.0)
    for found in (apart, moved):
        values = torch.cat([each.sv for each in found])
        assert_close(together.sv, values, rtol=0, atol=rounding(W) * sigma + 1e-43)


@pytest.mark.parametrize("count", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("spectrum", ["spread", "equal", "rank one", "zero", "ordered", "tiny"])
def test_both_forms_of_the_small_decomposition_agree(
    spectrum: str, dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LAPACK's, where numbers may be read, and Jacobi's, of a fixed number of operations."""
    r = {
        "spread": drawn(3, count, count, dtype=dtype),
        "equal": torch.linalg.qr(drawn(3, count, count, dtype=dtype))[0] * 2,
        "rank one": drawn(3, count, 1, dtype=dtype) @ drawn(3, 1, count, seed=2, dtype=dtype),
        "zero": torch.zeros(3, count, count, dtype=dtype),
        "ordered": torch.diag_embed(torch.arange(count, 0, -1.0).expand(3, -1)).to(dtype),
        "tiny": drawn(3, count, count, dtype=dtype) * 1e-36,
    }[spectrum]
    _, triangle = rayleigh_ritz.triangular(r)
    sigma = torch.linalg.svdvals(wide(triangle))
    scale = float(sigma.amax())
    for freely in (True, False):
        monkeypatch.setattr(rayleigh_ritz, "reads_freely", lambda _, freely=freely: freely)
        p, values, q = rayleigh_ritz.small_svd(triangle)
        eye = torch.eye(count, dtype=dtype).expand(3, -1, -1)
        assert_close(p.mH @ p, eye, rtol=0, atol=rounding(p))
        assert_close(q.mH @ q, eye, rtol=0, atol=rounding(p))
        assert_close(values.double(), sigma, rtol=0, atol=rounding(p) * scale)
        made = wide(p) * values.unsqueeze(-2) @ wide(q).mH
        assert_close(made, wide(triangle), rtol=0, atol=rounding(p) * scale)
        diagonal = p.diagonal(dim1=-2, dim2=-1)
        assert (diagonal.real >= 0).all()
        if dtype.is_complex:
            assert (diagonal.imag.abs() <= rounding(p)).all()


@pytest.mark.parametrize("dtype", WIDE)
def test_a_step_takes_the_same_vectors_by_both_forms(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, u = drawn(2, 7, 5, dtype=dtype), drawn(2, 3, 7, seed=1, dtype=dtype)
    right = step(W, u)
    monkeypatch.setattr(rayleigh_ritz, "reads_freely", lambda _: False)
    for found, one in zip(step(W, u), right, strict=True):
        assert_close(found, one, rtol=1e-4, atol=1e-5)


# A weight whose second singular value overtakes its first


SIGMA = ("power", "rayleigh-ritz")


def crossing(t: float) -> Tensor:
    """Values 1.5 and 1 that become 1 and 1.5, beside smaller ones, with vectors that stay."""
    values = torch.tensor([1.5 - 0.5 * t, 1.0 + 0.5 * t, 0.5, 0.3, 0.2, 0.1], dtype=torch.float64)
    left, right = (torch.linalg.qr(drawn(rows, 6, seed=rows))[0] for rows in (8, 6))
    return left * values @ right.mT


def worst_excess(layer: nn.Linear, update: str) -> float:
    """How far the norm of the weight in use is from 1, at worst in 100 steps of a change."""
    worst = 0.0
    for index in range(101):
        with torch.no_grad():
            original_of(layer).copy_(crossing(index / 100))
        if update == "step":
            snparam.update(layer)
        with torch.no_grad():
            layer(torch.zeros(1, 6, dtype=torch.float64))
            used = (
                layer.weight if update == "step" else original_of(layer) / norm_of(layer).sv[0, 0]
            )
        worst = max(worst, abs(float(exact(used)[0]) - 1))
    return worst


@pytest.mark.parametrize("update", ["forward", "step"])
@pytest.mark.parametrize("num_svs", [2, 3])
def test_it_follows_a_second_value_that_overtakes_the_first(num_svs: int, update: str) -> None:
    found = {}
    for sigma in SIGMA:
        layer = nn.Linear(6, 8, bias=False, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(crossing(0.0))
        snparam.register_sn(layer, num_svs, sigma=sigma, update=update)
        found[sigma] = worst_excess(layer, update)
    assert found["rayleigh-ritz"] <= 1e-3
    assert found["power"] > 0.05


def network() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4)
    )
    with torch.no_grad():
        for parameter in net.parameters():
            drawn_ = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            parameter.copy_(drawn_)
    return net


def excess_in_training(sigma: str, num_svs: int, steps: int = 40) -> float:
    """How far a norm exceeds 1, at worst, in what training forwards use, at a high rate."""
    net = snparam.convert_model(network(), num_svs, sigma=sigma, update="step")
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    worst = 0.0
    for index in range(steps):
        x = drawn(32, 12, seed=index).float()
        target = torch.stack([x[:, :4].sin(), x[:, 4:8] * x[:, 8:]]).sum(0)
        optimizer.zero_grad()
        (net(x) - target).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            norms = [float(exact(net[at].weight)[0]) for at in (0, 2, 4)]
        worst = max(worst, max(norms) - 1)
    return worst


def test_a_network_trained_at_a_high_rate_stays_at_its_bound() -> None:
    assert excess_in_training("power", 4) > 0.05
    assert excess_in_training("rayleigh-ritz", 4) < 5e-3
    assert excess_in_training("rayleigh-ritz", 2) < 0.7 * excess_in_training("power", 2)


# With everything that the classic iteration works with


def layers(sigma: str = "rayleigh-ritz", num_svs: int = 3, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh()).double()
    return snparam.convert_model(net, num_svs, sigma=sigma, init="random", **options)


def states(net: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def train(net: nn.Module, run: Any, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for index in range(steps):
        optimizer.zero_grad()
        run(drawn(4, 6, seed=index)).square().sum().backward()
        optimizer.step()
    return net


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert_close(p, q, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_training_moves_the_state_by_its_steps() -> None:
    """Each forward is a step of a plain loop: a classic step, turned by an exact decomposition."""
    net = layers(num_itrs=2)
    matrix, u = matrix_of(original_of(net[0])), norm_of(net[0]).u[0].clone()
    net(drawn(4, 6))
    for _ in range(2):
        v = torch.linalg.qr((u @ matrix).mT)[0].mT
        left, values, _ = torch.linalg.svd((v @ matrix.mT).mT, full_matrices=False)
        u = left.mT
    found = norm_of(net[0])
    assert_close(found.sv[0], values)
    assert_close((found.u[0] @ u.mT).abs(), torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("update", ["forward", "step"])
def test_a_compiled_network_trains_as_the_eager_one(update: Any) -> None:
    eager, other = (layers(update=update, num_svs=2) for _ in range(2))
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    assert_same(train(eager, eager), train(other, compiled))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("update", ["forward", "step"])
def test_a_checkpointed_network_trains_as_the_other(update: Any, reentrant: bool) -> None:
    plain, other = layers(update=update), layers(update=update)

    def run(x: Tensor) -> Tensor:
        return checkpoint(other, x.requires_grad_(), use_reentrant=reentrant)

    assert_same(train(plain, plain), train(other, run))


@pytest.mark.parametrize("update", ["forward", "step"])
def test_evaluating_moves_nothing_and_takes_one_step(update: Any) -> None:
    net = train(layers(update=update), layers(update=update)).eval()
    before = states(net)
    weight, norm = original_of(net[0]).detach(), norm_of(net[0])
    right = step(weight[None], norm.u)
    assert_close(net[0].weight, weight / right.sv[0, 0])
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), states(net).values(), strict=True)
    )


@pytest.mark.parametrize("spelling", ["snparam", "torch", "torch-hook", "biggan", "plain"])
def test_each_spelling_takes_a_state_across(spelling: str) -> None:
    one = layers()
    net, other = train(one, one, 20).eval(), layers().eval()
    snparam.refresh(net)
    if spelling == "snparam":
        saved = net.state_dict()
    elif spelling == "plain":
        saved = snparam.plain_state_dict(net, bake=False)
    else:
        saved = snparam.state_dict_for(net, spelling)
    other.load_state_dict(saved)
    x = drawn(4, 6)
    assert_close(other(x), net(x), rtol=1e-6, atol=1e-8)
    assert_close(norm_of(other[0]).sv, norm_of(net[0]).sv, rtol=1e-3, atol=0)


def test_baking_leaves_what_is_evaluated() -> None:
    one = layers()
    net, x = train(one, one).eval(), drawn(4, 6)
    before = net(x)
    snparam.restore_model(net, bake=True)
    assert_close(net(x), before, rtol=1e-12, atol=1e-12)
