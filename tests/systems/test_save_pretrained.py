"""`save_pretrained` of a model with normalised weights writes plain ones."""

import copy
import inspect
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrize

import snparam
from snparam.testing import assert_same_function

transformers = pytest.importorskip("transformers")


def assert_unchanged(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def tiny_bert():
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=30,
    )
    return transformers.BertForMaskedLM(config).eval()


def output_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12).reshape(2, 6)).logits


@pytest.fixture(scope="module")
def bert():
    """Its input embedding is its head's weight."""
    return snparam.convert_model(tiny_bert(), progress=False)


@pytest.mark.parametrize("explicit", [False, True])
def test_a_converted_transformer_reloads_as_it_was(bert, explicit, tmp_path):
    state = {"state_dict": snparam.plain_state_dict(bert)} if explicit else {}
    keys = list(bert.state_dict())
    bert.save_pretrained(tmp_path, **state)
    assert list(bert.state_dict()) == keys, "nobody else's state dict changes"
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    torch.testing.assert_close(output_of(loaded), output_of(bert), rtol=1e-5, atol=1e-5)
    plain = tiny_bert()
    assert list(snparam.plain_state_dict(bert)) == list(plain.state_dict())


def test_a_copy_saves_itself_and_not_its_original(bert, tmp_path):
    twin = copy.deepcopy(bert)
    before = output_of(twin)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert not torch.allclose(output_of(twin), before, atol=1e-3)
    twin.save_pretrained(tmp_path)
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    torch.testing.assert_close(output_of(loaded), output_of(twin), rtol=1e-5, atol=1e-5)


def test_a_part_that_saves_itself_does_so_right(bert, tmp_path):
    bert.bert.save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    ids = torch.arange(6).reshape(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(ids).last_hidden_state, bert.eval().bert(ids).last_hidden_state
        )


@pytest.mark.parametrize("gain", [None, "learned"])
def test_a_state_dict_of_other_values_is_saved_as_what_it_computes(gain, tmp_path):
    """A trainer gathers one from all ranks, or averages it over steps, and passes that."""
    model, other = (snparam.convert_model(tiny_bert(), progress=False, gain=gain) for _ in range(2))
    if gain:
        for norm in other.modules():
            if isinstance(norm, snparam.SpectralNorm):
                norm.gain.data.mul_(1.5)
    given = other.state_dict()
    keys = list(given)
    model.save_pretrained(tmp_path, state_dict=given)
    assert list(given) == keys
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    torch.testing.assert_close(output_of(loaded), output_of(other), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output_of(loaded), output_of(model), atol=1e-3)


@pytest.mark.parametrize("given", [False, True])
def test_half_of_a_shared_parameter_is_refused_and_nothing_is_written(given, tmp_path):
    model = tiny_bert()
    snparam.convert_model(model, exclude="cls.predictions.decoder", progress=False)
    state = {"state_dict": model.state_dict()} if given else {}
    with pytest.raises(
        ValueError, match=r"word_embeddings\.weight.*'cls.predictions.decoder.weight'"
    ):
        model.save_pretrained(tmp_path, **state)
    assert not list(tmp_path.glob("*.safetensors"))


def remove_one_by_one(model):
    for module in model.modules():
        if parametrize.is_parametrized(module):
            snparam.remove_sn(module)


def remove_by_torch(model):
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for tensor in list(module.parametrizations):
                parametrize.remove_parametrizations(module, tensor)


@pytest.mark.parametrize("remove", [snparam.restore_model, remove_one_by_one, remove_by_torch])
def test_a_transformer_has_nothing_of_its_own_before_or_after_it_is_removed(remove, tmp_path):
    model = tiny_bert()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    types = [type(module) for module in model.modules()]
    snparam.convert_model(model, progress=False)
    assert set(vars(model)) == before[""]
    assert set(vars(model.bert)) == before["bert"]
    remove(model)
    output_of(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert [type(module) for module in model.modules()] == types
    if remove is not remove_by_torch:  # which the modules around do not notice
        assert b"snparam" not in pickle.dumps(model)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(output_of(loaded), output_of(model))


class Saves(nn.Module):
    """A model of a library whose `save_pretrained` takes no state dict, as diffusers' are."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)

    def save_pretrained(self, path, *, safe=True):
        """Write it."""
        safetensors.torch.save_file(self.state_dict(), path / "model.safetensors")
        return "written"


# How a layer inside a model can come to be normalised; the model itself may not know of it.
WAYS = {
    "converted": snparam.convert_model,
    "registered": lambda model: snparam.register_sn(model.layer),
    "a part converted": lambda model: snparam.convert_model(model.layer),
    "with a gain": lambda model: snparam.register_sn(model.layer, gain="learned", blocks=3),
    "updated by step": lambda model: snparam.register_sn(model.layer, update="step"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_library_that_asks_the_model_for_its_state_dict_gets_a_plain_one(way, tmp_path):
    model = Saves()
    WAYS[way](model)
    if way == "with a gain":
        model.layer.parametrizations.weight[0].gain.data.mul_(3)
    before = copy.deepcopy(model.state_dict())
    assert model.train().save_pretrained(tmp_path, safe=True) == "written"
    assert model.layer.parametrizations.weight[0].training
    assert_unchanged(model, before)
    assert "layer.parametrizations.weight.original" in before
    ordinary = Saves()
    safetensors.torch.load_model(ordinary, tmp_path / "model.safetensors")
    assert_same_function(ordinary, model, torch.randn(2, 4), rtol=0, atol=0)


def test_a_copy_saves_its_own_values_and_a_restored_layer_those_it_has(tmp_path):
    model = Saves()
    snparam.register_sn(model.layer)
    twin = copy.deepcopy(model)
    twin.layer.parametrizations.weight.original.data.normal_()
    twin.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["layer.weight"], twin.eval().layer.weight)
    snparam.remove_sn(model.layer, bake=False)
    assert not model.layer._state_dict_hooks
    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["layer.weight"], model.layer.weight)


def test_half_of_a_parameter_shared_with_a_registered_layer_is_refused(tmp_path):
    model = Saves()
    model.twin = nn.Linear(4, 3)
    model.twin.weight = model.layer.weight
    snparam.register_sn(model.layer)
    with pytest.raises(ValueError, match=r"'layer.weight' \(3, 4\).*'twin.weight'"):
        model.save_pretrained(tmp_path)


def test_a_weight_with_another_parametrization_is_refused(tmp_path):
    model = Saves()
    snparam.register_sn(model.layer)
    nn.utils.parametrize.register_parametrization(model.layer, "weight", nn.Identity())
    with pytest.raises(ValueError, match="Identity"):
        model.save_pretrained(tmp_path)


def test_the_method_of_a_converted_model_is_documented_as_before(bert):
    plain = transformers.BertForMaskedLM
    assert inspect.signature(bert.save_pretrained) == inspect.signature(
        plain.save_pretrained.__get__(bert)
    )
    assert bert.save_pretrained.__doc__ == plain.save_pretrained.__doc__


def test_an_ordinary_model_of_the_class_of_a_converted_one_saves_what_it_is_given():
    class Given(Saves):
        def save_pretrained(self, *, state_dict=None):
            return state_dict

    given = snparam.convert_model(Given()).state_dict()
    assert Given().save_pretrained(state_dict=given) is given
    assert list(given)[-1] == "layer.parametrizations.weight.0.sv"


@pytest.mark.filterwarnings("ignore:Positional args:FutureWarning")
def test_a_library_that_passes_the_prefix_by_position_gets_plain_keys():
    class Positional(Saves):
        def save_pretrained(self):
            return self.layer.state_dict({}, "layer.")

    model = snparam.convert_model(Positional())
    assert set(model.save_pretrained()) == {"layer.weight", "layer.bias"}


def test_a_subclass_that_saves_through_its_base_is_right_too(tmp_path):
    class Base(Saves):
        def save_pretrained(self, path, state_dict=None):
            state_dict = self.state_dict() if state_dict is None else state_dict
            safetensors.torch.save_file(state_dict, path / "model.safetensors")

    class Derived(Base):
        def save_pretrained(self, path, **options):
            super().save_pretrained(path, **options)

    model, other = snparam.convert_model(Derived()), snparam.convert_model(Derived())
    for given, saved in (({}, model), ({"state_dict": other.state_dict()}, other)):
        model.save_pretrained(tmp_path, **given)
        ordinary = Saves()
        safetensors.torch.load_model(ordinary, tmp_path / "model.safetensors")
        assert_same_function(ordinary, saved, torch.randn(2, 4), rtol=0, atol=0)
