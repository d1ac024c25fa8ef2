"""Small networks through anything that a user does to them, in any order, beside a plain reference.

After each rule, everything that can be seen of the network (outputs, gradients, parameters, u, sv)
is what `helpers.semantics` allows. The reference then goes on from the state that was seen, so that
rounding does not add up.

An ordinary run is bounded. For a longer one, which draws other examples each time:

    SNPARAM_STATE_MACHINE=300 python -m pytest tests/properties/test_state_machine.py

runs 300 networks of up to 60 rules each.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import semantics
from helpers.semantics import ANY, MOVE, SHARE, Choices, State
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import snparam

SIZE = 6
RATE = 0.2  # so high that each step moves u visibly
LONG = int(os.environ.get("SNPARAM_STATE_MACHINE", "0"))


# Networks. Each layer maps six numbers to six, so that they chain in any order.


class Own(nn.Linear):
    """Reads its own weight three times in a forward, which may break off after the first."""

    error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.norm = self.weight.norm()
        if self.error is not None:
            raise self.error
        return super().forward(x) + 0.0 * F.linear(x, self.weight)


class Reader(nn.Module):
    """Reads its child's weight, and calls the child: two forwards as far as the state goes."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.child(F.linear(x, self.child.weight).tanh())
        return out


class Twice(nn.Module):
    """Calls its child twice."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.child(self.child(x).tanh())
        return out


class Convolution(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, 2, 3)).flatten(1)


class Transposed(nn.ConvTranspose1d):
    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        return super().forward(x.view(-1, 2, 3)).flatten(1)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(SIZE, SIZE),
    "own": lambda: Own(SIZE, SIZE),
    "reader": Reader,
    "twice": Twice,
    "convolution": lambda: Convolution(2, 2, 3, padding=1),
    "transposed": lambda: Transposed(2, 2, 3, padding=1),
}


class Network(nn.Module):
    """Layers with tanh between them; `trap` is where a forward breaks off, and by what."""

    def __init__(self, kinds: list[str], seed: int) -> None:
        super().__init__()
        self.kinds = kinds
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(LAYERS[kind]() for kind in kinds)
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.7)
        self.trap: tuple[int, type[BaseException]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        for place, layer in enumerate(self.layers):
            if self.trap is not None and place == self.trap[0]:
                raise self.trap[1]
            x = layer(x).tanh()
        return x


def weights_of(model: Network) -> dict[str, tuple[nn.Module, Any]]:
    """Qualified name, owner, and ParametrizationList of each normalised weight."""
    return {
        f"{name}.weight": (module, module.parametrizations.weight)  # type: ignore[union-attr]
        for name, module in model.named_modules()
        if hasattr(module, "parametrizations")
    }


def inputs(seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, SIZE, generator=generator, dtype=torch.float64).to(dtype)


# The reference of a whole network


@dataclass
class Seen:
    """What a run of the network, or of the reference, shows.

    Attributes:
        outputs: of the forwards that came to an end.
        gradients: by the name of the parameter of the ordinary network, and of the gains.
        states: after it.
    """

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    states: dict[str, State]


class Plain:
    """The network as a function of states: which weight is read when.

    Attributes:
        states: by the name of the weight.
        biases: by their names, leaves.
        kinds: of the layers.
    """

    def __init__(
        self, states: dict[str, State], biases: dict[str, Tensor], kinds: list[str]
    ) -> None:
        self.states = states
        self.biases = biases
        self.kinds = kinds

    def run(
        self,
        xs: list[Tensor],
        choices: Choices,
        *,
        training: bool,
        frozen: bool = False,
        cached: bool = False,
        trap: int | None = None,
        upstream: Tensor | None = None,
    ) -> Seen:
        """Forwards one after another, each read as it comes, and one backward for all of them."""
        kept: dict[str, Tensor] = {}
        how: dict[str, str] = {}
        states = dict(self.states)

        def read(name: str) -> Tensor:
            if name in kept:
                return kept[name]
            if frozen and states[name].is_stepwise and name not in how:
                how[name] = choices.pick(frozenset({"as in eval", SHARE}))
            if frozen and how.get(name) == SHARE:
                used = states[name].stored_read()
            elif training and not frozen:
                used, states[name] = states[name].training_read(choices.pick(states[name].next))
            else:
                used = states[name].eval_read()
            if cached:
                kept[name] = used
            return used

        outputs = []
        for x in xs:
            for place, kind in enumerate(self.kinds):
                if place == trap:
                    if kind == "own":
                        read(f"layers.{place}.weight")
                    break
                x = self._layer(x, kind, f"layers.{place}", read).tanh()
            else:
                outputs.append(x)
        gradients = {}
        if upstream is not None:
            total = torch.stack([(out * upstream).sum() for out in outputs]).sum()
            leaves = self.leaves()
            found = torch.autograd.grad(total, list(leaves.values()))
            gradients = dict(zip(leaves, found, strict=True))
        return Seen([out.detach() for out in outputs], gradients, states)

    def leaves(self) -> dict[str, Tensor]:
        gains = {
            name.replace("weight", "gain"): state.gain
            for name, state in self.states.items()
            if state.gain is not None and state.gain.requires_grad
        }
        return {**{n: s.weight for n, s in self.states.items()}, **self.biases, **gains}

    def _layer(self, x: Tensor, kind: str, name: str, read: Callable[[str], Tensor]) -> Tensor:
        bias = self.biases.get(f"{name}.bias")
        if kind in ("linear", "own"):
            return F.linear(x, read(f"{name}.weight"), bias)
        if kind == "convolution":
            weight = read(f"{name}.weight")
            return F.conv1d(x.view(-1, 2, 3), weight, bias, padding=1).flatten(1)
        if kind == "transposed":
            weight = read(f"{name}.weight")
            return F.conv_transpose1d(x.view(-1, 2, 3), weight, bias, padding=1).flatten(1)
        child, bias = f"{name}.child.weight", self.biases.get(f"{name}.child.bias")
        x = F.linear(x, read(child)).tanh()
        return F.linear(x, read(child), bias)


# The machine


options_of_a_conversion = st.fixed_dictionaries(
    {
        "num_svs": st.integers(1, 2),
        "num_itrs": st.integers(1, 2),
        "blocks": st.sampled_from([1, 1, 2]),
        "update": st.sampled_from(["step", "forward"]),
        "coeff": st.sampled_from([1.0, 1.0, 0.6]),
        "soft": st.booleans(),
        "gain": st.sampled_from([None, None, "learned", "fixed"]),
    }
)

seeds = st.integers(0, 9)
SPELLINGS = ["snparam", "plain", "originals", "torch", "torch-hook", "biggan"]


class Machine(RuleBasedStateMachine):
    """A network, and what the reference knows of it."""

    @initialize(
        kinds=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=3),
        options=options_of_a_conversion,
        cold=st.booleans(),
        steps=st.integers(0, 2),
        dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
    )
    def begin(
        self,
        kinds: list[str],
        options: dict[str, Any],
        cold: bool,
        steps: int,
        dtype: torch.dtype,
    ) -> None:
        if options["gain"] is not None:
            options = {**options, "soft": False, "coeff": 1.0}
        if any(kind in ("convolution", "transposed") for kind in kinds) and options["blocks"] == 2:
            options = {**options, "num_svs": 1}  # blocks of one row
        self.kinds, self.options, self.dtype = kinds, semantics.Options(**options), dtype
        self.model = self.converted(Network(kinds, 0).to(dtype), cold)
        self.optimizer: torch.optim.Optimizer | None = None
        self.know(State.untrusted)
        if not cold:
            self.assert_constraint_holds()
        for seed in range(steps):
            self.train_step(seed, "plain")

    def converted(self, model: Network, cold: bool = False) -> Network:
        options = {k: getattr(self.options, k) for k in self.options.__dataclass_fields__}
        if options["blocks"] == 1:
            options["blocks"] = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            init: Any = "random" if cold else "converged"
            return snparam.convert_model(model, init=init, progress=False, **options)

    # What is seen, and what is known of it

    def look(self, before: State | None, name: str) -> State:
        """The state of a weight as it is now; what its next reads may do is as it was before."""
        owner, chain = weights_of(self.model)[name]
        norm = chain[0]
        seen = State(
            weight=chain.original.detach().double().requires_grad_(),
            u=norm.u.detach().double().clone(),
            sv=norm.sv.detach().double().clone(),
            options=self.options,
            transposed=isinstance(owner, nn.ConvTranspose1d),
        )
        if self.options.gain is not None:
            gain = norm.gain.detach().double().clone()
            seen = replace(seen, gain=gain.requires_grad_(self.options.gain == "learned"))
        if before is None:
            return seen
        return replace(seen, next=before.next, after=before.after, v=before.v)

    def know(self, change: Callable[[State], State], only: str | None = None) -> None:
        """Go on from what is there now, with what a change means for the next reads."""
        before: dict[str, State] = getattr(self, "states", {})
        self.states = {}
        for name in weights_of(self.model):
            seen = self.look(before.get(name), name)
            self.states[name] = change(seen) if only in (None, name) else seen

    def plain(self) -> Plain:
        biases = {
            name: p.detach().double().requires_grad_()
            for name, p in self.model.named_parameters()
            if name.endswith("bias")
        }
        return Plain(self.states, biases, self.kinds)

    @property
    def close(self) -> dict[str, float]:
        if self.dtype == torch.float64:
            return {"rtol": 1e-6, "atol": 1e-8}
        return {"rtol": 5e-3, "atol": 5e-4}

    def gradients(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self.model.named_parameters():
            plain = name.replace("parametrizations.weight.original", "weight")
            plain = plain.replace("parametrizations.weight.0.gain", "gain")
            assert parameter.grad is not None, name
            found[plain] = parameter.grad.double()
        return found

    def differences(self, found: Seen, right: Seen) -> list[str]:
        """What of two runs is not alike."""
        pairs: dict[str, tuple[Any, Any]] = {}
        for i, out in enumerate(found.outputs):
            pairs[f"output {i}"] = (out, right.outputs[i])
        if not any(state.has_open_gradient for state in right.states.values()):
            for name, gradient in found.gradients.items():
                pairs[f"gradient of {name}"] = (gradient, right.gradients[name])
        for name, state in found.states.items():
            pairs[f"u of {name}"] = (state.u, right.states[name].u)
            pairs[f"sv of {name}"] = (state.sv, right.states[name].sv)
        return [
            f"{what}: {a.flatten()[:4].tolist()} is not {b.flatten()[:4].tolist()}"
            for what, (a, b) in pairs.items()
            if not torch.allclose(a, b, equal_nan=True, **self.close)
        ]

    def compare(self, found: Seen, run: Callable[[Choices], Seen]) -> None:
        """What was seen is what one of the ways through the choices leads to; go on from there."""
        assert len(found.outputs) == len(run(Choices()).outputs)
        failures = []
        for right in Choices.every(run):
            assert isinstance(right, Seen)
            wrong = self.differences(found, right)
            if not wrong:
                self.states = right.states
                self.know(lambda state: state)
                return
            failures.append(wrong)
        raise AssertionError(f"no choice explains what was seen: {failures}")

    def seen(self, outputs: list[Tensor], gradients: bool = False) -> Seen:
        states = {name: self.look(None, name) for name in weights_of(self.model)}
        return Seen(
            [out.detach().double() for out in outputs],
            self.gradients() if gradients else {},
            states,
        )

    def snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def assert_unchanged(self, before: dict[str, Tensor]) -> None:
        after = self.model.state_dict()
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]) or tensor.isnan().any(), name

    def used_in_eval(self) -> dict[str, Tensor]:
        before = self.snapshot()
        found = {
            name: snparam.weight_in_use(owner, "weight").clone()
            for name, (owner, _) in weights_of(self.model).items()
        }
        self.assert_unchanged(before)
        return found

    def assert_constraint_holds(self) -> None:
        """Right after an estimate to convergence: the norm of each block in use is what it is to
        be, by an exact decomposition."""
        self.know(lambda state: state)
        for name, used in self.used_in_eval().items():
            state = self.states[name]
            for i, block in enumerate(state.matrices(used.double())):
                norm = float(torch.linalg.matrix_norm(block, 2))
                sigma = float(torch.linalg.matrix_norm(state.matrices()[i].detach(), 2))
                if sigma == 0:
                    right = 0.0
                elif state.gain is not None:
                    right = abs(float(state.gain[i].detach()))
                elif self.options.soft:
                    right = min(sigma, self.options.coeff)
                else:
                    right = self.options.coeff
                assert math.isclose(norm, right, rel_tol=2e-3, abs_tol=1e-6), (name, norm, right)

    def sgd(self) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), RATE)
        return self.optimizer

    # Rules that train

    @rule(seed=seeds, how=st.sampled_from(["plain", "reentrant", "not reentrant"]))
    def train_step(self, seed: int, how: str) -> None:
        """A forward, a backward and a step of SGD, the forward checkpointed or not."""
        self.model.train()
        self.model.zero_grad()
        x = inputs(seed, self.dtype)
        upstream = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
        if how == "plain":
            output = self.model(x)
        else:
            x.requires_grad_()
            output = checkpoint(self.model, x, use_reentrant=how == "reentrant")
        output.backward(upstream.to(self.dtype))
        plain = self.plain()
        self.compare(
            self.seen([output], gradients=True),
            lambda choices: plain.run(
                [inputs(seed, torch.float64)], choices, training=True, upstream=upstream
            ),
        )
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        self.sgd().step()
        for name, parameter in self.model.named_parameters():
            torch.testing.assert_close(parameter, before[name] - RATE * gradients[name])
        self.moved_by_an_update() if self.options.update == "step" else self.stayed()

    def moved_by_an_update(self) -> None:
        """What an optimizer's step, or `update`, does to every state, on the weights of now."""
        right = {}
        for name, state in self.states.items():
            now = self.look(state, name)
            right[name] = replace(now, u=state.u, sv=state.sv).trusted()
        found = self.seen([])
        assert not (wrong := self.differences(found, Seen([], {}, right))), wrong
        self.states = right
        self.know(lambda state: state)

    def stayed(self) -> None:
        for name, state in self.states.items():
            now = self.look(None, name)
            assert torch.equal(now.u, state.u)
            assert torch.equal(now.sv, state.sv) or state.sv.isnan().any()
        self.know(State.changed)

    @rule(
        seed=seeds,
        context=st.sampled_from([torch.no_grad, torch.inference_mode]),
        forwards=st.integers(1, 3),
    )
    def training_forwards_without_a_graph(
        self, seed: int, context: Callable[[], Any], forwards: int
    ) -> None:
        self.model.train()
        for number in range(seed, seed + forwards):
            with context():
                output = self.model(inputs(number, self.dtype)).clone()
            plain, x = self.plain(), inputs(number, torch.float64)
            self.compare(
                self.seen([output]),
                lambda choices, plain=plain, x=x: plain.run([x], choices, training=True),
            )

    @rule(seed=seeds, forwards=st.integers(1, 3), training=st.booleans())
    def cached(self, seed: int, forwards: int, training: bool) -> None:
        """Forwards that share their weights, and one backward for all of them."""
        self.model.train(training)
        self.model.zero_grad()
        xs = [inputs(seed + i, self.dtype) for i in range(forwards)]
        upstream = torch.linspace(-1, 1, xs[0].numel(), dtype=torch.float64).view_as(xs[0])
        with snparam.cached(self.model):
            outputs = [self.model(x) for x in xs]
        total = torch.stack([(out * upstream.to(self.dtype)).sum() for out in outputs]).sum()
        total.backward()
        plain = self.plain()
        self.compare(
            self.seen(outputs, gradients=True),
            lambda choices: plain.run(
                [x.double() for x in xs],
                choices,
                training=training,
                cached=True,
                upstream=upstream,
            ),
        )

    @rule(
        seed=seeds,
        place=st.integers(0, 2),
        error=st.sampled_from([ZeroDivisionError, KeyboardInterrupt]),
        grad=st.booleans(),
    )
    def broken_off(self, seed: int, place: int, error: type[BaseException], grad: bool) -> None:
        """A training forward that raises between two layers, or in the middle of one."""
        self.model.train()
        trap = place % len(self.kinds)
        layer = self.model.layers[trap]
        if isinstance(layer, Own):
            layer.error = error
        else:
            self.model.trap = trap, error
        with pytest.raises(error), torch.set_grad_enabled(grad):
            self.model(inputs(seed, self.dtype))
        self.model.trap = None
        if isinstance(layer, Own):
            layer.error = None
        plain = self.plain()
        self.compare(
            self.seen([]),
            lambda choices: plain.run(
                [inputs(seed, torch.float64)], choices, training=True, trap=trap
            ),
        )

    @rule(which=st.integers(0, 2))
    def read_outside(self, which: int) -> None:
        self.model.train()
        names = list(self.states)
        name = names[which % len(names)]
        owner, _ = weights_of(self.model)[name]
        used = owner.weight

        def right(choices: Choices) -> Seen:
            state = self.states[name]
            weight, after = state.training_read(choices.pick(state.next))
            return Seen([weight.detach()], {}, {**self.states, name: after})

        self.compare(self.seen([used]), right)

    # Rules that move nothing

    @rule(seed=seeds, grad=st.booleans())
    def eval_forward(self, seed: int, grad: bool) -> None:
        before = self.snapshot()
        self.model.eval()
        self.model.zero_grad()
        x = inputs(seed, self.dtype)
        upstream = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
        with torch.set_grad_enabled(grad):
            output = self.model(x)
        if grad:
            output.backward(upstream.to(self.dtype))
        self.assert_unchanged(before)
        plain = self.plain()
        self.compare(
            self.seen([output], gradients=grad),
            lambda choices: plain.run(
                [x.double()], choices, training=False, upstream=upstream if grad else None
            ),
        )

    @rule(seed=seeds)
    def frozen_training_forward(self, seed: int) -> None:
        before = self.snapshot()
        self.model.train()
        with snparam.frozen(self.model):
            output = self.model(inputs(seed, self.dtype))
        self.assert_unchanged(before)
        plain = self.plain()
        self.compare(
            self.seen([output]),
            lambda choices: plain.run(
                [inputs(seed, torch.float64)], choices, training=True, frozen=True
            ),
        )
        self.know(State.frozen_once)

    @rule()
    def look_at_weights_in_use(self) -> None:
        for name, used in self.used_in_eval().items():
            right = self.states[name].eval_read().detach()
            torch.testing.assert_close(used.double(), right, **self.close)

    # Rules that change a weight

    @rule(
        which=st.integers(0, 2),
        how=st.sampled_from(["add", "scale", "zero", "replace", "assign", "data", "new data"]),
        seed=seeds,
        forwards=st.integers(0, 2),
    )
    def edit(self, which: int, how: str, seed: int, forwards: int) -> None:
        names = list(self.states)
        name = names[which % len(names)]
        owner, chain = weights_of(self.model)[name]
        original, shape = chain.original, chain.original.shape
        generator = torch.Generator().manual_seed(100 + seed)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
        change = State.changed
        if how in ("data", "new data"):
            if how == "data":
                original.data.add_(0.3 * noise)
            else:
                original.data = original.data + 0.3 * noise
            if self.options.update == "step" and self.states[name].next != {MOVE}:
                # Nothing but `update` can know of it.
                self.know(lambda state: state)
                self.update()
                return
            change = State.changed_unseen
        elif how == "assign":
            owner.weight = noise
            change = State.unknown
        elif how == "replace":
            chain.original = nn.Parameter(original.detach() + 0.3 * noise)
            self.optimizer = None
        else:
            with torch.no_grad():
                if how == "add":
                    original.add_(0.3 * noise)
                elif how == "scale":
                    original.mul_(3.0)
                else:
                    original.zero_()
        self.know(change, only=name)
        self.training_forwards_without_a_graph(seed, torch.no_grad, forwards)

    @precondition(lambda self: self.options.update == "step")
    @rule()
    def update(self) -> None:
        snparam.update(self.model)
        self.moved_by_an_update()

    @rule(which=st.integers(0, 2), bad=st.sampled_from([math.nan, math.inf]), seed=seeds)
    def break_and_repair(self, which: int, bad: float, seed: int) -> None:
        """One entry is broken during a training forward, and right again in the next."""
        names = list(self.states)
        name = names[which % len(names)]
        _, chain = weights_of(self.model)[name]
        good, u = chain.original.detach().clone(), chain[0].u.clone()
        with torch.no_grad():
            chain.original[(0,) * chain.original.ndim] = bad
        self.model.train()
        with torch.no_grad():
            self.model(inputs(seed, self.dtype))
        assert torch.equal(chain[0].u[0], u[0])
        with torch.no_grad():
            chain.original.copy_(good)
        # The others have moved as in any training forward, and this one moves in the next.
        broken = self.states[name]
        plain = self.plain()
        found = self.seen([])

        def right(choices: Choices) -> Seen:
            run = plain.run([inputs(seed, torch.float64)], choices, training=True)
            run.states[name] = replace(found.states[name], next=broken.next, after=broken.after)
            run.outputs = []
            return run

        self.compare(found, right)
        self.know(State.changed, only=name)
        self.know(State.untrusted if self.options.update == "forward" else self.settled, only=name)
        self.training_forwards_without_a_graph(seed, torch.no_grad, 1)

    @staticmethod
    def settled(state: State) -> State:
        """Moved by the next training forward, whatever is known of it; what then, is not known."""
        return replace(state, next=frozenset({MOVE}), after={MOVE: ANY}, v=None)

    # Rules that copy, cast and convert

    @rule(goes_on=st.sampled_from(["copy", "original"]), seed=seeds, forwards=st.integers(0, 2))
    def deepcopy(self, goes_on: str, seed: int, forwards: int) -> None:
        twin = copy.deepcopy(self.model)
        copied = twin.state_dict()
        for name, tensor in self.model.state_dict().items():
            assert torch.equal(tensor, copied[name]) or tensor.isnan().any(), name
        if goes_on == "copy":
            self.model, self.optimizer = twin, None
            self.know(State.untrusted)
        else:
            self.know(lambda state: state)
        self.training_forwards_without_a_graph(seed, torch.no_grad, forwards)

    @precondition(lambda self: self.dtype == torch.float32)
    @rule()
    def cast_to_float64(self) -> None:
        before = self.snapshot()
        self.model.double()
        self.dtype = torch.float64
        for name, tensor in self.model.state_dict().items():
            assert torch.equal(tensor, before[name].double()) or tensor.isnan().any(), name
        self.know(self.cast)

    @staticmethod
    def cast(state: State) -> State:
        return state if state.next == {MOVE} and not state.after else state.unknown()

    @rule(bake=st.booleans())
    def restore_and_convert_again(self, bake: bool) -> None:
        used = self.used_in_eval()
        originals = {n: c.original.detach().clone() for n, (_, c) in weights_of(self.model).items()}
        parameters = {n: c.original for n, (_, c) in weights_of(self.model).items()}
        snparam.restore_model(self.model, bake=bake)
        assert not weights_of(self.model)
        assert not list(self.model.buffers())
        for name, value in (used if bake else originals).items():
            weight = self.model.get_parameter(name)
            assert weight is parameters[name]
            assert torch.equal(weight, value), name
        self.converted(self.model)
        self.optimizer = None  # of other parameters, where there are gains
        self.know(State.untrusted)
        self.assert_constraint_holds()

    @rule(
        spelling=st.sampled_from(SPELLINGS),
        into=st.sampled_from(["itself", "another", "one that was trained"]),
        assign=st.booleans(),
        seed=seeds,
        forwards=st.integers(0, 2),
    )
    def save_and_load(
        self, spelling: str, into: str, assign: bool, seed: int, forwards: int
    ) -> None:
        try:
            saved = self.spelled(spelling)
        except ValueError as error:
            note(f"{spelling}: {error}")
            options = self.options
            inexpressible = options.blocks > 1 or options.gain or options.soft or options.coeff != 1
            assert spelling in ("torch", "torch-hook", "biggan")
            assert inexpressible
            return
        saved = {name: tensor.detach().clone() for name, tensor in saved.items()}
        used = self.used_in_eval()
        before = {n: c.original.detach().clone() for n, (_, c) in weights_of(self.model).items()}
        if into != "itself":
            self.model = self.converted(Network(self.kinds, 1).to(self.dtype))
            self.optimizer = None
        if into == "one that was trained":
            self.model(inputs(0, self.dtype)).sum().backward()
            self.sgd().step()
            self.model.zero_grad()
        self.model.load_state_dict(saved, assign=assign)
        if assign:
            self.optimizer = None  # its parameters are others now
        if spelling == "snparam":
            for name, tensor in self.model.state_dict().items():
                assert torch.equal(tensor, saved[name]) or tensor.isnan().any(), name
            self.know(State.loaded)
            self.training_forwards_without_a_graph(seed, torch.no_grad, forwards)
            return
        for name, (_, chain) in weights_of(self.model).items():
            right = used[name] if spelling == "plain" else before[name]
            assert torch.equal(chain.original, right), name
        self.know(State.unknown)
        if spelling in ("plain", "originals") and self.options.gain is None:
            self.assert_constraint_holds()

    def spelled(self, spelling: str) -> dict[str, Tensor]:
        if spelling == "snparam":
            return self.model.state_dict()
        if spelling in ("plain", "originals"):
            return snparam.plain_state_dict(self.model, bake=spelling == "plain")
        return snparam.state_dict_for(self.model, spelling)  # type: ignore[arg-type]

    # Always

    @invariant()
    def singular_values_are_those_stored(self) -> None:
        if not hasattr(self, "states"):
            return
        for name, values in snparam.singular_values(self.model).items():
            torch.testing.assert_close(values.double(), self.states[name].sv, equal_nan=True)
            assert not values.requires_grad

    @invariant()
    def u_is_finite_and_nothing_is_left_behind(self) -> None:
        if hasattr(self, "model"):
            for _, chain in weights_of(self.model).values():
                assert torch.isfinite(chain[0].u).all()
                assert not chain[0].u.requires_grad


TestStateMachine = Machine.TestCase
TestStateMachine.settings = settings(
    max_examples=LONG or 70,
    stateful_step_count=60 if LONG else 20,
    derandomize=not LONG,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
    phases=[phase for phase in Phase if phase is not Phase.explain],  # which takes minutes
)
