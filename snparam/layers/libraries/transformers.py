"""The rows of transformers: input-first layers, experts in one parameter, routers, decay rates."""

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

_rows, _columns = Layout("rows"), Layout("columns")
_stack, _stack_columns = Layout("stack"), Layout("stack_columns")

_DECAY = "its entries are decay rates of a recurrence, used one by one, and no matrix"


def _experts(module: Any) -> Layout:
    """Return the layout of all experts in one parameter: (experts, outputs, inputs) or input-first.

    transformers' experts share their implementations, so each says which by `is_transposed`.
    """
    return _stack_columns if getattr(module, "is_transposed", False) else _stack


def _fused_experts(module: Any) -> Layout:
    """Return the layout of experts whose gate and up projection may be stacked in one matrix.

    `natural` is then 2, one block for each projection.
    """
    parts = (
        2 if getattr(module, "is_concatenated", None) and getattr(module, "has_gate", None) else 1
    )
    return Layout(_experts(module).kind, natural=parts)


def _unknown_orientation(module: Any) -> str | None:
    """Return why experts that do not say how they are stored are left alone, else None."""
    if isinstance(getattr(module, "is_transposed", None), bool):
        return None
    return (
        "whether its experts are stored as (outputs, inputs) or input-first is not known; say it "
        "with register_layer_type"
    )


def _dbrx(kind: str) -> Any:
    """Return the layout function of DBRX, which keeps the rows of all experts in one matrix."""

    def layout(module: Any) -> Layout:
        return Layout(kind, into=(module.moe_num_experts, -1, module.hidden_size))

    return layout


def _gpt2_attention(module: Any) -> Layout:
    return Layout("columns", natural=2 if module.is_cross_attention else 3)


def _classes(names: str) -> tuple[str, ...]:
    """Return the qualified names of classes; `a.B` is B in transformers/models/a/modeling_a.py."""
    pairs = [name.split(".") for name in names.split()]
    return tuple(f"transformers.models.{where}.modeling_{where}.{name}" for where, name in pairs)


TYPES = [
    LayerType(
        names=("transformers.pytorch_utils.Conv1D",),
        weights={"weight": _columns},
    ),
    # This row comes before the pattern `*Experts` below, which matches some of these names, because
    # these classes do not say how they store their experts.
    LayerType(
        names=_classes(
            "llama4.Llama4TextExperts gpt_oss.GptOssExperts aria.AriaExperts "
            "openai_privacy_filter.OpenAIPrivacyFilterExperts"
        ),
        weights={"gate_up_proj": _stack_columns, "down_proj": _stack_columns},
        inside=EXPERT_BIASES,
    ),
    LayerType(
        names=_classes(
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
        names=_classes("dbrx.DbrxExpertGLU"),
        weights={"w1": _dbrx("stack"), "v1": _dbrx("stack"), "w2": _dbrx("stack_columns")},
    ),
    LayerType(
        names=_classes(
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
        inside=EXPERT_BIASES,
    ),
    LayerType(
        names=_classes("convbert.GroupedLinearLayer csm.CsmCodebooksHead"),
        weights={"weight": _stack_columns},
    ),
    LayerType(
        names=_classes("recurrent_gemma.RecurrentGemmaRglru"),
        weights={"input_gate_weight": _stack_columns, "recurrent_gate_weight": _stack_columns},
    ),
    LayerType(
        names=_classes("zamba.ZambaMambaMixer"),
        weights={"x_proj_weight": _stack},
        inside={"A_log": _DECAY},
    ),
    LayerType(
        names=_classes("xlnet.XLNetRelativeAttention"),
        weights={"q": _columns, "k": _columns, "v": _columns, "r": _columns, "o": _rows},
    ),
    LayerType(
        names=_classes("gemma3.Gemma3MultiModalProjector t5gemma2.T5Gemma2MultiModalProjector"),
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
        names=_classes("bit.WeightStandardizedConv2d"),
        weights={"weight": rows_in_groups},
        obstacle=lambda _: STANDARDISED,
    ),
]

register_rows(TYPES)
