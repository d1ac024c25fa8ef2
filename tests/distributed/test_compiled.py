"""Networks that read sharded weights themselves, compiled or not: equal to one eager process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

import snparam

from .ranks import assert_same, on_ranks
from .test_sharded import PLAN, Network, tensors, train

Options = dict[str, dict[str, Any]]

# Of the two layers, all at once, because compiling takes longer than everything else.
OPTIONS: list[Options] = [
    {"up": {"update": "step"}, "down": {"num_svs": 3, "num_itrs": 2, "gain": "learned"}},
    {"up": {}, "down": {"update": "step", "sigma": "rayleigh-ritz", "num_svs": 2}},
]


def register(model: nn.Module, options: Options) -> nn.Module:
    for name, given in options.items():
        snparam.register_sn(model.get_submodule(name), **given)
    return model


class Reading(Network):
    """Reads a weight itself, too, which must not move it a second time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.up.weight.dtype))


def trained(model: nn.Module, run: nn.Module, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """Training, an eval forward, training again."""
    train(run, part, parts)
    with torch.no_grad():
        run.eval()(torch.ones(4, 12, dtype=torch.float64))
    train(run.train(), part, parts)
    return tensors(model)


def fully_sharded(rank: int, options: Options, compiled: bool = True) -> dict[str, Any]:
    torch._dynamo.reset()
    model = register(Reading(), options)
    for module in (model.up, model.down, model):
        fully_shard(module, reshard_after_forward=True)
    run: Any = model
    if compiled:
        run = torch.compile(model, backend="aot_eager")  # FSDP2's own hooks break the graph
    return trained(model, run, rank, torch.distributed.get_world_size())


def fully_sharded_eager(rank: int, options: Options) -> dict[str, Any]:
    return fully_sharded(rank, options, compiled=False)


def tensor_parallel(rank: int, options: Options) -> dict[str, Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = register(parallelize_module(Reading(), mesh, PLAN), options)
    # Not inductor, which takes a minute for its kernels, and adds nothing about shards.
    run: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = trained(model, run)
    # One for training and one for eval, whatever the steps and switches, and because of
    # update="step" one more for the training that trusts the optimizers' hooks.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    return found


def each(rank: int, system: Any) -> list[dict[str, Any]]:
    return [system(rank, options) for options in OPTIONS]


@pytest.mark.parametrize("system", [fully_sharded_eager, fully_sharded, tensor_parallel])
def test_sharded_training_equals_one_eager_process(system: Any) -> None:
    expected = []
    for options in OPTIONS:
        model = register(Reading(), options)
        expected.append(trained(model, model))
    for results in on_ranks(2, each, system):
        for found, right in zip(results, expected, strict=True):
            assert_same(found, right, atol=1e-11)
