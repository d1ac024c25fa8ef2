"""The table: which tensors of which layer types are weights, and where their rows are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.utils import parametrize

from snparam.layers import thirdparty
from snparam.layers.rows import LayerType, layout_in
from snparam.layers.torch_norms import hook_behind, hooked
from snparam.matrices.views import Layout

_rows = Layout("rows")


def _groups(module: nn.Module) -> Layout:
    return Layout("rows", natural=module.groups)  # type: ignore[arg-type]


def _transposed_groups(module: nn.Module) -> Layout:
    groups: int = module.groups  # type: ignore[assignment]
    return Layout("transposed_conv", natural=groups, groups=groups)


def _embedding_obstacle(module: nn.Module) -> str | None:
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rewrites the rows of the weight in every forward"
    if getattr(module, "sparse", False):
        return "sparse=True asks for a sparse gradient, and that of a normalised weight is dense"
    return None


def _restore_flat_weights(module: nn.Module) -> None:
    module._init_flat_weights()  # type: ignore[operator]


# nn.RNNBase computes with a list of references to its parameters. Here the list is made of what the
# attributes give, for each forward anew, and nothing is kept that a copy or a move would miss.
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
    natural = Layout("rows", natural=gates)
    stacked = {"weight_ih_l*": natural, "weight_hh_l*": natural, "weight_hr_l*": _rows}
    return [
        LayerType((kind,), stacked, overrides=_RECURRENT_OVERRIDES, restored=_restore_flat_weights),
        LayerType((cell,), {"weight_ih": natural, "weight_hh": natural}),
    ]


TABLE: list[LayerType] = [
    LayerType((nn.Linear, nn.Bilinear), {"weight": _rows}),
    LayerType((nn.Conv1d, nn.Conv2d, nn.Conv3d), {"weight": _groups}),
    LayerType(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        {"weight": _transposed_groups},
    ),
    LayerType((nn.Embedding, nn.EmbeddingBag), {"weight": _rows}, _embedding_obstacle),
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

# Rows that users add, the last first: see `register_layer_type`.
USER_ROWS: list[LayerType] = []


@dataclass(frozen=True)
class Weight:
    """One tensor of one module, with where its rows are.

    Attributes:
        owner: the module that has the tensor.
        path: name of the tensor as seen from the module that was asked, such as `weight` or
            `out_proj.weight`.
        tensor_name: the last part of `path`.
        layout: where the rows are.
        obstacle: why it cannot be normalised, or None.
    """

    owner: nn.Module
    path: str
    layout: Layout
    obstacle: str | None = None

    @property
    def tensor_name(self) -> str:
        """Name of the tensor in its owner."""
        return self.path.rpartition(".")[2]


def layer_type(module: nn.Module) -> LayerType | None:
    """The row of the table for a module, or None.

    That of its own class, or else of the nearest class that it derives from. The classes that
    parametrizations and FSDP put in front of a module's own are in no table, and so are passed by.
    """
    for cls in type(module).__mro__:
        for row in USER_ROWS:
            if row.is_for(cls):
                return row
        found = _known_row(cls)
        if found is not None:
            return found
    return None


# What `_known_row` has found: a network has many modules of a few classes, each asked about often.
_known: WeakKeyDictionary[type, LayerType | None] = WeakKeyDictionary()


def _known_row(cls: type) -> LayerType | None:
    """The package's own row for exactly this class, or None."""
    try:
        return _known[cls]
    except KeyError:
        rows = (*TABLE, *thirdparty.ROWS)
        row = _known[cls] = next((row for row in rows if row.is_for(cls)), None)
        return row


def weights_of(module: nn.Module) -> list[Weight]:
    """The weights that the table lists for a module and that the module has."""
    row = layer_type(module)
    if row is None or not row.weights:
        return []
    obstacle = row.obstacle(module) if row.obstacle is not None else None
    return [
        Weight(
            owner=module.get_submodule(path.rpartition(".")[0]),
            path=path,
            layout=layout_in(layout, module),
            obstacle=obstacle,
        )
        for pattern, layout in row.weights.items()
        for path in _tensor_paths(module)
        if fnmatchcase(path, pattern)
    ]


def note_on(path: Sequence[tuple[str, nn.Module]], tensor_name: str) -> Layout | str | None:
    """What the modules around a tensor know about it: its layout, why to leave it alone, or None.

    Args:
        path: qualified names and modules from the root to the tensor's owner, both included.
        tensor_name: name of the tensor in its owner.
    """
    full = f"{path[-1][0]}.{tensor_name}" if path[-1][0] else tensor_name
    for name, module in reversed(path):
        row = layer_type(module)
        if row is None or not row.inside:
            continue
        below = full[len(name) + 1 :] if name else full
        for pattern, note in row.inside.items():
            if fnmatchcase(below, pattern):
                if note is not None:
                    return note if isinstance(note, str) else layout_in(note, module)
                break  # this one says nothing; those around it may
    return None


def weight_named(module: nn.Module, name: str) -> Weight:
    """The tensor `name` of a module, by the table's layout where the table knows it.

    Raises:
        ValueError: if the module has no such tensor, with the names it has.
        TypeError: if it is quantised.
    """
    if is_packed(module):
        raise TypeError(packed_message(module))
    for weight in weights_of(module):
        if weight.path == name:
            return weight
    if name in _tensor_paths(module):
        owner, _, _ = name.rpartition(".")
        return Weight(module.get_submodule(owner), name, Layout("bare"))
    hook = hook_behind(module, f"{name}_v")
    if hook is not None:
        raise ValueError(f"{name!r} of {type(module).__name__} is under {hook}; remove that first")
    known = [path for path, tensor in _tensors(module) if tensor is None or tensor.ndim >= 2]
    raise ValueError(
        f"{type(module).__name__} has no parameter or buffer named {name!r}; "
        + (f"its weights are {known}" if known else "it has none of two or more dimensions")
    )


def is_packed(module: nn.Module) -> bool:
    """Whether a module keeps its weights packed, out of reach, as torch's quantised ones do."""
    if not any("quantized" in cls.__module__.split(".") for cls in type(module).__mro__):
        return False
    cell, recurrent = "_packed_weight_ih" in vars(module), "_all_weight_values" in module._modules
    return callable(getattr(type(module), "weight", None)) or cell or recurrent


def packed_message(module: nn.Module) -> str:
    """What to say of a quantised module."""
    kind = type(module).__name__
    return f"{kind} is quantised: its weight is packed; convert before quantising"


def _tensor_paths(module: nn.Module) -> list[str]:
    return [path for path, _ in _tensors(module)]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Parameters, buffers and parametrized tensors of a module and its children, by path.

    A tensor that is parametrized already is given as None: reading it could compute it.
    """
    for prefix, owner in [("", module), *((f"{n}.", m) for n, m in module.named_children())]:
        if prefix == "parametrizations.":
            continue
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None:
                yield prefix + name, tensor
        for name in hooked(owner):
            yield f"{prefix}{name}", None
        if parametrize.is_parametrized(owner):
            for name in owner.parametrizations:  # type: ignore[union-attr]
                yield f"{prefix}{name}", None
