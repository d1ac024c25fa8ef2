"""Wrappers that have parameters in hand: a conversion after them is refused with what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import snparam

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed"),
    pytest.mark.filterwarnings("ignore:FSDP is switching", "ignore:.*FullyShardedDataParallel"),
]


@pytest.fixture(autouse=True, scope="module")
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def flattened(model: nn.Module, **options: Any) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


@pytest.mark.parametrize("options", [{"gain": "learned"}, {"init": "random"}], ids=str)
def test_what_data_parallel_would_not_synchronise_is_refused(options: dict[str, Any]) -> None:
    model = DistributedDataParallel(network())
    plan = snparam.plan_conversion(model, **options)
    assert [row.decision for row in plan] == ["refuse", "refuse"]
    message = r"'module\.0\.weight' \(5, 6\).*convert_model first, then wrap it in Distributed"
    with pytest.raises(ValueError, match=message):
        snparam.convert_model(model, **options)
    assert type(model.module[0]) is nn.Linear


@pytest.mark.parametrize("options", [{}, {"gain": "fixed"}], ids=str)
def test_what_needs_no_synchronisation_is_converted_within_data_parallel(
    options: dict[str, Any],
) -> None:
    model = snparam.convert_model(DistributedDataParallel(network()), **options)
    model(torch.randn(3, 6)).sum().backward()
    assert len(snparam.verify(model)) == 2


@pytest.mark.parametrize("original", [True, False])
def test_flattened_parameters_are_refused_with_the_order_of_calls(original: bool) -> None:
    model = flattened(network(), use_orig_params=original)
    message = "FullyShardedDataParallel.*convert_model first, then wrap"
    with pytest.raises(ValueError, match=message):
        snparam.convert_model(model)
    part = nn.ModuleDict({"flat": model, "plain": nn.Linear(4, 3)})
    with pytest.raises(ValueError, match=message):
        snparam.convert_model(part)
    snparam.convert_model(part, exclude="flat")
    assert list(snparam.singular_values(part)) == ["plain.weight"]


def test_a_network_that_was_converted_before_it_was_flattened_is_converted_already() -> None:
    model = flattened(snparam.convert_model(network()), use_orig_params=True)
    snparam.convert_model(model)
    assert {row.decision for row in snparam.plan_conversion(model)} == {"skip"}


def test_parameters_that_somebody_else_has_partitioned_are_guessed_at() -> None:
    """As DeepSpeed does, which leaves parameters without entries behind."""
    model = network()
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    with pytest.warns(UserWarning, match="converted nothing.*convert first, then wrap"):
        snparam.convert_model(model)
