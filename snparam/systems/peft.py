"""peft: a normalised layer under an adapter refuses the methods that would write to its weight.

peft merges an adapter by `base_layer.weight.data += delta`, and some initialisations move a part of
the weight into the adapter by the same means. A normalised weight is computed anew at each read, so
that what is written to it is lost, and the adapter with it. A layer does not know the adapters that
wrap it, before its conversion or after it; but before an adapter writes, it reads the attribute
`base_layer` of the module that it wraps, to find the innermost one. peft is not imported; the names
of that attribute, of peft's modules and of its methods are all that is looked for.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import nn

from snparam.parametrization.extensions import System, register_system
from snparam.parametrization.find import norms_of
from snparam.parametrization.frames import outward

_ATTRIBUTE = "base_layer"
_RESTORE = (
    "call restore_model(model), which leaves the normalised weights as ordinary ones, and then "
    "again what you called"
)
_ADAPT_FIRST = (
    "call get_peft_model before convert_model, or start the adapter otherwise, with "
    "init_lora_weights=True for one"
)
_LEAVE_OUT = "leave this module out of the conversion, by exclude="
# What to do instead, by peft's method that writes to the weight (those of its version 0.21).
_REMEDIES = {
    **dict.fromkeys(("merge", "unmerge", "unload_and_optionally_merge_module"), _RESTORE),
    **dict.fromkeys(("pissa_init", "olora_init", "corda_init", "loftq_init"), _ADAPT_FIRST),
    **dict.fromkeys(("lora_ga_init", "_truncate_base_weight"), _ADAPT_FIRST),
    "_restore_weights": _LEAVE_OUT,  # of MultiheadAttention, into which each forward merges
}


def refuse_merging(owner: nn.Module) -> None:
    """Let a parametrized module refuse to have an adapter merged into its normalised weights.

    Its class has to be its own.
    """
    cls = type(owner)
    if _ATTRIBUTE not in vars(cls):
        setattr(cls, _ATTRIBUTE, _PROPERTY)


def allow_merging(owner: nn.Module) -> None:
    """Undo `refuse_merging`."""
    cls = type(owner)
    if vars(cls).get(_ATTRIBUTE) is _PROPERTY:
        delattr(cls, _ATTRIBUTE)


def _base_layer(self: nn.Module) -> Any:
    """Answer for `base_layer` as any module does, or refuse if peft reads it in order to write."""
    norm = next((norm for _, norm in norms_of(self)), None)
    if norm is not None:
        method = _writing_method(sys._getframe(1))
        if method is not None:
            raise RuntimeError(
                f"SpectralNorm on {norm.name} {norm.view.shape}: {method} of a peft adapter would "
                "write to a weight that is computed anew at each read, and what it writes would be "
                f"lost; {_REMEDIES[method]}."
            )
    return nn.Module.__getattr__(self, _ATTRIBUTE)


_PROPERTY = property(_base_layer)


def _writing_method(frame: FrameType) -> str | None:
    """Return the method of peft's that reads the attribute, if it is one that writes, or None.

    The frames of `get_base_layer` are skipped: what matters is the method that calls it.

    Args:
        frame: the frame that reads the attribute.
    """
    for caller in outward(frame):
        if not caller.f_globals.get("__name__", "").startswith("peft."):
            return None
        method = caller.f_code.co_name
        if method != "get_base_layer":
            return method if method in _REMEDIES else None
    return None


class _Peft(System):
    def on_attach(self, owner: nn.Module) -> None:
        refuse_merging(owner)

    def on_detach(self, owner: nn.Module) -> None:
        allow_merging(owner)


register_system(_Peft())
