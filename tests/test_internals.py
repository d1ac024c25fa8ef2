"""docs/internals.md: its examples of what can be added run, and are taken away again."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from snparam.constraints.constraint import CONSTRAINTS
from snparam.estimators.estimate import ESTIMATORS
from snparam.layers.table import USER_ROWS
from snparam.parametrization.extensions import SPELLINGS, SYSTEMS

TEXT = (Path(__file__).parents[1] / "docs" / "internals.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, flags=re.MULTILINE | re.DOTALL))
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def _put_back():
    registries = [SPELLINGS, SYSTEMS]
    before = [list(registry) for registry in registries]
    named = [set(ESTIMATORS), set(CONSTRAINTS)]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry[:] = entries
    for known, names in zip((ESTIMATORS, CONSTRAINTS), named, strict=True):
        for name in set(known) - names:
            del known[name]
    USER_ROWS.clear()


@pytest.mark.usefixtures("_put_back")
@pytest.mark.parametrize("title", [title for title in SECTIONS if BLOCK.search(SECTIONS[title])])
def test_the_blocks_of_a_section_run_one_after_the_other(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "internals"}
    for block in BLOCK.findall(SECTIONS[title]):
        exec(block, namespace)


def test_files_that_are_named_exist():
    named = set(re.findall(r"`((?:snparam|tests|docs|benchmarks)/[\w./]+)`", TEXT))
    named |= {f"snparam/{path}" for path in re.findall(r"`(checkpoints/\w+\.py)`", TEXT)}
    assert {f"tests/helpers/{name}.py" for name in ("spelled", "classic")} <= named
    for path in named:
        assert (Path(__file__).parents[1] / path).exists(), path


FOLDERS = "commands|spectrum|testing|conversion|systems|checkpoints|parametrization|layers"
FOLDERS += "|constraints|estimators|matrices"
DOTTED = sorted(set(re.findall(rf"`((?:{FOLDERS})(?:\.\w+)+)`", TEXT)))


@pytest.mark.parametrize("dotted", DOTTED)
def test_what_the_journeys_name_exists(dotted):
    folder, file, *attributes = dotted.split(".")
    found = import_module(f"snparam.{folder}.{file}")
    for attribute in attributes:
        found = getattr(found, attribute)


def test_a_forward_and_backward_of_a_linear_goes_through_five_files():
    journey = re.search(r"\*\*One training forward.*?\n\n(.*?)\n\n", TEXT, flags=re.DOTALL)[1]
    named = re.findall(r"^- `(\w+\.\w+)\.", journey, flags=re.MULTILINE)
    assert 3 <= len(set(named)) <= 5
