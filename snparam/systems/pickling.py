"""What a module with normalised weights says where it would be pickled.

Its class is made at run time, and no other process could find it. torch refuses too, in words that
know of `state_dict` alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from snparam.parametrization.extensions import System, register_system
from snparam.parametrization.find import norms_of


def refuse_pickling(owner: nn.Module) -> None:
    """Let a parametrized module say what to do instead of pickling it.

    Its class has to be its own; one that has no normalised weight any more says what it did.
    """
    cls: Any = type(owner)
    before = cls.__getstate__

    def refuse(self: nn.Module) -> Any:
        names = [name for name, _ in norms_of(self)]
        if not names:
            return before(self)
        kind, weights = cls.__bases__[0].__name__, ", ".join(map(repr, names))
        raise RuntimeError(
            f"{kind} with SpectralNorm on {weights} cannot be pickled, by torch.save(model) or on "
            "the way to another process: save or send model.state_dict(), and load it there into "
            "a network that was built and converted by convert_model; or plain_state_dict(model), "
            "for an ordinary network, with the normalised weights; or call restore_model(model), "
            "and pickle the ordinary network that it leaves. copy.deepcopy(model) works."
        )

    if not hasattr(before, "_snparam"):
        refuse._snparam = True  # type: ignore[attr-defined]
        cls.__getstate__ = refuse


class _Pickling(System):
    def on_attach(self, owner: nn.Module) -> None:
        refuse_pickling(owner)


register_system(_Pickling())
