"""Activation checkpointing on several ranks: what one process without it computes.

Two ranks train a network of large weights, whose regions run again in the backward pass.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import snparam

from .ranks import assert_bit_equal, assert_same, on_ranks

WIDTH = 192
OPTIONS: list[dict[str, Any]] = [
    {"update": "forward"},
    {"update": "step"},
    {"update": "step", "num_svs": 2, "gain": "learned"},
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.b(self.a(x).tanh())
        return out


class Network(nn.Module):
    """Two blocks; `mode` is use_reentrant, or None without checkpointing."""

    def __init__(self, mode: bool | None, options: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 4)
        self.mode = mode
        self.double()
        torch.manual_seed(1)
        # A cold start, of which each step moves far.
        snparam.convert_model(self, init="random", **options)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.mode is None else checkpoint(block, x, use_reentrant=self.mode)
        out: Tensor = self.head(x)
        return out + 0  # FSDP2 warns of views


def train(model: nn.Module, part: int = 0, parts: int = 1) -> None:
    """Eight steps of two forwards for each backward."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(2)
    for _ in range(8):
        real, fake = (
            torch.randn(4, WIDTH, generator=generator, dtype=torch.float64).chunk(parts)[part]
            for _ in range(2)
        )
        real, fake = real.requires_grad_(), fake.requires_grad_()
        (model(real).square().mean() - model(fake).mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()


def tensors(model: nn.Module) -> dict[str, Any]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().numpy()
        for name, value in model.state_dict().items()
    }


def data_parallel(rank: int) -> list[dict[str, Any]]:
    found = []
    for options, mode in itertools.product(OPTIONS, (True, False)):
        model = Network(mode, options)
        # Without static_graph torch refuses several reentrant forwards.
        wrapped = DistributedDataParallel(model, static_graph=mode, gradient_as_bucket_view=True)
        train(wrapped, rank, torch.distributed.get_world_size())
        found.append(tensors(model))
    return found


def fully_sharded(rank: int) -> list[dict[str, Any]]:
    found = []
    for options, mode in itertools.product(OPTIONS, (None, False)):
        model = Network(mode, options)
        for module in (*model.blocks, model):
            fully_shard(module)
        train(model, rank, torch.distributed.get_world_size())
        found.append(tensors(model))
    return found


@pytest.mark.parametrize("system", [data_parallel, fully_sharded])
def test_checkpointed_ranks_equal_one_process_without_checkpointing(system: Any) -> None:
    expected = []
    for options in OPTIONS:
        model = Network(None, options)
        train(model)
        expected += [tensors(model)] * 2
    for first, second, right in zip(*on_ranks(2, system), expected, strict=True):
        assert_bit_equal(first, second)
        assert_same(first, right)
