"""The row of torchvision: its deformable convolution."""

from __future__ import annotations

from snparam.layers.rows import LayerType, register_rows, rows_in_groups

TYPES = [
    LayerType(
        names=("torchvision.ops.deform_conv.DeformConv2d",),
        weights={"weight": rows_in_groups},
    ),
]

register_rows(TYPES)
