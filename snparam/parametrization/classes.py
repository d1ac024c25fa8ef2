"""The class of a parametrized module, which torch makes for it and a deepcopy shares."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize


def give_own_class(owner: nn.Module) -> None:
    """Make the class that holds a parametrized module's properties its own.

    A deepcopy shares that class with its model, and would lose or gain properties with it.
    """
    if parametrize.is_parametrized(owner):
        cls = type(owner)
        own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        owner.__class__ = type(cls.__name__, cls.__bases__, own)
