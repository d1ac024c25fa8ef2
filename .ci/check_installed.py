"""Check that an installed snparam converts a network where torch is the only library."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import torch

import snparam

ROOT = Path(__file__).parents[1]


def main() -> str | None:
    """Return what is wrong with the installed snparam, in words, or None."""
    if Path(snparam.__file__).is_relative_to(ROOT):
        return f"{snparam.__file__} is the tree's own snparam, not an installed one"
    extras = ["numpy", "matplotlib", "hypothesis", "tqdm", "rich"]
    there = {distribution.name for distribution in importlib.metadata.distributions()}
    if there & set(extras):
        return f"{sorted(there & set(extras))} are installed, which torch does not need"
    layer = torch.nn.Linear(8, 4)
    snparam.convert_model(layer)
    layer(torch.randn(2, 8)).sum().backward()
    sigma = torch.linalg.matrix_norm(layer.eval().weight, 2).item()
    return None if abs(sigma - 1) < 1e-3 else f"the norm is {sigma}, expected 1"


if __name__ == "__main__":
    sys.exit(main())
