"""Learned gains in optimizers: which they are, and a warning where nobody trains them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import snparam


def network(**options: Any) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    return snparam.convert_model(model, gain="learned", **options)


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.fixture
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def gains_of(model: nn.Sequential) -> list[Any]:
    return [model[i].parametrizations.weight[0].gain for i in (0, 2)]


def test_gain_parameters_are_the_learned_gains_each_once() -> None:
    model = network()
    found = snparam.gain_parameters(model)
    assert [id(gain) for gain in found] == [id(gain) for gain in gains_of(model)]
    assert all(isinstance(gain, nn.Parameter) for gain in found)
    tied = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    tied["head"].weight = tied["embed"].weight
    assert len(snparam.gain_parameters(snparam.convert_model(tied, gain="learned"))) == 1
    for options in ({}, {"gain": "fixed"}):
        assert snparam.gain_parameters(snparam.convert_model(nn.Linear(3, 2), **options)) == []


def test_decay_in_parameter_groups_is_for_the_gains_alone() -> None:
    model = network()
    others, gains = snparam.parameter_groups(model, weight_decay=0.0)
    assert list(others) == ["params"]
    assert gains == {"params": gains_of(model), "weight_decay": 0.0}
    optimizer = torch.optim.SGD([others, gains], lr=0.1, weight_decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    every = {id(parameter) for parameter in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == every


def test_an_optimizer_that_was_built_before_the_conversion_warns_once() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    snparam.convert_model(model, gain="learned")
    before = [gain.clone() for gain in snparam.gain_parameters(model)]
    message = r"'0\.weight' \(5, 6\) and 1 more.*this SGD.*add_param_group.*gain_parameters"
    with pytest.warns(UserWarning, match=message) as warned:
        train(model, optimizer, steps=5)
    assert len(warned) == 1
    for gain, start in zip(snparam.gain_parameters(model), before, strict=True):
        assert torch.equal(gain, start)


def test_what_the_warning_says_to_do_trains_the_gains(silence: None) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    snparam.convert_model(model, gain="learned")
    before = [gain.clone() for gain in snparam.gain_parameters(model)]
    optimizer.add_param_group({"params": snparam.gain_parameters(model), "weight_decay": 0.0})
    train(model, optimizer)
    for gain, start in zip(snparam.gain_parameters(model), before, strict=True):
        assert not torch.equal(gain, start)


@pytest.mark.parametrize("gains_first", [True, False])
def test_gains_in_an_optimizer_of_their_own_do_not_warn(silence: None, gains_first: bool) -> None:
    model = network()
    others, gains = (group["params"] for group in snparam.parameter_groups(model))
    optimizers = [torch.optim.SGD(gains, lr=0.1), torch.optim.Adam(others)]
    train(model, *(optimizers if gains_first else reversed(optimizers)))


def test_who_does_not_train_the_weight_or_the_gain_on_purpose_is_not_warned(silence: None) -> None:
    model = network()
    train(model, torch.optim.SGD([model[0].bias], lr=0.1))
    for gain in snparam.gain_parameters(model):
        gain.requires_grad_(False)
    others, _ = snparam.parameter_groups(model)
    train(model, torch.optim.SGD(others["params"], lr=0.1))


def test_a_restored_network_does_not_warn(silence: None) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    snparam.convert_model(model, gain="learned")
    train(model, optimizer, steps=1)
    snparam.restore_model(model)
    train(model, optimizer)


def test_closures_count_as_one_step_each() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    snparam.convert_model(model, gain="learned")
    x = torch.randn(4, 6)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)
    with pytest.warns(UserWarning, match="this LBFGS"):
        optimizer.step(closure)
