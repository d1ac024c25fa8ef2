"""`resize_token_embeddings` of a converted model: resized, normalised, tied, and configured."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import snparam

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(12).reshape(2, 6)
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2(tied=True):
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=30, n_positions=12, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def t5(tied=True):
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=30,
        decoder_start_token_id=0, eos_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def bert(tied=True):
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        vocab_size=30, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config).eval()


BUILD = {"GPT-2": gpt2, "T5": t5, "BERT": bert}
MODELS = pytest.mark.parametrize("build", BUILD.values(), ids=list(BUILD))


def logits(model, tokens=TOKENS):
    given = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=tokens, **given).logits


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


def snparam_weights(model):
    return [
        (f"{name}.{tensor}", chain[0], chain.original)
        for name, module in model.named_modules(remove_duplicate=False)
        if parametrize.is_parametrized(module)
        for tensor, chain in module.parametrizations.items()
    ]


def spectral_norms(model):
    """Of every weight that is normalised, as eval mode uses it, by a decomposition."""
    used = {
        name: model.get_submodule(name.rpartition(".")[0]) for name, _, _ in snparam_weights(model)
    }
    return {
        name: float(torch.linalg.matrix_norm(module.weight.detach().double(), 2))
        for name, module in used.items()
    }


@MODELS
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [41, 30, 19])
@pytest.mark.parametrize("options", [{}, {"num_svs": 3}, {"update": "step"}], ids=str)
def test_it_is_resized_as_the_ordinary_model_is_and_normalised_as_before(
    build, tied, size, options
):
    torch.manual_seed(0)
    model = snparam.convert_model(build(tied), **options)
    ordinary = snparam.restore_model(copy.deepcopy(model), bake=False)
    before = {name for name, _, _ in snparam_weights(model)}
    torch.manual_seed(1)
    returned = model.resize_token_embeddings(size, mean_resizing=False)
    torch.manual_seed(1)
    ordinary.resize_token_embeddings(size, mean_resizing=False)

    assert returned is model.get_input_embeddings()
    assert tuple(returned.weight.shape) == (size, 16)
    assert {name for name, _, _ in snparam_weights(model)} == before
    assert spectral_norms(model) == pytest.approx(dict.fromkeys(before, 1.0), abs=1e-4)
    assert model.config.vocab_size == ordinary.config.vocab_size == size
    assert not any(norm.training for _, norm, _ in snparam_weights(model))

    for name, norm, original in snparam_weights(model):
        exact = torch.linalg.svdvals(original.detach().double())[: options.get("num_svs", 1)]
        torch.testing.assert_close(norm.sv[0].double(), exact, rtol=1e-3, atol=0, msg=name)

    originals = snparam.restore_model(copy.deepcopy(model), bake=False)
    assert shapes(originals) == shapes(ordinary)
    for name, tensor in ordinary.state_dict().items():
        assert torch.equal(originals.state_dict()[name], tensor), name
    anew, tokens = snparam.convert_model(ordinary, **options).eval(), TOKENS % size
    torch.testing.assert_close(logits(model, tokens), logits(anew, tokens))


@MODELS
def test_what_shares_a_parameter_shares_one_state_and_trains(build):
    model = snparam.convert_model(build())
    states = {name: norm for name, norm, _ in snparam_weights(model)}
    model.resize_token_embeddings(41)
    by_parameter = {}
    for name, norm, original in snparam_weights(model):
        by_parameter.setdefault(id(original), set()).add(id(norm))
        assert norm is states[name], "whoever watches it sees it still"
    assert {len(norms) for norms in by_parameter.values()} == {1}
    assert len(list(model.parameters())) == len(list(build().parameters()))
    optimizer = torch.optim.SGD(model.train().parameters(), 1e-3)
    labels = {"labels": TOKENS}
    for _ in range(2):
        model(input_ids=TOKENS, **labels).loss.backward()
        optimizer.step()
    assert spectral_norms(model.eval()) == pytest.approx(
        dict.fromkeys(spectral_norms(model), 1.0), abs=1e-2
    )


@MODELS
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gain", ["learned", "fixed", None])
def test_with_a_gain_the_tokens_that_there_were_keep_their_vectors(build, tied, gain):
    model = snparam.convert_model(build(tied), gain=gain, constraint="gain")
    embedding = model.get_input_embeddings()
    gains = {name: norm.gain for name, norm, _ in snparam_weights(model)}
    before, vectors = logits(model), embedding.weight.detach().clone()
    model.resize_token_embeddings(41)
    torch.testing.assert_close(embedding.weight[:30], vectors)
    torch.testing.assert_close(logits(model)[..., :30], before)
    for name, norm, _ in snparam_weights(model):
        assert norm.gain is gains[name], "the optimizer has it"


def test_saved_and_read_back_it_is_what_it_was(tmp_path):
    model = snparam.convert_model(gpt2())
    model.resize_token_embeddings(41)
    model.save_pretrained(tmp_path)
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(back), logits(model))


def test_a_state_dict_of_a_resized_model_loads_into_another():
    source, model = snparam.convert_model(gpt2()), snparam.convert_model(gpt2())
    for network in (source, model):
        network.resize_token_embeddings(41)
    assert model.load_state_dict(source.state_dict()) == ([], [])
    torch.testing.assert_close(logits(model), logits(source))


def test_asking_for_the_embedding_and_a_size_to_pad_to():
    model = snparam.convert_model(gpt2())
    assert model.resize_token_embeddings() is model.transformer.wte
    model.resize_token_embeddings(pad_to_multiple_of=16)
    assert tuple(model.lm_head.weight.shape) == (32, 16)
    assert spectral_norms(model)["lm_head.weight"] == pytest.approx(1, abs=1e-4)


def test_a_copy_is_resized_and_its_model_is_not():
    model = snparam.convert_model(gpt2())
    before = logits(model)
    twin = copy.deepcopy(model)
    twin.resize_token_embeddings(41)
    assert tuple(twin.lm_head.weight.shape) == (41, 16)
    assert torch.equal(logits(model), before)


def test_several_matrices_of_an_embedding_are_refused_and_nothing_is_changed():
    model = snparam.convert_model(gpt2(), blocks=2)
    before = logits(model)
    with pytest.raises(
        ValueError, match=r"'transformer.wte.weight' \(30, 16\).*2 matrices.*restore_model"
    ):
        model.resize_token_embeddings(40)
    assert model.config.vocab_size == 30
    assert torch.equal(logits(model), before)


class Outgrown(nn.Module):
    """A model of nobody's: it has no embeddings that one could ask for."""

    def __init__(self):
        super().__init__()
        self.table, self.other = nn.Embedding(8, 4), nn.Linear(4, 4)

    def resize_token_embeddings(self, count):
        self.table = nn.Embedding(count, 4)
        if count > 100:
            raise MemoryError

    def tie_weights(self):
        self.table.weight = nn.Parameter(self.table.weight.detach().clone())


def test_a_weight_that_cannot_be_normalised_any_more_is_said_and_the_others_are():
    model = snparam.convert_model(Outgrown(), blocks=2)
    with pytest.raises(ValueError, match=r"'table.weight' \(8, 4\).*2 matrices"):
        model.resize_token_embeddings(9)
    assert type(model.table) is nn.Embedding
    assert list(snparam.singular_values(model)) == ["other.weight"]


def test_an_error_on_the_way_leaves_the_model_normalised_and_is_raised():
    model = snparam.convert_model(Outgrown())
    with pytest.raises(MemoryError):
        model.resize_token_embeddings(101)
    assert spectral_norms(model) == pytest.approx({"table.weight": 1, "other.weight": 1}, abs=1e-4)


def test_what_is_untied_parts_in_its_state_too():
    model = Outgrown()
    model.head = nn.Linear(4, 8, bias=False)
    model.head.weight = model.table.weight
    snparam.convert_model(model)
    model.tie_weights()
    weights = {name: (norm, original) for name, norm, original in snparam_weights(model)}
    assert weights["table.weight"][1] is not weights["head.weight"][1]
    assert weights["table.weight"][0] is not weights["head.weight"][0]
    assert spectral_norms(model) == pytest.approx(dict.fromkeys(weights, 1.0), abs=1e-4)


def test_ordinary_models_of_a_converted_ones_class_are_resized_as_before():
    snparam.convert_model(gpt2())
    model = gpt2()
    model.resize_token_embeddings(41)
    assert type(model.lm_head) is nn.Linear
    assert tuple(model.lm_head.weight.shape) == (41, 16)


REGISTERED_ALONE = """
import conftest, torch, transformers
import snparam
for tied, name in [(False, "transformer.wte"), (False, "lm_head"), (True, "lm_head")]:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=30, n_positions=12,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied)
    model = transformers.GPT2LMHeadModel(config).eval()
    snparam.register_sn(model.get_submodule(name))
    model.resize_token_embeddings(40)
    assert model.config.vocab_size == 40
    assert model.transformer.wte.weight.shape == model.lm_head.weight.shape == (40, 16)
    sigma = torch.linalg.matrix_norm(model.get_submodule(name).weight.double(), 2)
    assert abs(sigma - 1) < 1e-3
    assert model(torch.tensor([[39]])).logits.shape == (1, 1, 40)
"""


def test_a_model_of_which_one_module_was_registered_is_resized():
    """In a process that has converted no model of the class."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REGISTERED_ALONE],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
