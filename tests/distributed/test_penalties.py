"""Gradient penalties, which differentiate twice, on sharded networks: gradients of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import snparam

from .ranks import assert_same, on_ranks

OPTIONS: list[dict[str, Any]] = [{"num_svs": 2, "gain": "learned"}, {"update": "step", "blocks": 2}]


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(12, 16)
        self.down = nn.Linear(16, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).tanh())
        return out


def batches(part: int = 0, parts: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    all_of = torch.randn(3, 8, 12, generator=generator, dtype=torch.float64)
    return tuple(x.chunk(parts)[part] for x in all_of)


def gradients(model: nn.Module, real: Tensor, fake: Tensor, between: Tensor) -> dict[str, Any]:
    """Of a critic's loss with a penalty of (‖∂D/∂x‖² − 1)² for each sample."""
    loss = model(fake).mean() - model(real).mean()
    between = between.detach().requires_grad_()
    (inner,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
    assert inner.requires_grad
    excess = (inner * inner).sum(1) - 1
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    (loss + (excess * excess).mean()).backward()
    return {name: whole(p.grad) for name, p in model.named_parameters()}


def whole(tensor: Tensor | None) -> Any:
    assert tensor is not None
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().numpy()


def single(options: dict[str, Any]) -> dict[str, Any]:
    return gradients(snparam.convert_model(Critic(), **options), *batches())


def fully_sharded(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    model = snparam.convert_model(Critic(), **options)
    for module in (model.up, model.down, model):
        fully_shard(module)
    return gradients(model, *batches(rank, torch.distributed.get_world_size()))


def tensor_parallel(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    # torch differentiates `to_local` once only, so that activations have to stay DTensors.
    plan = {
        "up": ColwiseParallel(use_local_output=False),
        "down": RowwiseParallel(use_local_output=False),
    }
    model = snparam.convert_model(parallelize_module(Critic(), mesh, plan), **options)
    return gradients(model, *(distribute_tensor(x, mesh, [Replicate()]) for x in batches()))


def each(rank: int, system: Any) -> list[dict[str, Any]]:
    return [system(rank, options) for options in OPTIONS]


@pytest.mark.parametrize("system", [fully_sharded, tensor_parallel])
def test_gradient_penalties_equal_those_of_a_single_process(system: Any) -> None:
    expected = [single(options) for options in OPTIONS]
    for results in on_ranks(2, each, system):
        for found, right in zip(results, expected, strict=True):
            assert_same(found, right)
