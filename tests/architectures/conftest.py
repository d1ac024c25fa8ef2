"""The libraries' own warnings are theirs; snparam's are errors here as everywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Nothing is ever downloaded: a configuration that asks for weights is a mistake in a test.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.filterwarnings("error:.*(SpectralNorm|convert_model)"))
