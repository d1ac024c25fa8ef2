"""What files above this folder register with it: other people's systems, and spellings.

Both lists are empty here. `snparam/__init__.py` imports the files that fill them.
"""

from __future__ import annotations

from torch import nn


class System:
    """Somebody else's system around normalised modules; each method is called where it says.

    A system overrides what it needs. Its methods may be called again for the same module, and leave
    nothing behind once what they did is undone.
    """

    def on_attach(self, owner: nn.Module) -> None:
        """Called after a SpectralNorm was put on a tensor of a module, whose class is its own."""

    def on_detach(self, owner: nn.Module) -> None:
        """Called after the last SpectralNorm of a module was taken off."""

    def on_model(self, model: nn.Module) -> None:
        """Called after a model was converted."""

    def on_restore(self, model: nn.Module) -> None:
        """Called after SpectralNorm was taken off a whole model, or off the last of its weights."""


SYSTEMS: list[System] = []


def register_system(system: System) -> None:
    """Let a system know of each module and model that is normalised from now on."""
    SYSTEMS.append(system)
