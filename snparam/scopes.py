"""Forwards: one forward of a layer, or of a module that reads its weight itself, moves once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .parametrization import SpectralNorm


def norms_of(module: nn.Module) -> Iterator[tuple[str, SpectralNorm]]:
    """Tensor names of a module (not of its children) and the SpectralNorm on each."""
    lists: Any = module._modules.get("parametrizations")
    if isinstance(lists, nn.ModuleDict):
        for name, parametrizations in lists.items():
            for parametrization in parametrizations:  # type: ignore[attr-defined]
                if isinstance(parametrization, SpectralNorm):
                    yield name, parametrization


def norm_on(module: nn.Module, tensor_name: str) -> SpectralNorm | None:
    """The SpectralNorm on a tensor of a module, or None."""
    return dict(norms_of(module)).get(tensor_name)


def open_scope(module: nn.Module) -> None:
    """Let each forward of a module count as one for the weights it reads."""
    if _begin not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_begin, prepend=True)
        module.register_forward_hook(_end, always_call=True)


def close_scope(module: nn.Module) -> None:
    """Undo `open_scope`, once the module reads no normalised weight any more."""
    if any(True for _ in _scope(module)):
        return
    for key in [k for k, hook in module._forward_pre_hooks.items() if hook is _begin]:
        del module._forward_pre_hooks[key]
    for key in [k for k, hook in module._forward_hooks.items() if hook is _end]:
        del module._forward_hooks[key]
        module._forward_hooks_always_called.pop(key, None)


def _begin(module: nn.Module, _args: object) -> None:
    for norm, own in _scope(module):
        norm.forwards.enter(own=own)


def _end(module: nn.Module, _args: object, _output: object) -> None:
    for norm, _ in _scope(module):
        norm.forwards.leave()


def _scope(module: nn.Module) -> Iterator[tuple[SpectralNorm, bool]]:
    """The states that a module's forward may read, and whether they are its own."""
    for _, norm in norms_of(module):
        yield norm, True
    for name, child in module._modules.items():
        if child is not None and name != "parametrizations":
            for norm in _readable(child):
                yield norm, False


def _readable(child: nn.Module) -> Iterator[SpectralNorm]:
    """States of a child, or of the children of a container that has no forward of its own."""
    if isinstance(child, nn.ModuleList | nn.ModuleDict):
        for grandchild in child._modules.values():
            if grandchild is not None:
                yield from _readable(grandchild)
    else:
        for _, norm in norms_of(child):
            yield norm
