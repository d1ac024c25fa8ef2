"""Every combination of options works, or says why not before anything changes.

The options are drawn from the registries and from the types of the options
(`helpers.combinations`). What works holds the norm that its constraint promises, by decompositions
in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.combinations import (
    KINDS,
    NEAR,
    STRUCTURES,
    USES,
    WORKING,
    Cell,
    assert_keeps_its_promise,
    assert_says_why,
    assert_unchanged,
    everything,
    inputs_for,
    is_accepted,
    kind_of,
    layer_for,
    name_of,
    register,
)
from helpers.holder import norm_of, original_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import snparam
from snparam.estimators.estimate import ESTIMATORS


def assert_trains(kind: str, layer: Any) -> None:
    """One step with finite gradients, of all parameters, that changes the original."""
    before = original_of(layer).detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), 1e-4)
    layer(inputs_for(kind)).abs().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(torch.view_as_real(parameter.grad + 0j)).all(), name
    optimizer.step()
    assert not torch.equal(original_of(layer), before)


def assert_loads_itself(kind: str, cell: Cell, layer: Any) -> None:
    """Another layer of the same options takes state and function over, to the bit."""
    state = copy.deepcopy(layer.state_dict())
    other = register(layer_for(kind, seed=1), kind, cell)
    other.load_state_dict(state)
    assert other.state_dict().keys() == state.keys()
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(snparam.weight_in_use(other), snparam.weight_in_use(layer))


def assert_restores(layer: Any) -> None:
    original = original_of(layer).detach().clone()
    used = snparam.weight_in_use(layer)
    sides = {"above": NEAR}  # certified after rounding, and so perhaps a little smaller
    baked = copy.deepcopy(layer)
    tolerance = sides.get(ESTIMATORS[norm_of(layer).settings.sigma].side, 0)
    snparam.remove_sn(baked)
    torch.testing.assert_close(baked.weight.detach(), used, rtol=tolerance, atol=0)
    parameter = original_of(layer)
    snparam.remove_sn(layer, bake=False)
    assert layer.weight is parameter
    assert torch.equal(layer.weight, original)


def refusal(convert: Callable[[], object]) -> str | None:
    """What a conversion says if it refuses."""
    try:
        convert()
    except (TypeError, ValueError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("cell", WORKING, ids=name_of)
def test_a_cell_works_or_says_why_not(cell: Cell) -> None:
    kind = kind_of(cell)
    layer = layer_for(kind)
    before = everything(layer)
    reason = refusal(lambda: register(layer, kind, cell))
    if reason is not None:
        assert_says_why(reason, cell)
        assert_unchanged(layer, before)
        return
    for training in (False, True):
        layer.train(training)
        assert_keeps_its_promise(kind, cell, layer, layer.weight)
    for _ in range(2):
        assert_trains(kind, layer)
    assert_keeps_its_promise(kind, cell, layer, layer.weight)
    assert_loads_itself(kind, cell, layer)
    layer.eval()
    assert_keeps_its_promise(kind, cell, layer, layer.weight)
    assert_restores(layer)
    assert type(layer) is before[0]


@pytest.mark.parametrize("use", USES, ids=name_of)
def test_options_that_contradict_each_other_are_refused(use: Cell) -> None:
    layer = layer_for("grouped Conv2d")
    before = everything(layer)
    for cell in (structure | use for structure in STRUCTURES):
        if is_accepted(cell):
            continue
        for convert in (snparam.register_sn, snparam.convert_model, snparam.plan_conversion):
            with pytest.raises((TypeError, ValueError)) as error:
                convert(layer, **cell)
            assert_says_why(str(error.value), cell)
    assert_unchanged(layer, before)


def effect(use: Cell) -> list[Any]:
    """What options make of a large and of a small weight, and what of that is learned."""
    found: list[Any] = []
    for scale in (1, 0.1):
        layer: Any = layer_for("Linear")
        layer.weight.data *= scale
        snparam.register_sn(layer, **use)
        weight = snparam.weight_in_use(layer)
        found.append([*weight.flatten().tolist(), len(list(layer.parameters()))])
    return found


@pytest.mark.parametrize("use", [u for u in USES if len(u) == 2 and is_accepted(u)], ids=name_of)
def test_no_option_is_passed_over(use: Cell) -> None:
    """Each of two options changes something, or says what the other one says."""
    together = effect(use)
    for name in use:
        alone, other = {name: use[name]}, {k: v for k, v in use.items() if k != name}
        if name != "constraint" and is_accepted(other) and effect(other) == together:
            assert effect(alone) == together, name


@settings(max_examples=100)
@given(st.sampled_from(STRUCTURES), st.sampled_from(USES), st.sampled_from(KINDS))
def test_models_are_converted_where_layers_are_registered(
    structure: Cell, use: Cell, kind: str
) -> None:
    """What a layer says no to, a model says no to, or leaves out with the reason in its plan."""
    cell = structure | use
    layer, model = layer_for(kind), nn.Sequential(layer_for(kind))
    example = {"example_inputs": inputs_for(kind)} if cell["norm"] == "operator" else {}
    before = everything(model), everything(model[0])
    reason = refusal(lambda: register(layer, kind, cell))
    if reason is None:
        (row,) = snparam.plan_conversion(model, **cell, **example)
        assert row.decision == "convert"
        snparam.convert_model(model, **cell, **example)
        for name, value in layer.state_dict().items():
            torch.testing.assert_close(model.state_dict()[f"0.{name}"], value)
        return
    plan: list[Any] = []
    said = refusal(lambda: plan.extend(snparam.plan_conversion(model, **cell, **example)))
    if said is None and plan[0].decision == "skip":
        said = plan[0].reason
        with pytest.warns(UserWarning, match="converted nothing"):
            snparam.convert_model(model, **cell, **example)
    else:
        said = refusal(lambda: snparam.convert_model(model, **cell, **example))
    assert said is not None
    assert said.partition(";")[0] in reason
    assert_says_why(said, cell)
    assert_unchanged(model, before[0])
    assert_unchanged(model[0], before[1])
