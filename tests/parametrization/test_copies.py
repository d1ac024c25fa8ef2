"""Copies of converted networks, and parametrizations beside SpectralNorm."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import snparam


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


X = torch.ones(2, 4)


@pytest.mark.parametrize("bake", [True, False])
def test_restoring_a_copy_leaves_the_model_converted_and_the_reverse(bake: bool) -> None:
    for restore_the_copy in (True, False):
        model = snparam.convert_model(network()).eval()
        clone = copy.deepcopy(model)
        expected = model(X)
        restored, other = (clone, model) if restore_the_copy else (model, clone)
        snparam.restore_model(restored, bake=bake)
        assert type(restored[0]) is nn.Linear
        torch.testing.assert_close(other(X), expected)
        assert len(snparam.singular_values(other)) == 2
        snparam.restore_model(other)
        assert type(other[0]) is nn.Linear


def test_registering_more_on_a_copy_leaves_the_model_alone() -> None:
    model = nn.LSTM(3, 4)
    snparam.register_sn(model, name="weight_ih_l0")
    clone = copy.deepcopy(model)
    snparam.register_sn(clone, name="weight_hh_l0")
    x = torch.ones(2, 1, 3)
    model(x)
    assert isinstance(model.weight_hh_l0, nn.Parameter)
    snparam.remove_sn(model)
    clone(x)
    assert set(snparam.singular_values(clone)) == {"weight_ih_l0", "weight_hh_l0"}


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def stacked() -> nn.Linear:
    layer = snparam.register_sn(nn.Linear(4, 5))
    parametrize.register_parametrization(layer, "weight", Halved())
    return layer


def test_a_parametrization_on_top_is_applied() -> None:
    norm = torch.linalg.matrix_norm(stacked().weight.detach(), 2)
    torch.testing.assert_close(norm, torch.tensor(0.5), rtol=1e-4, atol=0)


def test_verify_measures_the_weight_in_use_with_a_parametrization_on_top() -> None:
    (row,) = snparam.verify(stacked())
    assert row.exact == pytest.approx(0.5, rel=1e-4)


def test_a_parametrization_on_top_is_not_dropped_silently() -> None:
    layer = stacked()
    before = layer.weight.detach().clone()
    for remove in (snparam.remove_sn, snparam.restore_model):
        with pytest.raises(ValueError, match=r"'weight' of ParametrizedLinear: Halved"):
            remove(layer)
    torch.testing.assert_close(layer.weight, before)


def test_cached_parametrizations_of_torch_are_honoured() -> None:
    layer = snparam.register_sn(nn.Linear(4, 5))
    with parametrize.cached():
        assert layer.weight is layer.weight


def test_hooks_on_the_parametrization_run() -> None:
    layer = snparam.register_sn(nn.Linear(4, 5))
    seen = []
    layer.parametrizations.weight[0].register_forward_hook(lambda *_: seen.append(1))
    layer.weight  # noqa: B018
    assert seen == [1]


def through_torch(module: nn.Module) -> None:
    torch.save(module, io.BytesIO())


@pytest.mark.parametrize("save", [through_torch, pickle.dumps])
def test_pickling_is_refused_with_what_to_call_instead(save: Callable[..., object]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    snparam.register_sn(model[1], name="weight_ih_l0")
    snparam.register_sn(model[1], name="weight_hh_l0")
    for whole in (model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError) as caught:
            save(whole)
        message = str(caught.value)
        assert message.startswith("LSTM with SpectralNorm on 'weight_ih_l0', 'weight_hh_l0'")
        for name in ("model.state_dict()", "convert_model", "plain_state_dict", "restore_model"):
            assert name in message
    snparam.restore_model(model)
    save(model)


def test_pickling_with_other_parametrizations_is_refused_as_torch_does() -> None:
    layer = nn.GRUCell(4, 4)
    parametrize.register_parametrization(layer, "weight_hh", Halved())
    with pytest.raises(RuntimeError) as theirs:
        pickle.dumps(layer)
    snparam.remove_sn(snparam.register_sn(layer, name="weight_ih"))
    with pytest.raises(RuntimeError) as found:
        pickle.dumps(layer)
    assert str(found.value) == str(theirs.value)
