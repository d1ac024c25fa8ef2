"""peft: the base is normalised, the adapters are left as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
import peft

import snparam

from .contract import Architecture, assert_same, check, computed, convert
from .test_transformers import TOKENS, gpt2, language, llama

ADAPTER = "peft adapter"


def lora(build: Any, targets: list[str], **options: Any) -> Any:
    def adapted() -> nn.Module:
        config = peft.LoraConfig(
            r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False, **options
        )
        return peft.get_peft_model(build(), config)

    return adapted


ARCHITECTURES = [
    Architecture(
        "LoRA of Llama",
        lora(llama, ["q_proj", "v_proj", "embed_tokens"]),
        language,
        share=0.8,
        left={"lora_A.default.weight": ADAPTER, "lora_embedding_B.default": ADAPTER},
    ),
    Architecture(
        "LoRA of GPT-2",
        lora(gpt2, ["c_attn"], fan_in_fan_out=True),
        language,
        share=0.9,
        left={"lora_A.default.weight": ADAPTER, "lora_B.default.weight": ADAPTER},
    ),
    Architecture(
        "DoRA of Llama",
        lora(llama, ["q_proj"], use_dora=True),
        language,
        share=0.9,
        left={"lora_A.default.weight": ADAPTER},
    ),
    Architecture(
        "LoHa of Llama",
        lambda: peft.get_peft_model(
            llama(), peft.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False)
        ),
        language,
        share=0.9,
        left={"hada_w1_a.default": ADAPTER},
    ),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_contract(architecture: Architecture) -> None:
    check(architecture)


def test_the_base_is_normalised_and_the_adapter_added_as_it_is() -> None:
    model = lora(llama, ["q_proj"])()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    base = layer.base_layer.weight.detach().double().clone()
    down = layer.lora_A["default"].weight.detach().double()
    up = layer.lora_B["default"].weight.detach().double()
    convert(model)
    x = torch.randn(3, base.shape[1])
    sigma = torch.linalg.svdvals(base)[0]
    expected = x.double() @ (base / sigma + 2 * up @ down).T
    with torch.no_grad():
        found: Tensor = layer.eval()(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_only_the_adapters_train_and_the_frozen_base_stays_as_it_is() -> None:
    model = lora(llama, ["q_proj"])()
    convert(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    language(model.train()).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


def test_adapters_on_a_converted_base_are_saved_and_read_back(tmp_path: Path) -> None:
    """Their keys alone are written; the base is converted again, from its own file."""
    architecture = Architecture("LoRA", lora(llama, ["q_proj"]), language)
    base = llama()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    convert(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)  # type: ignore[arg-type]
    model.save_pretrained(str(tmp_path))
    other = llama()
    other.load_state_dict(state)
    convert(other)
    back = peft.PeftModel.from_pretrained(other, str(tmp_path))  # type: ignore[arg-type]
    assert_same(computed(architecture, back), computed(architecture, model))


def test_restored_and_merged_it_computes_what_it_did() -> None:
    """Merging adds to the base's weight in place: restore first, as docs/architectures.md says."""
    architecture = Architecture("LoRA", lora(llama, ["q_proj", "k_proj"]), language)
    model = architecture.make(0)
    convert(model)
    before = model.eval()(input_ids=TOKENS).logits.detach()
    merged = snparam.restore_model(model).merge_and_unload()
    torch.testing.assert_close(
        merged.eval()(input_ids=TOKENS).logits.detach(), before, rtol=1e-4, atol=1e-5
    )
    assert computed(architecture, merged)


# What peft does with an adapter on a normalised base: right, or refused

ORDERS = pytest.mark.parametrize("first", ["adapter", "conversion"])
OPTIONS: list[dict[str, Any]] = [{}, {"gain": "learned"}, {"update": "step", "blocks": 2}]


def adapted(first: str, options: dict[str, Any] | None = None, **config: Any) -> Any:
    torch.manual_seed(0)
    model: Any = llama().eval()
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    lora_config = peft.LoraConfig(**{**settings, **config})
    options = {"progress": False, **(options or {})}
    if first == "conversion":
        model = peft.get_peft_model(snparam.convert_model(model, **options), lora_config)
    else:
        model = snparam.convert_model(peft.get_peft_model(model, lora_config), **options)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=TOKENS).logits
    return found


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "safely": lambda model: model.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda model: model.merge_adapter() or model,
}


@ORDERS
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("merge", MERGES)
def test_merging_is_refused_before_it_is_lost_and_right_once_restored(
    first: str, options: dict[str, Any], merge: str
) -> None:
    """peft adds to `weight.data`: to a value that the next read computes anew."""
    model = adapted(first, options)
    before, outputs = state_of(model), logits(model)
    with pytest.raises(RuntimeError, match=r"q_proj.*\(16, 16\): merge .*restore_model\(model\)"):
        MERGES[merge](model)
    assert_same_state(model, before)
    torch.testing.assert_close(logits(model), outputs, rtol=0, atol=0)
    merged = MERGES[merge](snparam.restore_model(model))
    torch.testing.assert_close(logits(merged), outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [peft.IA3Config, peft.LoHaConfig, peft.OFTConfig])
def test_merging_of_other_adapters_is_refused_too(kind: Any) -> None:
    more = {"feedforward_modules": []} if kind is peft.IA3Config else {}
    more |= {"oft_block_size": 4} if kind is peft.OFTConfig else {}
    model = snparam.convert_model(llama(), progress=False)
    model = peft.get_peft_model(model, kind(target_modules=["q_proj"], **more))
    with pytest.raises(RuntimeError, match=r"q_proj.*merge of a peft adapter.*restore_model"):
        model.merge_and_unload()


def test_a_merge_that_is_refused_half_way_goes_on_once_restored() -> None:
    """The base of the first layers is not normalised, and so they have been merged already."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model: Any = peft.get_peft_model(llama(), settings)
    snparam.convert_model(model, include="**.layers.1", progress=False)
    outputs = logits(model)
    with pytest.raises(RuntimeError, match=r"layers\.1\..*restore_model"):
        model.merge_and_unload()
    merged = snparam.restore_model(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), outputs, rtol=1e-4, atol=1e-5)


def test_what_was_merged_before_the_conversion_is_not_taken_out_after_it() -> None:
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model: Any = peft.get_peft_model(llama(), settings)
    model.merge_adapter()
    snparam.convert_model(model, progress=False)
    before = state_of(model)
    for undo in (model.unmerge_adapter, lambda: logits_without(model)):
        with pytest.raises(RuntimeError, match=r"unmerge of a peft adapter.*restore_model"):
            undo()
        assert_same_state(model, before)


def logits_without(model: Any) -> Tensor:
    """Of the base alone."""
    with model.disable_adapter():
        return logits(model)


@ORDERS
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_without_the_adapter_the_normalised_base_is_left(
    first: str, options: dict[str, Any]
) -> None:
    model = adapted(first, options)
    torch.manual_seed(0)
    base = logits(snparam.convert_model(llama(), progress=False, **options))
    torch.testing.assert_close(logits_without(model), base, rtol=1e-5, atol=1e-5)
    originals = {id(p): p.detach().clone() for n, p in model.named_parameters() if "original" in n}
    assert not torch.allclose(logits(model), base, atol=1e-3)
    unloaded = model.unload()
    torch.testing.assert_close(logits(unloaded), base, rtol=1e-5, atol=1e-5)
    left = {id(p): p for n, p in unloaded.named_parameters() if "original" in n}
    assert left.keys() == originals.keys()
    assert all(torch.equal(left[key], originals[key]) for key in left)


@ORDERS
def test_adapters_come_and_go_and_are_summed(first: str) -> None:
    model = adapted(first)
    before, outputs = state_of(model), logits(model)
    other = peft.LoraConfig(r=3, target_modules=["k_proj"], init_lora_weights=False)
    model.add_adapter("other", other)
    torch.testing.assert_close(logits(model), outputs, rtol=0, atol=0)
    model.set_adapter("other")
    with_other = logits(model)
    assert not torch.allclose(with_other, outputs, atol=1e-3)
    state = peft.get_peft_model_state_dict(model, adapter_name="other")
    assert state
    assert all("k_proj.lora_" in key for key in state)
    model.add_weighted_adapter(["other"], [1.0], "same", combination_type="linear")
    model.set_adapter("same")
    torch.testing.assert_close(logits(model), with_other, rtol=1e-4, atol=1e-5)
    for name in ("other", "same"):
        model.delete_adapter(name)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), outputs, rtol=0, atol=0)
    assert {k: v for k, v in state_of(model).items() if "k_proj" not in k}.keys() == {
        k for k in before if "k_proj" not in k
    }


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_take_a_part_of_the_weight_come_before_the_conversion(start: Any) -> None:
    """They leave the rest in `weight.data`; on a normalised base it would stay whole."""
    with pytest.raises(RuntimeError, match=r"q_proj.*_init .*get_peft_model before convert_model"):
        adapted("conversion", init_lora_weights=start)
    model = adapted("adapter", {"gain": "fixed"}, init_lora_weights=start)
    torch.manual_seed(0)
    torch.testing.assert_close(logits(model), logits(llama()), rtol=1e-3, atol=1e-4)


@ORDERS
@pytest.mark.parametrize("gain", [None, "learned"])
def test_modules_that_are_trained_whole_are_saved_and_read_with_the_adapter(
    first: str, gain: Any, tmp_path: Path
) -> None:
    model = adapted(first, {"gain": gain}, modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"]
    with torch.no_grad():
        head.parametrizations.weight.original.add_(torch.randn(head.weight.shape) / 9)
        head.parametrizations.weight[0].refresh(head.parametrizations.weight.original)
    model.save_pretrained(str(tmp_path))
    state = peft.get_peft_model_state_dict(model)
    assert [key for key in state if "lm_head" in key] == ["base_model.model.lm_head.weight"]
    torch.manual_seed(0)
    base = snparam.convert_model(llama(), progress=False, gain=gain)
    again = adapted(first, {"gain": gain}, modules_to_save=["lm_head"])
    peft.set_peft_model_state_dict(again, state)
    for back in (peft.PeftModel.from_pretrained(base, str(tmp_path)), again):
        torch.testing.assert_close(logits(back), logits(model), rtol=1e-4, atol=1e-5)


class Attends(nn.Module):
    """torch's attention, whose forward peft makes by writing to its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.attention(x, x, x)[0]
        last: Tensor = self.last(attended)
        return last


def test_torchs_attention_under_an_adapter_is_left_alone_and_none_is_put_on_it_later() -> None:
    config = peft.LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False)
    model: Any = peft.get_peft_model(Attends(), config)
    rows = {row.weight: row for row in snparam.plan_conversion(model, progress=False)}
    inside = "base_model.model.attention.base_layer."
    for name in ("in_proj_weight", "out_proj.base_layer.weight"):
        assert "in every forward" in rows[inside + name].reason
    snparam.convert_model(model, progress=False)
    assert [row.weight for row in snparam.verify(model)] == ["base_model.model.last.weight"]
    model(torch.randn(3, 2, 8)).sum().backward()
    with pytest.raises(RuntimeError, match=r"'attention.in_proj_weight' \(24, 8\).*exclude="):
        peft.get_peft_model(snparam.convert_model(Attends(), progress=False), config)


def test_an_embedding_with_trained_rows_is_left_alone() -> None:
    """Its rows are replaced after it would have been divided by σ."""
    model = peft.get_peft_model(llama(), peft.TrainableTokensConfig(token_indices=[1, 2]))
    rows = {row.weight: row for row in snparam.plan_conversion(model, progress=False)}
    (name,) = (name for name in rows if name.endswith("embed_tokens.base_layer.weight"))
    assert rows[name].decision == "skip"
    assert "replaces rows" in rows[name].reason
