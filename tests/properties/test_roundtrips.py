"""There and back: plan, convert, train, restore, on networks of all eligible layers."""

import copy
import warnings

import pytest
import torch
from helpers.holder import exact
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import snparam
from snparam.testing import (
    assert_converted,
    assert_same_function,
    assert_spectral_norm,
    example_inputs,
    layers,
    networks,
)

# torch's own, about LSTM with proj_size
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")

ANY = st.one_of(networks(), layers(max_side=4))


def same_to_the_bit(a, b):
    assert a.keys() == b.keys()
    assert list(a) == list(b), "the order of the keys"
    for key in a:
        assert torch.equal(a[key], b[key]), key
        assert a[key].stride() == b[key].stride(), key


def train(model, steps):
    for step in range(steps):
        output = model(*example_inputs(model, seed=step))
        output = output[0] if isinstance(output, tuple) else output
        output.square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None


@settings(max_examples=100)
@given(model=ANY, num_svs=st.integers(1, 3), steps=st.integers(0, 2))
def test_restoring_the_originals_gives_them_back_to_the_bit(model, num_svs, steps):
    before = copy.deepcopy(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    types = [type(module) for module in model.modules()]
    snparam.convert_model(model, num_svs, progress=False)
    for step in range(steps):
        model(*example_inputs(model, seed=step))
    assert snparam.restore_model(model, bake=False) is model
    same_to_the_bit(before.state_dict(), model.state_dict())
    after = dict(model.named_parameters(remove_duplicate=False))
    assert parameters.keys() == after.keys()
    assert all(parameters[name] is after[name] for name in after)
    assert types == [type(module) for module in model.modules()]
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert_same_function(before, model, example_inputs(model), rtol=0, atol=0)


@settings(max_examples=100)
@given(model=ANY, steps=st.integers(0, 2))
def test_baking_leaves_what_eval_mode_used(model, steps):
    keys = list(model.state_dict())
    parameters = dict(model.named_parameters())
    snparam.convert_model(model, progress=False)
    train(model, steps)
    mode = model.training
    model.eval()
    weights = {}
    for name in parameters:
        owner, _, tensor = name.rpartition(".")
        weights[name] = getattr(model.get_submodule(owner), tensor).detach().clone()
    inputs = example_inputs(model)
    with torch.no_grad():
        outputs = model(*inputs)
    model.train(mode)
    snparam.restore_model(model)
    assert list(model.state_dict()) == keys
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, weights[name]), name
    assert_same_function(lambda *_: outputs, model, inputs)


@pytest.mark.parametrize("bake", [True, False])
def test_restoring_a_copy_leaves_the_other_alone(bake):
    """A deep copy shares its class with what it was copied from."""
    model = nn.ModuleList([nn.Linear(3, 4), nn.LSTM(4, 5)])
    snparam.convert_model(model)
    twin = copy.deepcopy(model)
    snparam.restore_model(twin, bake=bake)
    assert_converted(model)
    assert_spectral_norm(model)
    assert model[0](torch.randn(2, 3)).shape == (2, 4)
    assert model[1](torch.randn(6, 4))[0].shape == (6, 5)
    snparam.restore_model(model)
    assert type(model[1]) is nn.LSTM


def test_registering_on_a_copy_leaves_the_other_alone():
    lstm = snparam.register_sn(nn.LSTM(3, 5), name="weight_ih_l0")
    twin = copy.deepcopy(lstm)
    snparam.register_sn(twin, name="weight_hh_l0")
    assert twin(torch.randn(2, 3))[0].shape == (2, 5)
    assert lstm(torch.randn(2, 3))[0].shape == (2, 5)
    assert isinstance(lstm.weight_hh_l0, nn.Parameter)


@settings(max_examples=100)
@given(model=ANY)
def test_conversion_carries_out_the_plan(model):
    """Its rows, its shapes, and its σ, which is that of the weight."""
    before = copy.deepcopy(model).state_dict()
    plan = snparam.plan_conversion(model, 2, progress=False)
    same_to_the_bit(before, model.state_dict())
    sigma = {row.weight: exact_of(model, row) for row in plan.to_convert}
    snparam.convert_model(model, 2, progress=False)
    tracked = snparam.singular_values(model)
    assert list(tracked) == [row.weight for row in plan.to_convert]
    for row in plan.to_convert:
        owner, _, tensor = row.weight.rpartition(".")
        norm = model.get_submodule(owner).parametrizations[tensor][0]
        assert norm.view.matrices == row.matrices
        assert norm.view.shape == row.shape
        assert row.sigma == pytest.approx(sigma[row.weight], rel=1e-3)
        assert tracked[row.weight].shape == (row.matrices[0], min(2, *row.matrices[1:]))
        assert float(tracked[row.weight].max()) == pytest.approx(sigma[row.weight], rel=1e-3)
    again = snparam.plan_conversion(model, 2, progress=False)
    assert not again.to_convert
    snparam.convert_model(model, 2, progress=False)
    assert len(snparam.singular_values(model)) == len(tracked)


def exact_of(model, row):
    """σ of the weight of a row, by a full decomposition."""
    owner = model.get_submodule(row.weight.rpartition(".")[0])
    weight = getattr(owner, row.tensor)
    if isinstance(owner, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        parts = weight.chunk(owner.groups)
        weight = torch.cat([part.transpose(0, 1) for part in parts])
    return float(exact(weight)[0])


@settings(max_examples=100)
@given(model=ANY, num_svs=st.integers(1, 3))
def test_a_converted_network_is_normalised_and_finite(model, num_svs):
    snparam.convert_model(model, num_svs, progress=False)
    assert_converted(model)
    assert_spectral_norm(model, at_most=1.0, rtol=1e-3)
    train(model, 2)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    # The estimate trails a weight that moves, and always from below.
    for row in snparam.verify(model):
        assert row.exact == 0 or row.exact >= 1 - 1e-5, row


@settings(max_examples=100)
@given(model=ANY, num_svs=st.integers(1, 3))
def test_conversion_is_deterministic_and_leaves_the_random_state_alone(model, num_svs):
    twin = copy.deepcopy(model)
    state = torch.random.get_rng_state()
    snparam.convert_model(model, num_svs, progress=False)
    torch.rand(3)  # whatever happens to the random state between
    snparam.convert_model(twin, num_svs, progress=False)
    torch.random.set_rng_state(state)
    same_to_the_bit(model.state_dict(), twin.state_dict())
    for one in (model, twin):
        one(*example_inputs(one))
    snparam.verify(model)
    snparam.singular_values(model)
    snparam.plan_conversion(model, num_svs, progress=False)
    snparam.restore_model(copy.deepcopy(model))
    assert torch.equal(torch.random.get_rng_state(), state)
    same_to_the_bit(model.state_dict(), twin.state_dict())


def test_a_random_start_follows_the_global_seed():
    def start(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layer = nn.Linear(6, 5)
            torch.manual_seed(seed)
            return snparam.register_sn(layer, 3, init="random").parametrizations.weight[0].u

    assert torch.equal(start(1), start(1))
    assert not torch.allclose(start(1), start(2))
    rows = start(1)[0]
    torch.testing.assert_close(rows @ rows.T, torch.eye(3))


@settings(max_examples=100)
@given(model=ANY, num_svs=st.integers(1, 2), steps=st.integers(0, 2))
def test_a_state_dict_carries_everything(model, num_svs, steps):
    """Loaded into a network converted with the same options, training goes on to the bit."""
    twin = copy.deepcopy(model)
    snparam.convert_model(model, num_svs, progress=False)
    train(model, steps)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    snparam.convert_model(twin, num_svs, progress=False)
    twin.load_state_dict(model.state_dict())
    train(model, 2)
    train(twin, 2)
    same_to_the_bit(model.state_dict(), twin.state_dict())


@given(model=networks())
def test_frozen_weights_train_nothing_and_are_normalised(model):
    model.requires_grad_(False)
    snparam.convert_model(model, progress=False)
    assert not any(p.requires_grad for p in model.parameters())
    before = {n: p.clone() for n, p in model.named_parameters()}
    inputs = example_inputs(model)
    if inputs[0].is_floating_point():
        inputs[0].requires_grad_()
        model(*inputs).sum().backward()
        assert torch.isfinite(inputs[0].grad).all()
    else:
        assert not model(*inputs).requires_grad
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert_spectral_norm(model)


def test_nothing_to_convert_warns_and_names_what_it_saw():
    with pytest.warns(UserWarning, match=r"LayerNorm"):
        snparam.convert_model(nn.Sequential(nn.LayerNorm(3), nn.ReLU()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snparam.convert_model(nn.Sequential(nn.Linear(2, 2)), progress=False)
