"""The rows of diffusers: layers with all experts in one parameter, and their routers."""

from __future__ import annotations

from snparam.layers.rows import LayerType, register_rows
from snparam.matrices.views import Layout

TYPES = [
    LayerType(
        names=("diffusers.models.transformers.transformer_nucleusmoe_image.SwiGLUExperts",),
        weights={"gate_up_proj": Layout("stack_columns"), "down_proj": Layout("stack_columns")},
    ),
    LayerType(
        names=("diffusers.models.transformers.transformer_hidream_image.MoEGate",),
        weights={"weight": Layout("rows")},
    ),
]

register_rows(TYPES)
