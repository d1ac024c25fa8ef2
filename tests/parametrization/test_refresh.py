"""`refresh`: every state converges to its weight anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import snparam


def network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(9, 6),
            "conv": nn.Conv2d(4, 6, 3, groups=2),
            "head": nn.Linear(6, 9, bias=False),
            "lstm": nn.LSTM(6, 5),
        }
    )
    model["head"].weight = model["embed"].weight
    return snparam.convert_model(model, **options)


def rewrite(model: nn.Module) -> None:
    """Other weights, behind the state's back."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.copy_(torch.randn(parameter.shape, dtype=torch.float64))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_svs": 3}, {"blocks": "auto"}, {"update": "step"}, {"coeff": 2.0}, {"soft": True}],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_afterwards_the_norms_are_what_they_are_to_be(
    options: dict[str, Any], training: bool
) -> None:
    model = network(**options).train(training)
    rewrite(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    snparam.refresh(model)
    snparam.verify(model, tolerance=1e-3)
    assert model.training is training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_state_is_that_of_a_conversion_of_these_weights() -> None:
    model = network(num_svs=2)
    rewrite(model)
    plain = snparam.restore_model(copy.deepcopy(model), bake=False)
    expected = snparam.singular_values(snparam.convert_model(plain, 2))
    buffers = dict(model.named_buffers())
    snparam.refresh(model)
    for name, values in snparam.singular_values(model).items():
        torch.testing.assert_close(values, expected[name], rtol=1e-3, atol=0)
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())


def test_gains_stay_what_they_are() -> None:
    model = network(gain="learned")
    before = [gain.detach().clone() for gain in snparam.gain_parameters(model)]
    rewrite(model)
    snparam.refresh(model)
    for gain, value in zip(snparam.gain_parameters(model), before, strict=True):
        assert torch.equal(gain, value)
    snparam.verify(model, tolerance=1e-3)


def test_verification_names_it_and_it_helps() -> None:
    model = network()
    rewrite(model)
    with pytest.raises(RuntimeError, match=r"refresh\(model\)"):
        snparam.verify(model, 1e-3)
    snparam.refresh(model)
    snparam.verify(model, 1e-3)


def test_a_network_without_states_or_with_nan_is_refused_and_left_alone() -> None:
    with pytest.raises(ValueError, match=r"refresh: Linear.*convert_model first"):
        snparam.refresh(nn.Linear(2, 2))
    model = network()
    rewrite(model)
    model["lstm"].parametrizations.weight_hh_l0.original.data[0, 0] = torch.nan
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(ValueError, match=r"'lstm\.weight_hh_l0' \(20, 5\) has NaN"):
        snparam.refresh(model)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
