"""What is saved with some options and loaded with others, in every spelling.

The weight is kept to the bit, what does not fit of its state is estimated anew, so that the norm is
the one that the options of the loading network promise; or it raises.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from helpers.combinations import (
    LAYERS,
    STRUCTURES,
    WORKING,
    Cell,
    assert_keeps_its_promise,
    assert_unchanged,
    changed,
    everything,
    inputs_for,
    kind_of,
    layer_for,
    name_of,
    register,
)
from helpers.holder import norm_of, original_of
from helpers.spelled import SPELLINGS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import snparam
from snparam.estimators.estimate import ESTIMATORS

PLAIN = {name: None if name == "blocks" else value for name, value in STRUCTURES[0].items()}


def assert_holds(kind: str, cell: Cell, layer: Any) -> None:
    """The first forward in training, one in eval mode, and a further one in training."""
    for training in (True, False, True):
        layer.train(training)
        assert_keeps_its_promise(kind, cell, layer, layer.weight)


def tried(kind: str, cell: Cell, seed: int = 0, **others: Any) -> Any:
    """A registered layer; None where the layer does not go with the options."""
    try:
        return register(layer_for(kind, seed), kind, cell, **others)
    except ValueError:
        return None


@pytest.mark.parametrize("cell", WORKING, ids=name_of)
def test_each_spelling_writes_a_cell_or_says_why_not(cell: Cell) -> None:
    kind = kind_of(cell)
    layer = tried(kind, cell)
    if layer is None:
        return  # refused with the reason: tests/properties/test_combinations.py
    model, used = nn.Sequential(layer), snparam.weight_in_use(layer)
    for spelling in SPELLINGS:
        before = everything(layer)
        try:
            state = copy.deepcopy(snparam.state_dict_for(model, spelling))
        except ValueError as error:
            assert_says_why_unspelled(str(error), kind, cell, spelling)
            assert_unchanged(layer, before)
            continue
        assert_unchanged(layer, before)
        other = nn.Sequential(register(layer_for(kind, seed=1), kind, cell))
        other.load_state_dict(state)
        original = used if spelling == "plain" else original_of(layer)
        assert torch.equal(original_of(other[0]), original)
        assert_holds(kind, cell, other[0])
        if spelling != "plain":
            again = snparam.weight_in_use(other[0])
            torch.testing.assert_close(again, used, rtol=2e-3, atol=1e-5)


def assert_says_why_unspelled(message: str, kind: str, cell: Cell, spelling: str) -> None:
    assert spelling not in ("plain", "snparam")  # these can say everything
    assert "'0.weight'" in message
    assert "plain_state_dict" in message
    if kind == "complex Linear" and "it is complex" in message:
        return
    if kind == "ConvTranspose1d" and "it reads other rows" in message:
        return
    assert any(f"{name}=" in message for name in changed(cell)), message


@settings(max_examples=120)
@given(
    st.sampled_from(WORKING),
    st.sampled_from(WORKING),
    st.sampled_from(list(LAYERS)),
    st.sampled_from(SPELLINGS),
    st.integers(1, 2),
)
def test_what_any_cell_writes_any_other_loads_or_refuses(
    source: Cell, target: Cell, kind: str, spelling: str, num_svs: int
) -> None:
    if spelling not in ("plain", "snparam"):
        source = PLAIN  # the others can say little more
    saved, layer = tried(kind, source, num_svs=num_svs), tried(kind, target, seed=1)
    assume(saved is not None and layer is not None)
    saved(inputs_for(kind))
    try:
        state = copy.deepcopy(snparam.state_dict_for(nn.Sequential(saved), spelling))
    except ValueError:
        assume(False)
    model = nn.Sequential(layer)
    before = copy.deepcopy(layer.state_dict())
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        message = str(error)
        assert "blocks=" in message or "weight.0.gain" in message
        if "Unexpected key" not in message:  # torch loads all else before it raises
            for name, value in layer.state_dict().items():
                assert torch.equal(value, before[name]), name
    else:
        written = snparam.weight_in_use(saved) if spelling == "plain" else original_of(saved)
        assert torch.equal(original_of(layer), written)
    assert_holds(kind, target, layer)


@pytest.mark.parametrize("update", ["forward", "step"])
@pytest.mark.parametrize("kind", ["Linear", "ConvTranspose1d"])
@pytest.mark.parametrize(("saved", "loaded"), list(itertools.permutations(ESTIMATORS, 2)))
def test_another_way_to_find_sigma_takes_the_weight_and_its_own_promise(
    saved: str, loaded: str, kind: str, update: Any
) -> None:
    """The state that was saved is far from converged."""
    for norm in ("matrix", "operator"):
        cells = [PLAIN | {"norm": norm, "update": update, "sigma": s} for s in (saved, loaded)]
        source = register(layer_for(kind), kind, cells[0], init="random")
        source(inputs_for(kind))
        layer = register(layer_for(kind, seed=1), kind, cells[1])
        layer.load_state_dict(source.state_dict())
        assert torch.equal(original_of(layer), original_of(source))
        if ESTIMATORS[loaded].side == "below":
            assert torch.equal(norm_of(layer).sv, norm_of(source).sv)
            for _ in range(60):
                layer(inputs_for(kind))
        assert_holds(kind, cells[1], layer)
