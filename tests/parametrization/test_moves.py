"""When the state moves: forwards, reads outside them, recomputations, inference mode, `frozen`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.applied import square
from helpers.holder import norm_of, original_of
from helpers.same import assert_same_gradients_and_states
from helpers.states import all_u, assert_moved, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import snparam

UPDATES = ["forward", "step"]


def inputs(seed: int = 0, rows: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator, dtype=torch.float64)


# Forwards and reads


class Reader(nn.Module):
    """Reads a child's weight so many times, and calls the child so many times."""

    def __init__(self, reads: int, calls: int) -> None:
        super().__init__()
        self.child = square()
        self.reads, self.calls = reads, calls

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.reads):
            x = F.linear(x, self.child.weight)
        for _ in range(self.calls):
            x = self.child(x)
        return x


class ReadsItself(nn.Linear):
    """Reads its own weight several times in a forward, with a graph and without."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            norm = self.weight.norm()
        with torch.no_grad():
            assert torch.equal(self.weight.norm(), norm)
        x = x.to(self.weight.dtype)
        return F.linear(x, self.weight) + super().forward(x)


@pytest.mark.parametrize("num_itrs", [1, 3])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("grad", [True, False])
def test_a_forward_moves_once_however_often_it_reads(
    grad: bool, update: Any, num_itrs: int
) -> None:
    layer = snparam.register_sn(
        ReadsItself(6, 6, dtype=torch.float64), num_itrs=num_itrs, update=update
    )
    randomise(layer)
    for _ in range(3):
        before = all_u(layer)
        with torch.set_grad_enabled(grad):
            layer(inputs())
        assert_moved(layer, before, num_itrs)


@pytest.mark.parametrize(("reads", "calls"), [(1, 0), (3, 0), (0, 2), (2, 3)])
@pytest.mark.parametrize("update", UPDATES)
def test_each_read_by_another_modules_forward_counts_as_a_forward(
    update: Any, reads: int, calls: int
) -> None:
    model = randomise(snparam.convert_model(Reader(reads, calls), update=update))
    before = all_u(model)
    model(inputs())
    assert_moved(model, before, reads + calls)


@pytest.mark.parametrize("update", UPDATES)
def test_cached_reads_of_another_modules_forward_count_as_one(update: Any) -> None:
    model = randomise(snparam.convert_model(Reader(3, 2), update=update))
    before = all_u(model)
    with snparam.cached(model):
        model(inputs())
    assert_moved(model, before, 1)


@pytest.mark.parametrize("num_itrs", [1, 2])
@pytest.mark.parametrize("update", UPDATES)
def test_reading_a_weight_in_training_moves_the_state_and_in_eval_or_frozen_does_not(
    update: Any, num_itrs: int
) -> None:
    layer = randomise(snparam.register_sn(square(), num_itrs=num_itrs, update=update))
    before = all_u(layer)
    layer.weight  # noqa: B018
    assert_moved(layer, before, num_itrs)
    before = all_u(layer)
    with snparam.frozen(layer), snparam.frozen(layer):
        layer.weight  # noqa: B018
        layer(inputs())
    layer.eval()
    layer.weight  # noqa: B018
    layer(inputs())
    assert torch.equal(norm_of(layer).u, before[".weight"])
    layer.train()
    layer.weight  # noqa: B018
    assert_moved(layer, before, num_itrs)


@pytest.mark.parametrize("update", UPDATES)
def test_frozen_training_forwards_use_what_eval_forwards_use(update: Any) -> None:
    layer = randomise(snparam.register_sn(square(), update=update))
    right = copy.deepcopy(layer).eval()(inputs())
    with snparam.frozen(layer):
        torch.testing.assert_close(layer(inputs()), right)
        torch.testing.assert_close(F.linear(inputs(), layer.weight), right)


class Interrupted(nn.Linear):
    """Breaks off in the middle of a forward, after it has read its weight."""

    error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.error is not None:
            raise self.error
        return F.linear(x, weight)


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("update", UPDATES)
def test_a_forward_that_breaks_off_leaves_nothing_behind(update: Any, error: Any) -> None:
    layer = Interrupted(6, 6, bias=False, dtype=torch.float64)
    randomise(snparam.register_sn(layer, update=update))
    layer.error = error
    for _ in range(2):
        before = all_u(layer)
        with pytest.raises(type(error)):
            layer(inputs())
        assert_moved(layer, before, 1)
    layer.error = None
    for read in (lambda: layer(inputs()), lambda: layer.weight):
        before = all_u(layer)
        read()
        assert_moved(layer, before, 1)


@pytest.mark.parametrize("update", UPDATES)
def test_a_read_in_a_backward_pass_moves_nothing(update: Any) -> None:
    layer = randomise(snparam.register_sn(square(), update=update))
    output = layer(inputs())
    before = all_u(layer)
    norms = []
    output.register_hook(lambda _: norms.append(float(layer.weight.detach().norm())))
    output.sum().backward()
    assert len(norms) == 1
    assert torch.equal(norm_of(layer).u, before[".weight"])


@pytest.mark.parametrize("update", UPDATES)
def test_inference_mode_moves_as_no_grad_does(update: Any) -> None:
    states = []
    for context in (torch.no_grad, torch.inference_mode):
        model = randomise(snparam.convert_model(Reader(1, 1), update=update))
        before = all_u(model)
        with context():
            model(inputs())
        assert_moved(model, before, 2)
        states.append(all_u(model))
        model(inputs()).sum().backward()  # and training goes on
        assert torch.isfinite(original_of(model.child).grad).all()
    assert torch.equal(*(each["child.weight"] for each in states))


# Recomputed regions


class Body(nn.Module):
    """Uses one layer in the ways that networks do which log, clip or look at their weights."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.layer = square(seed=1)
        self.reads = reads
        self.logged: list[float] = []

    def log(self) -> None:
        self.logged.append(float(self.layer.weight.detach().norm()))

    def forward(self, x: Tensor) -> Tensor:
        if self.reads == "logged before":
            with torch.no_grad():
                self.log()
        elif self.reads == "inferred before":
            with torch.inference_mode():
                self.log()
        elif self.reads == "in use before":
            self.logged.append(float(snparam.weight_in_use(self.layer, "weight").norm()))
        elif self.reads == "with a graph before":
            x = x + 0.1 * F.linear(x, self.layer.weight)
        x = self.layer(x).tanh()
        if self.reads == "logged after":
            with torch.no_grad():
                self.log()
        elif self.reads == "without a graph after":
            x = x + F.linear(x, self.layer.weight.detach())
        return x


READS = [
    "logged before",
    "inferred before",
    "in use before",
    "with a graph before",
    "logged after",
    "without a graph after",
]

SAVED = [
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.mv.default,
    torch.ops.aten.bmm.default,
]

Region = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def reentrant(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    out: Tensor = checkpoint(function, x, use_reentrant=True)
    return out


def not_reentrant(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    out: Tensor = checkpoint(function, x, use_reentrant=False)
    return out


def selective(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    contexts = partial(create_selective_checkpoint_contexts, SAVED)
    out: Tensor = checkpoint(function, x, use_reentrant=False, context_fn=contexts)
    return out


def nested(outer: Region, inner: Region) -> Region:
    def region(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return outer(lambda y: inner(function, inner(function, y)), x)

    return region


def unchecked(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


REGIONS: dict[str, tuple[Region, Region]] = {
    "reentrant": (reentrant, unchecked),
    "not reentrant": (not_reentrant, unchecked),
    "selective": (selective, unchecked),
    **{
        f"{a.__name__} in {b.__name__}": (nested(b, a), nested(unchecked, unchecked))
        for a, b in itertools.product((reentrant, not_reentrant), repeat=2)
    },
}

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_svs": 2, "num_itrs": 2, "blocks": 2},
    {"update": "step"},
]


def trained(reads: str, region: Region, options: dict[str, Any], trusted: bool) -> nn.Module:
    """Several forwards before a backward, and the backwards in another order than the forwards."""
    body = snparam.convert_model(Body(reads), **options)
    randomise(body)
    if trusted:
        snparam.update(body)
    losses = []
    for seed in range(3):
        x = inputs(seed).requires_grad_()
        hidden = region(body, x)
        losses.append(region(body, hidden).square().sum())
    losses[1].backward()
    (losses[0] - 2 * losses[2]).backward()
    return body


# torch's, of an inner region while the outer one runs without gradients
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("regions", REGIONS.values(), ids=REGIONS)
def test_recomputed_regions_have_the_gradients_of_unchecked_ones(
    regions: tuple[Region, Region], reads: str, options: dict[str, Any]
) -> None:
    checked, plain = regions
    for trusted in (False, True) if options.get("update") == "step" else (False,):
        found = trained(reads, checked, options, trusted)
        right = trained(reads, plain, options, trusted)
        assert original_of(right.layer).grad.abs().max() > 1e-3
        assert_same_gradients_and_states(found, right)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("regions", REGIONS.values(), ids=REGIONS)
def test_a_layer_that_reads_itself_is_recomputed_as_it_was(
    regions: tuple[Region, Region], options: dict[str, Any]
) -> None:
    networks = []
    for region in regions:
        layer = ReadsItself(6, 6, dtype=torch.float64)
        layer.load_state_dict(
            {"weight": square(seed=1).weight, "bias": torch.ones(6, dtype=torch.float64)}
        )
        randomise(snparam.register_sn(layer, **options))
        losses = [region(layer, inputs(seed).requires_grad_()).square().sum() for seed in range(2)]
        (losses[0] - 2 * losses[1]).backward()
        networks.append(layer)
    assert_same_gradients_and_states(*networks)


# What is in use, without a move


@contextmanager
def torch_cached(_model: nn.Module) -> Iterator[None]:
    with parametrize.cached():
        yield


WITHIN: dict[str, Callable[[nn.Module], Any]] = {
    "nothing": lambda _: nullcontext(),
    "frozen": snparam.frozen,
    "cached": snparam.cached,
    "torch's cached": torch_cached,
    "no_grad": lambda _: torch.no_grad(),
    "inference_mode": lambda _: torch.inference_mode(),
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_svs": 2, "num_itrs": 3},
        {"blocks": 2},
        {"soft": True, "coeff": 2.0},
        {"gain": "learned"},
    ],
    ids=str,
)
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("within", WITHIN.values(), ids=WITHIN)
@pytest.mark.parametrize("training", [True, False])
def test_weight_in_use_is_what_an_eval_read_gives_and_moves_nothing(
    training: bool, within: Callable[[nn.Module], Any], update: Any, options: dict[str, Any]
) -> None:
    layer = randomise(snparam.register_sn(square(), update=update, **options))
    layer.train(training)
    right = copy.deepcopy(layer).eval().weight.detach()
    before = [b.clone() for b in layer.buffers()]
    modes = [module.training for module in layer.modules()]
    with within(layer):
        found = snparam.weight_in_use(layer, "weight")
    assert not found.requires_grad
    assert torch.equal(found, right)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))
    assert modes == [module.training for module in layer.modules()]


class Logging(nn.Linear):
    """Asks for its weight in use within its own forward, before and after it has read it."""

    def forward(self, x: Tensor) -> Tensor:
        self.logged = [snparam.weight_in_use(self)]
        out = super().forward(x)
        self.logged.append(snparam.weight_in_use(self))
        return out


def test_weight_in_use_within_a_forward_is_that_of_eval_too() -> None:
    layer = snparam.register_sn(Logging(6, 6).double(), init="random")
    before = copy.deepcopy(layer).eval().weight
    layer(torch.randn(2, 6, dtype=torch.float64))
    after = copy.deepcopy(layer).eval().weight
    assert not torch.equal(before, after)
    torch.testing.assert_close(layer.logged, [before, after])


@pytest.mark.parametrize("update", UPDATES)
def test_weight_in_use_changes_no_later_forward(update: Any) -> None:
    layer = randomise(snparam.register_sn(square(), update=update))
    twin = copy.deepcopy(layer)
    for step in range(4):
        assert torch.equal(
            snparam.weight_in_use(layer, "weight"), copy.deepcopy(layer).eval().weight
        )
        assert torch.equal(layer(inputs(step)), twin(inputs(step)))
        if step == 1:
            for each in (layer, twin):
                optimizer = torch.optim.SGD(each.parameters(), 0.1)
                each(inputs()).square().sum().backward()
                optimizer.step()


def test_weight_in_use_of_each_tensor_of_a_module() -> None:
    attention = snparam.register_sn(nn.MultiheadAttention(4, 2))
    found = snparam.weight_in_use(attention, "in_proj_weight")
    assert torch.equal(found, attention.eval().in_proj_weight)
    found = snparam.weight_in_use(attention.out_proj, "weight")
    assert torch.equal(found, attention.out_proj.weight)


def test_weight_in_use_of_a_weight_inside_has_a_dotted_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)))
    model.append(model[0])
    snparam.convert_model(model, exclude="1.1")
    for name in ("0.weight", "1.0.weight", "2.weight"):
        module = model.get_submodule(name.removesuffix(".weight"))
        expected = snparam.weight_in_use(module)
        assert torch.equal(snparam.weight_in_use(model, name), expected)
    for name in ("weight", "1.1.weight", "3.weight", "0"):
        with pytest.raises(ValueError, match=r"pass one of '0\.weight', '1\.0\.weight'$") as caught:
            snparam.weight_in_use(model, name)
        assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["bias", "wieght"])
def test_weight_in_use_of_what_is_not_normalised_is_refused(name: str) -> None:
    layer = snparam.register_sn(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=name):
        snparam.weight_in_use(layer, name)
