"""FSDP1 (FullyShardedDataParallel) after the conversion, against one process."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import snparam

from .ranks import assert_same, on_ranks


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    return snparam.convert_model(model.double())


def train(model: nn.Module) -> dict[str, Any]:
    """Outputs after ten steps."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(10):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"output": model.eval()(x).detach().numpy()}


def flattened(rank: int, original: bool) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(
            network(), use_orig_params=original, device_id=torch.device("cpu")
        )
        found = train(model)
        with FullyShardedDataParallel.summon_full_params(model):
            snparam.verify(model, tolerance=0.05)
    return found


@pytest.mark.parametrize("original", [True, False])
def test_flattened_after_the_conversion_it_trains_as_one_process_does(original: bool) -> None:
    right = train(network())
    for found in on_ranks(2, flattened, original):
        assert_same(found, right)
