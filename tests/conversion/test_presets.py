"""Presets: each leaves alone what its name says, and says so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import snparam
from snparam.conversion.presets import PRESETS

DOCS = Path(__file__).parents[2] / "docs" / "presets.md"


class WindowAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)


class CrossAttnDownBlock2D(nn.Module):
    """Has attention in its name, and convolutions in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.attn = WindowAttention()


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList([CrossAttnDownBlock2D()])
        self.mlp = nn.ModuleDict({"fc": nn.Linear(4, 4), "multi": nn.MultiheadAttention(4, 2)})
        self.fc = nn.Linear(4, 3)


EMBEDDING, CONV, QKV = "embed.weight", "blocks.0.conv.weight", "blocks.0.attn.qkv.weight"
INNER, HEAD = "mlp.fc.weight", "fc.weight"
MULTI = {"mlp.multi.in_proj_weight", "mlp.multi.out_proj.weight"}
LEFT = {
    "gan-discriminator": set(),
    "gan-generator": {EMBEDDING},
    "keep-head": {HEAD},
    "attention": {EMBEDDING, CONV, INNER, HEAD},
    "sigma-reparam": {EMBEDDING},
    "sngp": {EMBEDDING, HEAD},
}


def left(model: nn.Module, **options: Any) -> dict[str, str]:
    plan = snparam.plan_conversion(model, **options)
    return {row.weight: row.reason for row in plan if row.decision == "skip"}


def test_every_preset_is_tested_and_documented() -> None:
    assert set(LEFT) == set(PRESETS)
    assert set(re.findall(r"^## `(.+)`$", DOCS.read_text(encoding="utf-8"), re.M)) == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_left_alone_and_the_plan_says_by_whom(preset: str) -> None:
    model = Network()
    assert left(model, preset=preset) == dict.fromkeys(
        LEFT[preset], f"left out by preset {preset!r}"
    )
    snparam.convert_model(model, preset=preset)
    everything = {EMBEDDING, CONV, QKV, INNER, HEAD, *MULTI}
    assert set(snparam.singular_values(model)) == everything - LEFT[preset]


def test_include_exclude_and_filter_leave_out_more() -> None:
    model = Network()
    found = left(
        model,
        preset="keep-head",
        include=["blocks", "fc", "mlp"],
        exclude="**.conv",
        filter_fn=lambda module, name: name != "mlp.fc",
    )
    assert found == {
        EMBEDDING: "not included",
        CONV: "excluded by '**.conv'",
        INNER: "filter_fn says no",
        HEAD: "left out by preset 'keep-head'",
    }


def test_a_head_that_the_model_tells_is_left_alone_under_any_name() -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.tail = nn.Linear(3, 3), nn.Linear(3, 3)

        def get_classifier(self) -> nn.Module:
            return self.tail

    assert set(left(Told(), preset="keep-head")) == {"tail.weight"}


@pytest.mark.parametrize("preset", ["keep-head", "sngp"])
def test_no_head_is_an_error_that_names_the_parts_and_what_does_the_same(preset: str) -> None:
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(
        ValueError, match=rf"preset='{preset}': no head was recognised in Sequential.*0, 1, 2;"
    ) as caught:
        snparam.convert_model(model, preset=preset)
    assert type(model[1]) is nn.Linear
    (advice,) = re.findall(r"exclude=(\[.*\])", str(caught.value))
    exclude = eval(advice.replace("NAME", "2"), {"torch": torch})
    assert set(left(model, exclude=exclude)) == (
        {"2.weight"} if preset == "keep-head" else {"0.weight", "2.weight"}
    )


def test_an_unknown_preset_is_an_error_that_names_the_known() -> None:
    with pytest.raises(ValueError, match="preset='gan' is unknown") as error:
        snparam.convert_model(nn.Linear(2, 2), preset="gan")
    assert all(repr(name) in str(error.value) for name in PRESETS)
    with pytest.raises(TypeError, match="preset=3"):
        snparam.plan_conversion(nn.Linear(2, 2), preset=3)  # type: ignore[arg-type]
