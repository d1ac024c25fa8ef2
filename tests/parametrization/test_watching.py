"""With update="step": weights and states that others change, and who is told of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

import snparam

# One number on a CPU, several vectors, and several blocks: each is kept in its own way.
OPTIONS: list[dict[str, Any]] = [{}, {"num_svs": 2}, {"blocks": 2}, {"gain": "learned"}]


def layer(seed: int = 0, **options: Any) -> nn.Linear:
    torch.manual_seed(seed)
    return snparam.register_sn(nn.Linear(8, 6), update="step", **options)


def original_of(module: Any) -> Tensor:
    weight: Tensor = module.parametrizations.weight.original
    return weight


def other(seed: int, used: nn.Linear) -> nn.Linear:
    """A copy of a layer with another weight and its own state."""
    made = copy.deepcopy(used)
    with torch.no_grad():
        original_of(made).copy_(torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)))
        original_of(made).mul_(7.0)
    for _ in range(50):
        snparam.update(made)
    return made


X = torch.linspace(-1, 1, 5 * 8).reshape(5, 8)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_state_written_in_place_is_the_one_that_is_used(options: dict[str, Any]) -> None:
    # As DistributedDataParallel does to ranks that have run a forward before it wraps them.
    here = layer(**options)
    there = other(1, here)
    here(X)
    with torch.no_grad():
        for a, b in zip(
            [*here.parameters(), *here.buffers()],
            [*there.parameters(), *there.buffers()],
            strict=True,
        ):
            a.copy_(b)
    for _ in range(2):  # and nobody is warned
        assert torch.equal(here(X), there(X))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_state_that_is_passed_in_is_used_for_that_call_alone(options: dict[str, Any]) -> None:
    here = layer(**options)
    there = other(1, here)
    before = here(X)
    passed = {**dict(there.named_parameters()), **dict(there.named_buffers())}
    torch.testing.assert_close(functional_call(here, passed, (X,)), there(X))
    assert torch.equal(here(X), before)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_ensemble_equals_a_loop_over_its_members(options: dict[str, Any]) -> None:
    base = layer(**options)
    base(X)
    members = [base, other(1, base), other(2, base)]
    parameters, buffers = stack_module_state(members)  # type: ignore[arg-type]

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        out: Tensor = functional_call(base, (parameters, buffers), (X,))
        return out

    together = vmap(run)(parameters, buffers)
    torch.testing.assert_close(together, torch.stack([member(X) for member in members]))
    # Nothing of the transform is left behind.
    assert torch.equal(base(X), copy.deepcopy(base)(X))


def test_an_averaged_network_divides_by_the_averaged_singular_values() -> None:
    model = layer()
    mean = AveragedModel(model, use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    snparam.update_after_step(optimizer, model)
    for _ in range(5):
        mean(X)
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        mean.update_parameters(model)
    module: Any = mean.module
    sigma = module.parametrizations.weight[0].sv[0, 0]
    torch.testing.assert_close(module.weight, original_of(module) / sigma)


def scaled(weight: Tensor) -> None:
    with torch.no_grad():
        weight.mul_(10.0)


def from_a_vector(weight: Tensor) -> None:
    vector_to_parameters(parameters_to_vector([weight]) * 10.0, [weight])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_weight_changed_without_an_optimizer_is_noticed(options: dict[str, Any]) -> None:
    model = layer(**options)
    scaled(original_of(model))
    with pytest.warns(UserWarning, match="'weight' of Linear .*update\\(model\\)"):
        model(X)
    model(X)  # once
    snparam.update(model)
    model(X)


def test_a_weight_changed_and_updated_is_as_it_should_be() -> None:
    model = layer()
    model(X)
    scaled(original_of(model))
    snparam.update(model)
    model(X)
    from_a_vector(original_of(model))  # sets .data, which is not counted: told by the update alone
    snparam.update(model)
    torch.testing.assert_close(
        torch.linalg.matrix_norm(model.weight, 2), torch.tensor(1.0), rtol=1e-3, atol=0
    )


def assigned(model: nn.Linear) -> None:
    model.weight = torch.ones(6, 8)  # type: ignore[assignment]


def loaded(model: nn.Linear) -> None:
    model.load_state_dict(other(1, model).state_dict())


def assigned_by_loading(model: nn.Linear) -> None:
    model.load_state_dict(other(1, model).state_dict(), assign=True)


def to_double_and_back(model: nn.Linear) -> None:
    model.double().float()


@pytest.mark.parametrize("change", [assigned, loaded, assigned_by_loading, to_double_and_back])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_changes_that_bring_the_state_along_do_not_warn(
    options: dict[str, Any], change: Callable[[nn.Linear], None]
) -> None:
    model = layer(**options)
    model(X)
    change(model)
    model(X)
    gain = model.parametrizations.weight[0].gain.item() if "gain" in options else 1.0  # type: ignore[index, union-attr]
    if "blocks" not in options:
        assert abs(float(torch.linalg.matrix_norm(model.weight.detach(), 2)) / gain - 1) < 1e-2


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "fused adam": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=3),
}


def step_with_closures(
    model: nn.Module, optimizer: torch.optim.Optimizer, times: int, x: Tensor = X
) -> None:
    def closure() -> float:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss.item()

    for _ in range(times):
        optimizer.step(closure)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_closures_do_not_warn_where_updates_follow(
    make: Callable[[Any], torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    model = layer(**options)
    optimizer = make(model.parameters())
    snparam.update_after_step(optimizer, model)
    step_with_closures(model, optimizer, 3)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(model(X), twin(X))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_closures_warn_where_no_update_follows(
    make: Callable[[Any], torch.optim.Optimizer],
) -> None:
    model = layer()
    optimizer = make(model.parameters())
    with pytest.warns(UserWarning, match="update_after_step") as caught:
        step_with_closures(model, optimizer, 3)
    assert len(caught) == 1


def test_shared_passes_end_with_the_step_that_a_closure_has_begun_them_in() -> None:
    # Fused, so that no counter tells.
    torch.manual_seed(0)
    model = snparam.register_sn(nn.Linear(256, 256), update="step")
    optimizer = torch.optim.Adam(model.parameters(), 0.01, fused=True)
    snparam.update_after_step(optimizer, model)
    x = torch.ones(2, 256)
    step_with_closures(model, optimizer, 1, x)
    assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_optimizers_step_on_after_the_network_is_restored() -> None:
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    snparam.update_after_step(optimizer, model)
    step_with_closures(model, optimizer, 1)
    snparam.remove_sn(model)
    before = model.weight.detach().clone()
    step_with_closures(model, optimizer, 2)
    assert not torch.equal(model.weight, before)


class Product(nn.Module):
    """A parametrization that has a normalised layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = snparam.register_sn(nn.Linear(8, 8, bias=False), update="step")

    def forward(self, weight: Tensor) -> Tensor:
        return weight @ self.inner.weight


def test_layers_inside_parametrizations_are_updated() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 6)
    product = Product()
    nn.utils.parametrize.register_parametrization(model, "weight", product)
    scaled(original_of(product.inner))
    snparam.update(model)
    torch.testing.assert_close(
        torch.linalg.matrix_norm(product.inner.weight, 2), torch.tensor(1.0), rtol=1e-3, atol=0
    )


def test_modules_that_hold_one_another_are_updated() -> None:
    model: Any = nn.Module()
    model.layer = layer()
    model.layer_again = model.layer
    model.child = nn.Module()
    model.child.__dict__["_modules"]["parent"] = model
    scaled(original_of(model.layer))
    snparam.update(model)
    torch.testing.assert_close(
        torch.linalg.matrix_norm(model.layer.weight, 2), torch.tensor(1.0), rtol=1e-3, atol=0
    )


class WithExtra(nn.Linear):
    """Reads the weight of a layer inside it, twice."""

    def forward(self, x: Tensor) -> Tensor:
        extra: Any = self.extra
        return super().forward(x) + (x @ extra.weight.T) + (x @ extra.weight.T)


def test_a_layer_that_is_given_another_one_later_counts_its_forwards_as_one() -> None:
    torch.manual_seed(0)
    model = WithExtra(8, 6)
    snparam.register_sn(model, update="step")
    model.extra = snparam.register_sn(nn.Linear(8, 6), init="random")
    twin = copy.deepcopy(model.extra)
    model(X)
    twin(X)
    for a, b in zip(model.extra.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


def test_a_gain_is_read_under_another_default_device() -> None:
    model = layer(gain="learned")
    expected = model.weight
    with torch.device("meta"):
        found = model.weight
    assert torch.equal(found, expected)
