"""Every spelling of one state goes into a converted network, and means the same there."""

import copy

import pytest
import torch
from helpers.holder import exact, norm_of, original_of
from helpers.spelled import (
    SPELLINGS,
    assert_exact_state,
    blank,
    dominated,
    foreign,
    same_output,
    single_layers,
    spelled,
    tied,
    trained,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn.utils import parametrizations as torch_parametrizations

import snparam
from snparam.parametrization import extensions
from snparam.parametrization.extensions import Spelled, Spelling, State, register_spelling
from snparam.testing import networks

# torch's own, about LSTM with proj_size
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")


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


@pytest.mark.parametrize("gain", ["learned", "fixed", None])
@pytest.mark.parametrize("blocks", [1, 3])
def test_with_a_gain_a_plain_checkpoint_keeps_its_function(gain, blocks):
    layer = nn.Linear(4, 6)
    model = snparam.register_sn(nn.Linear(4, 6), gain=gain, constraint="gain", blocks=blocks)
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
    torch.testing.assert_close(norm_of(model).gain.detach(), torch.ones(1))


@pytest.mark.parametrize("spelling", ["torch", "torch-hook", "biggan"])
@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (nn.Linear(4, 6), {}),
        (nn.Linear(4, 6), {"blocks": 3}),
        (nn.Conv2d(4, 6, 3), {"blocks": 2}),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), {}),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), {"blocks": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("update", ["forward", "step"])
def test_with_a_gain_so_does_one_of_another_estimate_or_of_other_matrices(
    spelling, layer, options, update
):
    """torch's u and v after one forward are far from converged, and a network computes by them."""
    if spelling == "biggan" and isinstance(layer, nn.ConvTranspose1d):
        pytest.skip("BigGAN has no such layer")
    source = trained(foreign(layer, spelling), 1)
    model = snparam.register_sn(copy.deepcopy(layer), gain="fixed", update=update, **options)
    original_of(model).data.normal_()
    model.load_state_dict(source.state_dict())
    same_output(model, source, layer)


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


# Modules that rename the keys of older versions


class Renames(nn.Linear):
    """By its class."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if f"{prefix}kernel" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state_dict, prefix, *args)


def rename(module, state_dict, prefix, *_):
    if f"{prefix}kernel" in state_dict:
        state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel")


@pytest.mark.parametrize("way", ["class", "hook before", "hook after"])
def test_modules_that_rename_keys_still_do(way):
    layer = nn.Linear(4, 3)
    model = nn.Sequential(Renames(4, 3) if way == "class" else nn.Linear(4, 3))
    if way == "hook before":
        model[0].register_load_state_dict_pre_hook(rename)
    snparam.convert_model(model)
    if way == "hook after":
        model[0].register_load_state_dict_pre_hook(rename)
    assert model.load_state_dict({"0.kernel": layer.weight, "0.bias": layer.bias}) == ([], [])
    assert torch.equal(original_of(model[0]), layer.weight)
    assert_exact_state(model[0], 1)


# Spellings that others register


class Bar(Spelling):
    """`weight_bar`, and torch's names for vectors of other shapes."""

    name = "bar"

    def weight_key(self, tensor_name):
        return f"{tensor_name}_bar"

    def read(self, weight, tensors):
        u = tensors.get(f"{weight.tensor_name}_u")
        return None if u is None else State(u.unsqueeze(0), keys=(f"{weight.tensor_name}_u",))

    def write(self, weight):
        name, norm = weight.tensor_name, weight.norm
        return Spelled({f"{name}_bar": weight.original.detach()}, {f"{name}_u": norm.u[0]})


@pytest.fixture
def _bar():
    register_spelling(Bar())
    yield
    extensions.SPELLINGS.pop()


@pytest.mark.usefixtures("_bar")
def test_a_registered_spelling_is_read_and_written():
    """Its state has a name that torch's hook has too; the key of the weight tells them apart."""
    source = snparam.convert_model(mixture(), 2, init="random")
    model = snparam.convert_model(mixture(), 2, init="random")
    state = snparam.state_dict_for(source, "bar")
    assert {key for key in state if key[0] == "0"} == {"0.weight_bar", "0.bias", "0.weight_u"}
    assert model.load_state_dict(state) == ([], [])
    for ours, theirs in zip(model, source, strict=True):
        assert torch.equal(norm_of(ours).u, norm_of(theirs).u)
        assert torch.equal(original_of(ours), original_of(theirs))
    # and torch's hook is read as before
    layer = trained(foreign(mixture()[0], "torch-hook"))
    model[0].load_state_dict(layer.state_dict())
    assert torch.equal(norm_of(model[0]).u[0, 0], layer.weight_u)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'torch' is registered already"):
        register_spelling(type(extensions.SPELLINGS[2])())
    assert [spelling.name for spelling in extensions.SPELLINGS].count("torch") == 1


# Our own state


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("num_svs", [1, 3])
@pytest.mark.parametrize(
    "update",
    [
        "forward",
        "step",
    ],
)
def test_a_state_in_our_own_spelling_is_what_was_saved_to_the_bit(update, num_svs, assign):
    """Far from converged, so that whatever is computed from it differs."""
    source = snparam.convert_model(mixture(), num_svs=num_svs, init="random", update=update)
    with torch.no_grad():
        for layer in source:
            original_of(layer).add_(torch.randn_like(original_of(layer)))
    saved = copy.deepcopy(source.state_dict())
    model = snparam.convert_model(mixture(), num_svs=num_svs, update=update)
    model.load_state_dict(copy.deepcopy(saved), assign=assign)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[key]), key
    for layer, theirs in zip(model, source, strict=True):
        assert torch.equal(norm_of(layer).u, norm_of(theirs).u)
        assert torch.equal(norm_of(layer).sv, norm_of(theirs).sv)


# Loading by swapping tensors


@pytest.fixture
def _swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("_swapping")
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("update", ["forward", "step"])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    "used",
    [
        "never",
        "before",
    ],
)
def test_tensors_are_swapped_as_torch_swaps_those_of_its_own(spelling, update, assign, used):
    layer = nn.Linear(4, 6)
    layer.weight.data = dominated((6, 4), torch.float32)
    source = trained(foreign(layer, spelling), 30)
    source = snparam.register_sn(layer) if spelling in ("snparam", "plain") else source
    state = spelled(source, spelling) if spelling in ("snparam", "plain") else source.state_dict()
    model = snparam.register_sn(nn.Linear(4, 6), update=update)
    original, norm = original_of(model), norm_of(model)
    if used == "before":
        model(torch.randn(2, 4)).sum().backward()
        model.zero_grad()
        model.eval()(torch.randn(2, 4))
    assert model.load_state_dict(copy.deepcopy(state), assign=assign) == ([], [])
    assert original_of(model) is original
    assert norm_of(model) is norm
    same_output(model, source, nn.Linear(4, 6))


@pytest.mark.usefixtures("_swapping")
def test_a_weight_that_was_assigned_before_is_swapped():
    source, model = (snparam.register_sn(nn.Linear(4, 6)) for _ in range(2))
    torch.__future__.set_swap_module_params_on_conversion(False)
    model.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    torch.__future__.set_swap_module_params_on_conversion(True)
    assert model.load_state_dict(copy.deepcopy(source.state_dict())) == ([], [])


@pytest.mark.usefixtures("_swapping")
@pytest.mark.parametrize("assign", [False, True])
def test_swapped_weights_that_are_tied_stay_tied(assign):
    source, model = (snparam.convert_model(tied()) for _ in range(2))
    for _ in range(2):
        model.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
        assert original_of(model[0]) is original_of(model[1])
        assert norm_of(model[0]) is norm_of(model[1])
    x = torch.arange(7)
    torch.testing.assert_close(model.eval()(x), source.eval()(x))


# Shared weights


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


# State dicts that were filled up with the model's own tensors


def filled_up(model, state):
    model.load_state_dict({**model.state_dict(), **state})


def by_torch_distributed(model, state):
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, dict(state), options=options)


@pytest.mark.parametrize("fill", [filled_up, by_torch_distributed])
@pytest.mark.parametrize("spelling", ["plain", "torch-hook", "biggan"])
@pytest.mark.parametrize("gain", [None, "learned"])
def test_other_spellings_count_more_than_what_the_model_has_already(fill, spelling, gain):
    """accelerate reads checkpoints by the function of torch's that is used here."""
    layer = nn.Linear(4, 6)
    layer.weight.data = dominated((6, 4), torch.float32)
    source = trained(foreign(layer, spelling))
    model = nn.Sequential(snparam.register_sn(nn.Linear(4, 6), gain=gain))
    fill(model, nn.Sequential(source).state_dict())
    assert torch.equal(original_of(model[0]), layer.weight)
    expected = source
    if spelling == "plain" and gain is None:
        expected = snparam.register_sn(copy.deepcopy(layer))
    same_output(model[0], expected, layer)
