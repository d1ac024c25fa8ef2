"""Rayleigh-Ritz steps on weights that are sharded over ranks: those of the whole weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import snparam

from .ranks import assert_bit_equal, assert_same, on_ranks


def trained(update: Any, sharded: bool) -> dict[str, Any]:
    """State after three steps from a cold start, and the norms that the optimizer left."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    snparam.convert_model(net, 3, sigma="rayleigh-ritz", init="random", update=update)
    if sharded:
        for layer in (net[0], net[2], net):
            fully_shard(layer)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for index in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        optimizer.zero_grad()
        (net(x) + 0).square().sum().backward()
        optimizer.step()
    found = {}
    for name, tensor in net.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found[name] = whole.detach().clone().numpy()
    return found


def sharded_on(_: int, update: str) -> dict[str, Any]:
    return trained(update, sharded=True)


@pytest.mark.parametrize("update", ["forward", "step"])
def test_sharded_training_is_that_of_the_whole_weights(update: str) -> None:
    first, second = on_ranks(2, sharded_on, update)
    assert_bit_equal(first, second)
    assert_same(first, trained(update, sharded=False), atol=1e-10)
