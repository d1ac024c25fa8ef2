"""diffusers: U-Nets, an autoencoder, a diffusion transformer, in tiny configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
import diffusers

from .contract import Architecture, check

IMAGE = torch.linspace(-3, 3, 2 * 3 * 8 * 8).sin().reshape(2, 3, 8, 8)
LATENT = torch.linspace(-3, 3, 2 * 4 * 8 * 8).cos().reshape(2, 4, 8, 8)
TEXT = torch.linspace(-9, 9, 2 * 5 * 12).sin().reshape(2, 5, 12)
TIME = torch.tensor([3, 7])
CHANNELS: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4}


def unet() -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=8, layers_per_block=1, attention_head_dim=4, **CHANNELS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def conditional_unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, attention_head_dim=4, cross_attention_dim=12,
        **CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def autoencoder() -> nn.Module:
    return diffusers.AutoencoderKL(
        sample_size=8, layers_per_block=1, latent_channels=4, **CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip


ARCHITECTURES = [
    Architecture("UNet2D", unet, lambda m: m(IMAGE, TIME).sample),
    Architecture("UNet2DCondition", conditional_unet, lambda m: m(LATENT, TIME, TEXT).sample),
    Architecture("AutoencoderKL", autoencoder, lambda m: m(IMAGE, sample_posterior=False).sample),
    Architecture("DiT", dit, lambda m: m(LATENT, TIME, TIME).sample),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_contract(architecture: Architecture) -> None:
    check(architecture)
