"""Rows of the layer table: which tensors of a module type are weights, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from snparam.matrices.views import Layout

LayoutOf = Layout | Callable[[nn.Module], Layout]
Note = LayoutOf | str | None


@dataclass(frozen=True)
class LayerType:
    """One row of the layer table: module types, and how their weights are read.

    Attributes:
        types: module types; subclasses count.
        weights: mapping from the name of a tensor (a glob; dotted for a tensor of a submodule that
            the layer reads itself) to its layout, or to a function from the module to that.
        obstacle: function that returns why a given module's weights cannot be normalised, or None.
        overrides: class attributes for converted modules of this type, where the type keeps
            references to its weights instead of reading its attributes.
        restore: function that is called on a module of this type once none of its tensors is
            parametrized any more.
        names: qualified names of module types, or globs of them, for types of libraries that may
            not be installed; subclasses count.
        inside: mapping from the name of a tensor of this type or of a module anywhere inside it (a
            glob, dotted; `*` matches dots as well) to what this type says about it: a layout (or a
            function from the module to one), in place of that of the module whose tensor it is; a
            string, the reason to leave it alone; None, nothing. The first name that matches counts.
        is_lookup: whether the weights are tables whose rows are looked up, and multiply nothing.
    """

    types: tuple[type[nn.Module], ...] = ()
    weights: Mapping[str, LayoutOf] = field(default_factory=dict)
    obstacle: Callable[[nn.Module], str | None] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    restore: Callable[[nn.Module], None] | None = None
    names: tuple[str, ...] = ()
    inside: Mapping[str, Note] = field(default_factory=dict)
    is_lookup: bool = False

    def is_for(self, cls: type) -> bool:
        """Return whether the row names exactly this class; its bases are asked about separately."""
        return cls in self.types or any(
            fnmatchcase(qualified_class_name(cls), name) for name in self.names
        )


# The rows of this package. torch.py and each file in libraries/ add theirs when `snparam.layers`
# imports them. The first row that names a class counts.
ROWS: list[LayerType] = []


def register_rows(rows: Sequence[LayerType]) -> None:
    """Add the rows of one library to the table."""
    ROWS.extend(rows)


def qualified_class_name(cls: type) -> str:
    """Return the qualified name of a class, with the module that defines it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def layout_in(layout: LayoutOf, module: nn.Module) -> Layout:
    """Return the layout of a tensor in a given module.

    Raises:
        TypeError: if `layout` is a function, and returns something else than a layout.
    """
    resolved = layout if isinstance(layout, Layout) else layout(module)
    if not isinstance(resolved, Layout):
        raise TypeError(
            f"the layer table's function for {qualified_class_name(type(module))} gave "
            f"{resolved!r}: expected a snparam.Layout"
        )
    return resolved


# What the rows of several libraries share.


def rows_in_groups(module: Any) -> Layout:
    """Return the layout of a convolution: output channels are rows, in `groups` blocks."""
    return Layout("rows", natural=module.groups)


STANDARDISED = "its forward standardises the weight anew, so that dividing it changes nothing"
EXPERT_BIASES: Mapping[str, Note] = {"*bias": "one bias for each expert, and no matrix"}
