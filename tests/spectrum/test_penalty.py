"""Spectral penalties: values and gradients against float64 decompositions; no traces are left."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from helpers.holder import norm_of, original_of
from helpers.spectra import with_values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import snparam
from snparam.testing import weights


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 5)
        ).double()


def matrices(model: nn.Module) -> list[Tensor]:
    """The weights, or the originals behind them, as matrices that autograd follows."""
    found = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            lists: Any = getattr(module, "parametrizations", None)
            weight: Any = module.weight if lists is None else lists.weight.original
            found.append(weight.flatten(1))
    return found


FUNCTIONS: dict[str, tuple[Any, int]] = {
    "half square": (lambda sv: sv[:, 0].square().sum() / 2, 1),
    "to one": (lambda sv: (sv[:, 0].square() - 1).square().sum(), 1),
    "sum of three": (lambda sv: sv[:, :3].sum(), 3),
    "spread": (lambda sv: (sv[:, 0] / sv[:, 2]).log().sum(), 3),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("converted", ["no", "forward", "step", "in part"])
def test_value_and_gradient_are_those_of_float64_svdvals(name: str, converted: Any) -> None:
    function, k = FUNCTIONS[name]
    model = network()
    if converted == "in part":
        snparam.register_sn(model[3], k, sigma="rayleigh-ritz")
    elif converted != "no":
        snparam.convert_model(model, k, sigma="rayleigh-ritz", update=converted)
    snparam_state = copy.deepcopy(model.state_dict())
    penalty = snparam.SpectralPenalty(model, function, num_svs=k)
    leaves = [p for n, p in model.named_parameters() if p.ndim > 1]
    right = sum(function(torch.linalg.svdvals(m)[None]) for m in matrices(model))
    expected = torch.autograd.grad(right, leaves)
    for value in (penalty(), penalty(), snparam.spectral_penalty(model, function, num_svs=k)):
        torch.testing.assert_close(value, right, rtol=1e-6, atol=0)
        for a, b in zip(torch.autograd.grad(value, leaves), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, snparam_state[key]), key  # no state has moved


def test_of_an_operator_it_is_the_norm_of_the_convolution() -> None:
    layer: Any = nn.Conv2d(2, 3, 3, padding=1, bias=False, dtype=torch.float64)
    snparam.register_sn(layer, norm="operator", input_size=(4, 5), num_itrs=60)
    original = original_of(layer)
    layer.train()
    layer.weight  # noqa: B018 - a read takes its steps
    (gradient,) = torch.autograd.grad(snparam.spectral_penalty(layer), original)
    weight = original.detach().clone().requires_grad_()
    impulses = torch.eye(40, dtype=torch.float64).view(40, 2, 4, 5)
    matrix = nn.functional.conv2d(impulses, weight, padding=1).flatten(1)
    (expected,) = torch.autograd.grad(torch.linalg.matrix_norm(matrix, 2) ** 2 / 2, weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_the_default_is_half_the_square_of_sigma() -> None:
    model = network()
    sigmas = [torch.linalg.svdvals(m)[0].square() / 2 for m in matrices(model)]
    torch.testing.assert_close(snparam.spectral_penalty(model), sum(sigmas), rtol=1e-6, atol=0)


@settings(max_examples=40)
@given(weight=weights(max_side=6), k=st.integers(1, 3))
def test_any_weight_gives_its_singular_values(weight: Tensor, k: int) -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight = nn.Parameter(weight.flatten(1).clone())
    seen: list[Tensor] = []

    def function(sv: Tensor) -> Tensor:
        seen.append(sv)
        return sv.sum()

    value = snparam.SpectralPenalty(model, function, num_svs=k)()
    wide = weight.to(torch.complex128 if weight.is_complex() else torch.float64).flatten(1)
    right = torch.linalg.svdvals(wide)[:k]
    assert seen[0].shape == (1, len(right))
    torch.testing.assert_close(
        seen[0][0].double(), right, rtol=1e-3, atol=2e-3 * float(right[0]) + 1e-30
    )
    (gradient,) = torch.autograd.grad(value, model.weight)
    assert gradient.dtype == weight.dtype
    # A sum of singular values is homogeneous: its derivative along the weight is the sum itself.
    along = (gradient.to(wide.dtype).conj() * wide).sum().real
    torch.testing.assert_close(along, value.double(), rtol=1e-2, atol=1e-30)


def test_training_with_it_brings_singular_values_to_one() -> None:
    model = network()
    with torch.no_grad():
        for matrix in matrices(model):
            matrix.mul_(5.0)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    penalty = snparam.SpectralPenalty(model, lambda sv: (sv[:, 0] - 1).square().sum())
    for _ in range(300):
        optimizer.zero_grad()
        value = penalty()
        value.backward()
        optimizer.step()
    for matrix in matrices(model):
        assert float(torch.linalg.matrix_norm(matrix.detach(), 2)) == pytest.approx(1.0, abs=0.02)


def test_it_follows_a_weight_that_moves_and_starts_again_for_one_that_is_replaced() -> None:
    layer = nn.Linear(5, 4, bias=False).double()
    layer.weight.data = with_values([3.0, 1.0], 4, 5, seed=1)
    penalty = snparam.SpectralPenalty(layer, lambda sv: sv[:, 0].sum())
    assert float(penalty().detach()) == pytest.approx(3.0)
    with torch.no_grad():
        layer.weight.copy_(with_values([2.0, 0.1], 4, 5, seed=2))
    for _ in range(20):  # one step of the iteration in each call
        value = penalty()
    assert float(value.detach()) == pytest.approx(2.0)
    layer.weight = nn.Parameter(with_values([5.0, 4.9], 4, 5, seed=3))
    assert float(penalty().detach()) == pytest.approx(5.0)  # at once


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model[1].weight = model[0].weight
    alone = snparam.spectral_penalty(nn.Sequential(model[0]))
    torch.testing.assert_close(snparam.spectral_penalty(model), alone)
    snparam.convert_model(model)
    torch.testing.assert_close(snparam.spectral_penalty(model), alone)


def test_selection_and_blocks_are_those_of_a_conversion() -> None:
    model = network()
    function = FUNCTIONS["half square"][0]
    first, *rest = [snparam.spectral_penalty(nn.Sequential(m)) for m in (model[0], *model[3:])]
    for include, exclude in ((nn.Conv2d, None), (None, [nn.Linear])):
        penalty = snparam.SpectralPenalty(model, function, include=include, exclude=exclude)
        torch.testing.assert_close(penalty(), first)
    snparam.register_sn(model[3])
    without = snparam.SpectralPenalty(model, exclude=nn.Linear)
    torch.testing.assert_close(without(), first)
    penalty = snparam.SpectralPenalty(model, filter_fn=lambda m, n: isinstance(m, nn.Linear))
    torch.testing.assert_close(penalty(), rest[0] + rest[1], rtol=1e-5, atol=0)
    seen: list[Any] = []
    layer = nn.Linear(4, 6)
    snparam.SpectralPenalty(layer, lambda sv: seen.append(sv.shape) or sv.sum(), blocks=3)()
    assert seen == [(3, 1)]


def test_nothing_is_left_in_the_model_and_no_model_is_kept_alive() -> None:
    model = network()
    before = {id(m): set(vars(m)) for m in model.modules()}
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    penalty = snparam.SpectralPenalty(model, num_svs=2)
    (penalty() + snparam.spectral_penalty(model)).backward()
    assert {id(m): set(vars(m)) for m in model.modules()} == before
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == kinds
    assert all(not p._backward_hooks for p in model.parameters())
    reference = weakref.ref(model)
    del model, penalty
    gc.collect()
    assert reference() is None


def test_a_copy_has_vectors_of_its_own() -> None:
    model = network()
    snparam.spectral_penalty(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for matrix in matrices(other):
            matrix.normal_(generator=torch.Generator().manual_seed(1))
    right = sum(torch.linalg.svdvals(m)[0].square() / 2 for m in matrices(other))
    torch.testing.assert_close(snparam.spectral_penalty(other), right, rtol=1e-6, atol=0)


def test_the_weight_may_change_between_a_penalty_and_its_backward() -> None:
    layer = nn.Linear(5, 4).double()
    value = snparam.spectral_penalty(layer)
    left, sv, right = torch.linalg.svd(layer.weight.detach())
    with torch.no_grad():
        layer.weight.zero_()
    value.backward()
    torch.testing.assert_close(layer.weight.grad, sv[0] * torch.outer(left[:, 0], right[0]))


@pytest.mark.parametrize("update", ["forward", "step"])
def test_a_converted_weight_counts_with_its_original_and_its_own_number_of_values(
    update: Any,
) -> None:
    layer = snparam.register_sn(nn.Linear(5, 4).double(), 2, update=update)
    seen: list[Any] = []
    snparam.SpectralPenalty(layer, lambda sv: seen.append(sv.detach()) or sv.sum())()
    right = torch.linalg.svdvals(original_of(layer).detach())[:2]
    torch.testing.assert_close(seen[0][0], right, rtol=1e-6, atol=0)
    assert norm_of(layer).u.shape[1] == 2


def test_faults_are_named() -> None:
    with pytest.raises(TypeError, match=r"SpectralPenalty.*pass the network itself"):
        snparam.SpectralPenalty(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="function=3"):
        snparam.SpectralPenalty(network(), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_svs=0"):
        snparam.spectral_penalty(network(), num_svs=0)
    with pytest.raises(ValueError, match="ReLU has no weight to penalise"):
        snparam.spectral_penalty(nn.ReLU())
    with pytest.raises(ValueError, match=r"(?s)0\.weight.*\(1, 2\).*one number"):
        snparam.spectral_penalty(network(), lambda sv: sv, num_svs=2)
    broken = nn.Linear(3, 3)
    with torch.no_grad():
        broken.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or inf"):
        snparam.spectral_penalty(broken)
    layer: Any = nn.Linear(3, 3)
    penalty = snparam.SpectralPenalty(layer)
    penalty()
    layer.weight = nn.Parameter(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"'weight' \(3, 3\).*new SpectralPenalty"):
        penalty()


def test_a_factor_in_the_place_of_the_function_is_named() -> None:
    for call in (snparam.SpectralPenalty, snparam.spectral_penalty):
        with pytest.raises(TypeError, match=r"function=0\.01: expected a function"):
            call(nn.Linear(3, 3), 0.01)  # type: ignore[operator]
