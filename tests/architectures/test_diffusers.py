"""diffusers: U-Nets, an autoencoder, a diffusion transformer, in tiny configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
import diffusers

import snparam

from .contract import Architecture, assert_same, check, computed, convert

IMAGE = torch.linspace(-3, 3, 2 * 3 * 8 * 8).sin().reshape(2, 3, 8, 8)
LATENT = torch.linspace(-3, 3, 2 * 4 * 8 * 8).cos().reshape(2, 4, 8, 8)
TEXT = torch.linspace(-9, 9, 2 * 5 * 12).sin().reshape(2, 5, 12)
POOLED = torch.linspace(-4, 4, 2 * 10).cos().reshape(2, 10)
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


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
        pooled_projection_dim=10, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def run_flux(model: Any) -> Any:
    places = {"img_ids": torch.arange(48.0).reshape(16, 3), "txt_ids": torch.zeros(5, 3)}
    tokens = LATENT.reshape(2, 8, 32)[:, :, :16].mT
    return model(
        tokens, encoder_hidden_states=TEXT, pooled_projections=POOLED, timestep=TIME / 10, **places
    ).sample


def vq() -> nn.Module:
    return diffusers.VQModel(
        layers_per_block=1, latent_channels=4, num_vq_embeddings=16, **CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def unet_1d() -> nn.Module:
    return diffusers.UNet1DModel(
        sample_size=16, in_channels=2, out_channels=2, extra_in_channels=64,
        block_out_channels=(32, 32), mid_block_type="UNetMidBlock1D",
        down_block_types=("DownBlock1DNoSkip", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1DNoSkip"),
    )  # fmt: skip


ARCHITECTURES = [
    Architecture("UNet2D", unet, lambda m: m(IMAGE, TIME).sample),
    Architecture("UNet2DCondition", conditional_unet, lambda m: m(LATENT, TIME, TEXT).sample),
    Architecture("AutoencoderKL", autoencoder, lambda m: m(IMAGE, sample_posterior=False).sample),
    Architecture("DiT", dit, lambda m: m(LATENT, TIME, TIME).sample),
    Architecture("SD3", sd3, lambda m: m(LATENT, TEXT, POOLED, TIME).sample),
    Architecture("Flux", flux, run_flux),
    Architecture("VQModel", vq, lambda m: m(IMAGE).sample),
    Architecture("UNet1D", unet_1d, lambda m: m(IMAGE[:, :2, 0].repeat(1, 1, 2), TIME).sample),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_contract(architecture: Architecture) -> None:
    check(architecture)


SAVED = [architecture for architecture in ARCHITECTURES if architecture.name != "DiT"]


@pytest.mark.parametrize("architecture", SAVED, ids=str)
def test_saved_by_its_own_method_it_reads_back_as_it_computes(
    architecture: Architecture, tmp_path: Path
) -> None:
    model: Any = architecture.make(0)
    convert(model)
    model.save_pretrained(tmp_path)
    back = type(architecture.make(1)).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert list(back.state_dict()) == list(architecture.make(0).state_dict())
    assert_same(computed(architecture, back), computed(architecture, model))


def test_with_one_layer_registered_it_reads_back_as_it_computes(tmp_path: Path) -> None:
    """The model knows nothing of it."""
    architecture = ARCHITECTURES[0]
    model: Any = architecture.make(0)
    before = computed(architecture, model)
    snparam.register_sn(model.conv_in)
    assert not torch.allclose(computed(architecture, model)[0], before[0], atol=1e-3)
    model.save_pretrained(tmp_path)
    back = diffusers.UNet2DModel.from_pretrained(tmp_path)
    assert_same(computed(architecture, back), computed(architecture, model))


def test_an_attention_processor_reads_the_normalised_projections() -> None:
    """Processors call the projections of the attention that is passed to them, or fuse them."""
    from diffusers.models import attention_processor

    model: Any = ARCHITECTURES[1].make(0)
    convert(model)
    default = computed(ARCHITECTURES[1], model)
    for kind in (attention_processor.AttnProcessor, attention_processor.AttnProcessor2_0):
        model.set_attn_processor(kind())
        for mine, theirs in zip(default, computed(ARCHITECTURES[1], model), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
