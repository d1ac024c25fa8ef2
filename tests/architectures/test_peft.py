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
