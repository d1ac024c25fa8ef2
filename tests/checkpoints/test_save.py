"""A converted network comes out in every spelling, and means the same network."""

import copy
import re

import pytest
import torch
from helpers.holder import norm_of, original_of
from helpers.spelled import (
    SPELLINGS,
    assert_exact_state,
    blank,
    foreign,
    matrix_shape,
    same_output,
    single_layers,
    spelled,
    tied,
    trained,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations

import snparam
from snparam.testing import assert_same_function, example_inputs, layers, networks

# torch's own, about LSTM with proj_size
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")


@settings(max_examples=60)
@given(model=st.one_of(networks(), layers(max_side=4)), bake=st.booleans())
def test_the_plain_state_dict_is_that_of_the_restored_model(model, bake):
    ordinary = copy.deepcopy(model)
    snparam.convert_model(model, progress=False)
    model(*example_inputs(model))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plain = snparam.plain_state_dict(model, bake)
    assert list(plain) == list(ordinary.state_dict())
    assert plain._metadata == ordinary.state_dict()._metadata
    assert list(plain._metadata) == list(ordinary.state_dict()._metadata)
    ordinary.load_state_dict(plain)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert_same_function(
        ordinary, snparam.restore_model(copy.deepcopy(model), bake), example_inputs(model)
    )
    for key, tensor in snparam.restore_model(model, bake).state_dict().items():
        assert torch.equal(plain[key], tensor), key


@given(
    layer=single_layers(dtypes=(torch.float32, torch.float64, torch.bfloat16)),
    spelling=st.sampled_from(("torch", "torch-hook")),
    num_svs=st.integers(1, 3),
    forwards=st.integers(0, 2),
)
def test_torchs_own_models_take_theirs_and_compute_the_same(layer, spelling, num_svs, forwards):
    """Not converged: u starts anywhere."""
    model = snparam.register_sn(
        copy.deepcopy(layer), num_svs=min(num_svs, *matrix_shape(layer)), init="random"
    )
    trained(model, forwards)
    theirs = foreign(layer, spelling)
    state = snparam.state_dict_for(model, spelling)
    assert list(state) == list(theirs.state_dict())
    assert state._metadata == theirs.state_dict()._metadata
    assert [t.dtype for t in state.values()] == [t.dtype for t in theirs.state_dict().values()]
    assert theirs.load_state_dict(state) == ([], [])
    same_output(theirs, model, layer)


@given(
    layer=single_layers(kinds=("linear", "conv", "embedding"), dtypes=(torch.float32,)),
    num_svs=st.integers(1, 3),
    forwards=st.integers(0, 2),
)
def test_biggans_models_take_theirs_and_go_on_to_compute_the_same(layer, num_svs, forwards):
    num_svs = min(num_svs, *matrix_shape(layer))
    model = trained(snparam.register_sn(copy.deepcopy(layer), num_svs, init="random"), forwards)
    theirs = foreign(layer, "biggan", num_svs)
    state = snparam.state_dict_for(model, "biggan")
    assert list(state) == list(theirs.state_dict())
    assert theirs.load_state_dict(state) == ([], [])
    same_output(theirs, model, layer)
    trained(theirs.train(), 2)
    trained(model.train(), 2)
    same_output(theirs, model, layer)


@settings(max_examples=100)
@given(
    layer=single_layers(kinds=("linear", "conv", "embedding")),
    first=st.sampled_from(SPELLINGS),
    second=st.sampled_from(SPELLINGS),
    num_svs=st.tuples(*[st.integers(1, 3)] * 3),
    bake=st.booleans(),
)
def test_round_trips_between_every_pair(layer, first, second, num_svs, bake):
    a = trained(snparam.convert_model(copy.deepcopy(layer), num_svs[0], progress=False), 2)
    b, c = blank(layer, num_svs=num_svs[1]), blank(layer, num_svs=num_svs[2])
    assert b.load_state_dict(spelled(a, first, bake)) == ([], [])
    assert c.load_state_dict(spelled(b, second, bake)) == ([], [])
    same_output(a, b, layer)
    same_output(a, c, layer)
    if "plain" not in (first, second) or not bake:
        assert torch.equal(original_of(a), original_of(c))
    assert_exact_state(c, norm_of(c).u.shape[1])


def test_the_order_of_a_deep_network_and_of_modules_used_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.first = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
            self.again = self.first
            self.attention = nn.MultiheadAttention(4, 2)
            self.register_buffer("count", torch.zeros(()))

    plain = Net()
    expected = list(plain.state_dict())
    model = snparam.convert_model(plain)
    state = snparam.plain_state_dict(model)
    assert list(state) == expected
    assert torch.equal(state["again.0.weight"], state["first.0.weight"])
    Net().load_state_dict(state)


@settings(max_examples=30)
@given(model=st.one_of(networks(), layers(max_side=4)))
def test_our_own_spelling_and_the_plain_one_are_asked_for_by_name_too(model):
    snparam.convert_model(model, progress=False)
    pairs = [
        (snparam.state_dict_for(model, "snparam"), model.state_dict()),
        (snparam.state_dict_for(model, "plain"), snparam.plain_state_dict(model)),
    ]
    for found, expected in pairs:
        assert list(found) == list(expected)
        assert found._metadata == expected._metadata
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_wrapped_models_keep_the_wrappers_prefix():
    model = snparam.convert_model(nn.Sequential(nn.Linear(4, 3)))
    compiled = torch.compile(model, backend="eager")
    assert list(snparam.plain_state_dict(compiled)) == ["_orig_mod.0.weight", "_orig_mod.0.bias"]
    plain = snparam.plain_state_dict(model)
    compiled.load_state_dict({f"_orig_mod.{key}": tensor for key, tensor in plain.items()})


def test_a_model_without_snparam_has_its_own_state_dict():
    model = nn.Sequential(nn.Linear(4, 3))
    for state in (snparam.plain_state_dict(model), snparam.state_dict_for(model, "torch")):
        assert list(state) == ["0.weight", "0.bias"]
        assert torch.equal(state["0.weight"], model[0].weight)


def test_tied_weights_are_one_tensor_in_the_plain_state_dict():
    model = snparam.convert_model(tied())
    state = snparam.state_dict_for(model, "plain")
    assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()
    state = snparam.plain_state_dict(model)
    assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()
    torch.testing.assert_close(state["0.weight"], model[0].eval().weight)


def test_a_parameter_that_is_also_used_as_it_is_cannot_be_baked():
    model = snparam.convert_model(tied(), exclude="0")
    for write in (snparam.plain_state_dict, lambda m: snparam.state_dict_for(m, "plain")):
        with pytest.raises(ValueError, match=r"'1.weight' \(7, 4\).*'0.weight'.*bake=False"):
            write(model)
    assert list(snparam.plain_state_dict(model, bake=False)) == ["0.weight", "1.weight"]


INEXPRESSIBLE = [
    (nn.Linear(4, 6), {"blocks": 2}, "torch", "blocks=2"),
    (nn.Linear(4, 6), {"soft": True, "coeff": 2.0}, "torch-hook", "coeff=2.0, soft=True"),
    (nn.Linear(4, 6), {"coeff": 3.0}, "biggan", "coeff=3"),
    (nn.Linear(4, 6), {"gain": "fixed"}, "torch", "gain='fixed'"),
    (nn.Linear(4, 6), {"constraint": "bound"}, "torch", "constraint='bound'"),
    (nn.Linear(4, 6), {"constraint": "gain"}, "torch-hook", "constraint='gain'"),
    (nn.Linear(4, 6), {"constraint": "fixed", "coeff": 0.5}, "biggan", "coeff=0.5"),
    (nn.ConvTranspose1d(4, 6, 3, groups=2), {}, "torch", "axis 1"),
    (nn.ConvTranspose1d(4, 6, 3, groups=2), {}, "torch-hook", "axis 1"),
    (nn.ConvTranspose1d(4, 6, 3, groups=2), {}, "biggan", "other rows"),
    (nn.LSTMCell(4, 6), {}, "biggan", "'weight'"),
    (nn.Linear(4, 6, dtype=torch.complex64), {}, "torch-hook", "complex"),
    (nn.Linear(4, 6, dtype=torch.complex64), {}, "biggan", "complex"),
]


@pytest.mark.parametrize(("layer", "options", "spelling", "why"), INEXPRESSIBLE)
def test_what_cannot_be_expressed_is_refused_with_the_weight_and_the_reason(
    layer, options, spelling, why
):
    model = snparam.convert_model(nn.Sequential(copy.deepcopy(layer)), **options)
    with pytest.raises(ValueError, match="plain_state_dict") as caught:
        snparam.state_dict_for(model, spelling)
    assert re.search(r"SpectralNorm on '0\.weight\w*' \(\d+, .*\)", str(caught.value))
    assert why in str(caught.value)


def test_an_unknown_spelling_and_another_parametrization_are_refused():
    model = snparam.register_sn(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"'tensorflow'.*'plain', 'snparam', 'torch',"):
        snparam.state_dict_for(model, "tensorflow")
    nn.utils.parametrize.register_parametrization(model, "weight", nn.Identity())
    with pytest.raises(ValueError, match="Identity"):
        snparam.plain_state_dict(model)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_weights_through_torchs_parametrization(dtype):
    layer = nn.Linear(4, 3, dtype=dtype)
    model = snparam.register_sn(copy.deepcopy(layer), init="random")
    theirs = torch_parametrizations.spectral_norm(copy.deepcopy(layer))
    theirs.load_state_dict(snparam.state_dict_for(model, "torch"))
    x = torch.randn(2, 4, dtype=dtype)
    torch.testing.assert_close(theirs.eval()(x), model.eval()(x))
    trained_theirs = theirs.train()
    for _ in range(200):
        trained_theirs(x)
    other = snparam.register_sn(nn.Linear(4, 3, dtype=dtype))
    other.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(other.eval()(x), theirs.eval()(x))
