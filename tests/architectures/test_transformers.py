"""transformers: one tiny network of each kind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import transformers as hf

import snparam
from snparam.parametrization.find import normalised_weights

from .contract import Architecture, check

TOKENS = torch.arange(1, 13).reshape(2, 6)
IMAGE = torch.linspace(-1, 1, 2 * 3 * 16 * 16).sin().reshape(2, 3, 16, 16)
SOUND = torch.linspace(0, 90, 2 * 800).sin().reshape(2, 800)
POINTS = torch.tensor([[[[3.0, 4.0]]], [[[9.0, 4.0]]]])
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
    return hf.BitForImageClassification(
        hf.BitConfig(
            embedding_size=32, hidden_sizes=[32, 32, 32, 32], depths=[1, 1, 1, 1], num_groups=8
        )
    )


def deepseek() -> nn.Module:
    """Attention through latent projections, a router that is a bare parameter, shared experts."""
    return hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **SMALL, moe_intermediate_size=12, num_key_value_heads=2, n_routed_experts=4, n_group=2,
            topk_group=1, num_experts_per_tok=2, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, max_position_embeddings=16,
        )
    )  # fmt: skip


def rwkv() -> nn.Module:
    return hf.RwkvForCausalLM(
        hf.RwkvConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, context_length=16)
    )


def sam() -> nn.Module:
    vision = {
        "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 4, "mlp_dim": 24, "window_size": 2,
        "global_attn_indexes": [1], "num_pos_feats": 4,
    }  # fmt: skip
    prompt = {"hidden_size": 8, "image_size": 16, "patch_size": 4, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 8, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "iou_head_hidden_dim": 8,
    }  # fmt: skip
    return hf.SamModel(
        hf.SamConfig(
            vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
        )
    )


def qwen() -> nn.Module:
    return hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            **SMALL, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2, head_dim=8,
            num_key_value_heads=2, max_position_embeddings=16, decoder_sparse_step=1,
        )
    )  # fmt: skip


def gemma() -> nn.Module:
    return hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **SMALL, num_key_value_heads=2, head_dim=8, max_position_embeddings=16,
            sliding_window=4,
        )
    )  # fmt: skip


def mamba2() -> nn.Module:
    return hf.Mamba2ForCausalLM(
        hf.Mamba2Config(
            vocab_size=32, hidden_size=16, state_size=8, num_hidden_layers=2, num_heads=4,
            head_dim=8, expand=2, n_groups=1, chunk_size=4,
        )
    )  # fmt: skip


def jamba() -> nn.Module:
    """Attention, a recurrence, and experts, in turn."""
    return hf.JambaForCausalLM(
        hf.JambaConfig(
            **SMALL, num_key_value_heads=2, num_experts=2, attn_layer_period=2,
            attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=0, mamba_d_state=4,
            mamba_dt_rank=4, use_mamba_kernels=False,
        )
    )  # fmt: skip


def segformer() -> nn.Module:
    return hf.SegformerForSemanticSegmentation(
        hf.SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
            patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
            decoder_hidden_size=16, num_labels=3,
        )
    )  # fmt: skip


def detr() -> nn.Module:
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        out_features=["stage2"],
    )  # fmt: skip
    return hf.DetrForObjectDetection(
        hf.DetrConfig(
            use_timm_backbone=False, backbone=None, backbone_config=backbone, d_model=16,
            encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24,
            encoder_attention_heads=2, decoder_attention_heads=2, num_queries=4, num_labels=3,
        )
    )  # fmt: skip


def hiera() -> nn.Module:
    return hf.HieraModel(
        hf.HieraConfig(
            embed_dim=8, image_size=[16, 16], patch_size=[3, 3], patch_stride=[2, 2],
            patch_padding=[1, 1], depths=[1, 1], num_heads=[1, 2], query_stride=[2, 2],
            masked_unit_size=[4, 4], num_query_pool=1, masked_unit_attention=[True, False],
            mlp_ratio=2.0,
        )
    )  # fmt: skip


def vits() -> nn.Module:
    return hf.VitsModel(
        hf.VitsConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=24,
            window_size=2, flow_size=16, spectrogram_bins=9, prior_encoder_num_flows=1,
            prior_encoder_num_wavenet_layers=1, posterior_encoder_num_wavenet_layers=1,
            duration_predictor_num_flows=2, duration_predictor_filter_channels=16,
            depth_separable_num_layers=1, upsample_initial_channel=16, upsample_rates=[4, 4],
            upsample_kernel_sizes=[8, 8], resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]], use_stochastic_duration_prediction=False,
        )
    )  # fmt: skip


def encodec() -> nn.Module:
    return hf.EncodecModel(
        hf.EncodecConfig(
            target_bandwidths=[120.0], sampling_rate=24000, num_filters=4, num_residual_layers=1,
            upsampling_ratios=[2, 2], num_lstm_layers=1, codebook_size=16, hidden_size=16,
            codebook_dim=16,
        )
    )  # fmt: skip


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
    Architecture("DeepSeek-V3", deepseek, language),
    Architecture("Qwen3-MoE", qwen, language),
    Architecture("Gemma 3", gemma, language),
    Architecture("Mamba2", mamba2, language),
    Architecture("Jamba", jamba, language, share=0.98, left={"A_log": "decay rates"}),
    Architecture("SegFormer", segformer, lambda m: m(pixel_values=IMAGE)),
    Architecture("DETR", detr, lambda m: [*m(pixel_values=IMAGE).values()][:2]),
    Architecture(
        "Hiera",
        hiera,
        lambda m: m(pixel_values=IMAGE).last_hidden_state,
        share=0.83,
        left={"position_embeddings": "HieraEmbeddings is not in the layer table"},
    ),
    Architecture(
        "VITS",
        vits,
        lambda m: m(input_ids=TOKENS).waveform,
        share=0.6,
        left={
            "wavenet.in_layers.0.weight": "weight_norm",
            "emb_rel_k": "VitsAttention is not in the layer table",
        },
        idle=("posterior_encoder.conv_pre.weight", "posterior_encoder.conv_proj.weight"),
    ),
    Architecture(
        "EnCodec",
        encodec,
        lambda m: m(SOUND[:, None, :64]).audio_values,
        share=0.4,
        left={"decoder.layers.0.conv.weight": "weight_norm"},
    ),
    Architecture(
        "RWKV",
        rwkv,
        lambda m: m(input_ids=TOKENS, use_cache=False),
        share=0.97,
        left={"time_mix_key": "a single vector"},
    ),
    Architecture(
        "SAM",
        sam,
        lambda m: m(pixel_values=IMAGE, input_points=POINTS).pred_masks,
        share=0.9,
        left={"pos_embed": "SamVisionEncoder is not in the layer table"},
        # Of prompts and of outputs that this forward is not asked for.
        idle=(
            *(f"mask_embed.conv{i}.weight" for i in (1, 2, 3)),
            *(f"point_embed.{i}.weight" for i in (0, 2, 3)),
            "iou_prediction_head.weight",
        ),
    ),
    Architecture(
        "BiT",
        bit,
        lambda m: m(pixel_values=IMAGE),
        share=0,
        left={"conv1.weight": "standardises the weight anew"},
    ),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_contract(architecture: Architecture) -> None:
    check(architecture)


def rows_of(model: nn.Module, kind: str, **options: Any) -> list[Any]:
    return [r for r in snparam.plan_conversion(model, **options) if r.layer_type.endswith(kind)]


def test_gpt2s_own_layers_are_read_output_first_and_hold_most_of_it() -> None:
    """Conv1D is no convolution and no nn.Linear: without its row these would be left out."""
    model = gpt2()
    rows = rows_of(model, "Conv1D")
    assert len(rows) == 2 * 4
    for row in rows:
        inputs, outputs = row.shape
        assert row.decision == "convert"
        assert row.matrices == (1, outputs, inputs)
    matrices = {id(p): p.numel() for p in model.parameters() if p.ndim >= 2}
    share = sum(inputs * outputs for inputs, outputs in (row.shape for row in rows))
    # 12 n² in each of 2 blocks, beside the two embeddings (32 and 8 of n = 16).
    assert share / sum(matrices.values()) == pytest.approx(24 * 256 / (24 * 256 + 40 * 16))
    assert snparam.plan_conversion(model).share == 1


def test_mixtrals_experts_are_matrices_of_their_own_and_its_router_is_one() -> None:
    model = mixtral()
    assert {(r.tensor, r.matrices) for r in rows_of(model, "Experts")} == {
        ("gate_up_proj", (3, 48, 16)),
        ("down_proj", (3, 16, 24)),
    }
    assert {(r.tensor, r.matrices) for r in rows_of(model, "Experts", blocks="auto")} == {
        ("gate_up_proj", (6, 24, 16)),
        ("down_proj", (3, 16, 24)),
    }
    routers = rows_of(model, "Router")
    assert [(r.tensor, r.matrices, r.decision) for r in routers] == [
        ("weight", (1, 3, 16), "convert")
    ] * 2
    assert not any(isinstance(router.record.owner, nn.Linear) for router in routers)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    experts = sum(int(torch.Size(r.shape).numel()) for r in rows_of(model, "Experts"))
    assert experts / matrices > 0.7
    assert snparam.plan_conversion(model).share == 1


def test_the_trainer_decays_gains_unless_it_is_told_as_the_documentation_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "systems.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(import transformers\n.*?)```", page, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(block, namespace)
    model = snparam.convert_model(bert(), gain="learned")
    gains = {id(gain) for gain in snparam.gain_parameters(model)}
    decayed, without = (
        {
            id(model.get_parameter(name))
            for name in kind.get_decay_parameter_names(kind.__new__(kind), model)
        }
        for kind in (hf.Trainer, namespace["Trainer"])
    )
    assert gains < decayed
    assert without == decayed - gains
    originals = {id(weight.original) for weight in normalised_weights(model)}
    assert originals <= without
    assert not [
        name for name, p in model.named_parameters() if name.endswith("weight") and p.ndim > 1
    ]
