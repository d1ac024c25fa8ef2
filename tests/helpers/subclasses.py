"""Tensor subclasses that wrap another tensor, as the quantised tensors of other libraries do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Wrapper(Tensor):
    """A tensor without storage of its own, whose operations are those of `inner`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, strides=inner.stride()
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"{type(self).__name__}({tuple(self.shape)})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def result(cls, func: Any, computed: Any) -> Any:
        """What an operation gives, from what it gives for the inner tensors."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def inner(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapper) else x

        return cls.result(func, func(*tree_map(inner, args), **tree_map(inner, kwargs or {})))


class Packed(Wrapper):
    """Does what a layer's forward needs, and raises for everything else, as quantised ones do."""

    @classmethod
    def result(cls, func: Any, computed: Any) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(computed)
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.t.default):
            return computed
        raise NotImplementedError(f"{cls.__name__} has no {func}")


class Rewrapping(Wrapper):
    """Every result is of its own kind again."""

    @classmethod
    def result(cls, func: Any, computed: Any) -> Any:
        return tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, computed)


class Unwrapping(Wrapper):
    """Computes in ordinary tensors."""

    @classmethod
    def result(cls, func: Any, computed: Any) -> Any:
        return cls(computed) if func is torch.ops.aten.detach.default else computed
