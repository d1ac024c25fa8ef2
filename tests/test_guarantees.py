"""docs/guarantees.md: its code runs as it stands, and what it says of sizes is so."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

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
