"""Weights that modules share stay one Parameter with one state, whatever the model does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import snparam

from .contract import assert_same, convert, norms_in, tensors
from .test_transformers import TOKENS, bert, gpt2, language, t5

TIED = {
    "GPT-2": (gpt2, {"transformer.wte.weight", "lm_head.weight"}),
    "T5": (
        t5,
        {
            "shared.weight",
            "encoder.embed_tokens.weight",
            "decoder.embed_tokens.weight",
            "lm_head.weight",
        },
    ),
    "BERT": (bert, {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"}),
}
CASES = pytest.mark.parametrize(("build", "names"), TIED.values(), ids=list(TIED))
Build = Callable[[], nn.Module]


def used(model: nn.Module, names: set[str]) -> list[nn.Module]:
    """The modules of the tied weights, every name once."""
    return [model.get_submodule(name.rpartition(".")[0]) for name in sorted(names)]


def assert_tied(model: nn.Module, names: set[str]) -> None:
    originals, states = set(), set()
    for module in used(model, names):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        originals.add(id(module.parametrizations.weight.original))  # type: ignore[union-attr]
        states.add(id(module.parametrizations.weight[0]))  # type: ignore[index]
    assert len(originals) == len(states) == 1


def run(model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        outputs = model.eval()(input_ids=TOKENS, labels=TOKENS)
    return tensors(outputs.logits)


@CASES
def test_the_plan_shows_one_state_and_conversion_makes_one(build: Build, names: set[str]) -> None:
    model = build()
    count = len(list(model.parameters()))
    rows = {row.weight: row for row in snparam.plan_conversion(model)}
    shown = [name for name in rows if name in names]
    assert len(shown) >= 2
    assert all("shares its state with" in rows[name].reason for name in shown)
    convert(model)
    assert_tied(model, names)
    assert len(list(model.parameters())) == count


@CASES
def test_tie_weights_after_conversion_changes_nothing(build: Build, names: set[str]) -> None:
    model = build()
    convert(model)
    before, keys = run(model), list(model.state_dict())
    states = {name: id(norm) for name, _, _, norm in norms_in(model)}
    parameters = [id(p) for p in model.parameters()]
    model.tie_weights()  # type: ignore[operator]
    assert_tied(model, names)
    assert list(model.state_dict()) == keys
    assert {name: id(norm) for name, _, _, norm in norms_in(model)} == states
    assert sorted(id(p) for p in model.parameters()) == sorted(parameters)
    assert_same(run(model), before)


@CASES
def test_tie_weights_ties_what_had_been_untied(build: Build, names: set[str]) -> None:
    """Two Parameters, two states before it; one of each after it."""
    model = build()
    first, *others = used(model, names)
    apart = next(module for module in others if module is not first)
    apart.weight = nn.Parameter(apart.weight.detach().clone() * 2)  # type: ignore[operator]
    convert(model)
    with pytest.raises(AssertionError):
        assert_tied(model, names)
    model.tie_weights()  # type: ignore[operator]
    assert_tied(model, names)
    snparam.verify(model, tolerance=1e-2)


@CASES
def test_a_copy_is_tied_in_itself_and_ties_itself(build: Build, names: set[str]) -> None:
    model = build()
    convert(model)
    twin = copy.deepcopy(model)
    twin.tie_weights()  # type: ignore[operator]
    for network in (model, twin):
        assert_tied(network, names)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    assert_same(run(model), run(twin))


@CASES
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_another_leaves_them_tied(
    build: Build, names: set[str], assign: bool
) -> None:
    torch.manual_seed(0)
    source, model = build(), build()
    for network in (source, model):
        convert(network)
    model.load_state_dict(source.state_dict(), assign=assign)
    assert_tied(model, names)
    assert_same(run(model), run(source))


@CASES
def test_saved_and_read_back_it_is_tied_and_the_same(
    build: Build, names: set[str], tmp_path: Path
) -> None:
    model = build()
    convert(model)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    back = type(build()).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert len({id(module.weight) for module in used(back, names)}) == 1
    assert_same(run(model), run(back))
    convert(back)
    assert_tied(back, names)


@CASES
def test_restoring_leaves_its_own_tie_weights_and_a_tied_model(
    build: Build, names: set[str]
) -> None:
    model = build()
    convert(model)
    assert not [m for m in model.modules() if "tie_weights" in vars(m)]
    snparam.restore_model(model)
    model.tie_weights()  # type: ignore[operator]
    assert len({id(module.weight) for module in used(model, names)}) == 1


def test_one_training_forward_moves_the_shared_state_once_for_each_module_that_reads_it() -> None:
    """Embedding and head are two forwards of one layer each, as everywhere."""
    model = gpt2()
    snparam.convert_model(model, num_itrs=1, init="random")
    state = model.lm_head.parametrizations.weight[0]  # type: ignore[union-attr, index]
    weight = model.lm_head.parametrizations.weight.original  # type: ignore[union-attr]
    u = state.u[0, 0].double()
    for _ in range(2):
        v = weight.double().T @ u
        u = weight.double() @ (v / v.norm())
        u = u / u.norm()
    language(model.train())
    torch.testing.assert_close(state.u[0, 0].double(), u, rtol=0, atol=1e-5)


def test_read_differently_both_are_left_alone() -> None:
    """A transformers Conv1D (inputs first) and a Linear that share one Parameter."""
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    rows = snparam.plan_conversion(model)
    assert [row.decision for row in rows] == ["skip", "skip"]
    assert all("reads it as other matrices" in row.reason for row in rows)
    with pytest.warns(UserWarning, match="converted nothing"):
        snparam.convert_model(model)
    assert type(model[1]) is nn.Linear
