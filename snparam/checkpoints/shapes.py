"""Whether what a checkpoint has is a tensor of the shape that it should have."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def has_shape(value: Any, shape: tuple[int | None, ...]) -> bool:
    """Whether a value is a tensor of a shape, whose None stands for any length but zero."""
    return (
        isinstance(value, Tensor)
        and value.ndim == len(shape)
        and all(
            size == want or (want is None and size > 0)
            for size, want in zip(value.shape, shape, strict=True)
        )
    )


def fits(value: Any, tensor: Tensor) -> bool:
    """Whether a value is a tensor that can be loaded into another."""
    return (
        isinstance(value, Tensor) and value.shape == tensor.shape and value.layout == tensor.layout
    )
