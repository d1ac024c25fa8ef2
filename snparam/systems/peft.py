"""A normalised layer under a peft adapter refuses what would write to its weight.

peft merges an adapter by `base_layer.weight.data += delta`, and some initialisations move a part of
the weight into the adapter by the same means. A normalised weight is computed anew at each read, so
that what is written to it is lost, and the adapter with it. A layer does not know the wrappers that
it is put into, before its conversion or after it; but each of them asks what it wraps for
`base_layer`, to find the innermost, before it writes. peft is not imported; that name, those of its
modules and those of its methods are all that is looked for.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import nn

from snparam.parametrization.extensions import System, register_system
from snparam.parametrization.find import norms_of
from snparam.parametrization.frames import outward

_ASKED = "base_layer"
_RESTORE = (
    "call restore_model(model), which leaves the normalised weights as ordinary ones, and then "
    "again what you called"
)
_ADAPT_FIRST = (
    "call get_peft_model before convert_model, or start the adapter otherwise, with "
    "init_lora_weights=True for one"
)
_LEAVE_OUT = "leave this module out of the conversion, by exclude="
# What to do instead of peft's methods that write to the weight (those of its version 0.21).
_INSTEAD = {
    **dict.fromkeys(("merge", "unmerge", "unload_and_optionally_merge_module"), _RESTORE),
    **dict.fromkeys(("pissa_init", "olora_init", "corda_init", "loftq_init"), _ADAPT_FIRST),
    **dict.fromkeys(("lora_ga_init", "_truncate_base_weight"), _ADAPT_FIRST),
    "_restore_weights": _LEAVE_OUT,  # of MultiheadAttention, merged into in every forward
}


def refuse_merging(owner: nn.Module) -> None:
    """Let a parametrized module refuse to have an adapter merged into its normalised weights.

    Its class has to be its own.
    """
    cls = type(owner)
    if _ASKED not in vars(cls):
        setattr(cls, _ASKED, _ANSWER)


def allow_merging(owner: nn.Module) -> None:
    """Undo `refuse_merging`."""
    cls = type(owner)
    if vars(cls).get(_ASKED) is _ANSWER:
        delattr(cls, _ASKED)


def _asked(self: nn.Module) -> Any:
    """What any module without such an attribute, or with such a child, answers; or the refusal."""
    norm = next((norm for _, norm in norms_of(self)), None)
    if norm is not None:
        method = _writing(sys._getframe(1))
        if method is not None:
            raise RuntimeError(
                f"SpectralNorm on {norm.name} {norm.view.shape}: {method} of a peft adapter would "
                "write to a weight that is computed anew at each read, and what it writes would be "
                f"lost; {_INSTEAD[method]}."
            )
    return nn.Module.__getattr__(self, _ASKED)


_ANSWER = property(_asked)


def _writing(frame: FrameType) -> str | None:
    """The method of peft on whose way a wrapper asks, if it is one that writes."""
    for asking in outward(frame):
        if not asking.f_globals.get("__name__", "").startswith("peft."):
            return None
        method = asking.f_code.co_name
        if method != "get_base_layer":
            return method if method in _INSTEAD else None
    return None


class _Peft(System):
    def on_attach(self, owner: nn.Module) -> None:
        refuse_merging(owner)

    def on_detach(self, owner: nn.Module) -> None:
        allow_merging(owner)


register_system(_Peft())
