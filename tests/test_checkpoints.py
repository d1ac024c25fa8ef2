"""Every spelling of one state goes in, and comes out again, and means the same network."""

import copy
import re

import pytest
import torch
from classic import classic
from holder import exact, norm_of, original_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import spectral_norm as torch_hook

import snparam
from snparam.spellings import forget_spellings
from snparam.testing import assert_same_function, example_inputs, layers, networks

# torch's own, about LSTM with proj_size
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")

SPELLINGS = ("snparam", "plain", "torch", "torch-hook", "biggan")
CLOSE = {torch.float32: 2e-5, torch.float64: 1e-10, torch.bfloat16: 3e-2}


def dominated(shape, dtype=torch.float64, axis=0, seed=0):
    """A weight with σ₂/σ₁ about 0.2, so that fifteen steps of power iteration are converged."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[axis], torch.Size(shape).numel() // shape[axis]
    top = torch.outer(*(torch.randn(n, generator=generator) for n in (rows, columns)))
    rest = torch.randn(rows, columns, generator=generator)
    matrix = 3 * top / torch.linalg.matrix_norm(top, 2)
    matrix = matrix + 0.5 * rest / torch.linalg.matrix_norm(rest, 2)
    others = [size for d, size in enumerate(shape) if d != axis]
    return matrix.reshape(rows, *others).movedim(0, axis).contiguous().to(dtype)


KINDS = {
    "linear": lambda a, b: nn.Linear(b, a),
    "conv": lambda a, b: nn.Conv2d(b, a, 2, bias=False),
    "transposed": lambda a, b: nn.ConvTranspose1d(b, a, 3),
    "embedding": lambda a, b: nn.Embedding(a, b),
    "bilinear": lambda a, b: nn.Bilinear(2, b, a),
}


@st.composite
def single_layers(draw, kinds=tuple(KINDS), dtypes=(torch.float32, torch.float64)):
    kind, dtype = draw(st.sampled_from(kinds)), draw(st.sampled_from(dtypes))
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    layer = KINDS[kind](rows, columns).to(dtype)
    axis = 1 if kind == "transposed" else 0
    shape = tuple(layer.weight.shape)
    layer.weight.data = dominated(shape, dtype, axis, draw(st.integers(0, 5)))
    return layer


def inputs_of(layer):
    if isinstance(layer, nn.Embedding):
        return torch.arange(layer.num_embeddings)
    generator = torch.Generator().manual_seed(1)
    dtype = next(layer.parameters()).dtype
    if isinstance(layer, nn.Bilinear):
        sizes = (layer.in1_features, layer.in2_features)
        return [torch.randn(3, n, generator=generator).to(dtype) for n in sizes]
    sizes = {
        nn.Linear: lambda: (3, layer.in_features),
        nn.Conv2d: lambda: (2, layer.in_channels, 4, 5),
        nn.ConvTranspose1d: lambda: (2, layer.in_channels, 4),
    }
    (size,) = (make() for kind, make in sizes.items() if isinstance(layer, kind))
    return torch.randn(*size, generator=generator).to(dtype)


def foreign(layer, spelling, num_svs=1):
    """A copy of a layer under an implementation of its own."""
    layer = copy.deepcopy(layer)
    dtype = layer.weight.dtype
    if spelling == "torch":
        torch_parametrizations.spectral_norm(layer)
    elif spelling == "torch-hook":
        torch_hook(layer)
    elif spelling == "biggan":
        layer = classic(layer, num_svs)
    return layer.to(dtype)


def run(layer):
    inputs = inputs_of(layer)
    return layer(*inputs) if isinstance(inputs, list) else layer(inputs)


def trained(layer, forwards=15):
    with torch.no_grad():
        for _ in range(forwards):
            run(layer)
    return layer


def blank(layer, **options):
    """The same layer with other values, converted."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return snparam.convert_model(layer, progress=False, **options)


def spelled(model, spelling, bake=True):
    if spelling == "snparam":
        return model.state_dict()
    if spelling == "plain":
        return snparam.plain_state_dict(model, bake)
    return snparam.state_dict_for(model, spelling)


def same_output(a, b, layer):
    inputs = inputs_of(layer)
    inputs = tuple(inputs) if isinstance(inputs, list) else (inputs,)
    tolerance = CLOSE[layer.weight.dtype]
    assert_same_function(a, b, inputs, rtol=tolerance, atol=tolerance)


# In


@given(
    layer=single_layers(),
    spelling=st.sampled_from(("torch", "torch-hook")),
    num_svs=st.integers(1, 3),
    assign=st.booleans(),
)
def test_torchs_spellings_go_in_strictly_and_mean_the_same(layer, spelling, num_svs, assign):
    source = trained(foreign(layer, spelling))
    model = blank(layer, num_svs=num_svs)
    k = norm_of(model).u.shape[1]
    keys = model.load_state_dict(source.state_dict(), assign=assign)
    assert keys == ([], [])
    u = source.state_dict()[
        "weight_u" if spelling == "torch-hook" else "parametrizations.weight.0._u"
    ]
    assert torch.equal(norm_of(model).u[0, 0].to(u.dtype), u), "the u of the checkpoint, to the bit"
    assert norm_of(model).u.shape == (1, k, u.shape[0])
    same_output(model, source, layer)
    assert_exact_state(model, k)


@given(
    layer=single_layers(kinds=("linear", "conv", "embedding"), dtypes=(torch.float32,)),
    have=st.integers(1, 4),
    want=st.integers(1, 4),
    forwards=st.sampled_from([0, 1, 15]),
)
def test_biggans_spelling_goes_in_with_any_number_of_singular_values(layer, have, want, forwards):
    most = min(layer.weight.shape[0], layer.weight[0].numel())
    have = min(have, most)
    source = trained(foreign(layer, "biggan", have), forwards)
    model = blank(layer, num_svs=want)
    assert model.load_state_dict(source.state_dict()) == ([], [])
    norm = norm_of(model)
    kept = min(have, norm.u.shape[1])
    for i in range(kept):
        assert torch.equal(norm.u[0, i], getattr(source, f"u{i}")[0])
        assert torch.equal(norm.sv[0, i], getattr(source, f"sv{i}")[0])
    same_output(model, source, layer)  # it is the classic layer: whatever u is
    more = norm.u[0, kept:].double()
    torch.testing.assert_close(more @ more.T, torch.eye(len(more), dtype=torch.float64))


def assert_exact_state(model, k):
    """u and sv are those of the weight, by a decomposition in float64."""
    norm, weight = norm_of(model), original_of(model).detach()
    axis = 1 if isinstance(model, nn.ConvTranspose1d) else 0
    matrix = weight.movedim(axis, 0).flatten(1).double()
    sv = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(norm.sv[0].double(), sv[:k], rtol=1e-3, atol=1e-4)
    found = torch.linalg.vector_norm(norm.u[0].double() @ matrix, dim=1)
    torch.testing.assert_close(found, sv[:k], rtol=1e-3, atol=1e-3)
    gram = norm.u[0].double() @ norm.u[0].double().T
    torch.testing.assert_close(gram, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-3)


@given(layer=single_layers(), num_svs=st.integers(1, 3), assign=st.booleans())
def test_a_plain_weight_is_estimated_as_a_registration_does(layer, num_svs, assign):
    model = blank(layer, num_svs=num_svs)
    model.load_state_dict(layer.state_dict(), assign=assign)
    fresh = snparam.convert_model(copy.deepcopy(layer), num_svs, progress=False)
    for key, tensor in fresh.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=0, atol=0)
    assert torch.equal(original_of(model), layer.weight)


@settings(max_examples=60)
@given(model=networks(), num_svs=st.integers(1, 3))
def test_networks_of_every_layer_take_plain_weights(model, num_svs):
    """Attention, recurrent layers, groups: whatever their tensors are called."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter))
    snparam.convert_model(other, num_svs, progress=False)
    other.load_state_dict(model.state_dict())
    snparam.convert_model(model, num_svs, progress=False)
    for key, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor), key


def mixture():
    layers = [nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(3, 2)]
    for i, layer in enumerate(layers):
        layer.weight.data = dominated(tuple(layer.weight.shape), torch.float32, seed=i)
    return nn.Sequential(*layers)


def test_a_mixture_of_all_spellings_goes_in():
    ordinary = mixture()
    sources = [
        trained(layer)
        for layer in (
            snparam.register_sn(copy.deepcopy(ordinary[0]), 2),
            foreign(ordinary[1], "torch"),
            foreign(ordinary[2], "torch-hook"),
            foreign(ordinary[3], "biggan", 2),
            ordinary[4],
        )
    ]
    source = nn.Sequential(*sources).eval()
    model = snparam.convert_model(mixture(), 2).eval()
    for parameter in model.parameters():
        parameter.data.normal_()
    assert model.load_state_dict(source.state_dict()) == ([], [])
    x = torch.randn(3, 4)
    expected = source[:4](x)
    torch.testing.assert_close(model[:4](x), expected)
    top = float(exact(ordinary[4].weight)[0])
    torch.testing.assert_close(
        model(x), nn.functional.linear(expected, ordinary[4].weight / top, ordinary[4].bias)
    )


def test_within_one_weight_spellings_mix_too():
    layer = nn.Linear(4, 3)
    model = snparam.register_sn(nn.Linear(4, 3))
    u = torch.tensor([1.0, 0.0, 0.0])
    state = {"weight": layer.weight, "bias": layer.bias, "weight_u": u}
    model.load_state_dict(state)
    assert torch.equal(norm_of(model).u[0, 0], u)
    state = {"weight_orig": layer.weight, "bias": layer.bias}
    model.load_state_dict({**state, "parametrizations.weight.0.u": u.flip(0).reshape(1, 1, 3)})
    assert torch.equal(norm_of(model).u[0, 0], u.flip(0))
    # torch before 1.0: the normalised weight beside the original, and no v
    model.load_state_dict({**state, "weight": layer.weight / 2, "weight_u": u})
    assert torch.equal(norm_of(model).u[0, 0], u)
    assert torch.equal(original_of(model), layer.weight)


@pytest.mark.parametrize("blocks", [2, 6])
@pytest.mark.parametrize("spelling", ["torch", "torch-hook", "biggan"])
def test_into_several_blocks_the_state_is_estimated(blocks, spelling):
    layer = nn.Linear(4, 6)
    model = snparam.register_sn(nn.Linear(4, 6), 1, blocks=blocks)
    model.load_state_dict(trained(foreign(layer, spelling), 1).state_dict())
    fresh = snparam.register_sn(copy.deepcopy(layer), 1, blocks=blocks)
    assert torch.equal(norm_of(model).u, norm_of(fresh).u)
    assert torch.equal(norm_of(model).sv, norm_of(fresh).sv)


def test_groups_that_torch_reads_as_another_matrix_are_estimated():
    layer = nn.ConvTranspose1d(4, 6, 3, groups=2)
    model = snparam.register_sn(nn.ConvTranspose1d(4, 6, 3, groups=2))
    model.load_state_dict(foreign(layer, "torch").state_dict())
    fresh = snparam.register_sn(copy.deepcopy(layer))
    assert torch.equal(norm_of(model).u, norm_of(fresh).u)


def test_another_dim_of_torchs_is_the_transpose():
    layer = nn.Linear(4, 3)
    layer.weight.data = dominated((3, 4), torch.float32)
    source = trained(torch_parametrizations.spectral_norm(copy.deepcopy(layer), dim=1))
    model = snparam.register_sn(nn.Linear(4, 3))
    model.load_state_dict(source.state_dict())
    v = source.parametrizations.weight[0]._v
    assert torch.equal(norm_of(model).u[0, 0], v)
    same_output(model, source, layer)


def test_a_module_keeps_tensors_of_its_own_that_look_like_state():
    class Odd(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.weight_orig = nn.Parameter(torch.randn(3, 4))
            self.register_buffer("weight_u", torch.randn(3))
            self.register_buffer("u0", torch.randn(1, 3))

    odd, model = Odd(), snparam.register_sn(Odd())
    model.load_state_dict(odd.state_dict())
    for name in ("weight_orig", "weight_u", "u0"):
        assert torch.equal(getattr(model, name), getattr(odd, name))
    assert torch.equal(original_of(model), odd.weight)
    fresh = snparam.register_sn(copy.deepcopy(odd))
    assert torch.equal(norm_of(model).u, norm_of(fresh).u)


@pytest.mark.parametrize("gain", ["learned", "fixed"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_with_a_gain_a_plain_checkpoint_keeps_its_function(gain, blocks):
    layer = nn.Linear(4, 6)
    model = snparam.register_sn(nn.Linear(4, 6), gain=gain, blocks=blocks)
    model.load_state_dict(layer.state_dict())
    assert norm_of(model).gain.shape == (blocks,)
    assert norm_of(model).gain.requires_grad == (gain == "learned")
    same_output(model, layer, layer)


@pytest.mark.parametrize("gain", ["learned", "fixed"])
@pytest.mark.parametrize("spelling", ["torch", "torch-hook", "biggan", "snparam"])
def test_with_a_gain_a_normalised_checkpoint_keeps_its_function(gain, spelling):
    layer = nn.Linear(4, 6)
    layer.weight.data = dominated((6, 4), torch.float32)
    source = foreign(layer, spelling)
    source = trained(snparam.register_sn(source) if spelling == "snparam" else source)
    model = snparam.register_sn(nn.Linear(4, 6), gain=gain)
    model.load_state_dict(source.state_dict())
    same_output(model, source, layer)
    assert torch.equal(norm_of(model).gain, torch.ones(1))


def test_a_gain_that_is_there_is_loaded_and_a_surplus_one_reported():
    source = snparam.register_sn(nn.Linear(4, 6), gain="learned")
    norm_of(source).gain.data.fill_(2.5)
    model = snparam.register_sn(nn.Linear(4, 6), gain="fixed")
    model.load_state_dict(source.state_dict())
    assert norm_of(model).gain.item() == 2.5
    with pytest.raises(RuntimeError, match=r"Unexpected.*parametrizations\.weight\.0\.gain"):
        snparam.register_sn(nn.Linear(4, 6)).load_state_dict(source.state_dict())


def test_a_zero_weight_has_gain_one():
    model = snparam.register_sn(nn.Linear(4, 6), gain="learned")
    model.load_state_dict({"weight": torch.zeros(6, 4), "bias": torch.zeros(6)})
    assert norm_of(model).gain.item() == 1
    assert model(torch.ones(1, 4)).abs().max() == 0


def test_what_is_not_in_the_checkpoint_stays_as_it_is():
    model = snparam.convert_model(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)))
    trained_once = copy.deepcopy(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    keys = trained_once.load_state_dict({"1.weight": torch.ones(3, 5)}, strict=False)
    assert keys.unexpected_keys == []
    assert keys.missing_keys == [k for k in before if not k.startswith("1.p")]
    for key, tensor in trained_once.state_dict().items():
        assert torch.equal(tensor, before[key]) == (not key.startswith("1.p")), key
    assert norm_of(trained_once[1]).sv.item() == pytest.approx(15**0.5)


def test_the_state_dict_that_was_passed_is_left_alone():
    layer = foreign(nn.Linear(4, 3), "torch-hook")
    state = layer.state_dict()
    keys, tensors = list(state), [tensor.clone() for tensor in state.values()]
    snparam.register_sn(nn.Linear(4, 3)).load_state_dict(state)
    assert list(state) == keys
    assert all(torch.equal(*pair) for pair in zip(state.values(), tensors, strict=True))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_are_the_models_or_with_assign_the_checkpoints(spelling, dtype):
    source = snparam.register_sn(nn.Linear(4, 6).to(dtype))
    state = spelled(source, spelling)
    wide = torch.promote_types(dtype, torch.float32)
    for assign, weight, u in ((False, torch.float32, torch.float32), (True, dtype, wide)):
        model = snparam.register_sn(nn.Linear(4, 6))
        model.load_state_dict(state, assign=assign)
        assert original_of(model).dtype == weight
        assert norm_of(model).u.dtype == norm_of(model).sv.dtype == u
        assert model.weight.dtype == weight
        largest = torch.linalg.matrix_norm(model.eval().weight.detach().double(), 2)
        assert float(largest) == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("update", ["forward", "step"])
def test_a_model_on_the_meta_device_is_filled_by_assign(spelling, update):
    layer = nn.Linear(4, 6)
    source = snparam.register_sn(copy.deepcopy(layer))
    model = snparam.register_sn(nn.Linear(4, 6), update=update).to("meta")
    model.load_state_dict(spelled(source, spelling), assign=True)
    same_output(model, source, layer)
    for each in (model.train(), copy.deepcopy(model)):
        output = each(torch.ones(1, 4))
        torch.testing.assert_close(output, source.eval()(torch.ones(1, 4)))
        output.sum().backward()
        assert torch.isfinite(original_of(each).grad).all()


@pytest.mark.parametrize("spelling", ["plain", "torch", "torch-hook", "biggan"])
def test_under_update_step_the_next_forward_uses_what_was_loaded(spelling):
    source = snparam.register_sn(nn.Linear(4, 6))
    model = snparam.register_sn(nn.Linear(4, 6), update="step")
    model(torch.randn(2, 4))
    model.load_state_dict(spelled(source, spelling))
    x = torch.randn(2, 4)
    torch.testing.assert_close(model(x), source.eval()(x))


# Shared weights


def tied():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("spelling", ["snparam", "plain", "torch", "torch-hook", "biggan"])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("gain", [None, "learned"])
def test_tied_weights_stay_one_parameter_with_one_state(spelling, assign, gain):
    source = snparam.convert_model(tied())
    model = snparam.convert_model(tied(), 2, gain=gain)
    for _ in range(2):  # a second time, because the first may leave something behind
        source[0].parametrizations.weight.original.data.normal_()
        norm_of(source[0]).refresh(original_of(source[0]))
        model.load_state_dict(spelled(source, spelling), assign=assign)
        assert original_of(model[0]) is original_of(model[1])
        assert norm_of(model[0]) is norm_of(model[1])
        assert len(list(model.parameters())) == (1 if gain is None else 2)
        x = torch.arange(7)
        torch.testing.assert_close(model.eval()(x), source.eval()(x))


def test_assigning_other_values_to_tied_weights_parts_them_and_their_states():
    model = snparam.convert_model(tied())
    state = {"0.weight": torch.randn(7, 4), "1.weight": torch.randn(7, 4)}
    model.load_state_dict(state, assign=True)
    for i in (0, 1):
        assert torch.equal(original_of(model[i]), state[f"{i}.weight"])
        top = float(exact(state[f"{i}.weight"])[0])
        torch.testing.assert_close(model[i].eval().weight, state[f"{i}.weight"] / top)
    assert norm_of(model[0]) is not norm_of(model[1])


# Copies and removal


def test_a_copy_accepts_every_spelling_by_itself():
    model = snparam.register_sn(nn.Linear(4, 3))
    before = original_of(model).clone()
    twin = copy.deepcopy(model)
    layer = nn.Linear(4, 3)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(original_of(twin), layer.weight)
    assert torch.equal(original_of(model), before)
    del model
    twin.load_state_dict(foreign(layer, "torch").state_dict())


@pytest.mark.parametrize("remove", [snparam.remove_sn, snparam.restore_model])
def test_an_ordinary_module_again_accepts_the_plain_spelling_only(remove):
    model = remove(snparam.register_sn(nn.Linear(4, 3)))
    assert not model._load_state_dict_pre_hooks
    model.load_state_dict(nn.Linear(4, 3).state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight_orig"'):
        model.load_state_dict(foreign(nn.Linear(4, 3), "torch-hook").state_dict())


def test_modules_beside_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    snparam.convert_model(model, include="0")
    assert not model[1]._load_state_dict_pre_hooks
    state = {"0.weight": torch.ones(3, 4), "0.bias": torch.ones(3), "1.bias": torch.ones(2)}
    with pytest.raises(RuntimeError, match=r'Missing key.*"1.weight".*\n.*Unexpected.*"1.weight_o'):
        model.load_state_dict({**state, "1.weight_orig": torch.ones(2, 3)})


# Errors


def message(model, state, **options):
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(state, **options)
    return str(caught.value)


def outcome(model, state, strict):
    """What `load_state_dict` returns, or says."""
    try:
        return model.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        return str(error)


def without_hooks(model):
    """What torch alone makes of the same model."""
    model = copy.deepcopy(model)
    for module in model.modules():
        forget_spellings(module)
    return model


OWN = "0.parametrizations.weight."
FAULTS = {
    "missing bias": lambda s: s.pop("0.bias"),
    "surplus key": lambda s: s.update({"0.other": torch.ones(2)}),
    "surplus below": lambda s: s.update({OWN + "0.other": torch.ones(2)}),
    "surplus module": lambda s: s.update({"7.weight": torch.ones(2)}),
    "two weights": lambda s: s.update({"0.weight": s[OWN + "original"]}),
    "hooked beside": lambda s: s.update({"0.weight_orig": s[OWN + "original"]}),
    "two states": lambda s: s.update({OWN + "0._u": torch.ones(5)}),
    "no tensor": lambda s: s.update({OWN + "original": "weights"}),
    "weight shape": lambda s: s.update({OWN + "original": torch.ones(5, 3)}),
    "u shape": lambda s: s.update({OWN + "0.u": torch.ones(1, 1, 4)}),
    "u blocks": lambda s: s.update({OWN + "0.u": torch.ones(5, 1, 1)}),
    "sv shape": lambda s: s.update({OWN + "0.sv": torch.ones(2, 1)}),
    "gain shape": lambda s: s.update({OWN + "0.gain": torch.ones(2)}),
    "nothing at all": lambda s: s.clear(),
    "no weight": lambda s: s.pop(OWN + "original"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("strict", [True, False])
def test_faults_are_reported_as_torch_reports_them(fault, strict):
    model = snparam.convert_model(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), gain="learned")
    state = dict(copy.deepcopy(model).state_dict())
    FAULTS[fault](state)
    alone = without_hooks(model)
    assert outcome(model, state, strict) == outcome(alone, state, strict)


def in_torchs_words(text):
    """A message about our keys, as one about the keys of torch's parametrization."""
    return text.replace("0.u", "0._u").replace("0.sv", "0._v")


@pytest.mark.parametrize("spelling", ["torch", "torch-hook", "biggan", "plain"])
@pytest.mark.parametrize("fault", ["missing layer", "missing bias", "surplus", "shape"])
def test_faults_in_other_spellings_are_reported_as_torch_does_in_its_own(spelling, fault):
    """Next to a model under torch's parametrization that gets the same fault."""

    def broken(state, layer):
        state = {f"0.{key}": tensor for key, tensor in state.items()}
        if fault == "missing layer":
            return {key: tensor for key, tensor in state.items() if key == "0.bias"}
        if fault == "missing bias":
            del state["0.bias"]
        if fault == "surplus":
            state["0.weight_g"] = torch.ones(3, 1)
        if fault == "shape":
            (key,) = (k for k, v in state.items() if v.shape == (5, 4))
            state[key] = torch.ones(5, 9)
        return state

    layer = nn.Linear(4, 5)
    model = nn.Sequential(snparam.register_sn(copy.deepcopy(layer)))
    theirs = nn.Sequential(foreign(layer, "torch"))
    ours = message(model, broken(foreign(layer, spelling).state_dict(), layer))
    expected = message(theirs, broken(foreign(layer, "torch").state_dict(), layer))
    assert in_torchs_words(ours) == expected


@pytest.mark.parametrize(
    ("spelling", "key", "shape"),
    [
        ("torch", "parametrizations.weight.0._u", (9,)),
        ("torch", "parametrizations.weight.0._u", (1, 5)),
        ("torch-hook", "weight_u", (9,)),
        ("biggan", "u0", (1, 9)),
        ("biggan", "u0", (5,)),
        ("biggan", "sv0", (2,)),
        ("torch", "parametrizations.weight.0._v", (9,)),
        ("torch-hook", "weight_v", (9,)),
    ],
)
def test_a_state_of_a_wrong_shape_is_an_error_and_leaves_the_weight_alone(spelling, key, shape):
    model = snparam.convert_model(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)))
    state = nn.Sequential(foreign(nn.Linear(4, 5), spelling), nn.Linear(5, 2)).state_dict()
    state[f"0.{key}"] = torch.ones(shape)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    text = message(model, state)
    at = {"u": "parametrizations.weight.0.u", "s": "parametrizations.weight.0.sv"}
    ours = key if "_v" in key else at["s" if key[0] == "s" else "u"]
    now = [4] if "_v" in key else ([1, 1] if key[0] == "s" else [1, 1, 5])
    assert text == (
        "Error(s) in loading state_dict for Sequential:\n\t"
        f"size mismatch for 0.{ours}: copying a param with shape {torch.Size(shape)} "
        f"from checkpoint, the shape in current model is {torch.Size(now)}."
    )
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in after if k.startswith("0.p"))
    assert torch.equal(after["1.parametrizations.weight.original"], state["1.weight"])


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_weight_of_a_wrong_shape_leaves_its_state_alone_and_loads_the_rest(spelling):
    """torch loads whatever fits, and raises then; a weight and its state go together."""
    model = snparam.convert_model(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)))
    source = snparam.convert_model(nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 2)))
    before = {k: t.clone() for k, t in model.state_dict().items()}
    expected = r"size mismatch for 0\.parametrizations\.weight\.original: .*\[5, 9\].*\[5, 4\]\)\.$"
    assert re.search(expected, message(model, spelled(source, spelling)))
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in after if k.startswith("0.p"))
    assert torch.equal(after["0.bias"], source[0].bias)
    assert not torch.equal(after["1.bias"], before["1.bias"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_cannot_be_estimated_is_named_and_not_loaded(bad):
    model = snparam.convert_model(nn.Sequential(nn.Linear(4, 5)))
    before = {k: t.clone() for k, t in model.state_dict().items()}
    weight = torch.ones(5, 4)
    weight[2, 1] = bad
    text = message(model, {"0.weight": weight, "0.bias": before["0.bias"]})
    assert 'SpectralNorm on "0.weight" (5, 4)' in text
    assert "NaN or inf" in text
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


# Out


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


def matrix_shape(layer):
    axis = 1 if isinstance(layer, nn.ConvTranspose1d) else 0
    return layer.weight.shape[axis], layer.weight.numel() // layer.weight.shape[axis]


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
    state = snparam.plain_state_dict(model)
    assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()
    torch.testing.assert_close(state["0.weight"], model[0].eval().weight)


def test_a_parameter_that_is_also_used_as_it_is_cannot_be_baked():
    model = snparam.convert_model(tied(), exclude="0")
    with pytest.raises(ValueError, match=r"'1.weight' \(7, 4\).*'0.weight'.*bake=False"):
        snparam.plain_state_dict(model)
    assert list(snparam.plain_state_dict(model, bake=False)) == ["0.weight", "1.weight"]


INEXPRESSIBLE = [
    (nn.Linear(4, 6), {"blocks": 2}, "torch", "blocks=2"),
    (nn.Linear(4, 6), {"soft": True, "coeff": 2.0}, "torch-hook", "coeff=2, soft=True"),
    (nn.Linear(4, 6), {"coeff": 3.0}, "biggan", "coeff=3"),
    (nn.Linear(4, 6), {"gain": "fixed"}, "torch", "gain='fixed'"),
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
    with pytest.raises(ValueError, match=r"'tensorflow'.*'torch', 'torch-hook', 'biggan'"):
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
