"""All options on weights that are sharded already: as in one process, or refused."""

from __future__ import annotations

import re
from typing import Any

import torch
from helpers.combinations import (
    HEADER,
    ROWS,
    SIZES,
    WORKING,
    Cell,
    layer_for,
    meant,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import snparam
from snparam.estimators.estimate import ESTIMATORS

from .ranks import assert_same, on_ranks
from .test_sharded import PLAN, Network, tensors

# Both updates are in the other tests here.
CELLS = [
    cell
    for cell in WORKING
    if (cell["norm"], cell["update"]) == ("matrix", "forward") and cell["blocks"] != "auto"
]


def trained(model: Any) -> dict[str, Any]:
    """A network after two steps."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return tensors(model)


def outcome(model: Any, cell: Cell) -> str | dict[str, Any]:
    """What training makes of a network with the options of a cell, or why they are refused."""
    try:
        snparam.convert_model(model, **cell)
    except ValueError as error:
        for layer in (model.up, model.down):
            assert type(layer) is nn.Linear
            assert isinstance(layer.weight, nn.Parameter)
        return str(error)
    return trained(model)


def outcomes(rank: int) -> tuple[list[str | dict[str, Any]], dict[str, bool]]:
    mesh = init_device_mesh("cpu", (2,))
    found = [outcome(parallelize_module(Network(), mesh, PLAN), cell) for cell in CELLS]
    works = {row[0]: works_sharded(options, mesh) for row in ROWS for options in meant(row[0])}
    return found, works


def works_sharded(cell: Cell, mesh: Any) -> bool:
    """Whether a convolution with a sharded weight can be registered with some options."""
    kind = "grouped Conv2d"
    layer = layer_for(kind)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    size = {"input_size": SIZES[kind]} if cell.get("norm") == "operator" else {}
    if cell.get("sigma", "power") not in ESTIMATORS:
        return False
    try:
        snparam.register_sn(layer, **size, **cell)
    except ValueError:
        return False
    return True


def test_sharded_networks_train_as_in_one_process_or_are_refused() -> None:
    results = on_ranks(2, outcomes)
    said = {row[0]: row[HEADER.index("sharded already")] for row in ROWS}
    for _, works in results:
        for name, value in works.items():
            if all(cell.get("sigma", "power") in ESTIMATORS for cell in meant(name)):
                assert value == (said[name] == "yes"), name
    for cell, *found in zip(CELLS, *(outcomes for outcomes, _ in results), strict=True):
        refusing = [cell[option] for option in ("clip", "stable_rank") if cell.get(option)]
        if refusing or ESTIMATORS[cell["sigma"]].side == "above":
            for reason in found:
                assert isinstance(reason, str), cell
                assert re.search(r"'(up|down).weight' .*it is sharded, and .*; ", reason)
        else:
            right = outcome(Network(), cell)
            assert isinstance(right, dict)
            for each in found:
                assert isinstance(each, dict), each
                assert_same(each, right, atol=1e-9)
