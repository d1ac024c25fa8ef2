"""`snparam.testing`: what is drawn is what is documented, and assertions fail where they should."""

import copy
import dataclasses
import math
import random
import re
import subprocess
import sys

import pytest
import torch
from helpers.holder import exact, matrix_of, norm_of
from hypothesis import find, given, settings
from hypothesis import strategies as st
from torch import nn

import snparam
from snparam.layers.torch import TYPES
from snparam.testing import (
    Network,
    assert_converted,
    assert_same_function,
    assert_spectral_norm,
    example_inputs,
    layers,
    networks,
    weights,
)
from snparam.testing.tensors import DTYPES, FORMATS, SPECTRA, in_memory, weight_with

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")

ONCE = settings(database=None, derandomize=True, max_examples=1000)


# Weights


@pytest.mark.parametrize("shape", [(1, 1), (5, 8), (8, 5), (1, 7), (7, 1), (6, 2, 3, 1)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_spectra_are_what_they_are_called(spectrum, shape):
    weight = weight_with(spectrum, shape, seed=3, scale=2.0, dtype=torch.float64)
    assert weight.shape == shape
    sigma = exact(weight) / 2
    count = len(sigma)
    top = math.ceil(count / 2)
    if spectrum == "zero":
        assert not weight.any()
        return
    assert float(sigma[0]) == pytest.approx(1.0)
    close = {"rtol": 0.0, "atol": 1e-12}
    ones = torch.ones(count).double()
    if spectrum == "flat":
        torch.testing.assert_close(sigma, ones, **close)
    elif spectrum == "decaying":
        torch.testing.assert_close(sigma[1:], 0.7 * sigma[:-1], **close)
    elif spectrum == "clustered":
        assert (sigma[:top] > 0.9989).all()
        torch.testing.assert_close(sigma[top:], 0.1 * ones[top:], **close)
    elif spectrum == "repeated":
        torch.testing.assert_close(sigma[:top], ones[:top], **close)
        torch.testing.assert_close(sigma[top:], 0.5 * ones[top:], **close)
    elif spectrum == "deficient":
        assert (sigma[:top] > 0.49).all()
        assert (sigma[top:] < 1e-12).all()
    elif spectrum == "equal":
        assert (weight == weight.flatten()[0]).all()
    elif spectrum == "row" and shape[0] > 1:
        norms = matrix_of(weight).norm(dim=1).sort(descending=True).values
        assert norms[0] > 10 * norms[1]
    elif spectrum == "gaussian" and count > 2:
        assert sigma[0] > sigma[1] > sigma[2] > 0


@given(weight=weights())
def test_weights_are_finite_and_of_their_scale(weight):
    assert weight.dtype in DTYPES
    assert 2 <= weight.ndim <= 5
    assert torch.isfinite(weight).all()
    largest = 1e4 if weight.dtype == torch.float16 else 1e30
    assert float(exact(weight)[0]) <= largest * 1.01


@given(
    weight=weights(
        shapes=[(3, 4, 2, 2), (2, 5)],
        dtypes=[torch.float64],
        spectra=["flat"],
        scales=[7.0],
        formats=["channels_last"],
    )
)
def test_weights_keep_to_what_they_are_restricted_to(weight):
    assert weight.shape in ((3, 4, 2, 2), (2, 5))
    assert weight.dtype == torch.float64
    assert float(exact(weight)[0]) == pytest.approx(7.0)
    if weight.ndim == 4:
        assert weight.is_contiguous(memory_format=torch.channels_last)


@given(
    weight=weights(shapes=st.tuples(st.integers(5, 6), st.just(2))),
    memory=st.sampled_from(FORMATS),
)
def test_shapes_may_be_a_strategy_and_memory_formats_keep_values(weight, memory):
    assert weight.shape in ((5, 2), (6, 2))
    assert torch.equal(in_memory(weight, memory), weight)


def test_memory_formats_are_what_they_are_called():
    weight = torch.rand(3, 4, 5, 2)
    strides = {memory: in_memory(weight, memory).stride() for memory in FORMATS}
    assert len(set(strides.values())) == len(FORMATS)
    assert strides["contiguous"] == weight.stride()
    assert strides["transposed"] == (1, 3, 12, 60)
    assert in_memory(weight, "channels_last").is_contiguous(memory_format=torch.channels_last)
    assert strides["strided"][-1] == 2


CHOICES = {
    **{dtype: lambda w, dtype=dtype: w.dtype == dtype for dtype in DTYPES},
    "1e-38": lambda w: w.dtype == torch.float32 and 0 < w.abs().max() <= 1e-38,
    "1e30": lambda w: w.dtype == torch.bfloat16 and w.abs().max() > 1e28,
    "1e-6": lambda w: w.dtype == torch.float16 and 0 < w.abs().max() <= 1.1e-6,
    "1e4": lambda w: w.dtype == torch.float16 and w.abs().max() > 1e3,
    "row": lambda w: w.shape[0] > 1 and w.shape[1] > 1,
    "1 x n": lambda w: w.shape[0] == 1 and w.shape[1] > 3,
    "n x 1": lambda w: w.shape[0] > 3 and w[0].numel() == 1,
    "five dimensions": lambda w: w.ndim == 5,
    "deficient": lambda w: len(exact(w)) > 3 and 0 < exact(w)[-1] < 1e-6 * exact(w)[0],
    "zero": lambda w: not w.any(),
    "flat": lambda w: len(exact(w)) > 2 and exact(w)[-1] > 0.99 * exact(w)[0],
    "channels_last": lambda w: (
        w.ndim == 4 and not w.is_contiguous() and w.is_contiguous(memory_format=torch.channels_last)
    ),
    "transposed": lambda w: w.ndim == 2 and not w.is_contiguous() and w.T.is_contiguous(),
    "strided": lambda w: w.ndim == 2 and w.stride(1) == 2,
}


@pytest.mark.parametrize("choice", CHOICES)
def test_everything_that_may_be_drawn_is_drawn(choice):
    find(weights(), CHOICES[choice], settings=settings(ONCE, max_examples=5000))


@pytest.mark.parametrize(
    ("draw", "named"),
    [
        (lambda: weights(spectra=["flatt"]), "flatt"),
        (lambda: weights(formats=["nhwc"]), "nhwc"),
        (lambda: layers(spectra=["flatt"]), "flatt"),
        (lambda: layers(types=[nn.LayerNorm]), "LayerNorm"),
        (lambda: networks(max_layers=1), "max_layers=1"),
        (lambda: weight_with("flatt", (2, 2)), "flatt"),
        (lambda: in_memory(torch.ones(2, 2), "nhwc"), "nhwc"),
    ],
)
def test_unknown_choices_are_refused_by_name_at_once(draw, named):
    with pytest.raises(ValueError, match=named):
        draw()


# Layers and networks


@pytest.mark.parametrize("kind", [kind for row in TYPES for kind in row.types])
def test_every_eligible_type_can_be_drawn_and_called(kind):
    """Those of the table: a new row there needs a recipe here."""

    @settings(max_examples=15, database=None)
    @given(layer=layers(types=[kind]))
    def check(layer):
        assert type(layer) is kind
        inputs = example_inputs(layer, batch=3)
        layer(*inputs)
        snparam.register_sn(layer)
        output = layer(*inputs)
        output = output[0] if isinstance(output, tuple) else output
        assert torch.isfinite(output).all()
        assert 3 in output.shape

    check()


FORMS = {
    "groups": lambda m: getattr(m, "groups", 1) > 1,
    "transposed groups": lambda m: isinstance(m, nn.ConvTranspose2d) and m.groups > 1,
    "channels_last": lambda m: (
        isinstance(m, nn.Conv2d)
        and not m.weight.is_contiguous()
        and m.weight.is_contiguous(memory_format=torch.channels_last)
    ),
    "bidirectional": lambda m: getattr(m, "bidirectional", False),
    "proj_size": lambda m: getattr(m, "proj_size", 0) > 0,
    "several recurrent layers": lambda m: getattr(m, "num_layers", 1) > 1,
    "three projections": lambda m: getattr(m, "q_proj_weight", None) is not None,
    "one projection": lambda m: getattr(m, "in_proj_weight", None) is not None,
    "without bias": lambda m: getattr(m, "bias", 0) is None,
    "zero": lambda m: isinstance(m, nn.Linear) and not m.weight.any(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_drawn(form):
    find(layers(), FORMS[form], settings=settings(ONCE, max_examples=5000))


@given(layer=layers(types=[nn.Linear, nn.LSTM], dtypes=[torch.float64], spectra=["flat"]))
def test_layers_keep_to_what_they_are_restricted_to(layer):
    assert type(layer) in (nn.Linear, nn.LSTM)
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == torch.float64
        if parameter.ndim == 2:
            sigma = exact(parameter)
            assert (abs(sigma - sigma[0]) <= 1e-12 * sigma[0]).all(), name


@given(network=networks())
def test_networks_compute_something_finite(network):
    output = network(*example_inputs(network, batch=3))
    assert len(output) == 3
    assert torch.isfinite(output).all()
    assert len(network.layers) >= 2


NETWORK_FORMS = {
    "a layer used twice": lambda n: len({id(layer) for layer in n.layers}) < len(n.layers),
    "tied weights": lambda n: getattr(n.layers[0], "weight", None) is n.layers[-1].weight,
    "images": lambda n: isinstance(n.layers[0], nn.Conv2d),
    "attention": lambda n: any(isinstance(m, nn.MultiheadAttention) for m in n.layers),
    "recurrent": lambda n: any(isinstance(m, nn.GRU) for m in n.layers),
    "bags": lambda n: isinstance(n.layers[0], nn.EmbeddingBag),
    "bilinear": lambda n: any(isinstance(m, nn.Bilinear) for m in n.layers),
}


@pytest.mark.parametrize("form", NETWORK_FORMS)
def test_every_form_of_network_is_drawn(form):
    find(networks(), NETWORK_FORMS[form], settings=settings(ONCE, max_examples=5000))


def test_example_inputs_depend_on_their_seed_alone():
    layer = nn.Linear(3, 2)
    (a,), (b,), (c,) = example_inputs(layer), example_inputs(layer), example_inputs(layer, seed=1)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert example_inputs(layer.double(), batch=5)[0].dtype == torch.float64
    with pytest.raises(TypeError, match="LayerNorm"):
        example_inputs(nn.LayerNorm(3))


# Drawing


def drawn_with(seed, strategy):
    """What a derandomised test draws, with torch's global generator seeded before."""
    torch.manual_seed(seed)
    found = []

    @settings(database=None, derandomize=True, max_examples=20)
    @given(value=strategy)
    def collect(value):
        found.append(
            value if isinstance(value, torch.Tensor) else list(value.state_dict().values())
        )

    before = torch.random.get_rng_state()
    collect()
    assert torch.equal(torch.random.get_rng_state(), before), "the global state has moved"
    return found


@pytest.mark.parametrize(
    "strategy", [weights(), layers(), networks()], ids=["weights", "layers", "networks"]
)
def test_drawing_neither_reads_nor_moves_torchs_random_state(strategy):
    for one, other in zip(drawn_with(1, strategy), drawn_with(2, strategy), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# From several starts: what is drawn first depends on the modules that happen to be loaded, among
# whose constants Hypothesis draws.
STARTS = range(3)


def simplest(strategy, condition, start):
    return find(strategy, condition, settings=ONCE, random=random.Random(start))


@pytest.mark.parametrize("start", STARTS)
def test_weights_and_layers_shrink_to_the_simplest(start):
    weight = simplest(weights(), lambda w: bool(w.any()), start)
    assert weight.shape == (1, 1)
    assert weight.dtype == torch.float32
    weight = simplest(weights(), lambda w: w.shape[0] >= 3 and w.is_complex(), start)
    assert weight.shape == (3, 1)
    layer = simplest(layers(), lambda m: isinstance(m, nn.LSTM), start)
    assert (layer.input_size, layer.hidden_size, layer.num_layers) == (1, 1, 1)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    "types",
    [
        [nn.GRUCell, nn.Linear],
        [nn.EmbeddingBag, nn.Linear],
        [nn.ConvTranspose2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear],
        [nn.Embedding, nn.GRU, nn.Linear],
    ],
    ids=lambda types: types[-2].__name__,
)
def test_networks_shrink_to_the_layers_that_matter(types, start):
    network = simplest(networks(), lambda n: set(types) <= {type(m) for m in n.layers}, start)
    assert type(network) is Network
    assert [type(m) for m in network.layers] == types
    assert all(side == 1 for p in network.parameters() if p.ndim > 1 for side in p.shape[1:])


def run_without_hypothesis(code):
    blocked = f"import sys; sys.modules['hypothesis'] = None\n{code}"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", blocked], capture_output=True, text=True
    )


def test_assertions_work_without_hypothesis():
    done = run_without_hypothesis(
        "import torch, snparam, snparam.testing as t\n"
        "layer = torch.nn.Linear(3, 4)\n"
        "snparam.register_sn(layer)\n"
        "t.assert_spectral_norm(layer); t.assert_converted(layer)\n"
        "t.assert_same_function(layer, layer, t.example_inputs(layer))\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["weights", "layers", "networks"])
def test_strategies_without_hypothesis_name_the_extra(name):
    done = run_without_hypothesis(f"from snparam.testing import {name}")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert f"snparam.testing.{name}" in last
    assert "pip install 'snparam[testing]'" in last


def test_the_module_has_what_it_lists_and_nothing_else():
    import snparam.testing

    for name in snparam.testing.__all__:
        assert callable(getattr(snparam.testing, name))
    with pytest.raises(AttributeError, match="wieghts"):
        snparam.testing.wieghts  # noqa: B018


# assert_spectral_norm


def small_network():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Conv1d(3, 6, 2)), nn.Linear(5, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def scaled_to(model, sigma):
    """Every weight to this largest singular value."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(sigma / exact(parameter)[0])
    return model


@settings(max_examples=50)
@given(model=networks(spectra=("initial", "gaussian")), sigma=st.floats(0.1, 10.0))
def test_spectral_norms_are_judged_by_the_exact_value(model, sigma):
    """A hundredth of a percent on either side of the bound."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            module = model.get_submodule(name.rpartition(".")[0])
            weight = parameter.data
            if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                parts = weight.chunk(module.groups)
                weight = torch.cat([part.transpose(0, 1) for part in parts])
            parameter.data.mul_(sigma / float(exact(weight)[0]))
    assert_spectral_norm(model, at_most=sigma * 1.0001, rtol=0)
    with pytest.raises(AssertionError):
        assert_spectral_norm(model, at_most=sigma * 0.9999, rtol=0)
    assert_spectral_norm(model, at_most=sigma * 0.9999, rtol=2e-4)


def test_the_message_names_layer_shape_value_and_bound():
    model = scaled_to(small_network(), 0.5)
    with torch.no_grad():
        model[1][0].weight.mul_(2.468 / 0.5)
    with pytest.raises(AssertionError) as caught:
        assert_spectral_norm(model, at_most=2.0, rtol=0.1)
    message = str(caught.value)
    assert "1.0.weight" in message
    assert "Conv1d" in message
    assert "(6, 3, 2)" in message
    assert "2.468" in message
    assert "2.2" in message
    assert "0.weight Linear" not in message


def test_converted_weights_are_checked_as_eval_mode_uses_them():
    model = snparam.convert_model(small_network())
    assert_spectral_norm(model)
    norm = norm_of(model[0])
    with torch.no_grad():
        norm.u.copy_(torch.eye(5)[:1])  # a bad estimate: the weight in use is too large
    u = norm.u.clone()
    mode = [m.training for m in model.modules()]
    with pytest.raises(AssertionError, match=r"0\.weight Linear \(5, 4\)"):
        assert_spectral_norm(model)
    assert torch.equal(norm.u, u)
    assert mode == [m.training for m in model.modules()]


def test_a_weight_that_a_conversion_left_out_is_checked_unless_it_is_said():
    model = snparam.convert_model(scaled_to(small_network(), 9.0), include="2")
    with pytest.raises(AssertionError, match=r"0\.weight Linear \(5, 4\): (9|8\.99)") as caught:
        assert_spectral_norm(model)
    assert "2.weight" not in str(caught.value)
    assert_spectral_norm(model, only_converted=True)
    with pytest.raises(AssertionError, match=r"0\.weight"):
        assert_spectral_norm(snparam.restore_model(model))
    with pytest.raises(AssertionError, match="no weight under SpectralNorm"):
        assert_spectral_norm(model, only_converted=True)


def test_a_weight_of_no_known_type_is_checked_where_it_is_registered():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(5 * torch.eye(4))

    layer = snparam.register_sn(Own(), name="kernel", coeff=3.0)
    with pytest.raises(AssertionError, match=r"kernel Own \(4, 4\): 3"):
        assert_spectral_norm(layer)
    assert_spectral_norm(layer, at_most=3.0)


def test_blocks_are_checked_each_by_itself():
    layer = snparam.register_sn(nn.Linear(4, 6), blocks=3)
    assert_spectral_norm(layer)
    snparam.remove_sn(layer)
    with pytest.raises(AssertionError):  # three blocks of norm 1 have a larger one together
        assert_spectral_norm(layer)
    assert_spectral_norm(layer, blocks=3)
    with torch.no_grad():
        layer.weight[2:4] *= 1.5
    with pytest.raises(AssertionError, match=r"block 1: 1\.(5|49999)"):
        assert_spectral_norm(layer, blocks=3)
    with pytest.raises(ValueError, match=r"weight \(6, 4\).*blocks=4"):
        assert_spectral_norm(layer, blocks=4)
    attention = snparam.register_sn(nn.MultiheadAttention(4, 2), blocks="auto")
    assert_spectral_norm(attention)
    assert_spectral_norm(snparam.restore_model(attention), blocks="auto")


def test_selection_of_what_is_checked():
    model = scaled_to(small_network(), 0.5)
    scaled_to(model[2], 3.0)
    assert_spectral_norm(model, exclude="2")
    assert_spectral_norm(model, include=["0", nn.Conv1d])
    with pytest.raises(AssertionError, match=r"2\.weight"):
        assert_spectral_norm(model, include=nn.Linear)
    with pytest.raises(ValueError, match="matches no module"):
        assert_spectral_norm(model, exclude="3")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_fail(bad):
    model = scaled_to(small_network(), 0.5)
    model[2].weight.data[0, 0] = bad
    with pytest.raises(AssertionError, match=r"2\.weight Linear \(2, 5\).*NaN or inf"):
        assert_spectral_norm(model)
    converted = snparam.convert_model(small_network())
    converted[2].parametrizations.weight.original.data[0, 0] = bad
    with pytest.raises(AssertionError, match=r"2\.weight Linear \(2, 5\).*NaN or inf"):
        assert_spectral_norm(converted)


def test_a_model_with_nothing_to_check_fails():
    with pytest.raises(AssertionError, match="no weight"):
        assert_spectral_norm(nn.Sequential(nn.LayerNorm(4), nn.ReLU()))


def test_other_libraries_parametrizations_are_checked_as_they_compute():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5), n_power_iterations=30)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    assert_spectral_norm(layer)
    assert layer.training
    assert layer.parametrizations.weight[0].training
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
    scaled = nn.Linear(4, 4)
    nn.init.eye_(scaled.weight).data.mul_(3.0)  # whose rows have lengths without rounding
    nn.utils.parametrizations.weight_norm(scaled)
    with pytest.raises(AssertionError, match=r"weight Linear \(4, 4\): 3"):
        assert_spectral_norm(scaled)


# assert_converted


def test_converted_means_every_eligible_weight():
    model = small_network()
    with pytest.raises(AssertionError, match=r"3 of 3 eligible"):
        assert_converted(model)
    snparam.convert_model(model, exclude="1")
    with pytest.raises(AssertionError) as caught:
        assert_converted(model)
    assert "1 of 3 eligible" in str(caught.value)
    assert "1.0.weight Conv1d (6, 3, 2)" in str(caught.value)
    assert "2.weight" not in str(caught.value)
    assert_converted(model, exclude="1")
    assert_converted(model, include=nn.Linear)
    assert_converted(model, filter_fn=lambda module, name: not name.startswith("1"))
    with pytest.raises(AssertionError):
        assert_converted(model, include="1")
    snparam.convert_model(model)
    assert_converted(model)


def test_one_weight_of_a_layer_is_not_all_of_it():
    lstm = snparam.register_sn(nn.LSTM(3, 4), name="weight_ih_l0")
    with pytest.raises(AssertionError, match=r"weight_hh_l0 LSTM \(16, 4\)"):
        assert_converted(lstm)


def test_nothing_eligible_is_not_converted():
    with pytest.raises(AssertionError, match="none eligible"):
        assert_converted(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(AssertionError, match="max_norm"):
        assert_converted(nn.Embedding(3, 4, max_norm=1.0))


def test_a_weight_that_cannot_be_converted_yet_is_not_converted():
    layer = nn.Linear(3, 3)
    layer.weight.data[0, 0] = math.nan
    with pytest.raises(AssertionError, match=r"weight Linear \(3, 3\)"):
        assert_converted(layer)


# assert_same_function


def test_equal_networks_are_the_same_function_and_others_are_not():
    a = small_network()[0]
    b = copy.deepcopy(a)
    x = torch.randn(3, 4)
    assert_same_function(a, b, x, rtol=0, atol=0)
    b.weight.data[2, 3] += 1e-4
    with pytest.raises(AssertionError):
        assert_same_function(a, b, x)
    assert_same_function(a, b, x, rtol=0, atol=1e-2)
    assert_same_function(a, b, [x], rtol=0, atol=1e-2)
    assert_same_function(a, b, {"input": x}, rtol=0, atol=1e-2)


def test_the_message_names_the_first_layer_that_differs():
    a = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 6)), nn.Linear(6, 2))
    b = copy.deepcopy(a)
    b[2][0].weight.data += 1.0
    with pytest.raises(AssertionError) as caught:
        assert_same_function(a, b, torch.ones(3, 4))
    message = str(caught.value)
    assert "output differs between Sequential and Sequential: shape (3, 2)" in message
    assert re.search(r"Greatest absolute difference: \d.*up to 1e-05 allowed", message)
    assert message.endswith("The first layer that differs: '2.0' Linear (6, 5)")


def test_networks_are_compared_in_eval_mode_and_given_back_as_they_were():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    snparam.convert_model(model)
    model[1].eval()
    norm = norm_of(model[0])
    norm.u.copy_(torch.ones(1, 1, 4))
    twin = copy.deepcopy(model)
    assert_same_function(model, twin, torch.ones(2, 4), rtol=0, atol=0)
    assert torch.equal(norm.u, torch.ones(1, 1, 4))
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    assert model.training
    assert not model[1].training
    assert not any(m._forward_hooks for m in (model, model[1]))


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    states: tuple[torch.Tensor, ...]
    label: str = "same"


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda x: (torch.zeros(2), x), r"output\[1\]"),
        (lambda x: {"logits": x}, r"output\['logits'\]"),
        (lambda x: Output(torch.zeros(2), (x,)), r"output\.states\[0\]"),
        (lambda x: [None, {"a": (x, 3)}], r"output\[1\]\['a'\]\[0\]"),
    ],
)
def test_outputs_may_be_nested(make, where):
    assert_same_function(make, make, torch.ones(3))
    with pytest.raises(AssertionError, match=where):
        assert_same_function(make, lambda x: make(x + 1), torch.ones(3))


def test_outputs_of_another_structure_shape_dtype_or_kind_differ():
    x = torch.ones(3)
    for a, b in [
        (lambda x: (x, x), lambda x: (x,)),
        (lambda x: x, lambda x: x.view(3, 1)),
        (lambda x: x, lambda x: x.double()),
        (lambda x: x, lambda _: None),
        (lambda _: 1, lambda _: 2),
    ]:
        with pytest.raises(AssertionError):
            assert_same_function(a, b, x)
    nan = torch.full((2,), math.nan)
    assert_same_function(lambda _: nan, lambda _: nan, x)
    with pytest.raises(AssertionError):
        assert_same_function(lambda _: nan, lambda _: torch.zeros(2), x)
