"""The real model classes of transformers, tiny and with random weights: from a config, nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

WINDOW = 8
"""Sliding windows and chunks of attention, in tokens: shorter than the prompts of the tests."""

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        **_EXPERTS,
    },
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 48},
    "falcon_h1": {"num_hidden_layers": 2, "head_dim": 8, "mamba_d_ssm": 64, **_MAMBA},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
        **_EXPERTS,
    },
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1], **_MAMBA},
    "mamba2": {
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "mamba": {"num_hidden_layers": 2, "state_size": 8},
    "falcon_mamba": {"num_hidden_layers": 2, "state_size": 8},
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "mamba_d_state": 16,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "chunk_size": 16,
        "num_mem_blocks": 1,
    },
    "gemma3_text": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "head_dim": 8,
        "sliding_window": WINDOW,
    },
    "gpt_oss": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "head_dim": 8,
        "sliding_window": WINDOW,
        **_EXPERTS,
    },
    "llama": {"num_hidden_layers": 2},
    "mistral": {"num_hidden_layers": 2, "sliding_window": WINDOW},
    "granitemoehybrid": {
        "num_hidden_layers": 2,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 16,
        **_MAMBA,
        **_EXPERTS,
    },
    "nemotron_h": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "head_dim": 8,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "num_experts_per_tok": 2,
    },
    "olmo_hybrid": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "minimax": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "block_size": 4,
        **_EXPERTS,
    },
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "sliding_window": WINDOW,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "hc_mult": 2,
    },
    "glm_moe_dsa": {
        "num_hidden_layers": 2,
        "mlp_layer_types": ["dense", "dense"],
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "index_topk": 4,
        "index_head_dim": 16,
        "index_n_heads": 2,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "head_dim": 8,
        "global_head_dim": 8,
        "sliding_window": WINDOW,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
    },
    "inkling2_text": {
        "num_hidden_layers": 2,
        "layer_types": ["hybrid_sliding", "hybrid"],
        "head_dim": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "sliding_window_size": WINDOW,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    },
    "minimax_m3_vl_text": {
        "num_hidden_layers": 2,
        "layer_types": ["minimax_m3_sparse", "full_attention"],
        "mlp_layer_types": ["dense", "dense"],
        "head_dim": 8,
        "rotary_dim": 4,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "dense_intermediate_size": 48,
    },
    "llama4_text": {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "attention_chunk_size": WINDOW,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
        **_EXPERTS,
    },
}


def model(name: str) -> Any:
    """A model of that name with the same weights every time."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(name, **{**COMMON, **CONFIGS[name]})
    return AutoModelForCausalLM.from_config(config).eval()


def encoder_decoder() -> Any:
    """A model whose decoder also attends to an encoder."""
    torch.manual_seed(7)
    sizes: dict[str, Any] = {"d_model": 32, "vocab_size": 64}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 48}
    return BartForConditionalGeneration(BartConfig(**sizes)).eval()
