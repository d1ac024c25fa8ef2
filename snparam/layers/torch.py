"""The rows of torch's own layers in the layer table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from snparam.layers.rows import LayerType, register_rows, rows_in_groups
from snparam.matrices.torch_private import check_recurrent_layers
from snparam.matrices.views import Layout

_rows = Layout("rows")


def _transposed_groups(module: Any) -> Layout:
    return Layout("transposed_conv", natural=module.groups, groups=module.groups)


def _embedding_obstacle(module: nn.Module) -> str | None:
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rewrites the rows of the weight in every forward"
    if getattr(module, "sparse", False):
        return "sparse=True asks for a sparse gradient, and that of a normalised weight is dense"
    return None


def _recurrent_obstacle(_: nn.Module) -> str | None:
    try:
        check_recurrent_layers()
    except RuntimeError as error:
        return str(error)
    return None


def _restore_flat_weights(module: nn.Module) -> None:
    module._init_flat_weights()  # type: ignore[operator]


# nn.RNNBase computes with a list of references to its parameters. These attributes make the list in
# each forward, of what the layer's tensors are then, so that nothing is kept that a copy or a move
# of the layer would miss.
_RECURRENT_OVERRIDES: Mapping[str, Any] = {
    "_flat_weights": property(
        lambda module: [getattr(module, name, None) for name in module._flat_weights_names],
        lambda _module, _value: None,
    ),
    "_init_flat_weights": lambda _: None,
    "_weights_have_changed": lambda _: False,
    "flatten_parameters": lambda _: None,
}


def _recurrent(kind: type[nn.Module], cell: type[nn.Module], gates: int) -> list[LayerType]:
    """Return the rows of a recurrent layer and of its cell, with one block for each gate."""
    natural = Layout("rows", natural=gates)
    stacked = {"weight_ih_l*": natural, "weight_hh_l*": natural, "weight_hr_l*": _rows}
    return [
        LayerType(
            (kind,), stacked, _recurrent_obstacle, _RECURRENT_OVERRIDES, _restore_flat_weights
        ),
        LayerType((cell,), {"weight_ih": natural, "weight_hh": natural}),
    ]


TYPES: list[LayerType] = [
    LayerType((nn.Linear, nn.Bilinear), {"weight": _rows}),
    LayerType((nn.Conv1d, nn.Conv2d, nn.Conv3d), {"weight": rows_in_groups}),
    LayerType(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        {"weight": _transposed_groups},
    ),
    LayerType(
        (nn.Embedding, nn.EmbeddingBag), {"weight": _rows}, _embedding_obstacle, is_lookup=True
    ),
    LayerType(
        (nn.MultiheadAttention,),
        {
            "in_proj_weight": Layout("rows", natural=3),
            "[qkv]_proj_weight": _rows,
            # Attention reads this weight itself and never calls the submodule's forward.
            "out_proj.weight": _rows,
        },
    ),
    *_recurrent(nn.RNN, nn.RNNCell, 1),
    *_recurrent(nn.LSTM, nn.LSTMCell, 4),
    *_recurrent(nn.GRU, nn.GRUCell, 3),
]

register_rows(TYPES)
