"""docs/guarantees.md: its code runs as it stands, and what it says of sizes is so."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
from helpers.combinations import HEADER, ROWS, START, Cell, layer_for, meant, register
from torch import nn

import snparam
from snparam.estimators.estimate import ESTIMATORS
from snparam.parametrization.options import Settings

TEXT = (Path(__file__).parents[1] / "docs" / "guarantees.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_a_block_runs(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS[index], {"__name__": "guarantees"})


def test_the_norms_of_ones_are_those_that_are_named() -> None:
    named = [float(x) for x in re.findall(r"(\d\.\d) for n = \d+", TEXT)]
    sizes = [int(x) for x in re.findall(r"\d\.\d for n = (\d+)", TEXT)]
    assert len(sizes) == 2
    for value, n in zip(named, sizes, strict=True):
        assert value == pytest.approx((1 + 2 * math.cos(math.pi / (n + 1))) ** 2, abs=0.05)


def is_registered(cell: Cell) -> bool:
    return cell.get("sigma", "power") in ESTIMATORS


def works(cell: Cell) -> bool:
    kind = "grouped Conv2d"
    try:
        register(layer_for(kind), kind, {"norm": "matrix", **cell})
    except ValueError:
        return False
    return True


def is_spelled(cell: Cell) -> bool:
    """Whether the other implementations can say it, all three or none of them."""
    kind = "grouped Conv2d"
    model = nn.Sequential(register(layer_for(kind), kind, {"norm": "matrix", **cell}))

    def can_say(spelling: str) -> bool:
        try:
            snparam.state_dict_for(model, spelling)
        except ValueError:
            return False
        return True

    (said,) = {can_say(spelling) for spelling in ("torch", "torch-hook", "biggan")}
    return said


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_table_says_what_goes_with_what(row: list[str]) -> None:
    for column, said in zip(HEADER[1:], row[1:], strict=True):
        for mine, other in itertools.product(meant(row[0]), meant(column)):
            both = mine | other
            if not is_registered(both) or "sharded" in column:
                continue  # the latter is in tests/distributed/test_combinations.py
            if mine.keys() == other.keys() != set():
                assert said == ""
            elif "spellings" in column:
                assert is_spelled(both) == (said == "yes"), both
            else:
                assert said in ("yes", "no")
                assert works(both) == (said == "yes"), both


def test_the_table_has_every_option_and_estimator() -> None:
    named = [cell for row in ROWS for cell in meant(row[0])]
    options = {field.name for field in fields(Settings)} - {*START, "constraint"}
    assert {name for cell in named for name in cell} == options
    others = {name for name, estimator in ESTIMATORS.items() if name != Settings().sigma}
    assert others <= {cell["sigma"] for cell in named if "sigma" in cell}


def test_the_table_names_calls_that_there_are_and_each_kind_of_number() -> None:
    table = [line.split(" | ") for line in TEXT.split("\n\n")[2].splitlines()[2:]]
    assert all(len(cells) == 5 for cells in table)
    calls = {name for *_, call in table for name in re.findall(r"`(\w+)\(", call)}
    assert calls == {"singular_values", "verify", "norm_bounds", "certify"} & set(snparam.__all__)
    kinds = {kind for cells in table for kind in re.findall(r"\*\*(\w+)\*\*", cells[1])}
    assert kinds == {"estimate", "exact", "bound", "bounds"}
