"""`norm_bounds`: of layers of all kinds, converted and not, and which it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.convolutions import exact_norm, ignores_same, layers
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import snparam
from snparam import norm_bounds


def sigma(weight: Tensor) -> float:
    return float(torch.linalg.svdvals(weight.detach().double().flatten(1))[0])


def encloses(bounds: snparam.Bounds, right: float, ratio: float = 1 + 1e-9) -> bool:
    is_between = bounds.lower * (1 - 1e-12) <= right * (1 + 1e-12) <= bounds.upper * (1 + 1e-11)
    return is_between and bounds.upper <= bounds.lower * ratio


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_of_a_linear_layer_it_is_the_norm_of_its_weight(dtype: torch.dtype) -> None:
    layer = nn.Linear(7, 4, dtype=dtype)
    right = float(torch.linalg.svdvals(layer.weight.detach().to(torch.complex128))[0])
    assert encloses(norm_bounds(layer), right)


def test_of_other_layers_it_is_the_norm_of_what_the_table_reads() -> None:
    embedding, bilinear = nn.Embedding(9, 4), nn.Bilinear(3, 4, 5)
    assert encloses(norm_bounds(embedding), sigma(embedding.weight))
    assert encloses(norm_bounds(bilinear), sigma(bilinear.weight))
    lstm = nn.LSTM(3, 4)
    assert encloses(norm_bounds(lstm, name="weight_hh_l0"), sigma(lstm.weight_hh_l0))
    attention = nn.MultiheadAttention(8, 2)
    right = sigma(attention.out_proj.weight)
    assert encloses(norm_bounds(attention, name="out_proj.weight"), right)


@ignores_same
@settings(max_examples=50)
@given(drawn=layers())
def test_of_a_convolution_it_is_the_norm_of_the_convolution(drawn: Any) -> None:
    layer, size = drawn
    right = exact_norm(layer, size)
    assert encloses(norm_bounds(layer, size), right) or right < 1e-12
    assert right <= norm_bounds(layer).upper * (1 + 1e-12)


def test_a_convolution_differs_from_its_reshaped_weight() -> None:
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.ones_(layer.weight)
    assert encloses(norm_bounds(layer), 9, 1.05)
    assert sigma(layer.weight) == pytest.approx(3)


@pytest.mark.parametrize("options", [{}, {"coeff": 0.5}, {"sigma": "exact"}], ids=str)
@pytest.mark.parametrize("update", ["forward", "step"])
def test_of_a_converted_layer_it_is_of_the_weight_in_use(update: Any, options: Any) -> None:
    layer = snparam.register_sn(nn.Linear(6, 5), update=update, **options)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(3)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    assert layer.training
    bounds = norm_bounds(layer)
    assert encloses(bounds, sigma(snparam.weight_in_use(layer)))
    assert bounds.upper == pytest.approx(options.get("coeff", 1), rel=1e-2)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    assert layer.training


def test_of_a_converted_convolution_it_is_of_the_convolution() -> None:
    layer = snparam.register_sn(nn.Conv2d(3, 4, 3, padding=1))
    bounds = norm_bounds(layer, (5, 5))
    plain = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    with torch.no_grad():
        plain.weight.copy_(snparam.weight_in_use(layer))
    assert encloses(bounds, exact_norm(plain, (5, 5)), 1 + 1e-6)


def test_of_a_layer_under_other_parametrizations_it_is_of_what_they_give() -> None:
    spectral = parametrizations.spectral_norm(nn.Linear(5, 4))
    u = spectral.parametrizations.weight[0]._u.clone()
    bounds = norm_bounds(spectral)
    assert torch.equal(spectral.parametrizations.weight[0]._u, u)
    assert encloses(bounds, sigma(spectral.eval().weight))
    with pytest.warns(FutureWarning):
        hooked = weight_norm(nn.Linear(5, 4))
    with pytest.raises(ValueError, match="'weight' of Linear is under torch's weight_norm"):
        norm_bounds(hooked)


def test_gradients_are_not_asked_for_and_the_layer_is_left_as_it_was() -> None:
    layer = nn.Conv1d(2, 3, 3)
    before = layer.weight.detach().clone()
    norm_bounds(layer)
    norm_bounds(layer, (9,))
    assert torch.equal(layer.weight, before)
    assert layer.weight.grad is None


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def _broken() -> nn.Module:
    layer = nn.Linear(3, 2)
    nn.init.constant_(layer.weight, float("nan"))
    return layer


@pytest.mark.parametrize(
    ("layer", "arguments", "error", "message"),
    [
        (nn.Linear, {}, TypeError, "norm_bounds: expected an nn.Module, not the class Linear"),
        (nn.ReLU(), {}, ValueError, "ReLU has no parameter or buffer named 'weight'"),
        (nn.LayerNorm(3), {}, ValueError, "LayerNorm is not in the layer table"),
        (nn.Sequential(nn.Linear(2, 2)), {}, ValueError, "Sequential .*each layer inside"),
        (nn.LSTM(2, 2), {}, ValueError, "LSTM has several weights; pass name=, one of .*weight_ih"),
        (nn.Linear(2, 2), {"name": "bais"}, ValueError, "no parameter or buffer named 'bais'"),
        (
            nn.Linear(2, 2),
            {"name": "bias"},
            ValueError,
            "'bias' of Linear .2,.: it has 1 dim",
        ),
        (_broken(), {}, ValueError, "'weight' of Linear .2, 3. has NaN or inf"),
        (nn.Linear(2, 2, device="meta"), {}, ValueError, "'weight' of Linear .*meta device"),
        (nn.LazyLinear(2), {}, ValueError, "'weight' of LazyLinear has no shape yet"),
        (Standardised(2, 2, 3), {}, TypeError, "'weight' of Standardised .*forward of its own"),
        (nn.Conv2d(2, 2, 3), {"input_size": 8}, TypeError, "input_size=8: expected a tuple"),
        (nn.Conv2d(2, 2, 3), {"input_size": (8,)}, ValueError, "'weight' of Conv2d .*expected 2"),
        (nn.Conv2d(2, 2, 3), {"tightness": 1}, ValueError, "'weight' of Conv2d .*tightness=1"),
    ],
)
def test_what_it_refuses(layer: Any, arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        norm_bounds(layer, **arguments)


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_a_size_that_padding_cannot_repeat_is_refused(mode: Any) -> None:
    layer = nn.Conv2d(2, 3, 3, padding=3, padding_mode=mode)
    with pytest.raises(ValueError, match=f"too small for {mode} padding by 3"):
        snparam.norm_bounds(layer, (2, 2))
