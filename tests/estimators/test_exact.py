"""The exact estimator: σ, its vectors and its gradient against full decompositions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.convolutions import exact_norm, ignores_same, layers
from helpers.holder import exact, held, norm_of, original_of, used
from helpers.matrices import WIDE, gram, matrices, rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import snparam
from snparam.estimators.estimate import ESTIMATORS, Estimate
from snparam.testing.tensors import weight_with

EXACT = ESTIMATORS["exact"]


def wide(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def moved(stack: Tensor, u: Tensor) -> Estimate:
    (found,) = EXACT.move([stack], [u], 1, 0.0)
    return found


@given(W=matrices(), count=st.integers(1, 4))
def test_values_are_those_of_the_decomposition(W: Tensor, count: int) -> None:
    """From any u: what a power iteration would start from does not matter."""
    count = min(count, *W.shape[1:])
    u = weight_with("gaussian", (1, count, W.shape[1]), seed=3, dtype=W.dtype)
    sigma = exact(W[0])
    scale = float(sigma[0])
    for found in (moved(W, u), EXACT.read(W, u, 0.0)):
        assert found.u.dtype == found.v.dtype == W.dtype
        assert_close(
            found.sv[0].double(), sigma[:count], rtol=0, atol=rounding(W) * scale + 2e-8 * scale
        )
        assert abs(float(found.sv[0, 0]) - scale) <= rounding(W) * scale + 1e-43


@given(W=matrices(), count=st.integers(1, 3))
def test_vectors_belong_to_their_values(W: Tensor, count: int) -> None:
    """V Wᵀ = Σ U, with orthonormal rows."""
    count = min(count, *W.shape[1:])
    u = weight_with("gaussian", (1, count, W.shape[1]), seed=3, dtype=W.dtype)
    u, v, sv, _ = moved(W, u)
    scale = float(exact(W[0])[0])
    if scale > 0:
        assert_close(gram(u)[0], torch.eye(count, dtype=W.dtype), rtol=0, atol=rounding(W))
        assert_close(gram(v)[0], torch.eye(count, dtype=W.dtype), rtol=0, atol=rounding(W))
    atol = rounding(W) * scale + 2e-8 * scale + 1e-43
    assert_close(wide(v[0]) @ wide(W[0]).mT, wide(sv[0])[:, None] * wide(u[0]), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("broken", [0.0, float("nan"), float("inf")])
def test_a_block_of_zeros_or_broken_keeps_its_u(dtype: torch.dtype, broken: float) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64).to(dtype)
    W[1] = 0.0
    if broken != 0:
        W[1, 2, 3] = broken
    u = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64).to(dtype)
    found = moved(W, u)
    assert torch.equal(found.u[1], u[1])
    assert float(found.sigma[1]) == 1.0
    assert not found.sv[1].any() if broken == 0 else not found.sv[1].isfinite().any()
    for block in (0, 2):
        assert_close(found.sv[block].double(), exact(W[block])[:2], rtol=1e-5, atol=0)


def test_a_stack_that_is_known_by_its_products_is_decomposed_as_its_entries() -> None:
    class Products:
        def __init__(self, matrices: Tensor) -> None:
            self.matrices, self.shape, self.dtype = matrices, matrices.shape, matrices.dtype
            self.device = matrices.device

        def left(self, u: Tensor) -> Tensor:
            return u @ self.matrices.conj()

        def right(self, v: Tensor) -> Tensor:
            return v @ self.matrices.mT

    for shape in ((2, 3, 5), (1, 6, 4)):
        W = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.complex128)
        u = W.new_zeros(shape[0], 2, shape[1])
        stack: Any = Products(W)
        assert_close(moved(stack, u).sv, moved(W, u).sv)
        assert_close(moved(stack, u).u, moved(W, u).u)


@pytest.mark.parametrize("update", ["forward", "step"])
def test_the_weight_in_use_has_norm_one_after_any_change(update: Any) -> None:
    """Where power iteration would need many steps to follow."""
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    layer = held(weight, 2, sigma="exact", update=update)
    with torch.no_grad():
        original_of(layer).copy_(weight.flip(0) * torch.tensor([1.0, -3.0, 0.2, 5.0]))
    layer.train()()
    assert_close(exact(layer.weight)[0], torch.tensor(1.0, dtype=torch.float64))
    assert_close(norm_of(layer).sv[0], exact(original_of(layer))[:2])
    assert_close(exact(used(layer))[0], torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("training", [True, False])
def test_its_gradient_is_that_of_the_decomposition(training: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, weighting = (torch.randn(5, 7, generator=generator, dtype=dtype) for _ in range(2))
    layer = held(weight, sigma="exact").train(training)
    (layer() * weighting.conj()).sum().real.backward()
    source = weight.clone().requires_grad_()
    normalised = source / torch.linalg.svdvals(source)[0]
    (normalised * weighting.conj()).sum().real.backward()
    assert_close(original_of(layer).grad, source.grad)


@ignores_same
@settings(max_examples=30)
@given(drawn=layers())
def test_a_convolution_is_decomposed_as_its_matrix(drawn: Any) -> None:
    layer, size = drawn
    norm = exact_norm(layer, size)
    snparam.register_sn(layer, norm="operator", input_size=size, sigma="exact")
    for training in (True, False):
        estimate = norm_of(layer.train(training)).estimate(original_of(layer).detach())
        assert abs(float(estimate.sigma) - norm) <= 1e-12 * norm or norm == 0


def test_blocks_are_decomposed_each() -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    layer = held(weight, 2, sigma="exact", blocks=3)
    parts = torch.stack([exact(part) for part in weight.chunk(3)])
    assert_close(norm_of(layer).sv, parts[:, :2])
    for part in used(layer).chunk(3):
        assert_close(exact(part)[0], torch.tensor(1.0, dtype=torch.float64))


def test_a_compiled_network_trains_as_the_eager_one() -> None:
    def trained(compiled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double()
        snparam.convert_model(net, 2, sigma="exact")
        run = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for index in range(3):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(index)).double()
            optimizer.zero_grad()
            run(x).square().sum().backward()
            optimizer.step()
        return [parameter.detach() for parameter in net.parameters()]

    for eager, compiled in zip(trained(False), trained(True), strict=True):
        assert_close(compiled, eager, rtol=1e-8, atol=1e-10)


def test_it_is_saved_and_restored() -> None:
    torch.manual_seed(0)
    net = snparam.convert_model(nn.Sequential(nn.Linear(4, 5), nn.Conv2d(2, 3, 3)), sigma="exact")
    other = snparam.convert_model(nn.Sequential(nn.Linear(4, 5), nn.Conv2d(2, 3, 3)), sigma="exact")
    other.load_state_dict(net.state_dict())
    in_use = net.eval()[1].weight.detach().clone()
    assert torch.equal(other.eval()[1].weight, in_use)
    assert snparam.verify(net).worst < 1e-6
    assert torch.equal(snparam.restore_model(net)[1].weight, in_use)
