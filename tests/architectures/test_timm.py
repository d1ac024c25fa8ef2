"""timm: one small model of every family; the larger ones with `pytest -m sweep`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
import timm

from .contract import Architecture, check


class Model:
    """A model of timm, the side of its images, and what makes it smaller."""

    def __init__(self, name: str, side: int, **smaller: Any) -> None:
        self.name, self.side, self.smaller = name, side, smaller

    def architecture(self, family: str) -> Architecture:
        images = torch.linspace(-40, 40, 2 * 3 * self.side**2).sin()

        def build() -> nn.Module:
            model: nn.Module = timm.create_model(
                self.name, pretrained=False, num_classes=5, **self.smaller
            )
            return model

        return Architecture(
            family, build, lambda m: m(images.reshape(2, 3, self.side, self.side)), share=0
        )


# The smallest of each family, made smaller where its constructor can, at the smallest side that
# training takes.
FAMILIES = {
    "beit": Model("beit_base_patch16_224", 32, embed_dim=48, depth=2, num_heads=3, img_size=32),
    "byobnet": Model("test_byobnet", 32, img_size=32),
    "cait": Model("cait_xxs24_224", 32, embed_dim=48, depth=2, num_heads=3, img_size=32),
    "convit": Model("convit_tiny", 32, embed_dim=64, depth=2, num_heads=2, img_size=32),
    "convnext": Model("test_convnext", 32, dims=(16, 16, 32, 32), depths=(1, 1, 1, 1)),
    "cspnext": Model("cspnext_tiny", 32, depths=(1, 1, 1, 1)),
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
    "efficientvit_mit": Model("efficientvit_b0", 32, depths=(1, 1)),
    "efficientvit_msra": Model("efficientvit_m0", 32, img_size=32),
    "eva": Model(
        "vit_tiny_patch16_dinov3_qkvb", 32, embed_dim=48, depth=2, num_heads=3, img_size=32
    ),
    "fasternet": Model("fasternet_t0", 32, depths=(1, 1)),
    "fastvit": Model("fastvit_t8", 32, layers=(1, 1, 1, 1)),
    "gemma4_vit": Model("gemma4_vit_167m_enc", 96, embed_dim=48, depth=2, num_heads=3, img_size=96),
    "ghostnet": Model("ghostnet_050", 32),
    "hiera": Model("hiera_tiny_224", 32, embed_dim=48, stages=(1, 1, 1, 1), img_size=32),
    "hieradet_sam2": Model("sam2_hiera_tiny", 32, embed_dim=48, stages=(1, 1, 1, 1)),
    "inception_next": Model("inception_next_atto", 32, dims=(16, 16, 32, 32), depths=(1, 1, 1, 1)),
    "lcnetv2": Model("lcnetv2_small", 32, depths=(1, 1, 1, 1)),
    "mambaout": Model("test_mambaout", 32, depths=(1, 1)),
    "maxxvit": Model("test_coatnet", 32, depths=(1, 1, 1, 1), img_size=32),
    "mlp_mixer": Model("gmlp_ti16_224", 32, img_size=32),
    "mobilenetv3": Model("lcnet_035", 32),
    "mobilevit": Model("mobilevit_xxs", 32, num_features=128, img_size=32),
    "naflexvit": Model(
        "naflexvit_base_patch16_siglip", 32, embed_dim=48, depth=2, num_heads=3, img_size=32
    ),
    "nasnet": Model("nasnetalarge", 32, num_features=96, stem_size=24),
    "nfnet": Model("test_nfnet", 32, depths=(1, 1)),
    "pvt_v2": Model("pvt_v2_b0", 32, depths=(1, 1, 1, 1)),
    "qwen3_vit": Model("qwen3_vit_88m", 32, embed_dim=48, depth=2, num_heads=3, img_size=32),
    "regnet": Model("regnetx_002", 32),
    "repghost": Model("repghostnet_050", 32),
    "resnet": Model("test_resnet", 32, layers=(1, 1, 1, 1)),
    "resnetv2": Model("resnetv2_18", 32, layers=(1, 1)),
    "sequencer": Model("sequencer2d_s", 32, layers=(1, 1, 1, 1), img_size=32),
    "starnet": Model("starnet_s050", 32, depths=(1, 1)),
    "swiftformer": Model("swiftformer_xs", 32, layers=(1, 1, 1, 1), img_size=32),
    "swin_transformer": Model("swin_tiny_patch4_window7_224", 32, depths=(1, 1), img_size=32),
    "swin_transformer_v2": Model("swinv2_tiny_window8_256", 32, depths=(1, 1), img_size=32),
    "swin_transformer_v2_cr": Model("swinv2_cr_tiny_224", 32, depths=(1, 1), img_size=32),
    "tiny_vit": Model("tiny_vit_5m_224", 32, depths=(1, 1, 1, 1)),
    "tnt": Model("tnt_s_legacy_patch16_224", 32, embed_dim=48, depth=2, img_size=32),
    "twins": Model(
        "twins_svt_small", 32, embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), img_size=32
    ),
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
    "vovnet": Model("ese_vovnet19b_slim_dw", 32),
    "xcit": Model("xcit_nano_12_p8_224", 32, embed_dim=48, depth=2, num_heads=3, img_size=32),
}

# Those with more parameters still, for the sweep.
LARGE = {
    "byoanet": Model("halonet_h1", 256, img_size=256),
    "coat": Model("coat_tiny", 32, img_size=32),
    "convmixer": Model("convmixer_768_32", 32),
    "cpubone": Model("cpubone_nano", 32),
    "crossvit": Model("crossvit_tiny_240", 32),
    "csatv2": Model("csatv2", 64),
    "cspnet": Model("cs3darknet_focus_s", 32),
    "davit": Model("davit_tiny", 32, depths=(1, 1, 1, 1)),
    "efficientvim": Model("efficientvim_m1", 32, depths=(1, 1, 1)),
    "focalnet": Model("focalnet_tiny_srf", 32),
    "gcvit": Model("gcvit_xxtiny", 32, img_size=32),
    "hardcorenas": Model("hardcorenas_b", 32),
    "hgnet": Model("hgnetv2_b0", 32),
    "hrnet": Model("hrnet_w18_small", 32),
    "iformer": Model("iformer_t", 32),
    "inception_resnet_v2": Model("inception_resnet_v2", 96),
    "inception_v3": Model("inception_v3", 96),
    "inception_v4": Model("inception_v4", 96),
    "levit": Model("levit_128s", 32, img_size=32),
    "lowformer": Model("lowformer_b0", 32),
    "metaformer": Model("poolformerv2_s12", 32),
    "mobilenetv5": Model("mobilenetv5_base", 32, channel_multiplier=0.1),
    "mvitv2": Model("mvitv2_tiny", 32, img_size=32),
    "nest": Model("nest_tiny", 32, img_size=32),
    "nextvit": Model("nextvit_small", 32),
    "pit": Model("pit_ti_224", 32, img_size=32),
    "pnasnet": Model("pnasnet5large", 32),
    "rdnet": Model("rdnet_tiny", 32),
    "repvit": Model("repvit_m1", 32, img_size=32),
    "res2net": Model("res2next50", 32, layers=(1, 1, 1, 1)),
    "resnest": Model("resnest14d", 32, layers=(1, 1, 1, 1), base_width=8),
    "rexnet": Model("rexnet_100", 32),
    "selecsls": Model("selecsls42", 32),
    "senet": Model("legacy_seresnet18", 32, layers=(1, 1, 1, 1)),
    "shvit": Model("shvit_s1", 32),
    "sknet": Model("skresnet18", 32, layers=(1, 1, 1, 1)),
    "tresnet": Model("tresnet_m", 32, layers=(1, 1, 1, 1)),
    "vgg": Model("vgg11", 32),
    "vitamin": Model("vitamin_small_224", 32, depth=1, img_size=32),
    "volo": Model("volo_d1_224", 32, img_size=32),
    "xception": Model("legacy_xception", 32),
    "xception_aligned": Model("xception41p", 32),
}


def test_every_family_is_here() -> None:
    assert {*FAMILIES, *LARGE} == set(timm.list_modules())
    assert not set(FAMILIES) & set(LARGE)


@pytest.mark.parametrize("family", FAMILIES)
def test_contract(family: str) -> None:
    check(FAMILIES[family].architecture(family))


@pytest.mark.sweep
@pytest.mark.parametrize("family", LARGE)
def test_contract_of_larger_models(family: str) -> None:
    check(LARGE[family].architecture(family))
