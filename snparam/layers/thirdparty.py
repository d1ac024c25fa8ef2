"""Rows of the layer table for other libraries, by the qualified names of their classes.

None of the libraries is imported: a class is recognised by where it says it is defined. A row is
here because the library's code says so; what reads a weight by `F.linear` alone, or derives from
torch's own layers, needs none.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from snparam.layers.rows import LayerType
from snparam.matrices.views import Layout

_rows, _columns = Layout("rows"), Layout("columns")
_stack, _stack_columns = Layout("stack"), Layout("stack_columns")

_STANDARDISED = "its forward standardises the weight anew, so that dividing it changes nothing"
_ADAPTER = "a part of a peft adapter, which is left as it is; the base layer is normalised"
_MERGED_IN_FORWARD = "peft writes the adapter into it and out again in every forward"
_ROWS_REPLACED = "peft replaces rows of it by trained ones, which are not divided by its σ"
_PROMPT = "the trained prompt of a peft adapter, which is left as it is"
_BIASES = {"*bias": "one bias for each expert, and no matrix"}
_DECAY = "its entries are decay rates of a recurrence, used one by one, and no matrix"


def _attribute(module: nn.Module, name: str) -> Any:
    return getattr(module, name, None)


def _experts(module: nn.Module) -> Layout:
    """All experts in one parameter: (experts, outputs, inputs), or input-first.

    transformers' experts say which, since they share their implementations. `natural` counts gate
    and up projection, where one is stacked on the other.
    """
    return _stack_columns if _attribute(module, "is_transposed") else _stack


def _fused_experts(module: nn.Module) -> Layout:
    parts = 2 if _attribute(module, "is_concatenated") and _attribute(module, "has_gate") else 1
    return Layout(_experts(module).kind, natural=parts)


def _unknown_orientation(module: nn.Module) -> str | None:
    if isinstance(_attribute(module, "is_transposed"), bool):
        return None
    return (
        "whether its experts are stored as (outputs, inputs) or input-first is not known; say it "
        "with register_layer_type"
    )


def _dbrx(kind: str) -> Any:
    def layout(module: nn.Module) -> Layout:
        experts, inner = _attribute(module, "moe_num_experts"), _attribute(module, "hidden_size")
        return Layout(kind, into=(experts, -1, inner))

    return layout


def _conditional(module: nn.Module) -> Layout:
    """(experts, outputs · inputs / groups · kernel): one flattened convolution for each expert."""
    return Layout(
        "stack",
        natural=_attribute(module, "groups"),
        into=(_attribute(module, "num_experts"), _attribute(module, "out_channels"), -1),
    )


def _gpt2_attention(module: nn.Module) -> Layout:
    return Layout("columns", natural=2 if _attribute(module, "is_cross_attention") else 3)


def _groups(module: nn.Module) -> Layout:
    return Layout("rows", natural=_attribute(module, "groups"))


def _transformers(names: str) -> tuple[str, ...]:
    """`mixtral.*Experts` for the class in transformers/models/mixtral/modeling_mixtral.py."""
    pairs = [name.split(".") for name in names.split()]
    return tuple(f"transformers.models.{where}.modeling_{where}.{name}" for where, name in pairs)


_TRANSFORMERS = [
    LayerType(
        names=("transformers.pytorch_utils.Conv1D",),
        weights={"weight": _columns},
    ),
    # Before the pattern below, which the names of some of these fit: they do not say how they store
    # their experts.
    LayerType(
        names=_transformers(
            "llama4.Llama4TextExperts gpt_oss.GptOssExperts aria.AriaExperts "
            "openai_privacy_filter.OpenAIPrivacyFilterExperts"
        ),
        weights={"gate_up_proj": _stack_columns, "down_proj": _stack_columns},
        inside=_BIASES,
    ),
    LayerType(
        names=_transformers(
            "step3p7.Step3p7Experts longcat_flash.LongcatFlashExperts inkling.InklingSharedExperts"
        ),
        weights={
            "gate_up_proj": _stack,
            "gate_proj": _stack,
            "up_proj": _stack,
            "down_proj": _stack,
        },
    ),
    LayerType(
        names=_transformers("dbrx.DbrxExpertGLU"),
        weights={"w1": _dbrx("stack"), "v1": _dbrx("stack"), "w2": _dbrx("stack_columns")},
    ),
    LayerType(
        names=_transformers(
            "jetmoe.JetMoeParallelExperts granitemoe.GraniteMoeParallelExperts "
            "granitemoeshared.GraniteMoeSharedParallelExperts "
            "granitemoehybrid.GraniteMoeHybridParallelExperts moshi.MoshiFlexibleLinear "
            "kyutai_speech_to_text.KyutaiSpeechToTextFlexibleLinear"
        ),
        weights={"weight": _stack},
    ),
    LayerType(
        names=("transformers.models.*.modeling_*.*Experts",),
        weights={
            "gate_up_proj": _fused_experts,
            "gate_proj": _experts,
            "up_proj": _experts,
            "down_proj": _experts,
        },
        obstacle=_unknown_orientation,
        inside=_BIASES,
    ),
    LayerType(
        names=_transformers("convbert.GroupedLinearLayer csm.CsmCodebooksHead"),
        weights={"weight": _stack_columns},
    ),
    LayerType(
        names=_transformers("recurrent_gemma.RecurrentGemmaRglru"),
        weights={"input_gate_weight": _stack_columns, "recurrent_gate_weight": _stack_columns},
    ),
    LayerType(
        names=_transformers("zamba.ZambaMambaMixer"),
        weights={"x_proj_weight": _stack},
        inside={"A_log": _DECAY},
    ),
    LayerType(
        names=_transformers("xlnet.XLNetRelativeAttention"),
        weights={"q": _columns, "k": _columns, "v": _columns, "r": _columns, "o": _rows},
    ),
    LayerType(
        names=_transformers(
            "gemma3.Gemma3MultiModalProjector t5gemma2.T5Gemma2MultiModalProjector"
        ),
        weights={"mm_input_projection_weight": _columns},
    ),
    LayerType(
        names=("transformers.models.*.modeling_*.*Router",),
        weights={"weight": _rows},
    ),
    LayerType(
        names=("transformers.models.*.modeling_*.*Mixer",),
        inside={"A_log": _DECAY},
    ),
    LayerType(
        names=("transformers.models.gpt2.modeling_gpt2.GPT2Attention",),
        inside={"c_attn.weight": _gpt2_attention},
    ),
    LayerType(
        names=_transformers("bit.WeightStandardizedConv2d"),
        weights={"weight": _groups},
        obstacle=lambda _: _STANDARDISED,
    ),
]

_DIFFUSERS = [
    LayerType(
        names=("diffusers.models.transformers.transformer_nucleusmoe_image.SwiGLUExperts",),
        weights={"gate_up_proj": _stack_columns, "down_proj": _stack_columns},
    ),
    LayerType(
        names=("diffusers.models.transformers.transformer_hidream_image.MoEGate",),
        weights={"weight": _rows},
    ),
]

# Attentions of timm that reshape the outputs of `qkv` to (..., 3, heads, width): q, then k, then v.
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

_TIMM = [
    LayerType(
        names=("timm.layers.std_conv.*StdConv2d*",),
        weights={"weight": _groups},
        obstacle=lambda _: _STANDARDISED,
    ),
    LayerType(
        names=("timm.layers.cond_conv2d.CondConv2d",),
        weights={"weight": _conditional},
        inside=_BIASES,
    ),
    LayerType(names=_TIMM_FUSED, inside={"qkv.weight": Layout("rows", natural=3)}),
]

_OTHERS = [
    LayerType(
        names=("torchvision.ops.deform_conv.DeformConv2d",),
        weights={"weight": _groups},
    ),
    LayerType(
        names=("peft.tuners.lora.layer.MultiheadAttention",),
        inside={"base_layer.*": _MERGED_IN_FORWARD, "*": _ADAPTER},
    ),
    LayerType(
        names=("peft.tuners.trainable_tokens.layer.TrainableTokensLayer",),
        inside={"base_layer.*": _ROWS_REPLACED, "*": _ADAPTER},
    ),
    LayerType(
        names=("peft.tuners.tuners_utils.BaseTunerLayer",),
        inside={"base_layer.*": None, "*": _ADAPTER},
    ),
    LayerType(
        names=("peft.tuners.*.PromptEmbedding", "peft.tuners.*.PromptEncoder"),
        inside={"*": _PROMPT},
    ),
    LayerType(names=("peft.tuners.*.PrefixEncoder",), inside={"*": _PROMPT}),
]

ROWS: list[LayerType] = [*_TRANSFORMERS, *_DIFFUSERS, *_TIMM, *_OTHERS]
