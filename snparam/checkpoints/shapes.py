"""Checks that a value in a checkpoint is a tensor of the shape that it should have."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def has_shape(value: Any, shape: tuple[int | None, ...]) -> bool:
    """Return whether a value is a tensor of a shape, in which None stands for any length but 0."""
    return (
        isinstance(value, Tensor)
        and value.ndim == len(shape)
        and all(
            size == expected_size or (expected_size is None and size > 0)
            for size, expected_size in zip(value.shape, shape, strict=True)
        )
    )


def fits(value: Any, tensor: Tensor) -> bool:
    """Return whether a value is a tensor that can be loaded into another: same shape and layout."""
    return (
        isinstance(value, Tensor) and value.shape == tensor.shape and value.layout == tensor.layout
    )
