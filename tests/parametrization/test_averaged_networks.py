"""Averaged networks and teachers, which no optimizer trains, use the σ of their own weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.applied import applied, exact_norm, square
from helpers.holder import original_of
from helpers.states import all_u, assert_moved, states, stepped
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import snparam

UPDATES = ["forward", "step"]
with_updates = pytest.mark.parametrize("update", UPDATES)


def network(**options: Any) -> nn.Sequential:
    """Layers with batch norms, in float64."""
    layers: list[nn.Module] = []
    for seed in range(2):
        layers += [square(seed=seed), nn.BatchNorm1d(6, dtype=torch.float64), nn.ReLU()]
    return snparam.convert_model(nn.Sequential(*layers[:-1]), **options)


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(12, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


def train(net: nn.Module, after_step: Callable[[], None], steps: int = 30) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 0.3)
    for x in batches(steps):
        optimizer.zero_grad()
        (net(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        after_step()


def assert_uses_its_own_sigma(net: nn.Module, layer: nn.Module, run: Callable[[], Tensor]) -> None:
    """A training forward of the network moves its states by one step each, of its own weights."""
    before = all_u(net)
    right = {n: stepped(norm, w, before[n], 1) for n, norm, w in states(net)}
    run()
    for name, norm, weight in states(net):
        torch.testing.assert_close(norm.u, right[name], rtol=0, atol=1e-9)
        matrix = weight.detach()
        v = torch.nn.functional.normalize(before[name][0, 0] @ matrix, dim=0)
        torch.testing.assert_close(norm.sv[0, 0], (matrix @ v).norm())
    assert_moved(net, before, 1)
    assert exact_norm(applied(layer)) == pytest.approx(1.0, abs=0.2)


AVERAGES: dict[str, dict[str, Any]] = {
    "equal": {},
    "equal, with buffers": {"use_buffers": True},
    "exponential": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "exponential, with buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True},
    "by a function": {"avg_fn": lambda mean, new, _: 0.9 * mean + 0.1 * new},
}


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@with_updates
def test_an_averaged_network_in_training_mode_moves_by_steps_of_its_own_weights(
    update: Any, average: dict[str, Any]
) -> None:
    net = network(update=update)
    averaged = AveragedModel(net, **average)
    train(net, lambda: averaged.update_parameters(net))
    averaged.train()
    for x in batches(2):
        assert_uses_its_own_sigma(averaged, averaged.module[0], lambda x=x: averaged(x))


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@with_updates
def test_an_averaged_network_that_runs_while_the_other_trains_moves_in_each_forward(
    update: Any, average: dict[str, Any]
) -> None:
    net = network(update=update)
    averaged = AveragedModel(net, **average).train()

    def after_step() -> None:
        averaged.update_parameters(net)
        assert_uses_its_own_sigma(averaged, averaged.module[3], lambda: averaged(batches(1)[0]))

    train(net, after_step, steps=6)


def test_update_bn_finds_the_statistics_that_update_forward_finds() -> None:
    net = network(update="step")
    averaged = AveragedModel(net)
    train(net, lambda: averaged.update_parameters(net))
    other = AveragedModel(network(update="forward"))
    other.load_state_dict(averaged.state_dict())
    for each in (averaged, other):
        update_bn(batches(8), each)
    for name, value in averaged.state_dict().items():
        torch.testing.assert_close(
            value, other.state_dict()[name], msg=lambda m, n=name: f"{n} {m}"
        )
    x = batches(1)[0]
    torch.testing.assert_close(averaged.eval()(x), other.eval()(x))


def by_data(teacher: nn.Module, student: nn.Module) -> None:
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.data.mul_(0.8).add_(s.data, alpha=0.2)


def by_replacing_data(teacher: nn.Module, student: nn.Module) -> None:
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.data = 0.8 * t.data + 0.2 * s.data


def by_copy(teacher: nn.Module, student: nn.Module) -> None:
    with torch.no_grad():
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            t.copy_(0.8 * t + 0.2 * s)


def by_lerp(teacher: nn.Module, student: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.2)


def by_numpy(teacher: nn.Module, student: nn.Module) -> None:
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        array = t.detach().numpy()
        array *= 0.8
        array += 0.2 * s.detach().numpy()


def from_a_vector(teacher: nn.Module, student: nn.Module) -> None:
    t, s = parameters_to_vector(teacher.parameters()), parameters_to_vector(student.parameters())
    vector_to_parameters((0.8 * t + 0.2 * s).detach(), teacher.parameters())


RULES = [by_data, by_replacing_data, by_copy, by_lerp, by_numpy, from_a_vector]


@pytest.mark.parametrize("rule", RULES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("grad", [True, False])
@with_updates
def test_a_teacher_in_training_mode_moves_by_steps_of_its_own_weights(
    update: Any, grad: bool, rule: Callable[[nn.Module, nn.Module], None]
) -> None:
    student = network(update=update)
    train(student, lambda: None, steps=3)
    teacher = copy.deepcopy(student)  # of one that an optimizer has trained

    def after_step() -> None:
        rule(teacher, student)
        with torch.set_grad_enabled(grad):
            assert_uses_its_own_sigma(teacher, teacher[0], lambda: teacher(batches(1)[0]))

    train(student, after_step, steps=6)
    assert not torch.equal(original_of(teacher[0]), original_of(student[0]))
