"""docs/constraints.md: its blocks run, and its table names the options that there are."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from snparam.parametrization.options import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "constraints.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block_runs(index: int) -> None:
    exec(BLOCKS[index], {"__name__": "constraints"})


def test_options_that_are_named_exist() -> None:
    named = set(re.findall(r"`(\w+)=", PAGE.partition("## `spectral_penalty`")[0]))
    assert {"clip", "stable_rank", "coeff", "soft", "gain"} <= named
    assert named <= {field.name for field in fields(Settings)}
