"""A constraint that is no division and an estimator, both defined here, work from end to end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.holder import exact, norm_of, original_of
from torch import Tensor, nn

import snparam
from snparam.constraints.constraint import CONSTRAINTS, Constraint, register_constraint
from snparam.estimators.estimate import ESTIMATORS, Estimate, Estimator, register_estimator


class Clipped(Constraint):
    """W − max(0, σ₁ − c) u₁ v₁ᵀ: of the largest singular value what exceeds c is taken off."""

    name = "clipped"

    def apply(
        self, weight: Tensor, estimate: Estimate, parameters: Any, options: Any, view: Any, **_: Any
    ) -> Tensor:
        u, v = estimate.u[:, 0, :, None], estimate.v[:, 0, None]
        matrices = view.to_matrices(weight)
        sigma = (u.mT @ matrices @ v.mT).relu()
        excess = (sigma - options.coeff).relu() * (u @ v)
        return view.from_matrices(matrices - excess, like=weight)

    def norm(self, sigma: Tensor, parameters: Any, options: Any) -> Tensor:
        return sigma.clamp_max(options.coeff)


class Decomposed(Estimator):
    name, side = "decomposed", "exact"

    def start(self, stack: Any, k: int) -> tuple[Tensor, Tensor]:
        found = self.read(stack, stack[:, :k, :], 0.0)
        return found.u, found.sv

    def read(self, stack: Any, u: Tensor, eps: float) -> Estimate:
        left, sv, right = torch.linalg.svd(stack, full_matrices=False)
        k = u.shape[1]
        return Estimate.from_vectors(left.mT[:, :k], right[:, :k], sv[:, :k])

    def move(self, stacks: Any, us: Any, steps: int, eps: float) -> list[Estimate]:
        return [self.read(stack, u, eps) for stack, u in zip(stacks, us, strict=True)]


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register_constraint(Clipped())
    register_estimator(Decomposed())
    yield
    del CONSTRAINTS[Clipped.name], ESTIMATORS[Decomposed.name]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(True), nn.Flatten(), nn.Linear(36, 5)).double()
    with torch.no_grad():
        for layer in (net[0], net[3]):
            u, s, v = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
            s = torch.linspace(0.5, 0.1, len(s), dtype=s.dtype)
            s[0] = 3.0  # one value above c, which clipping brings down to it
            layer.weight.copy_((u * s @ v).view_as(layer.weight))
    return net


@pytest.mark.parametrize("update", ["forward", "step"])
@pytest.mark.parametrize("sigma", ["power", "rayleigh-ritz", "decomposed"])
def test_a_constraint_of_ones_own(sigma: str, update: Any) -> None:
    options: dict[str, Any] = {"constraint": "clipped", "sigma": sigma, "update": update}
    net = snparam.convert_model(network(), **options)
    for layer in (net[0], net[3]):
        assert float(exact(snparam.weight_in_use(layer))[0]) == pytest.approx(1.0, rel=1e-6)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (net(x) - 1).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    snparam.refresh(net)
    rows = snparam.verify(net, tolerance=1e-5)
    assert [row.intended for row in rows] == [1.0, 1.0]
    other = snparam.convert_model(network(), **options)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(x), net.eval()(x))
    assert torch.equal(norm_of(other[0]).u, norm_of(net[0]).u)
    before = net(x)
    snparam.restore_model(net, bake=True)
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("constraint", ["clipped", "fixed", "gain", "bound"])
def test_an_estimator_of_ones_own_is_exact_in_every_forward(constraint: str) -> None:
    gain = "learned" if constraint == "gain" else None
    net = snparam.convert_model(network(), sigma="decomposed", constraint=constraint, gain=gain)
    for layer in (net[0], net[3]):
        with torch.no_grad():
            original_of(layer).add_(torch.randn_like(original_of(layer)).mul_(1e-2))
            top = float(exact(original_of(layer))[0])
        layer.train()
        used = layer.weight
        expected = float(norm_of(layer).gain.detach()) if gain else 1.0
        assert float(exact(used)[0]) == pytest.approx(expected, rel=1e-9)
        assert float(norm_of(layer).sv[0, 0]) == pytest.approx(top, rel=1e-9)


@pytest.mark.parametrize("spelling", ["torch", "torch-hook", "biggan"])
def test_other_implementations_do_not_know_a_constraint_of_ones_own(
    spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = snparam.convert_model(network(), constraint="clipped")
    with pytest.raises(ValueError, match=f"'{spelling}': constraint='clipped'"):
        snparam.state_dict_for(model, spelling)
    # One that says it divides by σ, and does nothing else, is taken at its word.
    monkeypatch.setattr(Clipped, "divides_by_sigma", lambda self, options: True)
    assert snparam.state_dict_for(model, spelling)


def test_a_taken_name_is_refused_and_an_unknown_one_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match="clipped"):
        register_constraint(Clipped())
    with pytest.raises(ValueError, match="decomposed"):
        register_estimator(Decomposed())
    with pytest.raises(ValueError, match=r"'fixed'.*'clipped'"):
        snparam.convert_model(network(), constraint="cliped")
    with pytest.raises(ValueError, match=r"'power'.*'decomposed'"):
        snparam.convert_model(network(), sigma="exactly")
