"""The real model classes of mlx-lm, tiny and with random weights: from a config, nothing is downloaded."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

WINDOW = 8
"""Sliding windows and chunks of attention, in tokens: shorter than the prompts of the tests."""

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10_000.0,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [],
        "moe_intermediate_size": 16,
        "partial_rotary_factor": 0.5,
    },
    "mamba2": {
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 16,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
        "time_step_limit": (0.0, 10.0),
        "time_step_rank": "auto",
        "intermediate_size": 64,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "lfm2": {
        "num_hidden_layers": 3,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_ff_dim": 48,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "full_attn_idxs": [1],
    },
    "falcon_h1": {
        "num_hidden_layers": 2,
        "head_dim": 8,
        "mamba_d_ssm": 64,
        "mamba_d_head": 16,
        "mamba_n_heads": 4,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "gemma3_text": {
        "num_hidden_layers": 3,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
    },
    "gpt_oss": {
        "num_hidden_layers": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "rope_scaling": None,
    },
    "rwkv7": {
        "num_hidden_layers": 2,
        "norm_eps": 1e-5,
        "head_dim": 32,
        "hidden_size": 64,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "attention_bias": False,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "recurrent", "attention"],
        "num_key_value_heads": 1,
    },
    "llama4": {
        "text_config": {
            **COMMON,
            "attention_bias": False,
            "attention_chunk_size": WINDOW,
            "head_dim": 8,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 48,
            "model_type": "llama4_text",
            "num_experts_per_tok": 1,
            "num_hidden_layers": 4,
            "num_local_experts": 2,
            "rope_scaling": None,
            "use_qk_norm": True,
            "attn_temperature_tuning": 4,
        }
    },
}


def model(name: str) -> Any:
    """A model of that name with the same weights every time. float32: its mixtures of experts need it."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(7)
    made = module.Model(module.ModelArgs.from_dict({"model_type": name, **COMMON, **CONFIGS[name]}))
    # Some start with zeros where the state comes in (rwkv7): their logits would not show what the cache holds.
    made.update(tree_map(lambda weight: weight + 0.1 * mx.random.normal(weight.shape), made.parameters()))
    mx.eval(made.parameters())
    return made
