"""The rows of peft: adapters are left alone, and the layers that they adapt are normalised."""

from __future__ import annotations

from snparam.layers.rows import LayerType, register_rows

_ADAPTER = "a part of a peft adapter, which is left as it is; the base layer is normalised"
_MERGED_IN_FORWARD = "peft writes the adapter into it and out again in every forward"
_ROWS_REPLACED = "peft replaces rows of it by trained ones, which are not divided by its σ"
_PROMPT = "the trained prompt of a peft adapter, which is left as it is"

TYPES = [
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

register_rows(TYPES)
