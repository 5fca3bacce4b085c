"""The architectures of llama.cpp that a model may be written as, and what of a configuration they compute otherwise.

They are described by llama.cpp's code (``src/models/*.cpp``), names of tensors by its ``gguf-py``. ``deci`` is Llama
with numbers of its own for every layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from pared.checkpoint.portable import own_class
from pared.errors import ParedError
from pared.names import called

NORMS_OF_HEADS = ("attn_q_norm", "attn_k_norm")
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = {
    **NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GLOBAL_EVERY, LOCAL_BASE = 6, 1e4  # of Gemma 3 in llama.cpp's code: every sixth layer sees all, the others rotate so


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp, as far as it differs from Llama.

    Attributes:
        name: that it has there.
        biases: the layers whose biases it reads.
        has_norms_of_heads: whether queries and keys are normalised by head.
        rotates_neighbours: whether it rotates neighbouring rows, and reads factors for the frequencies.
        is_square: whether all heads together must be as wide as the model.
        by_layer: whether every layer may have numbers of its own.
        is_gemma: whether it is Gemma 3: its activation and windows, and norms that are stored with the 1 added that
            transformers adds as it runs.
        names: of modules in transformers -> in a file.
    """

    name: str
    biases: tuple[str, ...]
    has_norms_of_heads: bool = False
    rotates_neighbours: bool = False
    is_square: bool = False
    by_layer: bool = False
    is_gemma: bool = False
    names: Mapping[str, str] = field(default_factory=lambda: NAMES)


_QKV = ("attn_q", "attn_k", "attn_v")
_ALL = (*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
LLAMA = Architecture("llama", _ALL, rotates_neighbours=True)
DECI = Architecture("deci", _ALL, rotates_neighbours=True, by_layer=True)
QWEN2 = Architecture("qwen2", _QKV, is_square=True)
QWEN3 = Architecture("qwen3", _QKV, has_norms_of_heads=True)
GEMMA3 = Architecture("gemma3", (), has_norms_of_heads=True, is_gemma=True, names=GEMMA_NAMES)
# class of transformers -> what it may be in llama.cpp, the plainest first
FAMILIES: dict[str, tuple[Architecture, ...]] = {
    "LlamaForCausalLM": (LLAMA, DECI),
    "MistralForCausalLM": (LLAMA, DECI),
    "Qwen2ForCausalLM": (QWEN2, DECI),
    "Qwen3ForCausalLM": (QWEN3,),
    "Gemma3ForCausalLM": (GEMMA3,),
}


def require_covered(architectures: object, name: str) -> tuple[Architecture, ...]:
    """Return what a model may be in llama.cpp.

    Args:
        architectures: names of classes, as a configuration lists them.
        name: of the model, for messages.

    Raises:
        ParedError: it is of another class; says which are covered.
    """
    listed = list(architectures) if isinstance(architectures, (list, tuple)) else []
    found = FAMILIES.get(listed[0]) if len(listed) == 1 else None
    if found is None:
        raise ParedError(f"model {name!r} is {' and '.join(map(str, listed)) or 'of no class'}, and a .gguf file is "
                         f"written of {', '.join(FAMILIES)}; export a dense folder ({called('to', 'dense')}), and "
                         "convert it with convert_hf_to_gguf.py of llama.cpp")  # fmt: skip
    return found


def can_be_of_any_widths(model: PreTrainedModel) -> bool:
    """Whether an architecture that the model may be in llama.cpp has numbers of its own for every layer."""
    return any(one.by_layer for one in FAMILIES.get(own_class(type(model)).__name__, ()))


def require_same(config: PretrainedConfig, is_gemma: bool, name: str) -> None:
    """Refuse what the architectures of llama.cpp compute otherwise.

    Args:
        config: of the model.
        is_gemma: whether it is to be Gemma 3 there.
        name: of the model, for messages.

    Raises:
        ParedError: says which field of the configuration.
    """
    if is_gemma:
        _require_gemma(config, name)
        return
    if (activation := config.hidden_act) not in ("silu", "swish"):
        raise ParedError(f"model {name!r}: hidden_act is {activation!r}, and llama.cpp has silu there")
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = window is not None and window < config.max_position_embeddings
    if "sliding_attention" in kinds if kinds else slides:
        raise ParedError(f"model {name!r}: its attention sees {window} tokens (sliding_window), and llama.cpp's all of "
                         "them there: longer texts would be answered otherwise; set sliding_window to null in "
                         "config.json if it is to be served so")  # fmt: skip


def _require_gemma(config: Any, name: str) -> None:
    """Refuse a Gemma 3 whose numbers are not those that llama.cpp has in its code."""
    kinds = [f"{'sliding' if (block + 1) % GLOBAL_EVERY else 'full'}_attention"
             for block in range(config.num_hidden_layers)]  # fmt: skip
    local, everywhere = (config.rope_parameters[f"{kind}_attention"] for kind in ("sliding", "full"))
    expected: dict[str, tuple[object, object]] = {
        "hidden_activation": (config.hidden_activation, "gelu_pytorch_tanh"),
        "layer_types": (list(config.layer_types), kinds),
        "query_pre_attn_scalar": (config.query_pre_attn_scalar, config.head_dim),
        "rope_parameters.sliding_attention.rope_theta": (local["rope_theta"], LOCAL_BASE),
        "rope_parameters.sliding_attention.rope_type": (local.get("rope_type", "default"), "default"),
        "rope_parameters.full_attention.rope_type": (everywhere.get("rope_type", "default"), "default"),
        **{key: (getattr(config, key, None), None) for key in ("attn_logit_softcapping", "final_logit_softcapping")},
        "use_bidirectional_attention": (bool(getattr(config, "use_bidirectional_attention", False)), False),
    }
    for key, (found, wanted) in expected.items():
        if found != wanted:
            raise ParedError(f"model {name!r}: {key} is {found!r}, and llama.cpp has {wanted!r} there")
