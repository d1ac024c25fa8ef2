"""timm: one small model of every family."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")
import timm
from timm import models
from timm.layers import GatedMlp

from .contract import Architecture, check


class Model:
    """A model of timm.

    Args:
        which: its name, or its class.
        side: of its images.
        without: repeated parts that are left out, where the constructor cannot.
        smaller: what its constructor is given.
    """

    def __init__(
        self,
        which: str | Callable[..., nn.Module],
        side: int,
        without: Iterable[str] = (),
        **smaller: Any,
    ) -> None:
        self.which, self.side, self.without, self.smaller = which, side, tuple(without), smaller

    def build(self) -> nn.Module:
        model: nn.Module
        if isinstance(self.which, str):
            model = timm.create_model(self.which, pretrained=False, num_classes=5, **self.smaller)
        else:
            model = self.which(num_classes=5, **self.smaller)
        for part in self.without:
            model.set_submodule(part, LeftOut())
        return model

    def architecture(self, family: str) -> Architecture:
        images = torch.linspace(-40, 40, 2 * 3 * self.side**2).sin()
        shape = 2, 3, self.side, self.side
        # A fixed gain is tried with the networks of other libraries, which are fewer.
        return Architecture(
            family, self.build, lambda m: m(images.reshape(shape)), share=0, gains=("learned",)
        )


class LeftOut(nn.Module):
    """Returns the first of its inputs."""

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return x


class Cells(nn.Module):
    """The cells of PNASNet, whose constructor has no sizes, one of each kind and narrow."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.first = models.pnasnet.Cell(8, 4, 8, 4)
        self.reducing = models.pnasnet.Cell(8, 4, 20, 4, is_reduction=True)
        self.matching = models.pnasnet.Cell(20, 4, 20, 4, match_prev_layer_dims=True)
        self.head = nn.Linear(20, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        first = self.first(x, x)
        scores: Tensor = self.head(self.matching(first, self.reducing(x, first)).mean((2, 3)))
        return scores


def attention_in_blocks() -> Any:
    """Bottlenecks, one of which has halo attention for its convolution."""
    sizes: dict[str, Any] = {"d": 1, "c": 32, "s": 1, "gs": 0, "br": 0.5}
    kinds = ("bottle", "self_attn")
    return models.byobnet.ByoModelCfg(
        blocks=tuple(models.byobnet.ByoBlockCfg(type=kind, **sizes) for kind in kinds),
        stem_chs=16,
        stem_pool="",
        self_attn_layer="halo",
        self_attn_kwargs={"block_size": 4, "halo_size": 2, "dim_head": 8},
    )


def branches() -> dict[str, Any]:
    """HRNet with one block in each branch."""
    stages: dict[str, Any] = {
        f"stage{n}": {
            "num_modules": 1,
            "num_branches": n,
            "block_type": "BASIC" if n > 1 else "BOTTLENECK",
            "num_blocks": (1,) * n,
            "num_channels": tuple(8 << branch for branch in range(n)),
            "fuse_method": "SUM",
        }
        for n in (1, 2, 3, 4)
    }
    return {"stem_width": 16, **stages}


def selective() -> dict[str, Any]:
    """SelecSLS with one stage."""
    return {
        "block": models.selecsls.SelecSlsBlock,
        "features": [(32, 0, 8, 8, True, 2), (8, 8, 8, 16, False, 1)],
        "head": [(16, 16, 3, 2)],
        "feature_info": [],
        "num_features": 16,
    }


# The smallest of each family, made smaller where its constructor can, at the smallest side that
# training takes.

FAMILIES = {
    "beit": Model("beit_base_patch16_224", 32, embed_dim=48, depth=2, num_heads=3, img_size=32),
    "byoanet": Model(models.byobnet.ByobNet, 32, cfg=attention_in_blocks()),
    "byobnet": Model("test_byobnet", 32, img_size=32),
    "cait": Model("cait_xxs24_224", 32, embed_dim=48, depth=2, num_heads=3, img_size=32),
    "coat": Model(
        "coat_tiny", 32, img_size=32, embed_dims=(32,) * 4, serial_depths=(1,) * 4, parallel_depth=1
    ),
    "convit": Model("convit_tiny", 32, embed_dim=64, depth=2, num_heads=2, img_size=32),
    "convmixer": Model(models.convmixer.ConvMixer, 32, dim=32, depth=2),
    "convnext": Model("test_convnext", 32, dims=(16, 16, 32, 32), depths=(1, 1, 1, 1)),
    "cpubone": Model(
        "cpubone_nano",
        32,
        width_list=[8, 16, 16, 32, 32],
        depth_list=[0, 1, 1, 1, 1],
        head_widths=(64, 32),
    ),
    "crossvit": Model(
        "crossvit_tiny_240", 32, embed_dim=(24, 32), num_heads=(2, 2), depth=((1, 1, 0),)
    ),
    "csatv2": Model(
        "csatv2", 64, dims=(16, 24, 32, 48), depths=(1, 1, 2, 2), transformer_depths=(0, 0, 1, 1)
    ),
    "cspnet": Model("cs3darknet_focus_s", 32),
    "cspnext": Model("cspnext_tiny", 32, depths=(1, 1, 1, 1)),
    "davit": Model(
        "davit_tiny", 32, depths=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), num_heads=(2, 2, 4, 4)
    ),
    "deepseek_vit": Model(
        "deepseek_vit_412m", 224, embed_dim=48, depth=2, num_heads=3, img_size=224
    ),
    "deit": Model("deit_tiny_patch16_224", 32, embed_dim=48, depth=2, num_heads=3, img_size=32),
    "densenet": Model("densenet121", 32, growth_rate=8, block_config=(1, 1, 1, 1)),
    "dla": Model("dla46x_c", 32),
    "dpn": Model("dpn48b", 32, k_r=8, groups=8, k_sec=(1, 1, 1, 1)),
    "edgenext": Model("edgenext_xx_small", 32, dims=(16, 16, 32, 32), depths=(1, 1, 1, 1)),
    "efficientformer": Model(
        "efficientformer_l1", 224, embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), img_size=224
    ),
    "efficientformer_v2": Model(
        "efficientformerv2_s0", 32, embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), img_size=32
    ),
    "efficientnet": Model("test_efficientnet", 32, channel_multiplier=0.1),
    "efficientvim": Model("efficientvim_m1", 32, depths=(1, 1, 1), embed_dim=(32, 48, 64)),
    "efficientvit_mit": Model("efficientvit_b0", 32, depths=(1, 1)),
    "efficientvit_msra": Model("efficientvit_m0", 32, img_size=32),
    "eva": Model(
        "vit_tiny_patch16_dinov3_qkvb", 32, embed_dim=48, depth=2, num_heads=3, img_size=32
    ),
    "fasternet": Model("fasternet_t0", 32, depths=(1, 1)),
    "fastvit": Model("fastvit_t8", 32, layers=(1, 1, 1, 1)),
    "focalnet": Model(models.focalnet.FocalNet, 32, embed_dim=16, depths=(1, 1, 1, 1)),
    "gcvit": Model(
        models.gcvit.GlobalContextVit,
        128,
        img_size=128,
        embed_dim=16,
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 2, 2),
    ),
    "gemma4_vit": Model("gemma4_vit_167m_enc", 96, embed_dim=48, depth=2, num_heads=3, img_size=96),
    "ghostnet": Model("ghostnet_050", 32),
    "hardcorenas": Model("hardcorenas_a", 32),
    "hgnet": Model("hgnetv2_b0", 32, head_hidden_size=64),
    "hiera": Model("hiera_tiny_224", 32, embed_dim=48, stages=(1, 1, 1, 1), img_size=32),
    "hieradet_sam2": Model("sam2_hiera_tiny", 32, embed_dim=48, stages=(1, 1, 1, 1)),
    "hrnet": Model(models.hrnet.HighResolutionNet, 32, cfg=branches()),
    "iformer": Model("iformer_t", 32, dims=(16, 32, 32, 64), depths=(1, 1, 9, 6)),
    "inception_next": Model("inception_next_atto", 32, dims=(16, 16, 32, 32), depths=(1, 1, 1, 1)),
    "inception_resnet_v2": Model(
        "inception_resnet_v2",
        96,
        [f"repeat.{n}" for n in range(1, 10)]
        + [f"repeat_1.{n}" for n in range(1, 20)]
        + [f"repeat_2.{n}" for n in range(1, 9)],
    ),
    "inception_v3": Model(
        "inception_v3", 96, ("Mixed_5d", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7c")
    ),
    "inception_v4": Model(
        "inception_v4", 96, [f"features.{n}" for n in (7, 8, 9, *range(12, 18), 20, 21)]
    ),
    "lcnetv2": Model("lcnetv2_small", 32, depths=(1, 1, 1, 1)),
    "levit": Model(
        "levit_128s",
        32,
        img_size=32,
        embed_dim=(32, 32, 48),
        key_dim=8,
        num_heads=(2, 2, 2),
        depth=(1, 1, 1),
    ),
    "lowformer": Model(
        "lowformer_b0",
        32,
        width_list=[8, 16, 16, 32, 32],
        depth_list=[0, 1, 1, 1, 1],
        head_widths=(64, 32),
    ),
    "mambaout": Model("test_mambaout", 32, depths=(1, 1)),
    "maxxvit": Model("test_coatnet", 32, depths=(1, 1, 1, 1), img_size=32),
    "metaformer": Model(
        models.metaformer.MetaFormer, 32, dims=(16, 16, 32, 32), depths=(1, 1, 1, 1)
    ),
    "mlp_mixer": Model(
        models.mlp_mixer.MlpMixer,
        32,
        img_size=32,
        num_blocks=2,
        embed_dim=32,
        mlp_ratio=6,
        block_layer=models.mlp_mixer.SpatialGatingBlock,
        mlp_layer=GatedMlp,
    ),
    "mobilenetv3": Model("lcnet_035", 32),
    "mobilenetv5": Model("mobilenetv5_base", 32, channel_multiplier=0.05),
    "mobilevit": Model("mobilevit_xxs", 32, num_features=128, img_size=32),
    "mvitv2": Model(
        models.mvitv2.MultiScaleVit,
        32,
        img_size=(32, 32),
        cfg=models.mvitv2.MultiScaleVitCfg(
            depths=(1, 1, 1, 1), embed_dim=(16, 32, 64, 128), num_heads=(1, 2, 4, 8)
        ),
    ),
    "naflexvit": Model(
        "naflexvit_base_patch16_siglip", 32, embed_dim=48, depth=2, num_heads=3, img_size=32
    ),
    "nasnet": Model(
        "nasnetalarge",
        32,
        [f"cell_{n}" for first in (2, 8, 14) for n in range(first, first + 4)],
        num_features=96,
        stem_size=24,
    ),
    "nest": Model(
        models.nest.Nest,
        32,
        img_size=32,
        embed_dims=(16, 32, 32),
        num_heads=(2, 2, 2),
        depths=(1, 1, 1),
    ),
    "nextvit": Model(
        "nextvit_small", 32, [f"stages.2.blocks.{n}" for n in (1, 2, 3)], depths=(1, 1, 5, 1)
    ),
    "nfnet": Model("test_nfnet", 32, depths=(1, 1)),
    "pit": Model("pit_ti_224", 32, img_size=32, base_dims=(16, 16, 16), depth=(1, 1, 1)),
    "pnasnet": Model(Cells, 32),
    "pvt_v2": Model("pvt_v2_b0", 32, depths=(1, 1, 1, 1)),
    "qwen3_vit": Model("qwen3_vit_88m", 32, embed_dim=48, depth=2, num_heads=3, img_size=32),
    "rdnet": Model("rdnet_tiny", 32, growth_rates=(8,) * 7, num_blocks_list=(1,) * 7),
    "regnet": Model("regnetx_002", 32),
    "repghost": Model("repghostnet_050", 32),
    "repvit": Model("repvit_m1", 32, img_size=32, embed_dim=(16, 16, 32, 32), depth=(1, 1, 1, 1)),
    "res2net": Model(
        "res2net50_26w_4s", 32, layers=(1, 1, 1, 1), base_width=8, channels=(16, 16, 32, 32)
    ),
    "resnest": Model("resnest14d", 32, layers=(1, 1, 1, 1), base_width=8),
    "resnet": Model("test_resnet", 32, layers=(1, 1, 1, 1)),
    "resnetv2": Model("resnetv2_18", 32, layers=(1, 1)),
    "rexnet": Model("rexnet_100", 32, width_mult=0.5, depth_mult=0.5),
    "selecsls": Model(models.selecsls.SelecSls, 32, cfg=selective()),
    "senet": Model("legacy_seresnet18", 32, layers=(1, 1, 1, 1)),
    "sequencer": Model(
        "sequencer2d_s",
        32,
        layers=(1, 1, 1, 1),
        img_size=32,
        embed_dims=[32, 48, 48, 48],
        hidden_sizes=[16, 24, 24, 24],
    ),
    "shvit": Model(
        "shvit_s1", 32, embed_dim=(32, 48, 64), partial_dim=(8, 16, 16), depth=(1, 1, 1)
    ),
    "sknet": Model("skresnet18", 32, layers=(1, 1, 1, 1)),
    "starnet": Model("starnet_s050", 32, depths=(1, 1)),
    "swiftformer": Model("swiftformer_xs", 32, layers=(1, 1, 1, 1), img_size=32),
    "swin_transformer": Model("swin_tiny_patch4_window7_224", 32, depths=(1, 1), img_size=32),
    "swin_transformer_v2": Model("swinv2_tiny_window8_256", 32, depths=(1, 1), img_size=32),
    "swin_transformer_v2_cr": Model("swinv2_cr_tiny_224", 32, depths=(1, 1), img_size=32),
    "tiny_vit": Model("tiny_vit_5m_224", 32, depths=(1, 1, 1, 1)),
    "tnt": Model("tnt_s_legacy_patch16_224", 32, embed_dim=48, depth=2, img_size=32),
    "tresnet": Model("tresnet_m", 32, layers=(1, 1, 1, 1), width_factor=0.25),
    "twins": Model(
        "twins_svt_small", 32, embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), img_size=32
    ),
    "vgg": Model(models.vgg.VGG, 32, cfg=[8, "M", 16, "M", 16, "M"], mlp_ratio=0.01),
    "visformer": Model("visformer_tiny", 32, embed_dim=48, depth=2, num_heads=3, img_size=32),
    "vision_transformer": Model("test_vit", 32, embed_dim=48, depth=2, num_heads=3, img_size=32),
    "vision_transformer_hybrid": Model(
        "vit_tiny_r_s16_p8_224", 32, embed_dim=48, depth=2, num_heads=3, img_size=32
    ),
    "vision_transformer_relpos": Model(
        "test_vit_relpos", 32, embed_dim=48, depth=2, num_heads=3, img_size=32
    ),
    "vision_transformer_sam": Model(
        "samvit_base_patch16_224", 32, embed_dim=48, depth=2, img_size=32
    ),
    "vitamin": Model("vitamin_small_224", 32, depth=1, img_size=32),
    "volo": Model(
        models.volo.VOLO,
        32,
        img_size=32,
        layers=(1, 1, 1, 1),
        embed_dims=(32,) * 4,
        num_heads=(2, 2, 2, 2),
    ),
    "vovnet": Model("ese_vovnet19b_slim_dw", 32),
    "xception": Model("legacy_xception", 32, [f"block{n}" for n in range(4, 12)]),
    "xception_aligned": Model(
        models.xception_aligned.XceptionAligned,
        32,
        preact=True,
        block_cfg=[
            {"in_chs": 64, "out_chs": 32, "stride": 2},
            {"in_chs": 32, "out_chs": 32, "stride": 1},
        ],
    ),
    "xcit": Model("xcit_nano_12_p8_224", 32, embed_dim=48, depth=2, num_heads=3, img_size=32),
}


def test_every_family_is_here() -> None:
    assert set(FAMILIES) == set(timm.list_modules())


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LSTM)


@pytest.mark.parametrize("family", FAMILIES)
def test_contract(family: str) -> None:
    for row in check(FAMILIES[family].architecture(family)):
        is_layers = isinstance(row.record.owner, LAYERS) and row.tensor.startswith("weight")
        if is_layers and row.decision != "convert":
            assert "standardises the weight anew" in row.reason, row
