"""Patterns of path segments, types, predicates."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import nn

import snparam
from snparam.conversion.selection import matches


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.1", "layers.1", True),
        ("layers.1", "layers.10", False),
        ("layers.1", "layers.1.fc", False),
        ("layers.*", "layers.10", True),
        ("layers.*", "layers.10.fc", False),
        ("layers.1*", "layers.10", True),
        ("*", "a", True),
        ("*", "a.b", False),
        ("**", "a.b.c", True),
        ("**.fc", "fc", True),
        ("**.fc", "a.b.fc", True),
        ("**.fc", "a.b.fc2", False),
        ("a.**.c", "a.c", True),
        ("a.**.c", "a.b.b.c", True),
        ("a.**.c", "b.c", False),
        ("a.[xy]", "a.y", True),
    ],
)
def test_patterns_match_whole_segments(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def network() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(11)])
    model.embed = nn.Embedding(3, 2)
    model.attention = nn.MultiheadAttention(2, 1)
    model.head = nn.Linear(2, 2)
    return model


def converted(**options: object) -> set[str]:
    plan = snparam.plan_conversion(network(), **options)  # type: ignore[arg-type]
    return {row.weight for row in plan.to_convert}


def test_a_name_picks_everything_inside_it() -> None:
    assert converted(include="layers.1") == {"layers.1.0.weight"}
    assert converted(include="attention") == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }


def test_a_name_may_be_that_of_a_weight() -> None:
    assert converted(include="attention.in_proj_weight") == {"attention.in_proj_weight"}


def test_a_type_picks_everything_inside_its_modules() -> None:
    assert converted(include=nn.Sequential) == {f"layers.{i}.0.weight" for i in range(11)}
    assert converted(include=(nn.Embedding, "head")) == {"embed.weight", "head.weight"}


def test_exclude_wins_and_everything_must_agree() -> None:
    assert converted(include=nn.Linear, exclude=["layers", nn.MultiheadAttention]) == {
        "head.weight"
    }
    assert converted(include=["head", "embed"], filter_fn=lambda m, n: n == "embed") == {
        "embed.weight"
    }


def test_the_predicate_is_given_modules_and_qualified_names() -> None:
    seen = {}
    model = network()

    def keep(module: nn.Module, name: str) -> bool:
        seen[name] = module
        return True

    snparam.plan_conversion(model, filter_fn=keep)
    assert all(model.get_submodule(name) is module for name, module in seen.items())
    assert {"head", "embed", "attention", "attention.out_proj"} <= set(seen)


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("selector", ["layer", "layers.11", "head.fc", nn.Conv2d])
def test_what_matches_nothing_is_an_error_naming_it(option: str, selector: object) -> None:
    name = selector if isinstance(selector, str) else "Conv2d"
    with pytest.raises(ValueError, match=rf"{option}=.*{name}.* matches no"):
        converted(**{option: selector})


@pytest.mark.parametrize("selector", [3, ["head", None], int])
def test_a_selector_of_another_kind_is_an_error(selector: object) -> None:
    with pytest.raises(TypeError, match="include="):
        converted(include=selector)


def test_a_filter_that_is_no_function_is_an_error() -> None:
    with pytest.raises(TypeError, match="filter_fn='head'"):
        converted(filter_fn="head")


@pytest.mark.parametrize(
    "filter_fn", [lambda m: True, lambda m, n, p: True, lambda: True, lambda m, *, name: True]
)
def test_a_filter_that_takes_other_arguments_is_an_error_that_names_the_option(
    filter_fn: Any,
) -> None:
    with pytest.raises(TypeError, match=r"filter_fn=<.*: expected a function \(module, qualified_"):
        converted(filter_fn=filter_fn)


@pytest.mark.parametrize(
    "filter_fn",
    [lambda *a: True, lambda m, n, p=1: True, functools.partial(lambda p, m, n: True, 1)],
    ids=["any", "more", "partial"],
)
def test_a_filter_may_take_more(filter_fn: Any) -> None:
    assert converted(filter_fn=filter_fn) == converted()
