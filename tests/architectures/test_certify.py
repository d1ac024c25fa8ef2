"""Certificates of timm's networks: convolutional ones are finite, and gates are named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.steepness import jacobian_norm
from torch import nn

from snparam import certify, convert_model

pytest.importorskip("timm")
import timm
from timm.models.vgg import VGG

SHAPE = (1, 3, 32, 32)


def made(name: str, **smaller: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, num_classes=5, **smaller)


FINITE = {
    "resnet": made("test_resnet", layers=(1, 1, 1, 1)),
    "vgg": lambda: VGG(num_classes=5, cfg=[8, "M", 16, "M", 16, "M"], mlp_ratio=0.01),
    "convnext": made("test_convnext", dims=(16, 16, 32, 32), depths=(1, 1, 1, 1)),
    "densenet": made("densenet121", growth_rate=8, block_config=(1, 1, 1, 1)),
}


@pytest.mark.parametrize("family", FINITE)
@pytest.mark.parametrize("converted", [False, True], ids=["as it is", "converted"])
def test_convolutional_networks_have_finite_bounds(family: str, converted: bool) -> None:
    torch.manual_seed(0)
    model = FINITE[family]().double()
    if converted:
        convert_model(model)
    x = torch.randn(SHAPE, dtype=torch.float64)
    certificate = certify(model, x)
    assert not certificate.without_constant
    assert jacobian_norm(model.eval(), x) <= certificate.bound < math.inf


def test_the_squeeze_excite_gates_of_mobilenet_are_named() -> None:
    model = timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=5)
    gates = {name for name, part in model.named_modules() if type(part).__name__ == "SqueezeExcite"}
    certificate = certify(model, torch.zeros(SHAPE))
    assert certificate.bound == math.inf
    assert {row.name for row in certificate.without_constant} == gates
    assert gates
    assert all("gate" in row.reason for row in certificate.without_constant)


def test_the_attention_of_transformers_is_named() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, num_classes=5, depth=2, img_size=32
    )
    certificate = certify(model, torch.zeros(SHAPE))
    assert {row.name for row in certificate.without_constant} == {"blocks.0.attn", "blocks.1.attn"}
    assert "attention" in str(certificate)
