"""The formulas of docs/scaling.md, against what a step really reads and sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import snparam
from snparam import sharded

from .ranks import on_ranks

SHAPES = [(16, 24), (8, 40), (32, 8)]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(n, m, bias=False) for m, n in SHAPES])


CASES = [(1, 1), (3, 2)]


def counted(rank: int) -> list[tuple[list[int], int]]:
    return [count(num_svs, num_itrs) for num_svs, num_itrs in CASES]


def count(num_svs: int, num_itrs: int) -> tuple[list[int], int]:
    """The sizes of the all-reduces of one update, and the entries that this rank multiplies."""
    model = snparam.convert_model(Stack(), num_svs, num_itrs, update="step")
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    sizes: list[int] = []
    read = 0
    reduce, left, right = (
        torch.distributed.all_reduce,
        sharded.ShardedStack.left_here,
        sharded.ShardedStack.right_here,
    )

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    def reading(product: Any) -> Any:
        def call(stack: sharded.ShardedStack, x: Tensor) -> Tensor:
            nonlocal read
            read += stack.piece.numel()
            return product(stack, x)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", all_reduce)
        patch.setattr(sharded.ShardedStack, "left_here", reading(left))
        patch.setattr(sharded.ShardedStack, "right_here", reading(right))
        snparam.update(model)
    return sizes, read


@pytest.mark.parametrize("world", [1, 2, 4])
def test_step_reads_its_share_and_sends_vectors(world: int) -> None:
    rows, columns = (sum(side) for side in zip(*SHAPES, strict=True))
    entries = sum(m * n for m, n in SHAPES)
    for counts in on_ranks(world, counted):
        for (num_svs, num_itrs), (sizes, read) in zip(CASES, counts, strict=True):
            # Two all-reduces for each iteration, of all weights together, whatever the ranks.
            assert sizes == [num_svs * columns, num_svs * rows] * num_itrs
            assert read == 2 * num_itrs * entries / world


def test_worked_example_adds_up() -> None:
    layer = [(8192, 8192)] * 2 + [(1024, 8192)] * 2 + [(28672, 8192)] * 2 + [(8192, 28672)]
    network = layer * 80 + [(32000, 8192)] * 2
    assert sum(m + n for m, n in layer) == 161_792
    vectors = sum(m + n for m, n in network)
    assert vectors == 13_023_744
    entries = sum(m * n for m, n in network)
    assert round(entries / 1e9, 1) == 69.0
    sent = 2 * 255 / 256 * vectors * 4
    gathered = 255 / 256 * entries * 2
    assert round(sent / 1e6) == 104
    assert round(gathered / 1e9) == 137
    assert round(gathered / sent, -2) == 1300
    assert round(2 * entries * 2 / 256 / 1e9, 1) == 1.1
