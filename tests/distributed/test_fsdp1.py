"""FSDP1's state dicts of a converted network, beside those of one under torch's own norm."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from torch.nn.utils import parametrizations as torch_parametrizations

import snparam

from .ranks import on_ranks

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def network(who: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    if who == "torch":
        for i in (0, 2):
            torch_parametrizations.spectral_norm(model[i])
    elif who == "snparam":
        snparam.convert_model(model)
    return model


def wrapped(who: str, original: bool) -> Any:
    return FullyShardedDataParallel(
        network(who), device_id=torch.device("cpu"), use_orig_params=original
    )


# torch's local one is not loaded by torch itself on more than one rank.
KINDS = (StateDictType.FULL_STATE_DICT, StateDictType.SHARDED_STATE_DICT)
CASES = [(who, original) for who in ("snparam", "torch") for original in (False, True)]


def saved_and_loaded(who: str, original: bool) -> dict[str, Any]:
    """What is saved after a training forward, and what a wrapped network computes that loads it."""
    alone, model = network(who), wrapped(who, original)
    alone(X), model(X)
    found: dict[str, Any] = {"alone": alone.eval()(X).detach().numpy()}
    for kind in KINDS:
        other = wrapped(who, original)
        with FullyShardedDataParallel.state_dict_type(model, kind):
            state = model.state_dict()
        with FullyShardedDataParallel.state_dict_type(other, kind):
            keys = other.load_state_dict(state)
        assert list(state) == list(alone.state_dict())
        assert keys == ([], [])
        if kind == StateDictType.FULL_STATE_DICT:
            for key, value in alone.state_dict().items():
                torch.testing.assert_close(state[key], value, msg=f"{who} {original} {key}")
        found[kind.name] = other.eval()(X).detach().numpy()
    if who == "snparam":
        other = wrapped(who, original)
        with FullyShardedDataParallel.state_dict_type(other, StateDictType.FULL_STATE_DICT):
            other.load_state_dict(snparam.plain_state_dict(alone))
        found["plain"] = other.eval()(X).detach().numpy()
    return found


def on_rank(_rank: int) -> list[dict[str, Any]]:
    warnings.simplefilter("ignore", FutureWarning)  # of torch, that FSDP1 is to be given up
    return [saved_and_loaded(who, original) for who, original in CASES]


def test_what_is_saved_is_the_state_of_the_network_alone_and_is_loaded() -> None:
    for outputs in on_ranks(2, on_rank):
        for (who, _), found in zip(CASES, outputs, strict=True):
            right = torch.from_numpy(found.pop("alone"))
            assert len(found) == (3 if who == "snparam" else 2)
            for output in found.values():
                torch.testing.assert_close(torch.from_numpy(output), right)
