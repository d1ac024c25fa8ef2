"""SpectralNorm: when a read moves the state, by how much, and what it then computes.

The independent answer is the plain loop: the sequential step of `reference.py`, taken once for each
step that should have been taken, on the u from before.
"""

import contextlib
import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import torch
import torch.nn.functional as F
from holder import Holder, exact, held, norm_of, original_of, used
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import snparam
from snparam import SpectralNorm
from snparam.testing import example_inputs, layers, networks
from snparam.testing.tensors import weight_with

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")


def states(model):
    """(name, SpectralNorm, original) of every normalised weight."""
    for name, module in model.named_modules():
        if hasattr(module, "parametrizations"):
            for tensor, chain in module.parametrizations.items():
                yield f"{name}.{tensor}", chain[0], chain.original


def randomise(model):
    """Every u far from converged, so that each step moves it visibly."""
    for index, (_, norm, _) in enumerate(states(model)):
        rows = weight_with("gaussian", tuple(norm.u.shape), seed=index, dtype=norm.u.dtype)
        norm.u.copy_(rows)
    return model


def all_u(model):
    return {name: norm.u.clone() for name, norm, _ in states(model)}


def stepped(norm, original, u, steps):
    """u after some steps of the plain loop, block by block."""
    blocks = []
    for matrix, one in zip(norm.view.to_matrices(original.detach()), u, strict=True):
        for _ in range(steps):
            one, _, _ = reference.step(matrix, one)
        blocks.append(one)
    return torch.stack(blocks)


def assert_moved(model, before, steps):
    """Each u is where `steps` steps from `before` lead; `steps` a number, or one for each name."""
    for name, norm, original in states(model):
        count = steps if isinstance(steps, int) else steps[name]
        right = stepped(norm, original, before[name], count)
        torch.testing.assert_close(
            norm.u, right, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n} {m}"
        )


FULL_RANK = ("initial", "gaussian", "decaying")


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


class Parent(nn.Module):
    """Reads its children's weights itself, several times, in every way that models do."""

    def __init__(self, calls_child):
        super().__init__()
        self.proj = nn.Linear(4, 4, dtype=torch.float64)
        self.other = nn.ModuleList([nn.Linear(4, 4, dtype=torch.float64)])
        self.calls_child = calls_child

    def forward(self, x):
        x = x.to(self.proj.weight.dtype)
        x = F.linear(x, self.proj.weight) + F.linear(x, self.proj.weight[:4])
        x = F.linear(x, self.other[0].weight)
        return self.proj(x) if self.calls_child else x


@pytest.mark.parametrize("num_itrs", [1, 3])
@pytest.mark.parametrize("calls_child", [True, False])
def test_reads_by_the_module_around_belong_to_one_forward(calls_child, num_itrs):
    model = snparam.convert_model(Parent(calls_child), num_itrs=num_itrs)
    before = all_u(randomise(model))
    x = torch.randn(2, 4, dtype=torch.float64)
    output = model(x)
    assert_moved(model, before, num_itrs)
    # And all of them read the same weight.
    a, b = model.eval().proj.weight, model.other[0].weight
    assert output.shape == x.shape
    assert a.shape == b.shape


def test_every_read_within_a_forward_is_the_same_tensor_with_one_graph():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.seen = []

        def forward(self):
            with torch.no_grad():
                self.seen.append(self.inner.weight)
            self.seen += [self.inner.weight, self.inner.weight]
            return self.seen[1].sum() + self.seen[2].sum()

    model = randomise(snparam.convert_model(Reader(), num_itrs=2))
    model().backward()
    without, first, second = model.seen
    assert first is second
    assert not without.requires_grad
    assert first.requires_grad
    assert torch.equal(without, first), "a read without a graph and one with it differ"
    assert original_of(model.inner).grad is not None


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

    class Interrupted(Parent):
        on = True

        def forward(self, x):
            x = super().forward(x)
            if self.on:
                raise KeyboardInterrupt
            return x

    model = randomise(snparam.convert_model(nn.Sequential(Interrupted(True), Parent(True))))
    x = torch.randn(2, 4, dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(x)
    model[0].on = False
    before = all_u(model)
    for _ in range(3):
        model(x)
    assert_moved(model, before, 3)
    with torch.no_grad():
        for _ in range(2):  # outside of every forward, each read is one of its own
            assert model[1].proj.weight is not model[1].proj.weight


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
    assert torch.equal(training, model.eval()(*inputs))


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


# Where the state lives


@given(layer=layers(), num_svs=st.integers(1, 2))
def test_the_state_is_moved_in_place(layer, num_svs):
    snparam.convert_model(layer, num_svs, progress=False)
    addresses = [(n.u.data_ptr(), n.sv.data_ptr()) for _, n, _ in states(layer)]
    buffers = [(n.u, n.sv) for _, n, _ in states(layer)]
    layer(*example_inputs(layer))
    layer.load_state_dict(layer.state_dict())
    layer.eval()(*example_inputs(layer))
    for (_, norm, _), (u, sv) in zip(states(layer), buffers, strict=True):
        assert norm.u is u
        assert norm.sv is sv
        assert not u.requires_grad
    assert addresses == [(n.u.data_ptr(), n.sv.data_ptr()) for _, n, _ in states(layer)]


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("num_svs", [1, 3])
def test_buffers_have_the_documented_shapes(num_svs, blocks):
    norm = norm_of(snparam.register_sn(nn.Linear(5, 6), num_svs, blocks=blocks))
    assert norm.u.shape == (blocks, num_svs, 6 // blocks)
    assert norm.sv.shape == (blocks, num_svs)
    assert [name for name, _ in norm.named_buffers()] == ["u", "sv"]
    assert f"num_svs={num_svs}" in repr(norm)
    assert f"({blocks}, {6 // blocks}, 5)" in repr(norm)


@given(
    weight=st.sampled_from(((4, 6), (6, 4), (1, 5))).map(
        lambda s: weight_with("gaussian", s, seed=2, dtype=torch.float64)
    ),
    log_length=st.floats(-30, 30),
)
def test_the_length_of_u_is_of_no_account(weight, log_length):
    """Averaged, rounded, loaded from elsewhere: only its direction is read."""
    holder = held(weight)
    norm_of(holder).u.copy_(torch.ones(weight.shape[0]))
    right = used(holder)
    norm_of(holder).u.mul_(10.0**log_length)
    torch.testing.assert_close(used(holder), right, rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(model=networks(), steps=st.integers(0, 2))
def test_a_deep_copy_has_the_state_and_shares_none_of_it(model, steps):
    randomise(snparam.convert_model(model, 1, progress=False))
    for _ in range(steps):
        model(*example_inputs(model))
    twin = copy.deepcopy(model)
    mine, theirs = dict(all_u(model)), dict(all_u(twin))
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    model(*example_inputs(model))
    assert all(torch.equal(u, theirs[n]) for n, u in all_u(twin).items())
    twin(*example_inputs(twin))
    assert all(torch.equal(u, all_u(twin)[n]) for n, u in all_u(model).items())
    assert len({id(n) for _, n, _ in states(twin)}) == len({id(n) for _, n, _ in states(model)})


def test_a_copy_made_inside_frozen_or_cached_is_neither():
    layer = randomise(snparam.register_sn(nn.Linear(3, 4)))
    with snparam.frozen(layer), snparam.cached(layer):
        layer(torch.ones(1, 3))
        twin = copy.deepcopy(layer)
    for _ in range(2):
        u = norm_of(twin).u.clone()
        twin(torch.ones(1, 3))
        assert not torch.equal(norm_of(twin).u, u)


# Cached


def test_cached_reads_once_and_forgets_at_the_end():
    layer = snparam.register_sn(nn.Linear(3, 4)).eval()
    with snparam.cached(layer):
        first = layer.weight
        with snparam.cached(layer):
            assert layer.weight is first
        assert layer.weight is first
        with torch.no_grad():
            original_of(layer).mul_(-1.0)
        assert layer.weight is first
    torch.testing.assert_close(layer.weight, -first)


def scopes_of(model):
    """Which modules say where their forwards begin, by their class or by hooks."""
    return [
        ("__call__" in vars(type(m)), len(m._forward_pre_hooks), len(m._forward_hooks))
        for m in model.modules()
    ]


def test_cached_forwards_run_no_code_of_scopes_which_are_back_afterwards():
    """They would be most of what a forward with cached weights costs."""
    model = randomise(snparam.convert_model(nn.Sequential(Parent(True), Parent(False))))
    before = scopes_of(model)
    with contextlib.suppress(ZeroDivisionError), snparam.cached(model):
        assert not any(any(each) for each in scopes_of(model))
        with snparam.cached(model[0]):
            model(torch.randn(2, 4, dtype=torch.float64))
        raise ZeroDivisionError
    assert scopes_of(model) == before
    state = all_u(model)
    model(torch.randn(2, 4, dtype=torch.float64))
    assert_moved(model, state, 1)


def test_a_layer_that_is_restored_inside_cached_stays_restored():
    model = snparam.convert_model(nn.Sequential(Parent(True)))
    with snparam.cached(model):
        model(torch.randn(2, 4, dtype=torch.float64))
        snparam.restore_model(model)
    assert not any(any(each) for each in scopes_of(model))


def test_cached_training_forwards_move_once():
    layer = snparam.register_sn(nn.Linear(3, 4, dtype=torch.float64), num_itrs=2)
    before = all_u(randomise(layer))
    with snparam.cached(layer):
        outputs = [layer(torch.ones(1, 3, dtype=torch.float64)) for _ in range(3)]
        sum(outputs).sum().backward()
    assert_moved(layer, before, 2)


# Threads


def test_eval_forwards_in_threads_agree_with_one_thread():
    model = snparam.convert_model(
        nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)), 2, progress=False
    )
    randomise(model).eval()
    inputs = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(64)]
    with torch.no_grad():
        right = [model(x) for x in inputs]

    def call(x):
        with torch.no_grad():
            return model(x)

    for shared in (False, True):
        with ThreadPoolExecutor(8) as pool:
            if shared:
                with snparam.cached(model):
                    found = list(pool.map(call, inputs))
            else:
                found = list(pool.map(call, inputs))
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b)


def test_a_forward_in_one_thread_is_not_one_in_another():
    """Two forwards of one layer, both running: each moves the state, and keeps its own weight."""

    class Slow(nn.Linear):
        def forward(self, x):
            with one_at_a_time:
                first = self.weight
            both_inside.wait(timeout=30)
            assert self.weight is first
            return super().forward(x)

    one_at_a_time, both_inside = threading.Lock(), threading.Barrier(2)
    layer = snparam.register_sn(Slow(3, 4, dtype=torch.float64))
    before = all_u(randomise(layer))
    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map(layer, [torch.ones(1, 3, dtype=torch.float64)] * 2)
    assert not torch.equal(a, b)
    assert_moved(layer, before, 2)


# Inference mode, no_grad


@pytest.mark.parametrize("num_svs", [1, 2])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_training_goes_on_after_forwards_without_gradients(mode, num_svs):
    layer = snparam.register_sn(nn.Linear(3, 4, dtype=torch.float64), num_svs)
    before = all_u(randomise(layer))
    x = torch.randn(2, 3, dtype=torch.float64)
    with mode():
        layer(x)  # in training mode: it moves
    assert_moved(layer, before, 1)
    layer(x).sum().backward()
    assert torch.isfinite(original_of(layer).grad).all()
    assert_moved(layer, before, 2)
    layer.eval()
    with mode():
        layer(x)
    layer(x).sum().backward()


def test_conversion_under_inference_mode_trains_afterwards():
    layer = nn.Linear(3, 4)
    with torch.inference_mode():
        snparam.register_sn(layer)
        layer(torch.ones(1, 3))
    u = norm_of(layer).u.clone()
    with torch.no_grad():
        original_of(layer).add_(torch.eye(4, 3))
    layer(torch.ones(1, 3)).sum().backward()
    assert not torch.equal(norm_of(layer).u, u)


# Dtypes


LOW = {torch.float16: "half", torch.bfloat16: "bfloat16"}


@pytest.mark.parametrize("num_svs", [1, 2])
@pytest.mark.parametrize("dtype", LOW)
def test_a_model_moved_to_half_precision_stays_normalised(dtype, num_svs):
    torch.manual_seed(0)
    layer = snparam.register_sn(nn.Linear(12, 10), num_svs)
    getattr(layer, LOW[dtype])()
    x = torch.randn(3, 12, dtype=dtype)
    for _ in range(5):
        output = layer(x)
    assert output.dtype == dtype
    assert layer.weight.dtype == dtype
    output.float().sum().backward()
    assert original_of(layer).grad.dtype == dtype
    assert torch.isfinite(original_of(layer).grad).all()
    weight = original_of(layer).detach().double()
    right = weight / exact(weight)[0]
    eps = torch.finfo(dtype).eps
    assert ((used(layer).double() - right).abs() <= right.abs() * (1e-3 + eps)).all()


def test_a_model_moved_to_float64_computes_in_float64():
    layer = snparam.register_sn(nn.Linear(12, 10)).double()
    for _ in range(300):
        layer(torch.ones(1, 12, dtype=torch.float64))
    assert norm_of(layer).u.dtype == torch.float64
    sigma = float(exact(used(layer))[0])
    assert abs(sigma - 1) <= 1e-9


def test_sv_and_u_follow_moves_and_keep_their_values():
    layer = snparam.register_sn(nn.Linear(12, 10), 3)
    sv = norm_of(layer).sv.clone()
    layer.bfloat16().float()
    torch.testing.assert_close(norm_of(layer).sv, sv, rtol=2**-8, atol=0)
    layer(torch.ones(1, 12))
    sigma = float(exact(original_of(layer))[0])
    assert float(norm_of(layer).sv[0, 0]) == pytest.approx(sigma, rel=64 * 2**-23)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("num_svs", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_changes_neither_the_weight_nor_the_state(training, num_svs, blocks):
    torch.manual_seed(0)
    layer = snparam.register_sn(nn.Linear(12, 10), num_svs, blocks=blocks).train(training)
    randomise(layer)
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = layer.weight
        low = layer(x)
        assert torch.is_autocast_enabled("cpu")
    assert low.dtype == torch.bfloat16
    assert weight.dtype == torch.float32
    assert torch.equal(weight, twin.weight)
    high = twin(x)
    assert torch.equal(norm_of(layer).u, norm_of(twin).u)
    assert torch.equal(norm_of(layer).sv, norm_of(twin).sv)
    torch.testing.assert_close(low.float(), high, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).sum().backward()
    assert original_of(layer).grad.dtype == torch.float32


def test_autocast_around_backward_changes_no_gradient():
    layer = snparam.register_sn(nn.Linear(12, 10))
    upstream = torch.randn(10, 12)
    (right,) = torch.autograd.grad(layer.eval().weight, original_of(layer), upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = layer.weight
        (found,) = torch.autograd.grad(weight, original_of(layer), upstream)
        weight = layer.weight
        (again,) = torch.autograd.grad(weight, original_of(layer), upstream, create_graph=True)
    assert torch.equal(found, right)
    torch.testing.assert_close(again, right)


# Zero


@pytest.mark.parametrize("options", [{}, {"num_svs": 2}, {"blocks": 2}, {"eps": 1e-12}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_zero_weight_stays_zero_and_passes_its_gradient_on(training, options):
    holder = held(torch.zeros(4, 3), **options).train(training)
    upstream = torch.arange(12.0).reshape(4, 3)
    for _ in range(3):
        weight = holder()
        assert not weight.any()
        (gradient,) = torch.autograd.grad(weight, original_of(holder), upstream)
        torch.testing.assert_close(gradient, upstream)
    assert torch.isfinite(norm_of(holder).u).all()
    assert not norm_of(holder).sv.any()


@pytest.mark.parametrize("options", [{}, {"num_svs": 2}, {"blocks": 2}, {"num_itrs": 2}], ids=str)
@pytest.mark.parametrize("forwards", [0, 1, 3])
@pytest.mark.parametrize(
    "learned",
    ["rows that sum to zero", "columns that sum to zero", "one row", "one column", "dense"],
)
def test_a_weight_that_starts_at_zero_is_normalised_once_it_learns(learned, forwards, options):
    """What it learns is often orthogonal to sums or to single units: after a LayerNorm the rows of
    a gradient sum to zero, below a softmax its columns do, and dead units give none. The estimate
    must not start from there: a σ̂ at rounding level would blow the weight up."""
    torch.manual_seed(forwards)
    holder = held(torch.zeros(8, 6), **options)
    for _ in range(forwards):
        holder()
    weight = torch.randn(8, 6) @ torch.diag(torch.tensor([1.0, 0.5, 0.3, 0.2, 0.1, 0.1]))
    if learned == "rows that sum to zero":
        weight -= weight.mean(1, keepdim=True)
    elif learned == "columns that sum to zero":
        weight -= weight.mean(0, keepdim=True)
    elif learned == "one row":
        weight = F.pad(weight[:1], (0, 0, 2, 5)) + F.pad(weight[:1], (0, 0, 6, 1))
    elif learned == "one column":
        weight = F.pad(weight[:, :1], (3, 2))
    with torch.no_grad():
        original_of(holder).copy_(1e-3 * weight)
    first = float(torch.linalg.matrix_norm(holder().detach(), 2))
    assert 0.99 <= first <= 30.0
    for _ in range(60):
        holder()
    blocks = used(holder).chunk(options.get("blocks", 1))
    assert all(float(exact(block)[0]) == pytest.approx(1.0, abs=1e-3) for block in blocks)


# Assigning


@given(layer=layers(dtypes=(torch.float64,)))
def test_assigning_a_weight_stores_it_and_converges_anew(layer):
    snparam.register_sn(layer)
    for name, norm, original in states(layer):
        owner, _, tensor = name.rpartition(".")
        owner = layer.get_submodule(owner)
        value = weight_with(
            "gaussian", tuple(original.shape), seed=9, scale=5.0, dtype=torch.float64
        )
        address = norm.u.data_ptr()
        setattr(owner, tensor, value)
        assert owner.parametrizations[tensor].original is original
        assert torch.equal(original, value)
        assert norm.u.data_ptr() == address
        norm.eval()
        stack = norm.view.to_matrices(getattr(owner, tensor).detach())
        assert float(exact(stack[0])[0]) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(3, 4), [r"'weight' of Linear", r"\(4, 3\)", r"\(3, 4\)"]),
        (torch.full((4, 3), math.nan), [r"'weight' of Linear", r"\(4, 3\)", "NaN or inf"]),
        (torch.full((4, 3), math.inf), [r"'weight' of Linear", r"\(4, 3\)", "NaN or inf"]),
    ],
)
def test_what_cannot_be_assigned_is_refused_and_changes_nothing(value, words):
    layer = snparam.register_sn(nn.Linear(3, 4))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    for word in words:
        with pytest.raises(ValueError, match=word):
            layer.weight = value
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


# Memory


@pytest.mark.parametrize("options", [{}, {"update": "step"}, {"num_svs": 2}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_change_of_memory_format_changes_nothing_else(training, options):
    torch.manual_seed(0)
    conv = snparam.register_sn(nn.Conv2d(3, 4, (2, 3), dtype=torch.float64), **options)
    twin = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    for layer in (conv, twin):
        layer.train(training)
        layer(torch.ones(1, 3, 5, 5, dtype=torch.float64)).square().sum().backward()
    a, b = original_of(conv), original_of(twin)
    assert not b.is_contiguous()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(used(conv), used(twin), rtol=1e-12, atol=0)
    torch.testing.assert_close(norm_of(conv).u, norm_of(twin).u)


@pytest.mark.parametrize("memory", ["channels_last", "transposed", "strided"])
def test_the_weight_in_use_lies_as_the_weight_does(memory):
    weight = weight_with("gaussian", (4, 3, 2, 2), memory=memory)
    holder = held(weight)
    if memory == "strided":
        assert holder().is_contiguous()
    else:
        assert holder().stride() == weight.stride()


def test_the_class_is_public_and_documented():
    assert isinstance(norm_of(held(torch.ones(2, 2))), SpectralNorm)
    assert isinstance(held(torch.ones(2, 2)), Holder)
