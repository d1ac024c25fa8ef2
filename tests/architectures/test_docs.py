"""docs/architectures.md lists what is tested, with the shares that the plans have."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import snparam

from .contract import Architecture

TEXT = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
LIBRARIES = {
    "transformers": "transformers",
    "diffusers": "diffusers",
    "torchvision": "torchvision",
    "peft": "peft",
    "gans": "BigGAN style",
}


def architectures(where: str) -> list[Architecture]:
    module = importlib.import_module(f".test_{where}", __package__)
    found: list[Architecture] = module.ARCHITECTURES
    return found


def rows(library: str) -> dict[str, str]:
    """Name to share, as the table has them."""
    found = re.findall(rf"^\| {library} \| (.+?) \| (.+?) \|", TEXT, flags=re.MULTILINE)
    return dict(found)


@pytest.mark.parametrize("where", LIBRARIES)
def test_the_table_has_every_architecture_with_its_share(where: str) -> None:
    shares = {
        a.name: f"{snparam.plan_conversion(a.make(0), progress=False).share:.1%}"
        for a in architectures(where)
    }
    assert rows(LIBRARIES[where]) == shares
