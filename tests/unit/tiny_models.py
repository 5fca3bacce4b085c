"""One tiny random model of every family that the pipeline must compress, by name."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 64
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}

# family -> (class, name of the config class, its fields)
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_GROUPED, "num_hidden_layers": 3}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": 6}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 8, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **_GROUPED,
            "head_dim": 8,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 6,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2,
         "bos_token_id": 1, "eos_token_id": 2},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_SMALL, "use_parallel_residual": True}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "bert": ("BertForSequenceClassification", "BertConfig", {**_SMALL, "num_labels": 3}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
         "shared_expert_intermediate_size": 40},
    ),
}  # fmt: skip

_ALBERT = {**_SMALL, "embedding_size": 8, "num_hidden_layers": 4, "num_labels": 3}

# Models whose blocks run several times in a pass: 0000, and 001 of blocks that hold two layers each.
_REPEATED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", _ALBERT),
    "albert_groups": (
        "AlbertForSequenceClassification",
        "AlbertConfig",
        {**_ALBERT, "num_hidden_layers": 3, "num_hidden_groups": 2, "inner_group_num": 2},
    ),
}

_ROUTED = {**_GROUPED, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# Mixtures of 6 experts, of which a token is given to 2: weights of the picked ones normalised, or not (OLMoE); with a
# bias of the router (gpt-oss), or one of its choice alone and a dense first block (DeepSeek).
_MIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": (
        "MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 6, "num_experts_per_tok": 2}
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_ROUTED, "head_dim": 8, "norm_topk_prob": True}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**_GROUPED, "num_experts": 6, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**_SMALL, "num_key_value_heads": 4, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 1,
         "topk_group": 1, "moe_intermediate_size": 24, "n_shared_experts": 1, "first_k_dense_replace": 1,
         "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_GROUPED, "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8},
    ),
}  # fmt: skip


def _builder(family: str) -> Callable[[], PreTrainedModel]:
    model_class, config_class, fields = (_FAMILIES | _REPEATED | _MIXTURES)[family]

    def build() -> PreTrainedModel:
        config = getattr(transformers, config_class)(**fields)
        kind = getattr(transformers, model_class)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = kind._from_config(config).eval()
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # zeros at birth; a lost bias must show
                    torch.nn.init.normal_(parameter, std=0.2)
        return model

    return build


TINY_MODELS: dict[str, Callable[[], PreTrainedModel]] = {family: _builder(family) for family in _FAMILIES}
FAMILIES = sorted(TINY_MODELS)
REPEATED: dict[str, Callable[[], PreTrainedModel]] = {family: _builder(family) for family in _REPEATED}
MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {family: _builder(family) for family in _MIXTURES}
