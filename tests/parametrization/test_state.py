"""The state of SpectralNorm: where it lives, copies, `cached`, threads, inference mode."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.holder import held, norm_of, original_of, used
from helpers.states import Parent, all_u, assert_moved, randomise, states
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import snparam
from snparam.testing import example_inputs, layers, networks
from snparam.testing.tensors import weight_with

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")


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


def test_a_layer_that_is_restored_inside_cached_stays_restored():
    model = snparam.convert_model(nn.Sequential(Parent(True)))
    with snparam.cached(model):
        model(torch.randn(2, 4, dtype=torch.float64))
        snparam.restore_model(model)
    assert not list(states(model))
    assert type(model[0].proj) is nn.Linear


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
