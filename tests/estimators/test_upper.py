"""Certified weights in use: however they are read, no norm exceeds what it is held at."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.convolutions import exact_norm, ignores_same, layers
from helpers.holder import held, norm_of, original_of, used
from helpers.hostile import KINDS, hostile, norms_in_long_double
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import snparam
from snparam.estimators import upper as subject
from snparam.testing import weights

REAL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def exceeds(weight: Tensor, c: float) -> bool:
    """Whether the norm of a matrix is certainly above c."""
    weight = weight.detach().flatten(1)
    if weight.is_complex():
        real, imaginary = weight.real, weight.imag
        weight = torch.cat([torch.cat([real, -imaginary], 1), torch.cat([imaginary, real], 1)])
    (norm,) = norms_in_long_double(weight[None])
    return bool(norm * (1 - np.longdouble(4e-18)) > c)


def all_in_use(layer: nn.Module) -> list[Tensor]:
    """The weight as training, frozen, eval and inference read it, and as it is baked."""
    found = [layer.train()().detach()]
    with snparam.frozen(layer):
        found.append(layer().detach())
    found += [used(layer), snparam.weight_in_use(layer)]
    with torch.inference_mode():
        found.append(layer.eval()().clone())
    return [*found, snparam.restore_model(layer).weight.detach()]


@settings(max_examples=60)
@given(
    weight=weights(dtypes=(*REAL, torch.complex64)),
    coeff=st.sampled_from((1.0, 0.3, 7.0, 1e-3)),
    soft=st.booleans(),
    update=st.sampled_from(("forward", "step")),
    data=st.data(),
)
def test_no_weight_in_use_exceeds_its_norm(
    weight: Tensor, coeff: float, soft: bool, update: Any, data: Any
) -> None:
    count = data.draw(st.integers(1, min(3, *weight.flatten(1).shape)))
    options: Any = {"coeff": coeff, "soft": soft, "update": update, "sigma": "upper"}
    for in_use in all_in_use(held(weight, count, **options)):
        assert in_use.dtype == weight.dtype
        assert not exceeds(in_use, coeff)


@pytest.mark.parametrize("dtype", REAL)
def test_weights_are_held_closely(dtype: torch.dtype) -> None:
    """To rounding of their own dtype, times what rounding entries can do to a norm."""
    for seed, kind in enumerate(KINDS):
        weight = hostile(kind, 1, 12, 20, seed)[0].to(dtype)
        in_use = used(held(weight, sigma="upper"))
        (norm,) = norms_in_long_double(in_use[None])
        assert norm <= 1
        assert norm >= 1 - 16 * torch.finfo(dtype).eps - 1e-9


def test_classic_normalisation_exceeds_it() -> None:
    exceeding = 0
    for seed, kind in enumerate(KINDS):
        weight = hostile(kind, 1, 12, 20, seed)[0].float()
        exceeding += exceeds(used(held(weight)), 1.0)
    assert exceeding > 0


def test_a_soft_bound_leaves_smaller_weights_to_the_bit() -> None:
    weight = hostile("gaussian", 1, 6, 9, 0)[0].float()
    norm = float(torch.linalg.svdvals(weight.double())[0])
    for factor in (1 + 1e-8, 1.0001, 1.5):
        layer = held(weight, sigma="upper", coeff=norm * factor, soft=True)
        assert torch.equal(used(layer), weight)
        assert torch.equal(layer.train()().detach(), weight)
    assert not torch.equal(used(held(weight, sigma="upper", coeff=norm / 2, soft=True)), weight)


@pytest.mark.parametrize("broken", [0.0, float("nan")])
def test_a_weight_without_a_norm_is_left_as_it_is(broken: float) -> None:
    layer = held(torch.ones(3, 4), sigma="upper")
    with torch.no_grad():
        original_of(layer).fill_(broken)
    for in_use in (layer.train()().detach(), used(layer)):
        assert torch.equal(in_use.isnan(), original_of(layer).detach().isnan())
        assert (in_use.nan_to_num() == 0).all()


def test_blocks_are_certified_each() -> None:
    weight = torch.cat([hostile("gaussian", 1, 4, 6, seed)[0] * 10.0**seed for seed in range(3)])
    in_use = used(held(weight.float(), sigma="upper", blocks=3))
    for part in in_use.chunk(3):
        assert not exceeds(part, 1.0)
        assert float(torch.linalg.svdvals(part.double())[0]) > 1 - 1e-5


def network(update: Any, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))
    return snparam.convert_model(net, sigma="upper", update=update, **options)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("update", ["forward", "step"])
def test_training_never_exceeds_it(update: Any, fused: bool) -> None:
    """At a rate at which an estimate is far off: in each forward, and in eval after each step."""
    net = network(update, num_svs=2)
    optimizer = torch.optim.Adam(net.parameters(), 0.1, fused=fused)
    for index in range(12):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(index))
        net.train()
        optimizer.zero_grad()
        (net(x) - x.flip(1)).square().mean().backward()
        if update == "step":
            with torch.no_grad():
                assert not any(exceeds(layer.weight, 1.0) for layer in (net[0], net[2]))
        optimizer.step()
        if index % 2:
            net.eval()(x)
        assert not any(exceeds(snparam.weight_in_use(layer), 1.0) for layer in (net[0], net[2]))


@pytest.mark.parametrize("update", ["forward", "step"])
def test_the_gradient_keeps_the_length_of_the_weight(update: Any) -> None:
    """The weight in use does not change with the length of W, so that ⟨∂, W⟩ is 0, and else it is
    that of a multiple of the exact norm."""
    weight = hostile("gaussian", 1, 5, 7, 3)[0]
    weighting = hostile("gaussian", 1, 5, 7, 4)[0]
    layer = held(weight, 2, sigma="upper", update=update)
    source = weight.clone().requires_grad_()
    ((source / torch.linalg.svdvals(source)[0]) * weighting).sum().backward()
    for training in (True, False):
        layer.train(training).zero_grad()
        (layer() * weighting).sum().backward()
        gradient = original_of(layer).grad
        assert abs(float((gradient * weight).sum())) < 1e-12
        assert_close(gradient, source.grad, rtol=1e-3, atol=1e-3)


def certificates(run: Any) -> int:
    """How many bounds are computed in a function."""
    with mock.patch.object(subject, "matrix_bounds", wraps=subject.matrix_bounds) as counted:
        run()
    return counted.call_count


@pytest.mark.parametrize("update", ["forward", "step"])
def test_eval_reads_use_a_certificate_until_the_weight_changes(update: Any) -> None:
    layer = held(torch.randn(4, 5), sigma="upper", update=update).eval()
    assert certificates(layer) == 1
    assert certificates(layer) == 0
    with torch.inference_mode():
        assert certificates(layer) == 0
    with torch.no_grad():
        original_of(layer).mul_(3)
    assert certificates(layer) == 1
    assert not exceeds(layer(), 1.0)
    original = original_of(layer)
    layer.parametrizations.weight.original = nn.Parameter(original.detach() * 5)
    assert certificates(layer) == 1
    assert not exceeds(layer(), 1.0)
    layer.double()
    assert certificates(layer) == 1
    assert not exceeds(layer(), 1.0)


def test_to_verify_a_smaller_norm_is_no_drift() -> None:
    """A bound for every size of the input holds a convolution below 1 at each of them."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
    images = torch.zeros(1, 3, 5, 5)
    snparam.convert_model(model, sigma="upper", norm="operator", example_inputs=images)
    (row,) = snparam.verify(model.eval(), tolerance=0.0)
    assert row.exact < 0.98 * row.intended
    original = original_of(model[0])
    with torch.no_grad():
        original.data.mul_(3)  # which the certificate cannot see
    with pytest.raises(RuntimeError, match="drift by more than"):
        snparam.verify(model, tolerance=0.0)


@pytest.mark.parametrize("update", ["forward", "step"])
def test_a_step_that_torch_does_not_count_ends_a_certificate(update: Any) -> None:
    """Fused optimizers write to a weight without moving its version."""
    layer = held(torch.randn(30, 20), sigma="upper", update=update).eval()
    original = original_of(layer)
    optimizer = torch.optim.Adam([original], 0.5, fused=True)
    for _ in range(2):
        assert not exceeds(used(layer), 1.0)
        original.grad = torch.randn_like(original)
        optimizer.step()
    assert not exceeds(used(layer), 1.0)


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(list(parameters), 0.5, fused=True)


def stepped(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_other_parameters_in_the_place_of_a_weight_are_certified_after_fused_steps() -> None:
    layer = nn.Sequential(held(torch.randn(30, 20), sigma="upper")).eval()
    values = {name: nn.Parameter(p.detach().clone()) for name, p in layer.named_parameters()}
    optimizer = fused(values.values())

    def in_use() -> Tensor:
        return torch.func.functional_call(layer[0], {"parametrizations.weight.original": value}, ())

    (value,) = values.values()
    for _ in range(2):
        assert not exceeds(in_use(), 1.0)
        stepped(optimizer)
    assert not exceeds(in_use(), 1.0)


def test_a_step_that_raises_ends_certificates_too() -> None:
    layer = held(torch.randn(30, 20), sigma="upper").eval()
    original = original_of(layer)

    class Raises(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            original.data.mul_(3)  # as a fused kernel writes, uncounted
            raise ArithmeticError

    assert not exceeds(used(layer), 1.0)
    with pytest.raises(ArithmeticError):
        Raises([original], 0.1).step()
    assert not exceeds(used(layer), 1.0)


def test_an_outer_optimizer_that_writes_last_is_followed() -> None:
    layer = held(torch.randn(30, 20), sigma="upper", update="step")
    inner = fused([original_of(layer)])

    class Outer(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            stepped(inner)
            original_of(layer).data.mul_(3)

    Outer([original_of(layer)], 0.1).step()
    assert not exceeds(layer.train()(), 1.0)


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_write_between_reads_that_share_an_estimate_is_certified(is_cached: bool) -> None:
    class Writes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            first = self.weight.detach()
            with torch.no_grad():
                original_of(self).mul_(5)
                return torch.stack([first, self.weight])

    layer = snparam.register_sn(Writes(20, 30), sigma="upper", name="weight")
    with snparam.cached(layer) if is_cached else contextlib.nullcontext():
        for weight in layer(torch.zeros(1, 20)):
            assert not exceeds(weight, 1.0)


def test_half_precision_is_divided_by_more_than_it_can_hold() -> None:
    layer = held(torch.full((40, 40), 6e3, dtype=torch.float16), sigma="upper")  # of norm 2.4e5
    assert not exceeds(used(layer), 1.0)
    assert float(torch.linalg.matrix_norm(used(layer).double(), 2)) > 0.98


def test_a_graph_does_not_use_a_number_that_a_cast_has_rounded() -> None:
    net = network("step")
    snparam.update(net)
    net.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="cannot certify"):
        torch.compile(net, backend="eager", fullgraph=True)(torch.zeros(2, 6).bfloat16())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch to those who trace
def test_a_transform_leaves_no_certificate_behind() -> None:
    layer = held(torch.randn(5, 4), sigma="upper").eval()

    def total(value: Tensor) -> Tensor:
        named = {"parametrizations.weight.original": value}
        return torch.func.functional_call(layer, named, ()).sum()

    torch.func.grad(total)(original_of(layer))
    torch.jit.trace(layer.requires_grad_(False), ())
    assert not exceeds(used(layer), 1.0)


def test_forwards_after_a_step_of_the_optimizer_certify_nothing() -> None:
    net = network("step")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(torch.ones(2, 6)).sum().backward()
    assert certificates(optimizer.step) == 2
    assert certificates(lambda: net(torch.ones(2, 6))) == 0


@pytest.mark.parametrize("update", ["forward", "step"])
def test_a_loaded_number_is_certified_anew(update: Any) -> None:
    """What another estimator has saved is an estimate, and what others write is anything."""
    torch.manual_seed(0)
    state = snparam.convert_model(nn.Sequential(nn.Linear(6, 8)), update=update).state_dict()
    state["0.parametrizations.weight.0.sv"].mul_(0.5)
    net = snparam.convert_model(nn.Sequential(nn.Linear(6, 8)), update=update, sigma="upper")
    net.load_state_dict(state)
    for training in (True, False):
        with torch.no_grad():
            assert not exceeds(net.train(training)[0].weight, 1.0)
    snparam.update(net) if update == "step" else None
    norm_of(net[0]).sv.mul_(0.5)
    with torch.no_grad():
        assert not exceeds(net.train()[0].weight, 1.0)


@pytest.mark.parametrize("update", ["forward", "step"])
def test_a_saved_network_gives_the_same_weights(update: Any) -> None:
    net, other = network(update), network(update)
    with torch.no_grad():
        original_of(net[0]).mul_(2)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()[0].weight, net.eval()[0].weight)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("update", ["forward", "step"])
def test_a_checkpointed_network_trains_as_the_other(update: Any, reentrant: bool) -> None:
    def trained(run: Any) -> list[Tensor]:
        net = network(update).double()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for index in range(3):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(index)).double()
            optimizer.zero_grad()
            run(net, x.requires_grad_()).square().sum().backward()
            optimizer.step()
        return [*(p.detach() for p in net.parameters()), *net.buffers()]

    plain = trained(lambda net, x: net(x))
    other = trained(lambda net, x: checkpoint(net, x, use_reentrant=reentrant))
    for one, right in zip(other, plain, strict=True):
        assert_close(one, right, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("spelling", ["torch", "torch-hook", "biggan"])
def test_layers_that_divide_by_estimates_cannot_say_it(spelling: str) -> None:
    net = network("forward")
    with pytest.raises(ValueError, match="sigma='upper' divides it by a certified bound"):
        snparam.state_dict_for(net, spelling)
    plain = snparam.state_dict_for(net, "plain")
    assert torch.equal(plain["0.weight"], net.eval()[0].weight)


def test_a_compiled_network_trains_as_the_eager_one() -> None:
    def trained(compiled: bool) -> list[Tensor]:
        net = network("step").double()
        snparam.update(net)
        run = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for index in range(3):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(index)).double()
            optimizer.zero_grad()
            run(x).square().sum().backward()
            optimizer.step()
        net.eval()
        return [run(torch.ones(2, 6).double()).detach(), *(p.detach() for p in net.parameters())]

    for eager, compiled in zip(trained(False), trained(True), strict=True):
        assert_close(compiled, eager, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("update", ["forward", "step"])
def test_a_graph_without_a_certificate_is_refused(update: Any) -> None:
    run = torch.compile(network(update), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="a compiled graph cannot certify"):
        run(torch.ones(2, 6))


@ignores_same
@settings(max_examples=30)
@given(drawn=layers(), update=st.sampled_from(("forward", "step")), grown=st.integers(1, 4))
def test_a_certified_convolution_is_held_at_every_size(drawn: Any, update: Any, grown: int) -> None:
    layer, size = drawn
    snparam.register_sn(layer, norm="operator", input_size=size, sigma="upper", update=update)
    for training in (True, False):
        with torch.no_grad():
            in_use = layer.train(training).weight.clone()
        plain = type(layer).__mro__[1](1, 1, 1)
        plain.__dict__.update({k: v for k, v in layer.__dict__.items() if not k.startswith("_p")})
        plain._parameters = {"weight": nn.Parameter(in_use), "bias": None}
        plain._modules = {}
        for n in (size, tuple(length + grown for length in size)):
            assert exact_norm(plain, n) <= 1 + 1e-13


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": "learned"}, "sigma='upper' with constraint='gain'.*leave out gain"),
        ({"constraint": "gain"}, "sigma='upper' with constraint='gain'"),
    ],
)
def test_what_has_no_certificate_is_refused(options: Any, message: str) -> None:
    layer = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=message):
        snparam.register_sn(layer, sigma="upper", **options)
    assert type(layer) is nn.Linear


def test_a_norm_below_what_rounding_reaches_is_refused() -> None:
    layer = held(torch.ones(64, 64, dtype=torch.float16), sigma="upper", coeff=1e-6)
    with pytest.raises(ValueError, match="coeff=1e-06 is too small for a matrix of 4096 entries"):
        used(layer)
