"""norm="operator" in training: gradients, both updates, and what trains around it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.convolutions import exact_norm, ignores_same, layers
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import snparam

pytestmark = ignores_same

# Weights whose largest singular value stands apart, so that its vectors are determined.
KINDS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "zeros": (lambda: nn.Conv2d(2, 3, 3, padding=1, stride=2), (5, 6)),
    "circular": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (4, 5)),
    "reflect": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect", groups=1), (7,)),
    "groups": (lambda: nn.Conv1d(2, 4, 3, groups=2, dilation=2), (9,)),
    "transposed": (
        lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1),
        (3, 4),
    ),
    "volume": (lambda: nn.Conv3d(1, 2, 2), (3, 3, 4)),
}
DIFFERENTIABLE = sorted(set(KINDS) - {"circular"})  # there a largest value may be a double one


def layer_of(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    make, _ = KINDS[kind]
    layer = make().to(dtype)
    generator = torch.Generator().manual_seed(1)
    shape = layer.weight.shape
    layer.weight.data = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    layer.bias.data = torch.linspace(-1, 1, len(layer.bias), dtype=dtype)
    return layer


def registered(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    layer = layer_of(kind, dtype)
    snparam.register_sn(layer, norm="operator", input_size=KINDS[kind][1], **options)
    for _ in range(100):
        if options.get("update") == "step":
            snparam.update(layer)
        else:
            layer.weight  # noqa: B018 - a read in training mode moves the state
    return layer


def inputs(kind: str, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    make, size = KINDS[kind]
    generator = torch.Generator().manual_seed(2)
    shape = (batch, make().in_channels, *size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def norm_of(layer: Any) -> Any:
    return layer.parametrizations.weight[0]


def matrix_with(kind: str, weight: Tensor) -> Tensor:
    """The matrix of the convolution with a weight, column by column, differentiable in it."""
    layer, size = KINDS[kind][0](), KINDS[kind][1]
    del layer.weight
    layer.weight, layer.bias = weight, None
    entries = layer.in_channels * math.prod(size)
    images = layer(torch.eye(entries, dtype=weight.dtype).view(entries, layer.in_channels, *size))
    return images.reshape(entries, -1).T


def plain_norm(kind: str, weight: Tensor) -> Tensor:
    """σ of the convolution with a weight, from its matrix, differentiable in the weight."""
    return torch.linalg.matrix_norm(matrix_with(kind, weight), 2)


@pytest.mark.parametrize("kind", DIFFERENTIABLE)
@pytest.mark.parametrize("update", ["forward", "step"])
def test_the_gradient_is_that_of_the_division_by_the_exact_norm(kind: str, update: Any) -> None:
    layer, x = registered(kind, update=update), inputs(kind)
    original = layer.parametrizations.weight.original
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), original)
    plain = layer_of(kind)
    weight = original.detach().clone().requires_grad_()
    used = weight / plain_norm(kind, weight)
    output = torch.func.functional_call(plain, {"weight": used}, (x,))
    (expected,) = torch.autograd.grad(output.square().sum(), weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


OPTIONS = [{}, {"gain": "learned"}, {"coeff": 0.5, "soft": True}]


@pytest.mark.parametrize("kind", DIFFERENTIABLE)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_first_and_second_derivatives_are_those_with_u_and_v_held(
    kind: str, training: bool, options: dict[str, Any]
) -> None:
    """The plain form: σ(W) = Re(uᴴ W v) by the explicit matrix of W, and torch's own division."""
    layer = registered(kind, update="step", **options).train(training)
    norm, original = norm_of(layer), layer.parametrizations.weight.original
    estimate = norm.estimate(original)
    u, v = estimate.u[0, 0], estimate.v[0, 0]

    def plain() -> Tensor:
        sigma = u @ matrix_with(kind, original) @ v
        if options.get("soft"):
            return original / (sigma / 0.5)  # σ exceeds the bound for all of these weights
        return original * norm.gain.detach() / sigma if "gain" in options else original / sigma

    assert float(norm.sv[0, 0]) > 0.5
    direction = torch.linspace(-1, 2, original.numel(), dtype=torch.float64).view_as(original)
    derivatives = []
    for used in (layer.weight, plain()):
        (first,) = torch.autograd.grad((used * direction).sum(), original, create_graph=True)
        (second,) = torch.autograd.grad((first * direction.cos()).sum(), original)
        derivatives.append((used.detach(), first.detach(), second))
    for found, expected in zip(*derivatives, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@settings(max_examples=40)
@given(drawn=layers(torch.float32))
def test_the_state_follows_a_weight_that_is_trained(drawn: Any) -> None:
    layer, size = drawn
    snparam.register_sn(layer, norm="operator", input_size=size, update="step")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    x = torch.randn(2, layer.in_channels, *size, generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    for _ in range(100):
        snparam.update(layer)
    exact = exact_norm(layer.eval(), size)
    assert exact == pytest.approx(1 if layer.weight.any() and exact else 0, rel=2e-2)
    assert exact >= 1 - 1e-5 or not exact


def test_an_optimizer_moves_the_states_of_layers_that_are_alike() -> None:
    """Small weights of one shape are moved as one stack; convolutions cannot be put into one."""
    layers_alike = [layer_of("zeros") for _ in range(2)]
    layers_alike[1].weight.data.mul_(2).sub_(0.5)
    model = nn.Sequential(*layers_alike)
    for layer in model:
        snparam.register_sn(layer, norm="operator", input_size=(5, 6), update="step", num_itrs=50)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model[0](inputs("zeros")).square().sum() + model[1](inputs("zeros")).sum()).backward()
    optimizer.step()
    for layer in model:
        exact = plain_norm("zeros", layer.parametrizations.weight.original.detach())
        assert float(norm_of(layer).sv) == pytest.approx(float(exact), rel=1e-4)


@pytest.mark.parametrize("sigma", ["power", "rayleigh-ritz"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_several_singular_values_are_tracked(kind: str, sigma: str) -> None:
    layer = registered(kind, num_svs=3, sigma=sigma)
    matrix = matrix_with(kind, layer_of(kind).weight.detach())
    expected = torch.linalg.svdvals(matrix)[:3]
    torch.testing.assert_close(norm_of(layer).sv[0], expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(norm_of(layer).sv[0, 0], expected[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("kind", "update"), [("reflect", "forward"), ("transposed", "step")])
def test_a_compiled_layer_computes_the_same(kind: str, update: Any) -> None:
    torch.compiler.reset()
    layer = registered(kind, torch.float32, update=update)
    x = inputs(kind, dtype=torch.float32)
    other = copy.deepcopy(layer)
    compiled: Any = torch.compile(other, backend="aot_eager")
    for training in (True, False):
        layer.train(training)
        other.train(training)
        results = []
        for module, call in ((layer, layer), (other, compiled)):
            module.zero_grad()
            output = call(x)
            output.square().mean().backward()
            gradient = module.parametrizations.weight.original.grad
            results.append((output.detach(), gradient, norm_of(module).u))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("update", ["forward", "step"])
def test_a_checkpointed_region_uses_the_same_weight_again(update: Any, use_reentrant: bool) -> None:
    layer, x = registered("zeros", update=update), inputs("zeros").requires_grad_()
    other = copy.deepcopy(layer)
    layer(x).square().sum().backward()
    region: Any = checkpoint(other, x, use_reentrant=use_reentrant)
    region.square().sum().backward()
    gradients = [each.parametrizations.weight.original.grad for each in (layer, other)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(norm_of(layer).u, norm_of(other).u)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("kind", ["zeros", "reflect", "transposed"])
def test_traces_and_graphs_have_the_weight_in_use(kind: str) -> None:
    layer, x = registered(kind, torch.float32).eval(), inputs(kind, dtype=torch.float32)
    with torch.no_grad():
        expected = layer(x)
        torch.testing.assert_close(torch.jit.trace(layer, x)(x), expected)
        model = nn.Sequential(layer)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


def test_a_complex_convolution_has_norm_one() -> None:
    layer: Any = nn.Conv1d(2, 2, 3, padding=1, bias=False)
    generator = torch.Generator().manual_seed(0)
    layer.weight = nn.Parameter(torch.randn(2, 2, 3, dtype=torch.complex64, generator=generator))
    snparam.register_sn(layer, norm="operator", input_size=7)
    assert exact_norm(layer.eval(), (7,)) == pytest.approx(1, rel=1e-3)
    layer.train()
    x = torch.randn(1, 2, 7, dtype=torch.complex64, generator=generator)
    layer(x).abs().square().sum().backward()
    weight = layer.parametrizations.weight.original
    weight, gradient = weight.detach(), weight.grad
    assert gradient.is_complex()
    # A multiple of the weight is divided by a multiple of σ: nothing changes along the weight.
    along = (gradient.conj() * weight).sum().real
    assert abs(float(along)) < 1e-4 * float(gradient.norm() * weight.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_divided_by_a_norm_in_float32(dtype: torch.dtype) -> None:
    layer = layer_of("circular", torch.float32).to(dtype)
    snparam.register_sn(layer, norm="operator", input_size=(4, 5))
    assert layer.weight.dtype == dtype
    used = layer.weight.detach().double()
    sigma = float(plain_norm("circular", used))
    assert sigma == pytest.approx(1, rel=2e-2)


def test_refreshing_converges_to_a_weight_that_was_written_unseen() -> None:
    layer = layer_of("zeros")
    snparam.register_sn(layer, norm="operator", input_size=(5, 6), update="step")
    original = layer.parametrizations.weight.original
    original.data.copy_(torch.linspace(-1, 3, original.numel()).view_as(original))
    snparam.refresh(layer)
    expected = float(plain_norm("zeros", original.detach()))
    assert float(norm_of(layer).sv) == pytest.approx(expected, rel=1e-3)
    assert float(plain_norm("zeros", snparam.weight_in_use(layer))) == pytest.approx(1, rel=1e-3)


def test_channels_last_is_read_as_any_other_memory_format() -> None:
    layers_of_both = [layer_of("zeros"), layer_of("zeros").to(memory_format=torch.channels_last)]
    outputs = []
    for layer in layers_of_both:
        snparam.register_sn(layer, norm="operator", input_size=(5, 6), update="step")
        layer(inputs("zeros")).square().sum().backward()
        outputs.append((layer.weight.detach(), layer.parametrizations.weight.original.grad))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_convolution_that_sees_nothing_of_its_weight_is_left_as_it_is() -> None:
    """One pixel between zeros: only the middle of the kernel is seen, and here it is zero."""
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    layer.weight.data[0, 0, 1, 1] = 0.0
    before = layer.weight.detach().clone()
    snparam.register_sn(layer, norm="operator", input_size=(1, 1))
    assert torch.equal(layer.weight, before)
    F.mse_loss(layer(torch.ones(1, 1, 1, 1)), torch.ones(1, 1, 1, 1)).backward()
    gradient = layer.parametrizations.weight.original.grad
    assert gradient is not None
    assert gradient.isfinite().all()
