"""The rows of timm: fused q/k/v, convolutions mixed from experts, standardised convolutions."""

from __future__ import annotations

from typing import Any

from snparam.layers.rows import (
    EXPERT_BIASES,
    STANDARDISED,
    LayerType,
    register_rows,
    rows_in_groups,
)
from snparam.matrices.views import Layout


def _conditional(module: Any) -> Layout:
    """Return the layout of a weight with the flattened convolution of each expert in a row.

    weight: (num_experts, out_channels · in_channels / groups · prod(kernel_size))
    """
    return Layout(
        "stack",
        natural=module.groups,
        into=(module.num_experts, module.out_channels, -1),
    )


# The attentions that reshape the outputs of `qkv` to (..., 3, heads, width): q, then k, then v.
_TIMM_FUSED = (
    "timm.layers.attention.Attention*",
    "timm.layers.attention_pool2d.*AttentionPool2d",
    "timm.models.beit.Attention",
    "timm.models.cait.TalkingHeadAttn",
    "timm.models.coat.FactorAttnConvRelPosEnc",
    "timm.models.convit.MHSA",
    "timm.models.davit.*Attention",
    "timm.models.edgenext.CrossCovarianceAttn",
    "timm.models.eva.EvaAttention",
    "timm.models.hiera.MaskUnitAttention",
    "timm.models.hieradet_sam2.MultiScaleAttention",
    "timm.models.metaformer.Attention",
    "timm.models.mvitv2.MultiScaleAttention",
    "timm.models.nest.Attention",
    "timm.models.swin_transformer.WindowAttention",
    "timm.models.swin_transformer_v2.WindowAttention",
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention",
    "timm.models.vision_transformer_relpos.RelPosAttention",
    "timm.models.vision_transformer_sam.Attention",
    "timm.models.volo.Attention",
    "timm.models.xcit.XCA",
)

TYPES = [
    LayerType(
        names=("timm.layers.std_conv.*StdConv2d*",),
        weights={"weight": rows_in_groups},
        obstacle=lambda _: STANDARDISED,
    ),
    LayerType(
        names=("timm.layers.cond_conv2d.CondConv2d",),
        weights={"weight": _conditional},
        inside=EXPERT_BIASES,
    ),
    LayerType(names=_TIMM_FUSED, inside={"qkv.weight": Layout("rows", natural=3)}),
]

register_rows(TYPES)
