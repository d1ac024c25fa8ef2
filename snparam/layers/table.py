"""The layer table: which tensors of which layer types are weights, and where their rows are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.utils import parametrize

from snparam.layers.rows import ROWS, LayerType, layout_in, qualified_class_name
from snparam.layers.tensors import QUANTISE_LAST
from snparam.layers.torch_norms import hook_computing, hook_tensors, hook_using
from snparam.matrices.views import Layout

# Qualified names and modules from the root of a model to one of its modules, both included.
Path: TypeAlias = Sequence[tuple[str, nn.Module]]


class UserRows:
    """The rows that users add by `register_layer_type`; the last one for a type counts.

    Types are weak keys, because notebooks define classes again, and a row should not keep the first
    definition alive.
    """

    def __init__(self) -> None:
        self._by_type: WeakKeyDictionary[type, LayerType] = WeakKeyDictionary()
        self._by_name: list[LayerType] = []

    def add(self, kind: type | str, row: LayerType) -> None:
        """Add the row of a type, given as such or by its qualified name, which may be a glob."""
        if isinstance(kind, type):
            self._by_type[kind] = row
            return
        for cls in list(self._by_type):
            if fnmatchcase(qualified_class_name(cls), kind):
                del self._by_type[cls]
        self._by_name.insert(0, row)

    def row_of(self, cls: type) -> LayerType | None:
        """Return the row of exactly this class, or None."""
        row = self._by_type.get(cls)
        return row or next((named for named in self._by_name if named.is_for(cls)), None)

    def clear(self) -> None:
        """Forget all rows."""
        self._by_type.clear()
        self._by_name.clear()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._by_type) + len(self._by_name)


USER_ROWS = UserRows()

# The results of `_package_row`, since a network has many modules of few classes, asked about often.
_package_rows: WeakKeyDictionary[type, LayerType | None] = WeakKeyDictionary()


def layer_type(module: nn.Module) -> LayerType | None:
    """Return the row of the table for a module, or None.

    That is the row of the module's own class, or else of the nearest base class that has one. The
    classes that parametrizations and FSDP put in front of a module's own class have no row, and so
    are skipped.
    """
    for cls in type(module).__mro__:
        row = USER_ROWS.row_of(cls) or _package_row(cls)
        if row is not None:
            return row
    return None


def _package_row(cls: type) -> LayerType | None:
    """Return the package's own row for exactly this class, or None."""
    try:
        return _package_rows[cls]
    except KeyError:
        row = _package_rows[cls] = next((row for row in ROWS if row.is_for(cls)), None)
        return row


def layouts_of(module: nn.Module) -> dict[str, Layout]:
    """Return the layouts of the weights that the table lists for a module and that it has.

    They are keyed by the name of the tensor as seen from the module: `weight`, `out_proj.weight`.
    The first pattern that matches a name counts.
    """
    row = layer_type(module)
    layouts: dict[str, Layout] = {}
    for pattern, layout in row.weights.items() if row is not None else ():
        for name, _ in _tensors(module):
            if fnmatchcase(name, pattern) and name not in layouts:
                layouts[name] = layout_in(layout, module)
    return layouts


def obstacle_in(module: nn.Module) -> str | None:
    """Return why the table says that a module's weights cannot be normalised, or None."""
    row = layer_type(module)
    return None if row is None or row.obstacle is None else row.obstacle(module)


def is_lookup(module: nn.Module) -> bool:
    """Return whether the table says that the rows of a module's weights are looked up."""
    row = layer_type(module)
    return row is not None and row.is_lookup


def note_on(path: Path, tensor_name: str) -> Layout | str | None:
    """Return the layout, or the reason to leave it alone, that the modules around a tensor give.

    The result is None if the rows of these modules say nothing about the tensor.

    Args:
        path: qualified names and modules from the root to the tensor's owner, both included.
        tensor_name: name of the tensor in its owner.
    """
    full_name = f"{path[-1][0]}.{tensor_name}" if path[-1][0] else tensor_name
    for name, module in reversed(path):
        row = layer_type(module)
        if row is None or not row.inside:
            continue
        inner_name = full_name[len(name) + 1 :] if name else full_name
        for pattern, note in row.inside.items():
            if fnmatchcase(inner_name, pattern):
                if note is not None:
                    return note if isinstance(note, str) else layout_in(note, module)
                break  # this module says nothing; one around it may
    return None


def layout_named(module: nn.Module, name: str) -> Layout:
    """Return the layout of the tensor `name` of a module: the table's, or else `"bare"`.

    Raises:
        ValueError: if the module has no such tensor (the message lists those it has), or a hook of
            torch's pruning or weight_norm computes it.
        TypeError: if the module is quantised.
    """
    if is_packed(module):
        raise TypeError(packed_message(module))
    listed = layouts_of(module)
    if name in listed:
        return listed[name]
    tensors = dict(_tensors(module))
    if name in tensors:
        return Layout("bare")
    hook = hook_computing(module, name) or hook_using(module, name)
    if hook is not None:
        raise ValueError(f"{name!r} of {type(module).__name__} is under {hook}; remove that first")
    weights = [path for path, tensor in tensors.items() if tensor is None or tensor.ndim >= 2]
    raise ValueError(
        f"{type(module).__name__} has no parameter or buffer named {name!r}; "
        + (f"its weights are {weights}" if weights else "it has none of two or more dimensions")
    )


def is_packed(module: nn.Module) -> bool:
    """Return whether a module keeps its weights packed, as torch's quantised modules do."""
    if not any("quantized" in cls.__module__.split(".") for cls in type(module).__mro__):
        return False
    cell, recurrent = "_packed_weight_ih" in vars(module), "_all_weight_values" in module._modules
    return callable(getattr(type(module), "weight", None)) or cell or recurrent


def packed_message(module: nn.Module) -> str:
    """Return the error message for a quantised module."""
    kind = type(module).__name__
    return f"{kind} is quantised: its weight is packed; {QUANTISE_LAST}"


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Yield parameters, buffers and parametrized tensors of a module and its children, by name.

    A tensor that is parametrized already comes as None, because reading it could compute it. A
    tensor from which a hook computes another one, as pruning and weight_norm do, is left out: it is
    no weight of the module.
    """
    for prefix, owner in [("", module), *((f"{n}.", m) for n, m in module.named_children())]:
        if prefix == "parametrizations.":
            continue
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None and hook_using(owner, name) is None:
                yield prefix + name, tensor
        for name in hook_tensors(owner):
            yield f"{prefix}{name}", None
        if parametrize.is_parametrized(owner):
            for name in owner.parametrizations:  # type: ignore[union-attr]
                yield f"{prefix}{name}", None
