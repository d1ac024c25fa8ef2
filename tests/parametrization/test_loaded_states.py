"""A state that was loaded in snparam's own spelling: what it keeps, and what it does next."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.applied import divisor, plain_sigma, square
from helpers.holder import norm_of, original_of
from helpers.states import all_u, assert_moved, randomise
from torch import Tensor, nn

import snparam

UPDATES = ["forward", "step"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_svs": 2, "num_itrs": 2},
    {"blocks": 2},
    {"gain": "learned"},
]

with_options = pytest.mark.parametrize("options", OPTIONS, ids=str)
with_updates = pytest.mark.parametrize("update", UPDATES)
X = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6).sin()


def trained(update: Any, seed: int = 0, **options: Any) -> nn.Linear:
    """A layer some optimizer steps away from where it was registered."""
    layer = snparam.register_sn(square(seed=seed), update=update, **options)
    optimizer = torch.optim.SGD(layer.parameters(), 0.3)
    for _ in range(4):
        optimizer.zero_grad()
        (layer(X) - X.flip(1)).square().sum().backward()
        optimizer.step()
    return layer


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in module.named_buffers()}


def saved(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("assign", [False, True])
@with_options
@with_updates
def test_what_is_loaded_is_what_was_saved_to_the_bit(
    update: Any, options: dict[str, Any], assign: bool
) -> None:
    source = saved(trained(update, **options))
    # Any state, not only one that the weight would lead to.
    for key, value in source.items():
        if key.endswith((".u", ".sv")):
            value.mul_(1.25)
    layer = trained(update, seed=1, **options)
    layer.load_state_dict(source, assign=assign)
    found = layer.state_dict()
    assert found.keys() == source.keys()
    for key, value in source.items():
        assert torch.equal(found[key], value), key
    layer.eval()(X)
    layer.train()
    with snparam.frozen(layer):
        layer(X)
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in source.items())


@with_options
@with_updates
def test_training_goes_on_as_if_it_had_not_been_broken_off(
    update: Any, options: dict[str, Any]
) -> None:
    layer = trained(update, **options)
    resumed = snparam.register_sn(square(seed=1), update=update, **options)
    resumed.load_state_dict(saved(layer))
    assert torch.equal(resumed(X), layer(X))


@pytest.mark.parametrize("num_itrs", [1, 2])
@pytest.mark.parametrize("num_svs", [1, 2])
def test_the_first_training_forward_divides_by_the_loaded_sv_and_moves_nothing(
    num_svs: int, num_itrs: int
) -> None:
    layer = randomise(snparam.register_sn(square(), num_svs, num_itrs, update="step"))
    source = saved(layer)
    source["parametrizations.weight.0.sv"].copy_(torch.tensor([[7.0, 3.0]])[:, :num_svs])
    # Of a layer that an optimizer has trained: what is loaded is not what its hook has found.
    loading = trained("step", seed=1, num_svs=num_svs, num_itrs=num_itrs)
    loading.load_state_dict(source)
    before = buffers(loading)
    loading.eval()(X)  # which takes a step from u, and is no training forward
    loading.train()
    assert divisor(loading) == pytest.approx(7.0, rel=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in buffers(loading).items())
    for _ in range(2):  # after that forward it is like any that no optimizer has reached
        u = all_u(loading)
        sigma, _ = plain_sigma(loading, u[".weight"], num_itrs)
        assert divisor(loading) == pytest.approx(sigma, rel=1e-9)
        assert_moved(loading, u, num_itrs)


def test_a_move_after_a_load_leaves_what_was_loaded_in_use() -> None:
    """As where a checkpoint is loaded on the CPU, and the network then goes to its device."""
    layer = snparam.register_sn(nn.Linear(6, 6), init="random", update="step")
    source = saved(layer)
    source["parametrizations.weight.0.sv"].fill_(7.0)
    loading = snparam.register_sn(nn.Linear(6, 6), update="step")
    loading.load_state_dict(source)
    loading.double()
    u = norm_of(loading).u.clone()
    torch.testing.assert_close(7.0 * loading.weight, original_of(loading))
    assert torch.equal(norm_of(loading).u, u)


def test_the_gradient_of_the_first_training_forward_is_that_of_one_unstored_v() -> None:
    """With v = normalize(Wᵀu) and u, v constants: d(W/σ) for σ the loaded number."""
    layer = randomise(snparam.register_sn(square(), update="step"))
    layer.load_state_dict(saved(layer))
    norm, original = norm_of(layer), original_of(layer)
    u, sigma = norm.u[0, 0].clone(), norm.sv[0, 0].clone()
    upstream = torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6)
    (found,) = torch.autograd.grad(
        F.linear(torch.eye(6).double(), layer.weight), original, upstream
    )
    with torch.no_grad():
        v = F.normalize(original.mT @ u, dim=0)
        g = upstream.mT
        right = g / sigma - (g * original).sum() / sigma**2 * torch.outer(u, v)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("num_itrs", [1, 3])
def test_with_update_forward_the_first_training_forward_moves_from_the_loaded_u(
    num_itrs: int,
) -> None:
    source = saved(randomise(snparam.register_sn(square(), num_itrs=num_itrs)))
    layer = snparam.register_sn(square(seed=1), num_itrs=num_itrs)
    layer.load_state_dict(source)
    before = {".weight": source["parametrizations.weight.0.u"]}
    sigma, _ = plain_sigma(layer, before[".weight"], num_itrs)
    assert divisor(layer) == pytest.approx(sigma, rel=1e-9)
    assert_moved(layer, before, num_itrs)


def test_a_weight_that_changes_after_a_load_is_not_divided_by_the_loaded_sv() -> None:
    layer = randomise(snparam.register_sn(square(), update="step"))
    layer.load_state_dict(saved(layer))
    with torch.no_grad():
        original_of(layer).mul_(5.0)
    before = all_u(layer)
    sigma, _ = plain_sigma(layer, before[".weight"], 1)
    assert divisor(layer) == pytest.approx(sigma, rel=1e-9)
    assert_moved(layer, before, 1)


@with_updates
def test_a_copy_of_what_was_loaded_computes_what_it_computes_in_eval(update: Any) -> None:
    layer = randomise(snparam.register_sn(square(), update=update))
    layer.load_state_dict(saved(trained(update)))
    twin = copy.deepcopy(layer)
    assert torch.equal(layer.eval()(X), twin.eval()(X))
    before = all_u(twin.train())
    twin(X)
    assert_moved(twin, before, 1)  # copies take nothing on trust


@with_updates
def test_loading_in_the_middle_of_training_is_followed_by_the_next_step(update: Any) -> None:
    layer, source = trained(update), saved(trained(update, seed=1))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer.load_state_dict(source)
    layer(X).square().sum().backward()
    before = all_u(layer)
    optimizer.step()
    if update == "step":
        assert_moved(layer, before, 1)
        before = all_u(layer)
        sigma = float(norm_of(layer).sv)
        assert divisor(layer) == pytest.approx(sigma, rel=1e-9)
        assert torch.equal(norm_of(layer).u, before[".weight"])
    else:
        assert torch.equal(norm_of(layer).u, before[".weight"])
        layer(X)
        assert_moved(layer, before, 1)


def test_tied_weights_are_loaded_with_their_one_state() -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Embedding(6, 6, dtype=torch.float64), square())
        model[0].weight = model[1].weight
        return snparam.convert_model(model, update="step")

    source = saved(randomise(tied()))
    model = tied()
    model.load_state_dict(source)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in source.items())
    assert norm_of(model[0]) is norm_of(model[1])
    assert divisor(model[1]) == pytest.approx(float(norm_of(model[1]).sv), rel=1e-12)
