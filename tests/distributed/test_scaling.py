"""The formulas of docs/scaling.md, against what a step really reads and sends."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import snparam
from snparam.matrices import sharded

from .ranks import on_ranks

SHAPES = [(16, 24), (8, 40), (32, 8)]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(n, m, bias=False) for m, n in SHAPES])


CASES = [(1, 1), (3, 2)]


class Counts:
    """While it lasts: the sizes of all-reduces, and the entries that this rank multiplies."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.read = 0
        reduce = torch.distributed.all_reduce

        def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sizes.append(tensor.numel())
            return reduce(tensor, *args, **kwargs)

        patch.setattr(torch.distributed, "all_reduce", all_reduce)
        for name in ("left_summand", "right_summand"):
            product = getattr(sharded.ShardedStack, name)
            patch.setattr(sharded.ShardedStack, name, self.reading(product))

    def reading(self, product: Any) -> Any:
        def call(stack: sharded.ShardedStack, x: Tensor) -> Tensor:
            self.read += stack.piece.numel()
            return product(stack, x)

        return call


def counted(rank: int) -> list[tuple[list[int], int]]:
    """Of one update under FSDP2."""
    return [updated(num_svs, num_itrs) for num_svs, num_itrs in CASES]


def updated(num_svs: int, num_itrs: int) -> tuple[list[int], int]:
    model = snparam.convert_model(Stack(), num_svs, num_itrs, update="step")
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    with pytest.MonkeyPatch.context() as patch:
        counts = Counts(patch)
        snparam.update(model)
    return counts.sizes, counts.read


@pytest.mark.parametrize("world", [1, 2, 4])
def test_step_reads_its_share_and_sends_vectors(world: int) -> None:
    rows, columns = (sum(side) for side in zip(*SHAPES, strict=True))
    entries = sum(m * n for m, n in SHAPES)
    for counts in on_ranks(world, counted):
        for (num_svs, num_itrs), (sizes, read) in zip(CASES, counts, strict=True):
            # Two all-reduces for each iteration, of all weights together, whatever the ranks.
            assert sizes == [num_svs * columns, num_svs * rows] * num_itrs
            assert read == 2 * num_itrs * entries / world


def forwards(rank: int) -> list[tuple[list[int], int, list[int], list[str]]]:
    """Of a forward and of a backward pass of each layer under tensor parallelism."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    found = []
    for num_svs, num_itrs in CASES:
        stack = Stack()
        for layer in stack.layers:
            parallelize_module(layer, mesh, ColwiseParallel(use_local_output=False))
        snparam.convert_model(stack, num_svs, num_itrs)
        with pytest.MonkeyPatch.context() as patch, CommDebugMode() as mode:
            counts = Counts(patch)
            outputs = [layer(torch.ones(2, layer.in_features)) for layer in stack.layers]
            forward = list(counts.sizes)
            for output in outputs:
                output.to_local().sum().backward()
        kinds = [str(kind).split(".")[-1] for kind in mode.get_comm_counts()]
        found.append((forward, counts.read, counts.sizes[len(forward) :], kinds))
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_tensor_parallel_forward_reads_its_share_and_sends_vectors(world: int) -> None:
    entries = sum(m * n for m, n in SHAPES)
    for counts in on_ranks(world, forwards):
        for (num_svs, num_itrs), (forward, read, backward, kinds) in zip(
            CASES, counts, strict=True
        ):
            steps = [(num_svs * n, num_svs * m) * num_itrs for m, n in SHAPES]
            assert forward == list(itertools.chain(*steps))
            assert read == 2 * num_itrs * entries / world
            assert backward == [1] * len(SHAPES)
            assert set(kinds) == {"allreduce_"}  # nothing is gathered


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
    # Tensor parallelism over 8 ranks.
    assert round(2 * 7 / 8 * vectors * 4 / 1e6) == 91
    assert 2 * len(network) == 1124
    activations = 2 * 7 / 8 * 80 * 2 * 4096 * 8192 * 2
    assert round(activations / 1e9, 1) == 18.8
