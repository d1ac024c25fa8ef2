"""The geometry of torch's convolutions, and the sizes of what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.convolutions import ignores_same, inputs_of, layers
from hypothesis import given, settings
from torch import Tensor, nn

import snparam
from snparam.layers.convolutions import geometry_of
from snparam.matrices.convolutions import Geometry


@ignores_same
@settings(max_examples=200)
@given(drawn=layers())
def test_an_output_has_the_size_that_torch_gives_it(drawn: Any) -> None:
    layer, size = drawn
    geometry = geometry_of(layer)
    assert geometry is not None
    with torch.no_grad():
        output = layer(inputs_of(layer, size))
    assert geometry.output_size(size, layer.kernel_size) == tuple(output.shape[2:])


def test_what_torch_writes_as_one_number_or_a_name_is_told_for_each_axis() -> None:
    same = nn.Conv2d(1, 1, (4, 3), padding="same", dilation=(1, 2), padding_mode="reflect")
    assert geometry_of(same) == Geometry(
        stride=(1, 1), padding=((1, 2), (2, 2)), dilation=(1, 2), padding_mode="reflect"
    )
    valid = nn.Conv1d(2, 2, 3, padding="valid", groups=2)
    assert geometry_of(valid) == Geometry(stride=(1,), padding=((0, 0),), dilation=(1,), groups=2)
    assigned = nn.Conv3d(1, 1, 3)
    assigned.stride, assigned.padding = 2, (1,)  # type: ignore[assignment]
    assert geometry_of(assigned) == Geometry((2, 2, 2), ((1, 1),) * 3, (1, 1, 1))
    transposed = nn.ConvTranspose1d(1, 1, 3, stride=3, padding=1, output_padding=2)
    assert geometry_of(transposed) == Geometry(
        (3,), ((1, 1),), (1,), transposed=True, output_padding=(2,)
    )


class Inheriting(nn.Conv2d):
    """A class of one's own that changes no forward."""


class Standardising(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


class Wrapping(nn.Conv2d):
    def _conv_forward(self, *args: Any) -> Tensor:
        return 2 * super()._conv_forward(*args)


class Upsampling(nn.ConvTranspose1d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(x, output_size) ** 2


def test_only_a_forward_of_torchs_own_has_a_geometry() -> None:
    expected = geometry_of(nn.Conv2d(1, 1, 3, padding=1))
    assert geometry_of(Inheriting(1, 1, 3, padding=1)) == expected
    assert geometry_of(snparam.register_sn(nn.Conv2d(1, 1, 3, padding=1))) == expected
    others = [Standardising(1, 1, 3), Wrapping(1, 1, 3), Upsampling(1, 1, 3), nn.Linear(3, 3)]
    assert [geometry_of(other) for other in others] == [None] * 4
    patched: Any = nn.Conv1d(1, 1, 3)
    patched.forward = lambda x: x
    assert geometry_of(patched) is None


def test_a_size_with_another_number_of_axes_is_refused() -> None:
    geometry = geometry_of(nn.Conv2d(1, 1, 3))
    assert geometry is not None
    with pytest.raises(ValueError, match=r"input_size=\(8,\).*expected 2 numbers"):
        geometry.output_size((8,), (3, 3))
