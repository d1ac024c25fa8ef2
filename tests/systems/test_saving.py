"""Files: what is written reads right, and what is broken changes nothing."""

import copy
import inspect
import io
import pickle
import re
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import snparam
from snparam.testing import assert_same_function

transformers = pytest.importorskip("transformers")


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def states(model):
    return {
        "snparam": model.state_dict(),
        "plain": snparam.plain_state_dict(model),
        "torch": snparam.state_dict_for(model, "torch"),
        "torch-hook": snparam.state_dict_for(model, "torch-hook"),
        "biggan": snparam.state_dict_for(model, "biggan"),
    }


SPELLINGS = tuple(states(snparam.convert_model(network())))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("num_svs", [1, 2])
def test_through_files_of_both_kinds(spelling, num_svs, tmp_path):
    model = snparam.convert_model(network(), num_svs)
    state = states(model)[spelling]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.pt")
    for loaded in (
        safetensors.torch.load_file(tmp_path / "model.safetensors"),
        torch.load(tmp_path / "model.pt", weights_only=True),
    ):
        other = snparam.convert_model(network(), num_svs)
        other.load_state_dict(loaded)
        assert_same_function(other, model, torch.randn(3, 4))


def test_a_plain_file_loads_into_the_ordinary_network(tmp_path):
    model = snparam.convert_model(network())
    safetensors.torch.save_file(snparam.plain_state_dict(model), tmp_path / "plain.safetensors")
    ordinary = network()
    safetensors.torch.load_model(ordinary, tmp_path / "plain.safetensors")
    assert_same_function(ordinary, model, torch.randn(3, 4), rtol=0, atol=0)


class Needy:
    """What a pickle must not bring to life."""


def test_a_pickle_that_would_need_more_is_refused():
    model = snparam.convert_model(network())
    before = copy.deepcopy(model.state_dict())
    buffer = io.BytesIO()
    torch.save({**model.state_dict(), "extra": Needy()}, buffer)
    buffer.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="Needy"):
        model.load_state_dict(torch.load(buffer, weights_only=True))
    assert_unchanged(model, before)


def assert_unchanged(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_truncated_file_is_an_error_and_changes_nothing(kept, kind, tmp_path):
    model = snparam.convert_model(network())
    path, before = tmp_path / f"model.{kind}", copy.deepcopy(model.state_dict())
    state = snparam.convert_model(network()).state_dict()
    if kind == "pt":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    load = {"pt": torch.load, "safetensors": safetensors.torch.load_file}[kind]
    errors = (RuntimeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError)
    with pytest.raises(errors):
        model.load_state_dict(load(path))
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_damaged_file_changes_nothing_or_the_numbers_of_what_it_has(kind, tmp_path):
    """One byte at a time. Neither format has a checksum of the numbers themselves."""
    path, state = tmp_path / f"model.{kind}", snparam.convert_model(network()).state_dict()
    save = {"pt": torch.save, "safetensors": safetensors.torch.save_file}[kind]
    load = {"pt": torch.load, "safetensors": safetensors.torch.load_file}[kind]
    save(state, path)
    whole = path.read_bytes()
    model = snparam.convert_model(network())
    errors = 0
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        reader = copy.deepcopy(model)
        try:
            reader.load_state_dict(load(path))
        except Exception:  # noqa: BLE001  torch's reader of pickles has many
            errors += 1
            assert_unchanged(reader, model.state_dict())
        else:
            shapes = {name: tensor.shape for name, tensor in reader.state_dict().items()}
            assert shapes == {name: tensor.shape for name, tensor in state.items()}
    assert errors > len(whole) / 5 / 4


DOCS = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", DOCS, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_documentation_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(block, {})


# Models that save themselves


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


def test_a_restored_transformer_is_its_class_again():
    model = tiny_bert()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    snparam.restore_model(snparam.convert_model(model, progress=False))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


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


def test_methods_of_modules_without_normalised_weights_are_left_alone():
    model = nn.Sequential(tiny_bert(), nn.Linear(4, 3))
    snparam.convert_model(model, exclude="0")
    assert "save_pretrained" not in vars(model[0])
