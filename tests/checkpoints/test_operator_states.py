"""States of norm="operator" in state dicts: ours keeps them, and no other spelling can say them."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from helpers.convolutions import exact_norm
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import snparam


def plain(seed: int = 0) -> Any:
    layer: Any = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    generator = torch.Generator().manual_seed(seed)
    layer.weight.data = torch.randn(3, 2, 3, 3, generator=generator)
    return layer


def operator(size: tuple[int, int] = (6, 5), seed: int = 0, **options: Any) -> nn.Sequential:
    layer = snparam.register_sn(plain(seed), norm="operator", input_size=size, **options)
    return nn.Sequential(layer)


def norm_of(model: Any) -> Any:
    return model[0].parametrizations.weight[0]


def used_norm(model: Any, size: tuple[int, int]) -> float:
    return exact_norm(model[0].eval(), size)


@pytest.mark.parametrize("update", ["forward", "step"])
def test_our_own_spelling_keeps_the_state_to_the_bit(update: Any) -> None:
    model, other = operator(update=update, num_svs=2), operator(seed=1, update=update, num_svs=2)
    model(torch.randn(1, 2, 6, 5, generator=torch.Generator().manual_seed(0)))
    state = copy.deepcopy(model.state_dict())
    other.load_state_dict(state)
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name])
    x = torch.ones(1, 2, 6, 5)
    assert torch.equal(other.eval()(x), model.eval()(x))


SAVED = {
    "another input size": lambda seed: operator((9, 4), seed),
    "the matrix": lambda seed: nn.Sequential(snparam.register_sn(plain(seed), num_svs=2)),
    "an ordinary layer": lambda seed: nn.Sequential(plain(seed)),
    "torch's own": lambda seed: nn.Sequential(parametrizations.spectral_norm(plain(seed))),
}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("update", ["forward", "step"])
@pytest.mark.parametrize("assign", [False, True])
def test_states_of_other_maps_leave_their_weight_and_are_estimated_anew(
    saved: str, update: Any, assign: bool
) -> None:
    source, model = SAVED[saved](1), operator(update=update)
    model.load_state_dict(source.state_dict(), assign=assign)
    weight = plain(1).weight
    torch.testing.assert_close(model[0].parametrizations.weight.original, weight)
    assert norm_of(model).u.shape == (1, 1, 3 * 6 * 5)
    assert float(norm_of(model).sv) == pytest.approx(exact_norm(plain(1), (6, 5)), rel=1e-3)
    assert used_norm(model, (6, 5)) == pytest.approx(1, rel=1e-3)


def test_a_matrix_that_loads_the_state_of_an_operator_is_estimated_anew() -> None:
    model = nn.Sequential(snparam.register_sn(plain()))
    model.load_state_dict(operator(seed=1).state_dict())
    matrix = plain(1).weight.detach().flatten(1)
    expected = float(torch.linalg.matrix_norm(matrix, 2))
    assert norm_of(model).u.shape == (1, 1, 3)
    assert float(norm_of(model).sv) == pytest.approx(expected, rel=1e-3)


def test_a_gain_keeps_the_function_of_the_network_that_was_saved() -> None:
    source, model = nn.Sequential(plain(1)), operator(gain="learned")
    model.load_state_dict(source.state_dict())
    torch.testing.assert_close(snparam.weight_in_use(model[0]), source[0].weight.detach())


def test_a_state_of_another_layer_is_still_refused() -> None:
    state = operator().state_dict()
    key = "0.parametrizations.weight.0.u"
    broken: dict[str, Tensor] = {**state, key: state[key][..., :-1]}
    with pytest.raises(RuntimeError, match=f"size mismatch for {re.escape(key)}"):
        operator().load_state_dict(broken)


@pytest.mark.parametrize("spelling", ["torch", "torch-hook", "biggan"])
def test_spellings_that_cannot_say_it_refuse_with_the_reason(spelling: str) -> None:
    with pytest.raises(
        ValueError, match=r"'0.weight'.*norm='operator'.*\(6, 5\).*plain_state_dict"
    ):
        snparam.state_dict_for(operator(), spelling)


def test_spellings_that_can_say_it_do() -> None:
    model = operator()
    expected = snparam.weight_in_use(model[0])
    assert torch.equal(snparam.plain_state_dict(model)["0.weight"], expected)
    assert torch.equal(snparam.state_dict_for(model, "plain")["0.weight"], expected)
    ours = snparam.state_dict_for(model, "snparam")
    assert ours.keys() == model.state_dict().keys()


def test_the_vectors_of_biggan_are_of_another_map() -> None:
    source = nn.Sequential(snparam.register_sn(plain(1)))
    model = operator()
    model.load_state_dict(snparam.state_dict_for(source, "biggan"))
    assert float(norm_of(model).sv) == pytest.approx(exact_norm(plain(1), (6, 5)), rel=1e-3)
