"""SpectralNorm: when a read moves the state, and by how much, against a plain loop."""

import copy
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from helpers import reference
from helpers.holder import norm_of, original_of
from helpers.states import FULL_RANK, Parent, all_u, assert_moved, randomise, states, stepped
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import snparam
from snparam.testing import example_inputs, layers, networks

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")


# Training forwards


@settings(max_examples=100)
@given(
    layer=layers(dtypes=(torch.float64,), spectra=FULL_RANK),
    num_itrs=st.integers(1, 3),
    blocks=st.sampled_from((None, "auto")),
    forwards=st.integers(1, 2),
)
def test_a_training_forward_takes_num_itrs_steps(layer, num_itrs, blocks, forwards):
    """Attention, recurrent layers, ... : however often the forward reads the weight."""
    snparam.register_sn(layer, num_itrs=num_itrs, blocks=blocks)
    before = all_u(randomise(layer))
    for _ in range(forwards):
        layer(*example_inputs(layer))
    assert_moved(layer, before, num_itrs * forwards)


@settings(max_examples=60)
@given(network=networks(dtypes=(torch.float64,), spectra=FULL_RANK), num_itrs=st.integers(1, 2))
def test_a_layer_moves_once_for_each_of_its_calls(network, num_itrs):
    snparam.convert_model(network, num_itrs=num_itrs, progress=False)
    before = all_u(randomise(network))
    calls = {id(layer): list(network.layers).count(layer) for layer in network.layers}
    network(*example_inputs(network))
    for name, norm, original in states(network):
        # Tied weights share a state, which each of their layers moves.
        moves = sum(
            calls[id(layer)]
            for layer in {id(layer): layer for layer in network.layers}.values()
            for _, other, _ in states(layer)
            if other is norm
        )
        right = stepped(norm, original, before[name], num_itrs * moves)
        torch.testing.assert_close(norm.u, right, rtol=0, atol=1e-9)


@pytest.mark.parametrize("num_itrs", [1, 3])
@pytest.mark.parametrize("calls_child", [True, False])
def test_each_read_by_the_module_around_counts_as_a_forward(calls_child, num_itrs):
    model = snparam.convert_model(Parent(calls_child), num_itrs=num_itrs)
    before = all_u(randomise(model))
    model(torch.randn(2, 4, dtype=torch.float64))
    reads = {"proj.weight": 3 + calls_child, "other.0.weight": 1}
    assert_moved(model, before, {name: num_itrs * count for name, count in reads.items()})


def test_every_read_within_a_forward_is_the_same_tensor_with_one_graph():
    class Reader(nn.Linear):
        seen: ClassVar[list] = []

        def forward(self):
            with torch.no_grad():
                self.seen.append(self.weight)
            self.seen.extend((self.weight, self.weight))
            return self.seen[1].sum() + self.seen[2].sum()

    model = randomise(snparam.convert_model(Reader(3, 3), num_itrs=2))
    model().backward()
    without, first, second = model.seen
    assert first is second
    assert not without.requires_grad
    assert first.requires_grad
    assert torch.equal(without, first), "a read without a graph and one with it differ"
    assert original_of(model).grad is not None


def test_a_forward_that_fails_leaves_nothing_behind():
    layer = randomise(snparam.register_sn(nn.Linear(3, 4, dtype=torch.float64)))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            layer(torch.randn(2, 7, dtype=torch.float64))
    before = all_u(layer)
    for _ in range(2):
        layer(torch.randn(2, 3, dtype=torch.float64))
    assert_moved(layer, before, 2)


def test_forwards_that_are_interrupted_leave_nothing_behind():
    """A KeyboardInterrupt skips torch's forward hooks, the always-called ones too."""

    class Interrupted(nn.Linear):
        on = True

        def forward(self, x):
            x = F.linear(super().forward(x), self.weight)
            if self.on:
                raise KeyboardInterrupt
            return x

    layer = Interrupted(4, 4, dtype=torch.float64)
    model = randomise(snparam.convert_model(nn.Sequential(layer)))
    x = torch.randn(2, 4, dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(x)
    layer.on = False
    before = all_u(model)
    for _ in range(3):
        model(x)
    assert_moved(model, before, 3)
    with torch.no_grad():
        for _ in range(2):  # outside of every forward, each read is one of its own
            assert layer.weight is not layer.weight


# What never moves it


STILL = {
    "eval": lambda model: model.eval(),
    "frozen": lambda model: model,
    "frozen, nested": lambda model: model,
}


@settings(max_examples=60)
@given(model=st.one_of(layers(), networks()), how=st.sampled_from(sorted(STILL)), data=st.data())
def test_eval_and_frozen_forwards_and_reads_leave_the_state_to_the_bit(model, how, data):
    snparam.convert_model(model, data.draw(st.integers(1, 2)), num_itrs=2, progress=False)
    STILL[how](randomise(model))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    inputs = example_inputs(model)

    def run():
        for _ in range(2):
            model(*inputs)
            for module in model.modules():
                for tensor in getattr(module, "parametrizations", ()):
                    getattr(module, tensor)

    if how == "eval":
        run()
    else:
        with snparam.frozen(model):
            if "nested" in how:
                with snparam.frozen(model):
                    run()
            run()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@settings(max_examples=40)
@given(model=networks(dtypes=(torch.float64,)))
def test_frozen_training_forwards_compute_what_eval_forwards_do(model):
    randomise(snparam.convert_model(model, progress=False))
    inputs = example_inputs(model)
    with snparam.frozen(model):
        training = model(*inputs)
        weights = [(norm, norm(original)) for _, norm, original in states(model)]
    # The outputs differ by rounding, as training may divide what the linear map computes.
    torch.testing.assert_close(training, model.eval()(*inputs), rtol=1e-9, atol=1e-9)
    originals = {id(norm): original for _, norm, original in states(model)}
    assert all(torch.equal(used, norm(originals[id(norm)])) for norm, used in weights)


def test_frozen_ends_where_it_ends_also_after_an_error():
    layer = randomise(snparam.register_sn(nn.Linear(3, 4)))
    u = norm_of(layer).u.clone()
    with pytest.raises(ZeroDivisionError), snparam.frozen(layer):
        raise ZeroDivisionError
    layer(torch.randn(2, 3))
    assert not torch.equal(norm_of(layer).u, u)
    with pytest.raises(ValueError, match=r"Linear.*convert_model"), snparam.frozen(nn.Linear(2, 2)):
        pass


class ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.layer.weight  # noqa: B018
        ctx.layer(torch.ones(1, 3))
        return grad, None


def test_reads_and_forwards_inside_a_backward_pass_leave_the_state():
    layer = randomise(snparam.register_sn(nn.Linear(3, 4), num_itrs=2))
    x = torch.randn(2, 3, requires_grad=True)
    output = layer(ReadsInBackward.apply(x, layer))
    before = all_u(layer)
    output.sum().backward()
    assert torch.equal(norm_of(layer).u, before[".weight"])


# Activation checkpointing


class Block(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first = nn.Linear(4, 6, dtype=torch.float64)
        self.again = nn.Linear(6, 6, dtype=torch.float64)
        self.cell = nn.GRUCell(6, 4, dtype=torch.float64)
        self.reentrant = reentrant

    def region(self, x):
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.again(torch.tanh(self.again(x))))
        return self.cell(x)

    def forward(self, x):
        if self.reentrant is None:
            return self.region(x)
        return checkpoint(self.region, x, use_reentrant=self.reentrant)


def checkpointed_pair(reentrant, **options):
    torch.manual_seed(0)
    plain = randomise(snparam.convert_model(Block(None), progress=False, **options))
    saved = copy.deepcopy(plain)
    saved.reentrant = reentrant
    return plain, saved


def assert_same_after(plain, saved):
    for (name, p), (_, q) in zip(plain.named_parameters(), saved.named_parameters(), strict=True):
        torch.testing.assert_close(
            p.grad, q.grad, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: n + m
        )
    for key, value in plain.state_dict().items():
        assert torch.equal(value, saved.state_dict()[key]), key


@pytest.mark.parametrize("num_svs", [1, 3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_neither_gradient_nor_state(reentrant, num_svs):
    plain, saved = checkpointed_pair(reentrant, num_svs=num_svs, num_itrs=2)
    for model in (plain, saved):
        for step in range(2):
            x = torch.randn(
                3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
            )
            model(x.requires_grad_()).square().sum().backward()
    assert_same_after(plain, saved)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_two_forwards_before_one_backward(reentrant):
    """D(real) + D(fake): each recomputation with the estimate of its own forward."""
    plain, saved = checkpointed_pair(reentrant)
    real, fake = torch.randn(2, 3, 4, dtype=torch.float64)
    for model in (plain, saved):
        a, b = real.clone().requires_grad_(), fake.clone().requires_grad_()
        (model(a).sum() + model(b).square().sum()).backward()
    assert_same_after(plain, saved)


def test_checkpointing_under_frozen():
    plain, saved = checkpointed_pair(False)
    x = torch.randn(3, 4, dtype=torch.float64)
    before = all_u(saved)
    for model in (plain, saved):
        with snparam.frozen(model):
            model(x).sum().backward()
    assert_same_after(plain, saved)
    assert all(torch.equal(before[n], u) for n, u in all_u(saved).items())


# Several forwards, one backward


@pytest.mark.parametrize("num_svs", [1, 2])
@pytest.mark.parametrize("backward_order", ["together", "last first"])
def test_two_forwards_before_one_backward_have_each_their_own_sigma(backward_order, num_svs):
    """Against the sequential reference, moved twice, differentiated once."""
    layer = randomise(snparam.register_sn(nn.Linear(5, 4, dtype=torch.float64), num_svs))
    right = reference.Layer(original_of(layer), norm_of(layer).u)
    real, fake = torch.randn(2, 3, 5, dtype=torch.float64)
    a, b = layer(real).sum(), layer(fake).square().sum()
    if backward_order == "together":
        (a + b).backward()
    else:
        b.backward()
        a.backward()
    first = F.linear(real, right.normalised(True), layer.bias.detach()).sum()
    second = F.linear(fake, right.normalised(True), layer.bias.detach()).square().sum()
    (first + second).backward()
    torch.testing.assert_close(original_of(layer).grad, right.weight.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm_of(layer).u, right.u, rtol=0, atol=1e-10)


def test_state_that_is_overwritten_between_forward_and_backward_breaks_no_gradient():
    """As a broadcast of buffers, or a loaded checkpoint, does."""
    layer = randomise(snparam.register_sn(nn.Linear(5, 4, dtype=torch.float64), 2))
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 5, dtype=torch.float64)
    loss = layer(x).square().sum()
    norm_of(layer).u.fill_(1.0)
    norm_of(layer).sv.zero_()
    loss.backward()
    twin(x).square().sum().backward()
    assert torch.equal(original_of(layer).grad, original_of(twin).grad)


def test_a_graph_may_be_used_twice():
    layer = snparam.register_sn(nn.Linear(5, 4, dtype=torch.float64))
    loss = layer(torch.ones(2, 5, dtype=torch.float64)).square().sum()
    loss.backward(retain_graph=True)
    once = original_of(layer).grad.clone()
    loss.backward()
    torch.testing.assert_close(original_of(layer).grad, 2 * once)
