"""Optimizer state across a conversion and back: as if the optimizer had been there all the time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import snparam
from snparam import optimizer_state_dict_for


class Network(nn.Module):
    """Square layers, whose moments fit each other's parameters; a tie, an LSTM, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 6)
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6))
        self.scale = nn.Parameter(torch.ones(6))
        self.attention = nn.MultiheadAttention(6, 2)
        self.lstm = nn.LSTM(6, 6)
        self.head = nn.Linear(6, 6)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.layers(self.embed(tokens)) * self.scale
        x, _ = self.attention(x, x, x)
        x, _ = self.lstm(x)
        out: Tensor = self.head(x)
        return out


def network() -> nn.Module:
    torch.manual_seed(0)
    return Network()


Build = Callable[[Any], torch.optim.Optimizer]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        tokens = torch.randint(0, 6, (4, 2), generator=generator)
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


BUILDS: dict[str, Build] = {
    "one group": lambda model: adam(model.parameters()),
    "two groups": lambda model: adam(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "lr": 1e-3},
        ]
    ),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9),
}


TAKES_NAMES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)
if TAKES_NAMES:
    BUILDS["names"] = lambda model: adam(model.named_parameters())


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_into_a_converted_network_it_goes_on_as_an_optimizer_from_before(build: Build) -> None:
    model = network()
    optimizer = build(model)
    train(model, optimizer, 1)
    saved, resumed = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)

    snparam.convert_model(model)  # the optimizer was there before
    train(model, optimizer, 2)

    snparam.convert_model(resumed)
    another = build(resumed)
    another.load_state_dict(optimizer_state_dict_for(resumed, another, "snparam", saved))
    train(resumed, another, 2)
    same(model, resumed)


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_out_of_a_converted_network_it_goes_on_as_an_optimizer_from_before(build: Build) -> None:
    model = snparam.convert_model(network())
    optimizer = build(model)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer_state_dict_for(model, optimizer, "plain"))
    resumed = network()
    resumed.load_state_dict(snparam.plain_state_dict(model, bake=False))
    resumed.head.weight = resumed.embed.weight
    another = build(resumed)
    another.load_state_dict(saved)

    snparam.restore_model(model, bake=False)
    train(model, optimizer, 2)
    train(resumed, another, 2)
    same(model, resumed)


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_there_and_back_is_the_same_state(build: Build) -> None:
    model = network()
    optimizer = build(model)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    snparam.convert_model(model)
    another = build(model)
    ours = optimizer_state_dict_for(model, another, "snparam", saved)
    another.load_state_dict(ours)
    for given in (None, ours):
        back = optimizer_state_dict_for(model, another, "plain", given)
        assert back["param_groups"] == saved["param_groups"]
        assert back["state"].keys() == saved["state"].keys()
        for number, state in saved["state"].items():
            for key, value in state.items():
                assert value is None or torch.equal(back["state"][number][key], value)


def test_without_it_the_moments_are_those_of_other_parameters() -> None:
    """What the function is for: torch takes the numbers, and fails later or not at all."""
    model = network()
    optimizer = adam(model.parameters())
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    snparam.convert_model(model)
    another = adam(model.parameters())
    another.load_state_dict(saved)
    with pytest.raises(RuntimeError):
        train(model, another, 2)


@pytest.mark.parametrize("grouped", [True, False])
def test_gains_begin_anew_and_are_left_behind(grouped: bool) -> None:
    model = network()
    optimizer = adam(model.parameters())
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    snparam.convert_model(model, gain="learned")
    groups = snparam.parameter_groups(model, weight_decay=0.0) if grouped else model.parameters()
    another = adam(groups)
    ours = optimizer_state_dict_for(model, another, "snparam", saved)
    another.load_state_dict(ours)
    gains = snparam.gain_parameters(model)
    assert not any(gain in another.state for gain in gains)
    moments = {id(p): state["exp_avg"] for p, state in another.state.items()}
    for parameter, state in optimizer.state.items():
        assert torch.equal(moments[id(parameter)], state["exp_avg"])
    train(model, another, 2)
    assert all(gain in another.state for gain in gains)
    back = optimizer_state_dict_for(model, another, "plain")
    assert len(back["param_groups"]) == 1
    assert back["param_groups"][0]["params"] == saved["param_groups"][0]["params"]
    fresh = adam(snparam.restore_model(model, bake=False).parameters())
    fresh.load_state_dict(back)
    train(model, fresh, 3)


def test_parameters_that_have_not_been_trained_have_no_state() -> None:
    model = network()
    model.lstm.requires_grad_(False)
    optimizer = adam(model.parameters())
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    snparam.convert_model(model)
    another = adam(model.parameters())
    another.load_state_dict(optimizer_state_dict_for(model, another, "snparam", saved))
    assert another.state.keys() == optimizer.state.keys()


def test_beside_another_librarys_parametrization_names_stay_theirs() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        layer = parametrizations.weight_norm(nn.LSTM(4, 3), "weight_ih_l0")
        return nn.Sequential(layer)

    def run(model: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model[0](torch.ones(2, 1, 4))[0].square().mean().backward()
        optimizer.step()

    model = build()
    optimizer = adam(model.parameters())
    run(model, optimizer)
    saved, resumed = copy.deepcopy(optimizer.state_dict()), build()
    resumed.load_state_dict(model.state_dict())
    for one in (model, resumed):
        snparam.register_sn(one[0], name="weight_hh_l0")
    another = adam(resumed.parameters())
    another.load_state_dict(optimizer_state_dict_for(resumed, another, "snparam", saved))
    run(model, optimizer)
    run(resumed, another)
    same(model, resumed)


def test_mistakes_are_errors_that_name_them() -> None:
    model = snparam.convert_model(network())
    optimizer = adam(model.parameters())
    with pytest.raises(ValueError, match="spelling='torch'"):
        optimizer_state_dict_for(model, optimizer, "torch")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="state_dict="):
        optimizer_state_dict_for(model, optimizer, "snparam")
    with pytest.raises(ValueError, match="none of the model's"):
        optimizer_state_dict_for(network(), optimizer, "plain")
    with pytest.raises(ValueError, match="LBFGS"):
        optimizer_state_dict_for(model, torch.optim.LBFGS(model.parameters()), "plain")
    two = BUILDS["two groups"](network()).state_dict()
    with pytest.raises(ValueError, match="2 groups"):
        optimizer_state_dict_for(model, optimizer, "snparam", two)
    fewer = adam(list(network().parameters())[1:]).state_dict()
    with pytest.raises(ValueError, match=r"group 0 has \d+ parameters"):
        optimizer_state_dict_for(model, optimizer, "snparam", fewer)
    if TAKES_NAMES:
        other = adam([(f"m.{name}", p) for name, p in network().named_parameters()]).state_dict()
        with pytest.raises(ValueError, match=r"has '(m\.)?\w"):
            optimizer_state_dict_for(model, optimizer, "snparam", other)


def test_parametrizations_that_torch_has_transferred_have_the_order_of_the_restored_module() -> (
    None
):
    source, target = snparam.register_sn(nn.Linear(4, 3)), nn.Linear(4, 3)
    parametrize.transfer_parametrizations_and_params(source, target)
    optimizer = adam(target.parameters())
    target(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    plain = optimizer_state_dict_for(target, optimizer, "plain")
    restored = snparam.restore_model(copy.deepcopy(target), bake=False)
    for number, parameter in enumerate(restored.parameters()):
        assert plain["state"][number]["exp_avg"].shape == parameter.shape
