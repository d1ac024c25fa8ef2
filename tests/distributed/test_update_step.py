"""With update="step", on several ranks: each optimizer step moves every state once, alike on all.

The independent answer is a plain loop on the whole weight, in one process: from the stored u,
`num_itrs` plain steps on the weight as it is after the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import reference
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import snparam

from .ranks import on_ranks

PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}
OPTIONS: list[dict[str, Any]] = [{}, {"num_svs": 2, "num_itrs": 2}]
STEPS = 3

# By name, what is looked at: before a training forward, after it, after its optimizer's step, and
# after two more forwards.
Look = dict[str, Any]


class Network(nn.Module):
    """Two layers, each of which is used twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.down(self.up(x).tanh())
        return x + 0  # FSDP2 warns of views


def converted(model: Network, **options: Any) -> Network:
    """From a cold start, from which each step moves far."""
    torch.manual_seed(1)
    return snparam.convert_model(model, update="step", init="random", **options)


System = Callable[..., nn.Module]


def fully_sharded(**options: Any) -> nn.Module:
    model = converted(Network(), **options)
    for module in (model.up, model.down, model):
        fully_shard(module)
    return model


def fully_sharded_and_gathered(**options: Any) -> nn.Module:
    model = converted(Network(), **options)
    fully_shard(model, reshard_after_forward=False)
    return model


def data_parallel(**options: Any) -> nn.Module:
    return DistributedDataParallel(converted(Network(), **options))


def tensor_parallel(**options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = converted(parallelize_module(Network(), mesh, PLAN), **options)  # type: ignore[arg-type]
    assert isinstance(model.up.weight, DTensor)
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def looked_at(model: nn.Module) -> Look:
    found: Look = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            key = name.split("parametrizations")[0].removeprefix("module.")
            norm = module[0]
            tensors = {"weight": module.original, "u": norm.u, "sv": norm.sv}
            found |= {f"{key}{n}": whole(t).detach().clone().numpy() for n, t in tensors.items()}
    return found


def forward(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * seed + dist.get_rank())
    x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    out: Tensor = model(x)
    return out


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.5),
    "foreach adam": lambda p: torch.optim.Adam(p, 0.05, foreach=True),
}


def zero_redundancy(parameters: Any) -> torch.optim.Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(parameters, torch.optim.SGD, lr=0.5)


def trained(rank: int, system: System, optimizers: list[str]) -> list[Any]:
    """For each combination of options and optimizers, what was looked at in each step."""
    found = []
    for options in OPTIONS:
        for name in optimizers:
            model = system(**options)
            make = OPTIMIZERS.get(name, zero_redundancy)
            optimizer = make(model.parameters())
            looks = []
            for seed in range(STEPS):
                optimizer.zero_grad()
                one = [looked_at(model)]
                loss = forward(model, seed).square().mean()
                one.append(looked_at(model))
                loss.backward()
                optimizer.step()
                one.append(looked_at(model))
                for _ in range(2):
                    forward(model, seed + 100).sum().backward()
                one.append(looked_at(model))
                looks.append(one)
            found.append(looks)
    return found


def plain(look: Look, layer: str, u: Any, steps: int) -> tuple[Tensor, Tensor]:
    """u (1, k, m) and σ₁ after plain steps on the whole weight that was looked at."""
    weight, (one,) = torch.from_numpy(look[f"{layer}.weight"]), torch.from_numpy(u)
    for _ in range(steps):
        one, _, sv = reference.step(weight, one)
    return one.unsqueeze(0), sv[0]


def assert_followed(looks: list[list[Look]], num_itrs: int, most: int = 1) -> None:
    """Each step moves by plain steps, once or up to `most` times, and forwards move nothing."""
    for number, (before, after_forward, after_step, after_more) in enumerate(looks):
        for layer in ("up", "down"):
            u = before[f"{layer}.u"]
            if number == 0:
                # No optimizer has reached the weight: both uses in the forward move it.
                right, _ = plain(before, layer, u, 2 * num_itrs)
                torch.testing.assert_close(
                    torch.from_numpy(after_forward[f"{layer}.u"]), right, rtol=0, atol=1e-9
                )
            else:
                assert (after_forward[f"{layer}.u"] == u).all()
            u = after_forward[f"{layer}.u"]
            found = torch.from_numpy(after_step[f"{layer}.u"])
            assert (after_step[f"{layer}.weight"] != before[f"{layer}.weight"]).any()
            ends = [plain(after_step, layer, u, n * num_itrs) for n in range(1, most + 1)]
            reached = [torch.allclose(found, end, rtol=0, atol=1e-9) for end, _ in ends]
            assert any(reached), (number, layer)
            sigma = float(after_step[f"{layer}.sv"][0, 0])
            assert sigma == pytest.approx(float(ends[reached.index(True)][1]), rel=1e-9)
            assert (after_more[f"{layer}.u"] == after_step[f"{layer}.u"]).all()
            assert (after_more[f"{layer}.sv"] == after_step[f"{layer}.sv"]).all()


SYSTEMS: dict[str, tuple[System, list[str]]] = {
    "fully sharded": (fully_sharded, list(OPTIMIZERS)),
    "fully sharded and gathered": (fully_sharded_and_gathered, list(OPTIMIZERS)),
    "data parallel": (data_parallel, list(OPTIMIZERS)),
    "tensor parallel": (tensor_parallel, list(OPTIMIZERS)),
    "data parallel, optimizer in parts": (data_parallel, ["zero"]),
}


def all_systems(rank: int) -> dict[str, list[Any]]:
    return {name: trained(rank, *system) for name, system in SYSTEMS.items()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, list[Any]]]:
    """What two ranks have looked at, by system: they are started once for all."""
    return on_ranks(2, all_systems)


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_step_moves_every_state_by_plain_steps_of_the_whole_weight(
    ranks: list[dict[str, list[Any]]], system: str
) -> None:
    """Where each rank steps some of the weights, and gets the others by a broadcast after that, a
    state may move after either."""
    optimizers = SYSTEMS[system][1]
    most = 2 if optimizers == ["zero"] else 1
    runs = [options for options in OPTIONS for _ in optimizers]
    for options, looks in zip(runs, ranks[0][system], strict=True):
        assert_followed(looks, options.get("num_itrs", 1), most)


@pytest.mark.parametrize("system", SYSTEMS)
def test_ranks_have_the_same_states_at_all_times(
    ranks: list[dict[str, list[Any]]], system: str
) -> None:
    for first, second in zip(*(each[system] for each in ranks), strict=True):
        for one, other in zip(first, second, strict=True):
            for look, same in zip(one, other, strict=True):
                assert look.keys() == same.keys()
                for name, value in look.items():
                    torch.testing.assert_close(
                        torch.from_numpy(value), torch.from_numpy(same[name]), rtol=0, atol=1e-12
                    )
