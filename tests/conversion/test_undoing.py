"""All or nothing: what a failure half way leaves behind is what was there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import snparam
from snparam.parametrization.undoing import all_or_nothing


def break_off(model: nn.Sequential) -> None:
    with all_or_nothing(model.modules()):
        snparam.register_sn(model[0], name="table")
        snparam.register_sn(model[0], name="weight")
        snparam.convert_model(model)
        del model[0]
        raise KeyboardInterrupt


def test_a_failure_leaves_every_module_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2))
    model[0].register_buffer("table", torch.randn(2, 3), persistent=False)
    model.register_buffer("late", torch.zeros(1))
    types = [type(module) for module in model.modules()]
    attributes = [dict(vars(module)) for module in model.modules()]
    tables = [
        {name: list(value) for name, value in one.items() if isinstance(value, dict | set)}
        for one in attributes
    ]
    with pytest.raises(KeyboardInterrupt):
        break_off(model)
    assert [type(module) for module in model.modules()] == types
    for module, before, filled in zip(model.modules(), attributes, tables, strict=True):
        assert vars(module) == before
        for name, keys in filled.items():
            assert list(vars(module)[name]) == keys, name
