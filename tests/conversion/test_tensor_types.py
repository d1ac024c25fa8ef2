"""Weights of other libraries' tensor types, under hooks, and quantised: skipped with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.subclasses import Packed, Rewrapping, Unwrapping, Wrapper
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

import snparam

UNREADABLE = [Packed, Rewrapping]


def network(kind: type[Wrapper]) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    model[0].weight = nn.Parameter(kind(model[0].weight.detach()), requires_grad=False)
    return model


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("options", [{}, {"gain": "learned"}, {"gain": "fixed"}], ids=str)
def test_a_weight_that_is_no_matrix_is_skipped_and_the_others_are_converted(
    kind: type[Wrapper], options: dict[str, Any]
) -> None:
    model = network(kind)
    before = model[0].weight
    plan = snparam.plan_conversion(model, **options)
    assert [row.decision for row in plan] == ["skip", "convert"]
    assert kind.__name__ in plan[0].reason
    assert str(plan)
    snparam.convert_model(model, **options)
    assert model[0].weight is before
    assert list(snparam.singular_values(model)) == ["2.weight"]
    assert len(snparam.verify(model)) == 1
    if kind is Packed:
        assert torch.isfinite(model(torch.randn(3, 6))).all()
    snparam.restore_model(model)
    assert model[0].weight is before


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("options", [{}, {"name": "weight"}, {"gain": "learned"}], ids=str)
def test_register_sn_says_what_stands_against_it(
    kind: type[Wrapper], options: dict[str, Any]
) -> None:
    model = network(kind)
    with pytest.raises(
        TypeError, match=rf"'weight' of Linear \(5, 6\): a {kind.__name__} .*quantis"
    ):
        snparam.register_sn(model[0], **options)
    assert type(model[0]) is nn.Linear


def test_singular_values_of_an_ordinary_network_leave_it_out() -> None:
    assert list(snparam.singular_values(network(Packed))) == ["2.weight"]


@pytest.mark.parametrize("options", [{}, {"gain": "learned"}], ids=str)
def test_a_type_that_computes_in_ordinary_tensors_is_converted(options: dict[str, Any]) -> None:
    model = network(Unwrapping)
    snparam.convert_model(model, **options)
    reference = nn.Linear(6, 5)
    with torch.no_grad():
        reference.weight.copy_(model[0].parametrizations.weight.original.inner)
    snparam.register_sn(reference, **options)
    torch.testing.assert_close(model[0].weight, reference.weight)


# torch's own tools


def pruned(kind: str) -> tuple[nn.Module, str]:
    layer: nn.Module = nn.LSTM(6, 5) if kind == "LSTM" else nn.Linear(6, 5)
    name = "weight_ih_l0" if kind == "LSTM" else "weight"
    prune.l1_unstructured(layer, name, amount=0.3)
    if kind == "twice":
        prune.random_unstructured(layer, name, amount=0.3)
    return layer, name


@pytest.mark.parametrize("kind", ["Linear", "LSTM", "twice"])
def test_a_pruned_weight_is_left_alone_and_pruning_is_named(kind: str) -> None:
    layer, name = pruned(kind)
    (row,) = [row for row in snparam.plan_conversion(layer) if row.tensor == f"{name}_orig"]
    assert row.decision == "skip"
    assert "torch.nn.utils.prune" in row.reason
    assert "weight_norm" not in row.reason
    for tensor in (name, f"{name}_orig"):
        with pytest.raises(ValueError, match=r"torch\.nn\.utils\.prune"):
            snparam.register_sn(layer, name=tensor)
    prune.remove(layer, name)
    snparam.register_sn(layer)


def test_a_pruned_layer_without_other_weights_says_so_without_a_name() -> None:
    with pytest.raises(ValueError, match=r"torch\.nn\.utils\.prune"):
        snparam.register_sn(pruned("Linear")[0])


def test_pruning_of_the_original_zeroes_entries_of_the_weight_in_use() -> None:
    layer = snparam.register_sn(nn.Linear(6, 5), num_itrs=20)
    prune.l1_unstructured(layer.parametrizations.weight, "original", amount=0.5)
    for _ in range(3):
        layer(torch.randn(3, 6)).sum().backward()
    assert int((layer.weight == 0).sum()) == 15
    sigma = torch.linalg.matrix_norm(layer.weight.detach().double(), 2)
    assert float(sigma) == pytest.approx(1, abs=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_network_is_quantised_once_it_is_restored_and_converted_no_more() -> None:
    model = snparam.convert_model(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)))
    x = torch.randn(3, 6)
    expected = model.eval()(x)
    quantised = quantize_dynamic(snparam.restore_model(model), {nn.Linear})
    torch.testing.assert_close(quantised(x), expected, rtol=0.05, atol=0.05)
    assert all(row.decision == "skip" for row in snparam.plan_conversion(quantised))
    with pytest.raises(TypeError, match="restore_model before quantising"):
        snparam.register_sn(quantised[0])


def test_batch_norm_is_folded_into_a_restored_convolution_and_into_no_converted_one() -> None:
    conv = snparam.register_sn(nn.Conv2d(3, 4, 3)).eval()
    norm = nn.BatchNorm2d(4).eval()
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    x = torch.randn(2, 3, 5, 5)
    expected = norm(conv(x))
    with pytest.raises(KeyError, match=r"restore_model\(model\) first.*folding"):
        fuse_conv_bn_eval(conv, norm)
    torch.testing.assert_close(norm(conv(x)), expected)
    torch.testing.assert_close(fuse_conv_bn_eval(snparam.remove_sn(conv), norm)(x), expected)


@pytest.mark.parametrize("value", [torch.ones(5, 6), Packed(torch.ones(5, 6))], ids=repr)
def test_a_parameter_in_place_of_a_normalised_weight_is_refused_with_what_to_do(value: Any) -> None:
    """As tools that quantise assign it."""
    layer = snparam.register_sn(nn.Linear(6, 5))
    original = layer.parametrizations.weight.original
    with pytest.raises(KeyError, match=r"'weight' of Linear.*assign a tensor.*restore_model"):
        layer.weight = nn.Parameter(value, requires_grad=False)
    assert layer.parametrizations.weight.original is original
    layer.scale = nn.Parameter(torch.ones(1))
    assert "scale" in dict(layer.named_parameters())
    snparam.remove_sn(layer)
    layer.weight = nn.Parameter(value, requires_grad=False)
    assert type(layer) is nn.Linear
