"""One row of the layer table: what a type of module is known to do with its tensors."""

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
    """One row of the table.

    Attributes:
        types: module types; subclasses count.
        weights: tensor name (a glob; dotted for a submodule that the layer reads directly) to the
            layout of that tensor in a given module.
        obstacle: for a given module, why its weight cannot be normalised, or None.
        overrides: class attributes for converted modules of this type, where the type keeps
            references to its weights instead of reading its attributes.
        restored: called on a module of this type once it is an ordinary one again.
        names: qualified names of module types, or globs of them, for types of libraries that may
            not be installed; subclasses count.
        inside: name of a tensor of this type or of a module anywhere inside it (a glob, dotted; `*`
            stands for dots as well) to what this type knows about it: a layout, instead of that
            of the module whose tensor it is; a string, why it is to be left alone; None, nothing.
            The first that matches counts.
    """

    types: tuple[type[nn.Module], ...] = ()
    weights: Mapping[str, LayoutOf] = field(default_factory=dict)
    obstacle: Callable[[nn.Module], str | None] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    restored: Callable[[nn.Module], None] | None = None
    names: tuple[str, ...] = ()
    inside: Mapping[str, Note] = field(default_factory=dict)

    def is_for(self, cls: type) -> bool:
        """Whether the row names exactly this class; those it derives from are asked apart."""
        return cls in self.types or any(fnmatchcase(qualified(cls), name) for name in self.names)


# The rows of this package. A file that has some adds them when it is imported, which
# `snparam.layers` does for torch.py and for each file in libraries/. The first row that names a
# class counts.
ROWS: list[LayerType] = []


def register_rows(rows: Sequence[LayerType]) -> None:
    """Add the rows of one library to the table."""
    ROWS.extend(rows)


def qualified(cls: type) -> str:
    """Return where a class is defined, and its name there."""
    return f"{cls.__module__}.{cls.__qualname__}"


def layout_in(layout: LayoutOf, module: nn.Module) -> Layout:
    """Return the layout of a tensor in a given module.

    Raises:
        TypeError: if a function that was to give one gave something else.
    """
    given = layout if isinstance(layout, Layout) else layout(module)
    if not isinstance(given, Layout):
        raise TypeError(
            f"the layer table's function for {qualified(type(module))} gave {given!r}: expected a "
            "snparam.Layout"
        )
    return given


# What rows of several libraries say.


def rows_in_groups(module: Any) -> Layout:
    """Return the layout of a convolution: output channels are rows, in `groups` blocks."""
    return Layout("rows", natural=module.groups)


STANDARDISED = "its forward standardises the weight anew, so that dividing it changes nothing"
EXPERT_BIASES: Mapping[str, Note] = {"*bias": "one bias for each expert, and no matrix"}
