"""The shared options: what is refused, and how it is said."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from torch import nn

import snparam
from snparam.parametrization.arguments import put_into_docstring

SHARED = [snparam.register_sn, snparam.plan_conversion, snparam.convert_model]


@pytest.mark.parametrize("call", [snparam.register_sn, snparam.convert_model])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_svs": 0}, ValueError, "num_svs=0: expected at least 1"),
        ({"num_svs": 1.0}, TypeError, "num_svs=1.0: expected an int"),
        ({"num_svs": True}, TypeError, "num_svs=True: expected an int"),
        ({"num_itrs": -1}, ValueError, "num_itrs=-1: expected at least 1"),
        ({"num_itrs": "2"}, TypeError, "num_itrs='2': expected an int"),
        ({"blocks": 0}, ValueError, "blocks=0"),
        ({"blocks": "gates"}, TypeError, "blocks='gates'.*'auto'"),
        ({"init": "cold"}, ValueError, "init='cold': expected 'converged' or 'random'"),
        ({"eps": -1.0}, ValueError, "eps=-1.0"),
        ({"eps": float("inf")}, ValueError, "eps=inf"),
        ({"eps": None}, TypeError, "eps=None"),
        ({"update": "epoch"}, ValueError, "update='epoch': expected 'forward' or 'step'"),
        ({"block": 2}, TypeError, "unknown option 'block'; did you mean 'blocks'"),
        ({"zzz": 2}, TypeError, "unknown option 'zzz'.*blocks, init, eps"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_before_anything_changes(
    call: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    layer = nn.Linear(3, 4)
    with pytest.raises(error, match=message):
        call(layer, **options)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("function", SHARED, ids=lambda f: f.__name__)
def test_help_is_filled_in_and_fits(function: Any) -> None:
    assert "{" not in function.__doc__
    assert max(map(len, function.__doc__.splitlines())) <= 100
    arguments = inspect.cleandoc(function.__doc__).partition("Args:\n")[2].partition("\n\n")[0]
    first = {line.partition(":")[0] for line in arguments.splitlines() if line[4] != " "}
    assert {name.strip() for name in first} == set(inspect.signature(function).parameters)


@pytest.mark.parametrize("function", SHARED, ids=lambda f: f.__name__)
def test_the_signature_has_plain_annotations(function: Any) -> None:
    shown = str(inspect.signature(function))
    assert "int | Literal['auto'] | None" in shown
    assert "ForwardRef" not in shown


@pytest.mark.parametrize("indentation", [4, 0], ids=["as written", "as Python 3.13 strips it"])
def test_a_placeholder_is_replaced_at_its_own_indentation(indentation: int) -> None:
    def function() -> None: ...

    outer, inner = " " * indentation, " " * (indentation + 4)
    function.__doc__ = f"Do it.\n\n{outer}Args:\n{inner}{{options}}\n{outer}"
    put_into_docstring(function, "options", "one: a\n    b\ntwo: c")
    expected = f"{inner}one: a\n{inner}    b\n{inner}two: c\n{outer}"
    assert function.__doc__ == f"Do it.\n\n{outer}Args:\n{expected}"


def test_neither_gain_nor_all_options_at_once_can_be_set() -> None:
    layer: Any = snparam.register_sn(nn.Linear(3, 4), coeff=0.5)
    (norm,) = layer.parametrizations.weight
    other: Any = snparam.register_sn(nn.Linear(3, 4))
    for name, value in (
        ("gain", "learned"),
        ("gain", None),
        ("settings", other.parametrizations.weight[0].settings),
    ):
        with pytest.raises(AttributeError, match=rf"weight.*{name}=.*remove_sn"):
            setattr(norm, name, value)
    assert norm.settings.coeff == 0.5
