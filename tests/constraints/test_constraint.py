"""The constraints: coeff, soft and gain, against exact singular values and plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import snparam
from snparam.estimators.power import power_step


def sigma(weight: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(weight.detach().double().flatten(1), 2)


def linear(norm: float, seed: int = 0, rows: int = 6, columns: int = 9) -> nn.Linear:
    """A layer whose weight has the given norm, in float64."""
    layer = nn.Linear(columns, rows, dtype=torch.float64)
    weight = torch.randn(
        rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    layer.weight = nn.Parameter(weight * (norm / sigma(weight)))
    return layer


def original(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original  # type: ignore[union-attr, return-value]


NORMS = st.floats(0.01, 100.0)


@given(norm=NORMS, coeff=NORMS)
def test_coeff_is_the_norm(norm: float, coeff: float) -> None:
    layer = snparam.register_sn(linear(norm), coeff=coeff)
    torch.testing.assert_close(
        sigma(layer.weight), torch.tensor(coeff, dtype=torch.float64), rtol=1e-9, atol=0
    )


@given(norm=NORMS, coeff=NORMS)
def test_soft_is_a_bound_and_leaves_smaller_weights_to_the_bit(norm: float, coeff: float) -> None:
    layer = snparam.register_sn(linear(norm), coeff=coeff, soft=True)
    if norm <= coeff * (1 - 1e-9):
        assert torch.equal(layer.weight, original(layer))
    elif norm > coeff * (1 + 1e-9):
        torch.testing.assert_close(
            sigma(layer.weight), torch.tensor(coeff, dtype=torch.float64), rtol=1e-9, atol=0
        )


def constrained(weight: Tensor, u: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """The constraint written with autograd's own operations, u and v constants."""
    blocks = len(u)
    matrices = weight.reshape(blocks, -1, weight.shape[-1])
    s = torch.stack([u[b] @ matrices[b] @ v[b] for b in range(blocks)])[:, None, None]
    c = options.get("coeff", 1.0)
    if options.get("soft"):
        return (matrices / (s / c).clamp_min(1.0)).reshape(weight.shape)
    return (matrices * c / s).reshape(weight.shape)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("norm", [0.5, 3.0])
@pytest.mark.parametrize(
    "options", [{"coeff": 2.5}, {"soft": True}, {"soft": True, "coeff": 2.0}], ids=str
)
def test_gradient_on_both_sides_of_the_bound(
    norm: float, blocks: int, options: dict[str, Any]
) -> None:
    layer = snparam.register_sn(linear(norm), blocks=blocks, **options).eval()
    weight = original(layer)
    used = layer.weight
    matrices = weight.detach().reshape(blocks, -1, weight.shape[1])
    u = layer.parametrizations.weight[0].u  # type: ignore[union-attr, index]
    _, v, _ = power_step(matrices, u)[:3]
    u, _, _ = power_step(matrices, u)[:3]
    grad = torch.randn_like(used)
    (found,) = torch.autograd.grad(used, weight, grad)
    expected_used = constrained(weight, u[:, 0], v[:, 0], options)
    (expected,) = torch.autograd.grad(expected_used, weight, grad)
    torch.testing.assert_close(used, expected_used)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("gain", ["learned", "fixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gain_keeps_the_function_and_then_holds_the_norm_at_gamma(
    gain: str, blocks: int, dtype: torch.dtype
) -> None:
    layer = linear(7.0).to(dtype)
    before = layer.weight.detach().clone()
    snparam.register_sn(layer, gain=gain, blocks=blocks)  # type: ignore[arg-type]
    norm = layer.parametrizations.weight[0]  # type: ignore[union-attr, index]
    torch.testing.assert_close(layer.weight, before)
    assert norm.gain.shape == (blocks,)
    assert isinstance(norm.gain, nn.Parameter) == (gain == "learned")
    assert "parametrizations.weight.0.gain" in layer.state_dict()
    with torch.no_grad():
        original(layer).mul_(5.0)  # the scale of the original no longer matters
    torch.testing.assert_close(layer.weight, before)
    with torch.no_grad():
        norm.gain.mul_(-2.0)
    torch.testing.assert_close(layer.weight, before * -2)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("value", [0.0, 1.7, -2.0])
def test_gradients_of_gain_and_weight(value: float, blocks: int) -> None:
    layer = snparam.register_sn(linear(3.0), gain="learned", blocks=blocks).eval()
    norm = layer.parametrizations.weight[0]  # type: ignore[union-attr, index]
    weight = original(layer)
    with torch.no_grad():
        norm.gain.fill_(value)
    matrices = weight.detach().reshape(blocks, -1, weight.shape[1])
    u, v, _ = power_step(matrices, norm.u)[:3]
    grad = torch.randn(weight.shape, dtype=weight.dtype)
    found = torch.autograd.grad(layer.weight, (weight, norm.gain), grad)
    gamma = norm.gain.detach().clone().requires_grad_()
    scale = gamma.repeat_interleave(weight.shape[0] // blocks)[:, None]
    expected = torch.autograd.grad(
        constrained(weight, u[:, 0], v[:, 0], {}) * scale, (weight, gamma), grad
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{"gain": "learned"}, {"soft": True, "coeff": 0.5}], ids=str)
def test_double_backward_of_constraints(options: dict[str, Any]) -> None:
    layer = snparam.register_sn(linear(3.0), **options).eval()
    norm, weight = layer.parametrizations.weight[0], original(layer)  # type: ignore[union-attr, index]
    inputs = [weight, norm.gain] if "gain" in options else [weight]
    u, v, _ = power_step(weight.detach()[None], norm.u)[:3]

    def penalty(used: Tensor) -> Tensor:
        grads = torch.autograd.grad(used.pow(3).sum(), inputs, create_graph=True)
        return sum((g.square().sum() for g in grads), start=torch.zeros(()))

    found = torch.autograd.grad(penalty(layer.weight), inputs)
    plain = constrained(weight, u[:, 0], v[:, 0], options)
    plain = plain * norm.gain if "gain" in options else plain
    expected = torch.autograd.grad(penalty(plain), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_zero_matrix_with_a_gain_stays_zero_and_learns() -> None:
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    snparam.register_sn(layer, gain="learned")
    used = layer.weight
    assert torch.equal(used, torch.zeros(3, 4))
    used.backward(torch.ones(3, 4))
    assert torch.equal(original(layer).grad, torch.ones(3, 4))  # type: ignore[arg-type]


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 5), nn.LSTM(5, 3))


@pytest.mark.parametrize("gain", ["learned", "fixed"])
@pytest.mark.parametrize("update", ["forward", "step"])
@pytest.mark.parametrize("training", [True, False])
def test_converting_with_a_gain_keeps_the_outputs(gain: Any, update: Any, training: bool) -> None:
    model = small().train(training)
    x = torch.randn(2, 2, 5, 5)
    before = model(x)[0]
    snparam.convert_model(model, gain=gain, update=update)
    torch.testing.assert_close(model(x)[0], before)
    after = model.eval()(x)[0]
    snparam.restore_model(model, bake=True)
    assert torch.equal(model(x)[0], after)
    assert set(model.state_dict()) == set(small().state_dict())


def test_gains_have_an_optimizer_group_of_their_own() -> None:
    model = snparam.convert_model(small(), gain="learned")
    groups = snparam.parameter_groups(model, weight_decay=0.0, lr=0.5)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    others, gains = optimizer.param_groups
    assert (gains["weight_decay"], gains["lr"], others["lr"]) == (0.0, 0.5, 0.1)
    assert sorted(map(id, others["params"] + gains["params"])) == sorted(
        map(id, model.parameters())
    )
    assert len(gains["params"]) == len(snparam.singular_values(model))
    before = [p.detach().clone() for p in gains["params"]]
    model(torch.randn(2, 2, 5, 5))[0].square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, gains["params"], strict=True))


@pytest.mark.parametrize("gain", [None, "fixed"])
def test_without_learned_gains_one_group_has_all_parameters(gain: Any) -> None:
    model = snparam.convert_model(small(), gain=gain)
    (group,) = snparam.parameter_groups(model, weight_decay=0.0)
    assert list(group) == ["params"]  # the option is for gains alone
    assert list(map(id, group["params"])) == list(map(id, model.parameters()))


@pytest.mark.parametrize("gain", [None, "learned"])
def test_an_option_that_no_optimizer_has_is_refused(gain: Any) -> None:
    model = snparam.convert_model(small(), gain=gain)
    with pytest.raises(TypeError, match=r"'weight_decy'; did you mean 'weight_decay'\?.*\[-1\]"):
        snparam.parameter_groups(model, weight_decy=0.0)
    with pytest.raises(TypeError, match="'params'"):
        snparam.parameter_groups(model, params=[])
    known = {"lr": 0.1, "betas": (0.9, 0.9), "momentum": 0.5, "fused": False}
    groups = snparam.parameter_groups(model, **known)
    assert all({**group, **known} == group for group in groups[1:])


def test_a_frozen_weight_has_a_frozen_gain() -> None:
    layer = nn.Linear(3, 4).requires_grad_(False)
    snparam.register_sn(layer, gain="learned")
    assert not any(p.requires_grad for p in layer.parameters())


def test_verify_measures_against_what_is_intended() -> None:
    model = nn.Sequential(linear(0.5), linear(3.0))
    for options, intended in (
        ({"coeff": 2.0}, [2.0, 2.0]),
        ({"coeff": 2.0, "soft": True}, [0.5, 2.0]),
        ({"gain": "fixed"}, [0.5, 3.0]),
    ):
        snparam.convert_model(model, **options)  # type: ignore[arg-type]
        rows = snparam.verify(model, tolerance=1e-6)
        assert [row.intended for row in rows] == pytest.approx(intended)
        assert [row.exact for row in rows] == pytest.approx(intended)
        assert [row.estimate for row in rows] == pytest.approx([0.5, 3.0])
        snparam.restore_model(model, bake=False)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"coeff": 0.0}, ValueError),
        ({"coeff": float("nan")}, ValueError),
        ({"coeff": "1"}, TypeError),
        ({"soft": 1}, TypeError),
        ({"gain": "yes"}, ValueError),
        ({"gain": "fixed", "soft": True}, ValueError),
        ({"gain": "learned", "coeff": 2.0}, ValueError),
    ],
    ids=str,
)
def test_impossible_constraints_are_refused(options: Any, error: type[Exception]) -> None:
    layer = nn.Linear(3, 4)
    with pytest.raises(error, match=next(iter(options))):
        snparam.register_sn(layer, **options)
    assert type(layer) is nn.Linear
