"""DistributedDataParallel, compiled or not, and FSDP2 after conversion, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import snparam

from .ranks import assert_bit_equal, assert_same, on_ranks


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)
    ).double()


def train(model: nn.Module, part: int = 0, parts: int = 1) -> None:
    """Twenty steps of D(real) + D(fake), two forwards for each backward."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        real, fake = (
            torch.randn(8, 6, generator=generator, dtype=torch.float64).chunk(parts)[part]
            for _ in range(2)
        )
        (model(real).square().mean() - model(fake).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def state(model: nn.Module) -> dict[str, Any]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().numpy().copy()
        for name, value in model.state_dict().items()
    }


def data_parallel(rank: int, broadcast: bool) -> dict[str, Any]:
    torch.manual_seed(rank)  # conversion must not depend on it
    model = network()
    torch.manual_seed(rank)
    snparam.convert_model(model)
    wrapped = DistributedDataParallel(model, broadcast_buffers=broadcast)
    train(wrapped, rank, torch.distributed.get_world_size())
    return state(model)


@pytest.mark.parametrize("broadcast", [True, False])
def test_ranks_equal_each_other_to_the_bit_and_a_single_process(broadcast: bool) -> None:
    single = snparam.convert_model(network())
    train(single)
    expected = state(single)
    first, second = on_ranks(2, data_parallel, broadcast)
    assert_bit_equal(first, second)
    assert_same(first, expected)


def compiled(rank: int, fullgraph: bool) -> dict[str, Any]:
    model = snparam.convert_model(network())
    if fullgraph:
        wrapped: Any = DistributedDataParallel(torch.compile(model, fullgraph=True))
    else:  # torch splits its graphs where the buckets of gradients end
        wrapped = torch.compile(DistributedDataParallel(model))
    train(wrapped, rank, torch.distributed.get_world_size())
    wrapped.eval()(torch.ones(2, 6, dtype=torch.float64))
    return state(model)


def compiled_both_ways(rank: int) -> list[dict[str, Any]]:
    return [compiled(rank, fullgraph) for fullgraph in (True, False)]


def test_compiled_ranks_equal_each_other_to_the_bit_and_a_single_eager_process() -> None:
    single = snparam.convert_model(network())
    train(single)
    expected = state(single)
    for first, second in zip(*on_ranks(2, compiled_both_ways), strict=True):
        assert_bit_equal(first, second)
        assert_same(first, expected)


def sharded(model: nn.Module) -> nn.Module:
    for layer in (model[0], model[2], model[4], model):  # type: ignore[index]
        fully_shard(layer)
    return model


def train_and_save(rank: int, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    model = sharded(snparam.convert_model(network(), **options))
    train(model, rank, torch.distributed.get_world_size())
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    return state(model)


def load(rank: int, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    model = sharded(snparam.convert_model(network(seed=5), **options))
    found = {"model": get_model_state_dict(model)}
    dcp.load(found, checkpoint_id=folder)
    set_model_state_dict(model, found["model"])
    return {**state(model), **outputs(model)}


def outputs(model: nn.Module) -> dict[str, Any]:
    """Of training mode, too, which uses what is derived from a loaded state."""
    x = torch.ones(2, 6, dtype=torch.float64)
    return {str(mode): model.train(mode)(x).detach().numpy() for mode in (False, True)}


OPTIONS: list[dict[str, Any]] = [{}, {"update": "step", "num_svs": 2, "gain": "learned"}]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fsdp_equals_a_single_process_and_reshards_through_checkpoints(
    options: dict[str, Any], tmp_path: Path
) -> None:
    single = snparam.convert_model(network(), **options)
    train(single)
    expected = state(single)
    trained = on_ranks(2, train_and_save, str(tmp_path), options)
    loaded = [
        *on_ranks(1, load, str(tmp_path), options),
        *on_ranks(4, load, str(tmp_path), options),
    ]
    resumed = snparam.convert_model(network(seed=5), **options)
    resumed.load_state_dict(single.state_dict())
    after_load = {**state(resumed), **outputs(resumed)}
    for found, right in [*((f, expected) for f in trained), *((f, after_load) for f in loaded)]:
        assert_same(found, right)


def convert_too_late(rank: int) -> tuple[str, list[str]]:
    model = sharded(network())
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="fully_shard") as caught:
        snparam.convert_model(model)
    assert list(model.state_dict()) == before
    out: Tensor = model(torch.ones(2, 6, dtype=torch.float64))
    out.sum().backward()
    return str(caught.value), before


def test_converting_a_sharded_model_is_refused_with_the_order_to_use() -> None:
    for message, _ in on_ranks(2, convert_too_late):
        assert "convert_model first, then fully_shard" in message
