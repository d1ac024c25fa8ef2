"""transformers: one tiny network of each kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import transformers as hf

from .contract import Architecture, check

TOKENS = torch.arange(1, 13).reshape(2, 6)
IMAGE = torch.linspace(-1, 1, 2 * 3 * 16 * 16).sin().reshape(2, 3, 16, 16)
SOUND = torch.linspace(0, 90, 2 * 800).sin().reshape(2, 800)
MEL = torch.linspace(0, 90, 2 * 8 * 16).cos().reshape(2, 8, 16)
SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
NO_SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def language(model: nn.Module) -> Any:
    return model(input_ids=TOKENS, labels=TOKENS, use_cache=False)


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2, **NO_SPECIAL)
    )


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(**SMALL, num_key_value_heads=1, max_position_embeddings=8)
    )


def bert() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**SMALL, max_position_embeddings=8))


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
            decoder_start_token_id=0, tie_word_embeddings=True,
        )
    )  # fmt: skip


def vit() -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=16,
                     patch_size=8)
    )  # fmt: skip


def clip() -> nn.Module:
    vision = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    return hf.CLIPModel(
        hf.CLIPConfig(
            text_config={**SMALL, **NO_SPECIAL, "max_position_embeddings": 8},
            vision_config={**vision, "image_size": 16, "patch_size": 8},
            projection_dim=12,
        )
    )


def whisper() -> nn.Module:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=32, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
            decoder_ffn_dim=24, max_source_positions=8, max_target_positions=8,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
            **NO_SPECIAL,
        )
    )  # fmt: skip


def wav2vec2() -> nn.Module:
    return hf.Wav2Vec2ForCTC(
        hf.Wav2Vec2Config(
            **SMALL, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3),
            num_feat_extract_layers=2, num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2, layerdrop=0.0, mask_time_prob=0.0,
        )
    )  # fmt: skip


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(
            **SMALL, num_key_value_heads=1, head_dim=8, num_local_experts=3,
            num_experts_per_tok=2, max_position_embeddings=8,
        )
    )  # fmt: skip


def gpt_oss() -> nn.Module:
    return hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **SMALL, num_key_value_heads=1, head_dim=8, num_local_experts=3,
            num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=0,
        )
    )  # fmt: skip


def mamba() -> nn.Module:
    return hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4)
    )


def bit() -> nn.Module:
    return hf.BitModel(
        hf.BitConfig(
            embedding_size=32, hidden_sizes=[32, 32, 32, 32], depths=[1, 1, 1, 1], num_groups=8
        )
    )


def dbrx() -> nn.Module:
    return hf.DbrxForCausalLM(
        hf.DbrxConfig(
            d_model=16, n_heads=2, n_layers=1, max_seq_len=8, vocab_size=32,
            attn_config={"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0},
            ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 3, "moe_top_k": 2},
            pad_token_id=0,
        )
    )  # fmt: skip


ARCHITECTURES = [
    Architecture("GPT-2", gpt2, language),
    Architecture("Llama", llama, language),
    Architecture("BERT", bert, lambda m: m(input_ids=TOKENS, labels=TOKENS)),
    Architecture("T5", t5, lambda m: m(input_ids=TOKENS, labels=TOKENS, use_cache=False)),
    Architecture("ViT", vit, lambda m: m(pixel_values=IMAGE), share=0.9),
    Architecture("CLIP", clip, lambda m: m(input_ids=TOKENS, pixel_values=IMAGE, return_loss=True)),
    Architecture(
        "Whisper", whisper, lambda m: m(input_features=MEL, labels=TOKENS, use_cache=False)
    ),
    Architecture(
        "wav2vec2",
        wav2vec2,
        lambda m: m(input_values=SOUND, labels=TOKENS[:, :3]),
        share=0.8,
        left={"pos_conv_embed.conv.weight": "weight_norm"},
    ),
    Architecture("Mixtral", mixtral, language),
    Architecture("gpt-oss", gpt_oss, language, share=0.96, left={"_bias": "one bias for each"}),
    Architecture("Mamba", mamba, language, share=0.94, left={"A_log": "decay rates"}),
    Architecture("DBRX", dbrx, language),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_contract(architecture: Architecture) -> None:
    check(architecture)
