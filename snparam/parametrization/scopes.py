"""Forwards: one forward of a layer, or of a module that reads its weight itself, moves once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.compiler import is_compiling

from snparam.parametrization.find import has_norms, is_normalised, norms_of
from snparam.parametrization.forwards import begin, end
from snparam.parametrization.spectral_norm import SpectralNorm

# Modules that were found to need their scope since a weight was last removed; None before that.
_not_idle: WeakSet[nn.Module] | None = None


def open_own_scope(owner: nn.Module) -> None:
    """Let each forward of a module with normalised weights of its own count as one.

    By its class, which is its own: hooks would take as long as a small product.
    """
    close_own_scope(owner)
    cls = type(owner)
    call: Any = cls.__call__
    pure = all(norm.settings.update == "step" for _, norm in norms_of(owner))

    def scoped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Which forward it is does not matter to what moves nothing.
        if pure and self.training and len(self._modules) == 1:
            return call(self, *args, **kwargs)
        if is_compiling():
            _begin(self, args)
            try:
                return call(self, *args, **kwargs)
            finally:
                _end(self, args, None)
        begin(self)
        try:
            return call(self, *args, **kwargs)
        finally:
            end(self)

    cls.__call__ = scoped  # type: ignore[method-assign]


def close_own_scope(owner: nn.Module) -> None:
    """Undo `open_own_scope`, on a module whose class is its own still."""
    if "__call__" in vars(type(owner)):
        del type(owner).__call__


def open_scope(module: nn.Module) -> None:
    """Let each forward of a module count as one for the weights that it reads of others."""
    if not has_scope(module):
        module.register_forward_pre_hook(_begin, prepend=True)
        module.register_forward_hook(_end, always_call=True)


def has_scope(module: nn.Module) -> bool:
    """Whether `open_scope` has been called on a module and not been undone."""
    return _begin in module._forward_pre_hooks.values()


def open_scopes(model: nn.Module) -> None:
    """`open_scope` for every module that may read a normalised weight inside it."""
    without = (nn.Module.forward, nn.Sequential.forward)
    for module in model.modules():
        reads = getattr(type(module), "forward", None) not in without
        if reads and not has_norms(module) and is_normalised(module):
            open_scope(module)


def close_scope(module: nn.Module) -> None:
    """Undo `open_scope`, once no normalised weight is left inside the module."""
    if not is_normalised(module):
        _remove_hooks(module)


def _remove_hooks(module: nn.Module) -> None:
    for key in [k for k, hook in module._forward_pre_hooks.items() if hook is _begin]:
        del module._forward_pre_hooks[key]
    for key in [k for k, hook in module._forward_hooks.items() if hook is _end]:
        del module._forward_hooks[key]
        module._forward_hooks_always_called.pop(key, None)


def expect_idle_scopes() -> None:
    """Let scopes that have no normalised weight inside any more undo themselves.

    A layer does not know the modules around it: each looks for itself, in its next forward.
    """
    global _not_idle
    _not_idle = WeakSet()


def _is_idle(module: nn.Module) -> bool:
    """Whether a module's scope has just been undone, because nothing inside is normalised."""
    if _not_idle is None or module in _not_idle:
        return False
    if is_normalised(module):
        _not_idle.add(module)
        return False
    close_scope(module)
    return True


@contextmanager
def without_scopes(model: nn.Module) -> Iterator[None]:
    """Within it, forwards of the model do not say where they begin and end, which takes time."""
    owners = [m for m in model.modules() if "__call__" in vars(type(m)) and has_norms(m)]
    others = [m for m in model.modules() if has_scope(m)]
    for owner in owners:
        close_own_scope(owner)
    for module in others:
        _remove_hooks(module)
    try:
        yield
    finally:
        for owner in filter(has_norms, owners):
            open_own_scope(owner)
        for module in filter(is_normalised, others):
            open_scope(module)


# In a compiled graph it matters only where a read moves the state which forward it belongs to:
# what is computed twice the compiler finds by itself. And a checkpointed region in a graph may not
# change anything in Python.


def _begin(module: nn.Module, _args: object) -> None:
    if is_compiling():
        for norm, own in _near(module):
            if norm.moves:
                norm.forwards.enter_traced(own=own)
    elif not _is_idle(module):
        begin(module, by_hook=True)


def _end(module: nn.Module, _args: object, _output: object) -> None:
    if is_compiling():
        for norm, _ in _near(module):
            if norm.moves:
                norm.forwards.leave_traced()
    else:
        end(module)


def _near(module: nn.Module) -> Iterator[tuple[SpectralNorm, bool]]:
    """States of a module and of its children, and whether they are its own."""
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
