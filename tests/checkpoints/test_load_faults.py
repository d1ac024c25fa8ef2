"""What a state dict lacks, or has too much, is reported as torch does, and loads nothing wrong."""

import copy
import re

import pytest
import torch
from helpers.holder import original_of
from helpers.spelled import SPELLINGS, assert_exact_state, foreign, spelled
from torch import nn

import snparam
from snparam.checkpoints.load import forget_spellings
from snparam.parametrization.classes import give_own_class

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
    model.load_state_dict(nn.Linear(4, 3).state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight_orig"'):
        model.load_state_dict(foreign(nn.Linear(4, 3), "torch-hook").state_dict())


def test_modules_beside_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    snparam.convert_model(model, include="0")
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


def without_spellings(model):
    """The same model, of which torch alone loads the state."""
    model = copy.deepcopy(model)
    for module in model.modules():
        give_own_class(module)  # a copy shares it with the model
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
    alone = without_spellings(model)
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
        ("biggan", "u0", (1, 1, 5)),
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


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("saved", "here"), [(3, 1), (1, 3), (3, 2)])
def test_a_state_of_other_blocks_is_an_error_that_names_the_option(saved, here, assign):
    source, model = (
        snparam.convert_model(nn.Sequential(nn.Linear(4, 12)), blocks=blocks)
        for blocks in (saved, here)
    )
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(source.state_dict(), assign=assign)
    assert re.search(
        rf"SpectralNorm on '0\.weight' \(12, 4\): .* read it in {saved} .* in {here}; .*"
        rf"\(blocks={saved} for this weight\)",
        str(caught.value),
    )
    assert "size mismatch for 0.parametrizations.weight.0.u" in str(caught.value)


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


PLAIN_FAULTS = {
    "a shape": {"0.weight": torch.ones(5, 9)},
    "no dimension": {"0.weight": torch.ones(())},
    "no tensor": {"0.weight": [1.0, 2.0]},
    "nothing": {"0.weight": None},
    "another layout": {"0.weight": torch.ones(5, 4).to_sparse()},
    "a surplus tensor": {"other": torch.ones(1)},
    "a surplus tensor of the layer": {"0.weight_g": torch.ones(5, 1)},
    "torch's v alone": {"0.weight_v": torch.ones(4)},
    "BigGAN's sv alone": {"0.sv0": torch.ones(1)},
    "BigGAN's u1 alone": {"0.u1": torch.ones(1, 5)},
}


@pytest.mark.parametrize("fault", PLAIN_FAULTS)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_faults_in_a_plain_one_are_reported_as_the_ordinary_network_does(fault, strict, assign):
    """To the letter, but for the name that the weight has in a converted network."""
    ordinary = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    state = {**ordinary.state_dict(), **PLAIN_FAULTS[fault]}
    model = snparam.convert_model(copy.deepcopy(ordinary))

    def said(network):
        try:
            return str(network.load_state_dict(dict(state), strict=strict, assign=assign))
        except (RuntimeError, AttributeError) as error:
            return str(error)

    assert said(model).replace("parametrizations.weight.original", "weight") == said(ordinary)


# State that is no state


@pytest.mark.parametrize("spelling", ["snparam", "torch", "torch-hook", "biggan"])
@pytest.mark.parametrize("num_svs", [1, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("update", ["forward", "step"])
def test_a_u_without_a_direction_is_estimated(spelling, num_svs, bad, update):
    """No power iteration goes on from it: left as it is, it gives a wrong σ, or an error."""
    layer = nn.Linear(4, 5)
    theirs = snparam.register_sn(layer, 3) if spelling == "snparam" else foreign(layer, spelling)
    state = theirs.state_dict()
    for key in state:
        if key.endswith(("u", "_u", "u0")):
            state[key] = torch.full_like(state[key], bad)
    model = snparam.register_sn(nn.Linear(4, 5), num_svs, update=update)
    assert model.load_state_dict(state) == ([], [])
    assert_exact_state(model, num_svs)
