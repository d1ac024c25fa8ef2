"""With update="step", each optimizer step moves the states of the weights that it stepped.

Nothing is called for that. The independent answer is a plain loop: from the stored u, `num_itrs`
plain steps on the weight as it is after the optimizer's step. Until an optimizer has reached a
weight, its state moves in every training forward.

Averaged networks are in `test_averaged_networks.py`, loaded states in `test_loaded_states.py`,
sharded weights in `tests/distributed/test_update_step.py`.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.applied import applied, exact_norm, square
from helpers.holder import norm_of, original_of
from helpers.states import all_u, assert_moved, randomise, states, stepped
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import snparam

Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "foreach sgd": lambda p: torch.optim.SGD(p, 0.1, foreach=True),
    "fused sgd": lambda p: torch.optim.SGD(p, 0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.05),
    "foreach adam": lambda p: torch.optim.Adam(p, 0.05, foreach=True),
    "fused adam": lambda p: torch.optim.Adam(p, 0.05, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_svs": 2, "num_itrs": 3},
    {"blocks": 2},
    {"gain": "learned"},
]
with_options = pytest.mark.parametrize("options", OPTIONS, ids=str)


class Network(nn.Module):
    """Two layers of one shape, which may be moved as one stack, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.a = square(seed=0)
        self.b = square(seed=1)
        generator = torch.Generator().manual_seed(2)
        self.conv = nn.Conv1d(2, 4, 2, dtype=torch.float64)
        self.head = nn.Linear(20, 4, dtype=torch.float64)
        with torch.no_grad():
            for layer in (self.conv, self.head):
                values = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
                layer.weight.copy_(values)
                layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).tanh()).tanh()
        out: Tensor = self.head(self.conv(x.view(-1, 2, 6)[:, :, :6]).flatten(1))
        return out


def network(**options: Any) -> Network:
    """Converted, with every u so far from the singular vectors that each step moves it visibly."""
    model = snparam.convert_model(Network(), update="step", **options)
    randomise(model)
    return model


def batch(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=generator, dtype=torch.float64)


def backward(model: nn.Module, seed: int = 0) -> Tensor:
    model.zero_grad()
    loss: Tensor = model(batch(seed)).square().mean()
    loss.backward()
    return loss


def num_itrs(model: nn.Module) -> int:
    return max(norm.settings.num_itrs for _, norm, _ in states(model))


def assert_forwards_share_what_is_there(model: nn.Module) -> None:
    """Training forwards move nothing, agree exactly, and divide by the stored σ."""
    before = all_u(model)
    first = model(batch(7))
    assert torch.equal(model(batch(7)), first)
    with torch.no_grad():  # where σ is applied may differ, and with it the rounding
        torch.testing.assert_close(model(batch(7)), first)
    assert all(torch.equal(u, before[name]) for name, u in all_u(model).items())
    for name, norm, original in states(model):
        owner = model.get_submodule(name.rpartition(".")[0])
        rows = norm.view.to_matrices(original.detach()) / norm.sv[:, 0, None, None]
        if norm.settings.gain is not None:
            rows = rows * norm.gain.detach()[:, None, None]
        used = norm.view.to_matrices(owner.weight.detach())
        torch.testing.assert_close(used, rows, msg=lambda m, n=name: f"{n} {m}")


def assert_sv_is_that_of(model: nn.Module, before: dict[str, Tensor]) -> None:
    """The stored σ is what the last of the plain steps finds."""
    for name, norm, original in states(model):
        start = stepped(norm, original, before[name], norm.settings.num_itrs - 1)
        for block, matrix in enumerate(norm.view.to_matrices(original.detach())):
            v = torch.nn.functional.normalize(start[block, 0] @ matrix, dim=0)
            torch.testing.assert_close(norm.sv[block, 0], (matrix @ v).norm())


def assert_step_moves(model: nn.Module, step: Callable[[], object]) -> None:
    before = all_u(model)
    step()
    assert_moved(model, before, num_itrs(model))
    assert_sv_is_that_of(model, before)
    assert_forwards_share_what_is_there(model)


# Optimizers


@with_options
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_each_step_moves_every_state_by_plain_steps_of_the_new_weight(
    make: Make, options: dict[str, Any]
) -> None:
    model = network(**options)
    optimizer = make(model.parameters())
    before = all_u(model)
    backward(model)
    assert_moved(model, before, num_itrs(model))  # no optimizer has reached it yet
    for seed in range(3):
        backward(model, seed)
        assert_step_moves(model, optimizer.step)


def test_nothing_has_to_be_called_and_update_is_what_may_be() -> None:
    assert not hasattr(snparam, "update_after_step")
    model = network(num_itrs=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    assert_step_moves(model, lambda: snparam.update(model))
    for parameter in model.parameters():
        parameter.data.add_(0.1)  # which nothing but `update` can know of
    assert_step_moves(model, lambda: snparam.update(model))


def test_accumulated_gradients_are_those_of_one_forward_of_all() -> None:
    model = network()
    backward(model)
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.zero_grad()
    for part in batch(0).split(2):
        model(part).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(batch(0)).square().sum().backward()
    torch.testing.assert_close(found, [p.grad for p in model.parameters()])


class Follower:
    """Checks that a state was always moved since its weight last changed, by plain steps."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.remember()

    def remember(self) -> None:
        self.u = all_u(self.model)
        self.weights = {name: w.detach().clone() for name, _, w in states(self.model)}

    def check(self) -> None:
        """After a training forward: moved if the weight has changed, and moved or not if not."""
        for name, norm, original in states(self.model):
            right = stepped(norm, original, self.u[name], norm.settings.num_itrs)
            kept = torch.equal(original, self.weights[name]) and torch.equal(norm.u, self.u[name])
            if not kept:
                torch.testing.assert_close(
                    norm.u, right, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n} {m}"
                )
        self.remember()


CLOSING: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "fused adam": lambda p: torch.optim.Adam(p, 0.05, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
    "lbfgs, line search": lambda p: torch.optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("options", [{}, {"num_itrs": 2, "num_svs": 2}], ids=str)
@pytest.mark.parametrize("make", CLOSING.values(), ids=CLOSING)
def test_closures_use_the_sigma_of_the_weights_that_they_are_called_with(
    make: Make, options: dict[str, Any]
) -> None:
    model = network(**options)
    optimizer, follower = make(model.parameters()), Follower(model)
    calls = 0

    def closure() -> float:
        nonlocal calls
        calls += 1
        loss = backward(model)
        follower.check()
        return float(loss.detach())

    for _ in range(3):
        optimizer.step(closure)  # type: ignore[arg-type]
        follower.check()
        assert_forwards_share_what_is_there(model)
    assert calls >= 3


# LBFGS calls its closure again once it has changed the weights.
@pytest.mark.parametrize(("name", "call"), [("sgd", 1), ("fused adam", 1), ("lbfgs", 2)])
def test_a_closure_that_raises_leaves_nothing_stale_behind(name: str, call: int) -> None:
    model = network()
    optimizer = CLOSING[name](model.parameters())
    left = -1

    def closure() -> float:
        nonlocal left
        loss = backward(model)
        left -= 1
        if left == 0:
            raise ZeroDivisionError
        return float(loss.detach())

    optimizer.step(closure)  # type: ignore[arg-type]
    follower, left = Follower(model), call
    weights = follower.weights
    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)  # type: ignore[arg-type]
    changed = any(not torch.equal(weights[name], w) for name, _, w in states(model))
    assert changed == (call > 1)
    follower.check()  # the forward in the closure has used the weight as it was there
    other = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        backward(model)
        assert_step_moves(model, other.step)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_grad_scaler_skips_leave_nothing_stale(fused: bool) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.05, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    follower = Follower(model)
    for seed, scale in enumerate((1.0, torch.inf, 1.0, torch.inf, torch.inf, 1.0)):
        optimizer.zero_grad()
        weights = [p.detach().clone() for p in model.parameters()]
        scaler.scale(model(batch(seed)).square().mean() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped = all(map(torch.equal, weights, model.parameters()))
        assert skipped == (scale == torch.inf)
        if seed:  # before, the forward has moved, too
            follower.check()
        assert_forwards_share_what_is_there(model)
        follower.remember()


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of its import
@pytest.mark.usefixtures("one_process")
def test_zero_redundancy_optimizer() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = network()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    backward(model)
    optimizer.step()
    for seed in range(3):
        backward(model, seed)
        before = all_u(model)
        optimizer.step()
        # Once after the inner optimizer's step, and once more at most after the broadcast of it.
        for name, norm, original in states(model):
            near = [stepped(norm, original, before[name], n) for n in (1, 2)]
            assert any(torch.allclose(norm.u, u, rtol=0, atol=1e-9) for u in near), name
        assert_forwards_share_what_is_there(model)


# Several optimizers


def test_an_optimizer_moves_the_states_of_its_own_weights_alone() -> None:
    model = network()
    parts = (("a", "conv"), ("b", "head"))
    optimizers = [
        torch.optim.SGD([p for n in names for p in model.get_submodule(n).parameters()], 0.1)
        for names in parts
    ]
    backward(model)
    for optimizer in optimizers:
        optimizer.step()
    backward(model)
    for names, optimizer in zip(parts, optimizers, strict=True):
        before = all_u(model)
        optimizer.step()
        moved = {n: int(n.partition(".")[0] in names) for n in before}
        assert set(moved.values()) == {0, 1}
        assert_moved(model, before, moved)
    assert_forwards_share_what_is_there(model)


def test_two_networks_that_train_in_turns() -> None:
    models = [network(), network(num_itrs=2)]
    optimizers = [torch.optim.Adam(m.parameters(), 0.05, fused=True) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        backward(model)
        optimizer.step()
    for model, other, optimizer in zip(models, models[::-1], optimizers, strict=True):
        backward(model)
        apart = all_u(other)
        assert_step_moves(model, optimizer.step)
        assert all(torch.equal(u, apart[name]) for name, u in all_u(other).items())


class Around(torch.optim.Optimizer):
    """An optimizer around another, which may change the weights after the inner one's step."""

    def __init__(self, inner: torch.optim.Optimizer, pull: float) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.pull = inner, pull
        self.between: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        before = [p.clone() for group in self.param_groups for p in group["params"]]
        loss = self.inner.step(closure)
        self.between = [p.clone() for group in self.param_groups for p in group["params"]]
        if self.pull:
            for group in self.param_groups:
                for p, old in zip(group["params"], before, strict=True):
                    p.lerp_(old, self.pull)
        return loss


@pytest.mark.parametrize("make", [OPTIMIZERS["sgd"], OPTIMIZERS["fused adam"]])
def test_optimizers_that_nest_move_once_for_each_change(make: Make) -> None:
    model = network()
    twin = copy.deepcopy(model)
    optimizer = Around(make(model.parameters()), pull=0.0)
    backward(model)
    optimizer.step()
    for seed in range(2):
        backward(model, seed)
        assert_step_moves(model, optimizer.step)
    optimizer = Around(make(twin.parameters()), pull=0.5)  # as Lookahead does
    backward(twin)
    optimizer.step()
    for seed in range(2):
        backward(twin, seed)
        before = all_u(twin)
        optimizer.step()
        inner = copy.deepcopy(twin)
        with torch.no_grad():
            for parameter, value in zip(inner.parameters(), optimizer.between, strict=True):
                parameter.copy_(value)
        halfway = {n: stepped(norm, w, before[n], 1) for n, norm, w in states(inner)}
        assert_moved(twin, halfway, 1)
        assert_forwards_share_what_is_there(twin)


def test_two_optimizers_of_the_same_weights() -> None:
    model = network()
    optimizers = [torch.optim.SGD(model.parameters(), lr) for lr in (0.1, 0.03)]
    for optimizer in optimizers:
        backward(model)
        optimizer.step()
    for seed in range(2):
        for optimizer in optimizers:
            backward(model, seed)
            assert_step_moves(model, optimizer.step)


def test_accelerates_wrapped_optimizer() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    try:
        plain = network()
        model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), 0.1))
        follower = Follower(model)
        for seed in range(6):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch(seed)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            if seed == 1:
                follower.remember()
            elif seed > 1:
                assert_forwards_share_what_is_there(model)
                follower.check()
        assert not torch.equal(original_of(model.a), square(seed=0).weight)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()


def test_parameters_that_are_added_to_an_optimizer_later() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.head.parameters(), 0.1)
    backward(model)
    optimizer.step()
    before = all_u(model)
    backward(model)  # the others are reached by no optimizer yet
    assert_moved(model, before, {n: int(not n.startswith("head")) for n in before})
    optimizer.add_param_group({"params": [p for m in (model.a, model.b, model.conv)
                                          for p in m.parameters()]})  # fmt: skip
    backward(model)
    assert_step_moves(model, optimizer.step)


def test_weights_that_are_tied_move_once() -> None:
    model = nn.Sequential(nn.Embedding(6, 6, dtype=torch.float64), square())
    model[0].weight = model[1].weight
    randomise(snparam.convert_model(model, update="step"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        model(torch.arange(6)).square().sum().backward()
        before = norm_of(model[1]).u.clone()
        optimizer.step()
        assert norm_of(model[0]) is norm_of(model[1])
        right = stepped(norm_of(model[1]), original_of(model[1]), before, 1)
        torch.testing.assert_close(norm_of(model[1]).u, right, rtol=0, atol=1e-9)


# Weights that no optimizer of torch's trains


def in_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.sub_(0.1 * parameter.grad)


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.1 * parameter.grad)


def in_numpy(model: nn.Module) -> None:
    for parameter in model.parameters():
        array = parameter.detach().numpy()
        array -= 0.1 * parameter.grad.numpy()


def elsewhere(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data - 0.1 * parameter.grad


BY_HAND = [in_data, in_place, in_numpy, elsewhere]


@with_options
@pytest.mark.parametrize("change", BY_HAND, ids=lambda f: f.__name__)
def test_without_an_optimizer_every_training_forward_moves(
    change: Callable[[nn.Module], None], options: dict[str, Any]
) -> None:
    model = network(**options)
    for seed in range(6):
        before = all_u(model)
        backward(model, seed)
        assert_moved(model, before, num_itrs(model))
        assert_sv_is_that_of(model, before)
        change(model)


def test_weights_that_are_changed_by_hand_stay_normalised() -> None:
    layer = snparam.register_sn(square(), update="step")
    for seed in range(30):
        layer(batch(seed)).square().mean().backward()
        in_data(layer)
        original_of(layer).grad = None
        assert exact_norm(applied(layer)) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("change", [in_place], ids=lambda f: f.__name__)
def test_a_weight_that_an_optimizer_trains_and_somebody_changes_is_noticed(
    change: Callable[[nn.Module], None],
) -> None:
    """By its version; what leaves that alone is left to `update(model)`."""
    model = network()
    backward(model)
    torch.optim.SGD(model.parameters(), 0.1).step()
    follower = Follower(model)
    for seed in range(3):
        backward(model, seed)
        follower.check()
        change(model)


def test_a_parameter_that_is_replaced_is_noticed_and_found_by_its_optimizer() -> None:
    layer = randomise(snparam.register_sn(square(), update="step"))
    backward(layer)
    torch.optim.SGD(layer.parameters(), 0.1).step()
    layer.parametrizations.weight.original = nn.Parameter(square(seed=3).weight.detach())
    before = all_u(layer)
    backward(layer)
    assert_moved(layer, before, 1)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    assert_step_moves_alone(layer, optimizer.step)


def assert_step_moves_alone(layer: nn.Module, step: Callable[[], object]) -> None:
    before = all_u(layer)
    step()
    assert_moved(layer, before, 1)
    after = all_u(layer)
    layer(batch(0))
    assert all(torch.equal(u, after[name]) for name, u in all_u(layer).items())


class Doubled(nn.Module):
    """A parametrization, of another norm and of other singular vectors than the weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.linspace(0.2, 2.0, 6, dtype=weight.dtype)


def test_what_is_normalised_is_what_the_parametrization_before_it_gives() -> None:
    layer = snparam.register_sn(square(), update="step")
    layer.parametrizations.weight.insert(0, Doubled())
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    for seed in range(40):
        optimizer.zero_grad()
        layer(batch(seed)).square().mean().backward()
        optimizer.step()
        if seed > 15:
            assert exact_norm(applied(layer)) == pytest.approx(1.0, abs=0.05)


# Copies


def test_a_copy_of_a_trained_network_moves_in_every_forward_until_it_is_trained() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    backward(model)
    optimizer.step()
    clone = copy.deepcopy(model)
    for seed in range(3):
        before = all_u(clone)
        backward(clone, seed)
        assert_moved(clone, before, 1)
        in_data(clone)
    assert_forwards_share_what_is_there(model)
    backward(model)
    apart = all_u(clone)
    assert_step_moves(model, optimizer.step)
    assert all(torch.equal(u, apart[name]) for name, u in all_u(clone).items())
    backward(clone)
    assert_step_moves(clone, torch.optim.SGD(clone.parameters(), 0.1).step)


# Compiled


def small(**options: Any) -> nn.Module:
    """A network that is soon compiled."""
    model = nn.Sequential(square(seed=0), nn.Tanh(), square(seed=1))
    return randomise(snparam.convert_model(model, update="step", **options))


def in_turns(
    model: nn.Module, run: Callable[[Tensor], Tensor], step: Callable[[], object], seed: int
) -> Tensor:
    model.zero_grad()
    output = run(batch(seed))
    output.square().mean().backward()
    step()
    return output


@pytest.mark.parametrize(
    ("options", "backend"),
    [({}, "eager"), ({}, "aot_eager"), ({"num_svs": 2, "num_itrs": 2}, "eager")],
)
def test_a_compiled_network_trains_as_it_does_eagerly_and_compiles_twice(
    options: dict[str, Any], backend: str
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    eager = small(**options)
    traced = copy.deepcopy(eager)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(traced, fullgraph=True, backend=counter)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (eager, traced)]
    for seed in range(5):
        before = all_u(traced)
        found = in_turns(traced, compiled, lambda: None, seed)
        # The first forward takes its steps in the graph; what comes later relies on the hook.
        assert_moved(traced, before, num_itrs(traced) * int(seed == 0))
        right = in_turns(eager, eager, lambda: None, seed)
        torch.testing.assert_close(found, right)
        for model, optimizer in zip((eager, traced), optimizers, strict=True):
            before = all_u(model)
            optimizer.step()
            assert_moved(model, before, num_itrs(model))
    assert counter.frame_count == 2  # once more when an optimizer has reached the weights
    for a, b in zip(eager.parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_network_that_no_optimizer_trains_moves_in_every_forward() -> None:
    torch._dynamo.reset()
    model = small()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for seed in range(4):
        before = all_u(model)
        in_turns(model, compiled, lambda: None, seed)
        assert_moved(model, before, 1)
        in_data(model)


def test_a_compiled_network_divides_by_what_was_loaded_once() -> None:
    torch._dynamo.reset()
    model = small()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for seed in range(3):
        in_turns(model, compiled, optimizer.step, seed)
    source = {key: value.clone() for key, value in small().state_dict().items()}
    model.load_state_dict(source)
    eager = small()
    eager.load_state_dict(source)
    before = all_u(model)
    torch.testing.assert_close(compiled(batch(0)), eager(batch(0)))
    assert all(torch.equal(u, before[name]) for name, u in all_u(model).items())
    for seed in range(2):
        in_turns(model, compiled, optimizer.step, seed)
    assert_forwards_share_what_is_there(model)


# torch's, of what it imports while it compiles
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "compiles_network"),
    [(OPTIMIZERS["sgd"], False), (OPTIMIZERS["sgd"], True), (OPTIMIZERS["foreach adam"], True)],
    ids=["sgd", "sgd, compiled network", "foreach adam, compiled network"],
)
def test_compiled_optimizer_steps_leave_nothing_stale(make: Make, compiles_network: bool) -> None:
    torch._dynamo.reset()
    model = small()
    optimizer = make(model.parameters())
    step = torch.compile(optimizer.step, backend="eager")
    run = torch.compile(model, fullgraph=True, backend="eager") if compiles_network else model
    in_turns(model, run, step, 0)
    run(batch(0))  # on the weights of the step, whoever tells of it
    follower = Follower(model)
    for seed in range(4):
        weights = [w.detach().clone() for _, _, w in states(model)]
        in_turns(model, run, step, seed)
        assert not all(
            torch.equal(w, p) for w, (_, _, p) in zip(weights, states(model), strict=True)
        )
        run(batch(seed))
        follower.check()


# Removed


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.operations[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations_of(step: Callable[[], object]) -> Counter[str]:
    with Counting() as mode:
        step()
    return mode.operations


def stepping(model: nn.Module) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(batch(0)).square().mean().backward()
    optimizer.step()
    return optimizer.step


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("remove", ["restore_model", "remove_parametrizations"])
def test_a_state_that_was_removed_neither_moves_nor_costs(remove: str, again: bool) -> None:
    plain, model = Network(), network()
    kept = {name: norm for name, norm, _ in states(model)}
    trained = torch.optim.SGD(model.parameters(), 0.1)
    backward(model)
    trained.step()
    if remove == "restore_model":
        snparam.restore_model(model)
    else:
        for layer in (model.a, model.b, model.conv, model.head):
            parametrize.remove_parametrizations(layer, "weight")
    before = {name: norm.u.clone() for name, norm in kept.items()}
    if again:
        snparam.convert_model(model, update="step")
        right = operations_of(stepping(network()))
    else:
        right = operations_of(stepping(plain))
    assert operations_of(stepping(model)) == right
    trained.step()
    assert all(torch.equal(norm.u, before[name]) for name, norm in kept.items())


def test_an_optimizer_of_another_network_costs_nothing_more() -> None:
    right = operations_of(stepping(Network()))
    model = network()
    step = stepping(Network())
    assert operations_of(step) == right
    assert len(all_u(model)) == 4


def test_neither_hooks_nor_optimizers_keep_a_network_alive() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    backward(model)
    optimizer.step()
    norms = [weakref.ref(norm) for _, norm, _ in states(model)]
    del model
    gc.collect()
    assert [ref() for ref in norms] == [None] * 4
    optimizer.step()
