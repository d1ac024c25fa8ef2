"""Clip, stable rank, coeff="mup" and spectral penalties on sharded networks: as in one process.

Clip and stable rank need whole matrices, which FSDP2 gathers for a forward. Elsewhere a shard is
refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import snparam

from .ranks import assert_same, on_ranks
from .test_sharded import PLAN, Network, train, whole

WHOLE: list[dict[str, Any]] = [{"clip": 0.3, "num_svs": 3}, {"stable_rank": 1.5, "update": "step"}]
SHARDED: list[dict[str, Any]] = [{"coeff": "mup"}]


def parameters(model: nn.Module) -> dict[str, Any]:
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: whole(tensor).detach().numpy() for name, tensor in found.items()}


def sharded(model: nn.Module) -> Any:
    for module in (model.up, model.down, model):
        fully_shard(module)
    return model


def trained(rank: int) -> list[dict[str, Any]]:
    """Networks that FSDP2 shards after their conversion, trained, one for each of the options."""
    results = []
    for options in WHOLE + SHARDED:
        model = sharded(snparam.convert_model(Network(), **options))
        train(model, rank, 2)
        results.append(parameters(model))
        if options in SHARDED:
            continue
        before = {name: whole(buffer).clone() for name, buffer in model.named_buffers()}
        for training in (True, False):
            model.train(training)
            assert isinstance(model.up.parametrizations.weight.original, DTensor)
            with pytest.raises(ValueError, match=r"up\.weight.*read as a shard"):
                model.up.weight  # noqa: B018 - the read is what raises
        with pytest.raises(ValueError, match="read as a shard"):
            snparam.verify(model)
        for name, buffer in model.named_buffers():
            assert torch.equal(whole(buffer), before[name])
    return results


def test_fully_sharded_training_equals_a_single_process() -> None:
    expected = []
    for options in WHOLE + SHARDED:
        model = snparam.convert_model(Network(), **options)
        train(model)
        expected.append(parameters(model))
    for results in on_ranks(2, trained):
        for found, right in zip(results, expected, strict=True):
            assert_same(found, right, atol=1e-9)


def refused_and_penalised(rank: int) -> list[dict[str, Any]]:
    mesh = init_device_mesh("cpu", (2,))
    model = parallelize_module(Network(), mesh, PLAN)
    for options in WHOLE:
        plan = snparam.plan_conversion(model, **options)
        assert [row.decision for row in plan] == ["refuse", "refuse"]
        for call, target in ((snparam.convert_model, model), (snparam.register_sn, model.up)):
            with pytest.raises(ValueError, match="it is sharded"):
                call(target, **options)  # type: ignore[operator]
        assert type(model.up) is nn.Linear
    results = []
    for each in (model, sharded(Network())):
        penalty = snparam.SpectralPenalty(each, lambda sv: sv.square().sum(), num_svs=3)
        for _ in range(3):
            value = penalty()
        value.backward()
        gradients = {n: whole(p.grad).numpy() for n, p in each.named_parameters() if p.ndim > 1}
        results.append({**gradients, "value": value.detach().numpy()})
    return results


def test_tensor_parallel_weights_are_refused_and_penalties_equal_a_single_process() -> None:
    model = Network()
    sv = [torch.linalg.svdvals(layer.weight)[:3] for layer in (model.up, model.down)]
    value = torch.cat(sv).square().sum()
    value.backward()
    right = {n: p.grad.numpy() for n, p in model.named_parameters() if p.ndim > 1}  # type: ignore[union-attr]
    right["value"] = value.detach().numpy()
    for results in on_ranks(2, refused_and_penalised):
        for found in results:
            for name, array in right.items():
                torch.testing.assert_close(
                    torch.from_numpy(found[name]), torch.from_numpy(array), rtol=1e-3, atol=1e-4
                )
