"""A model as llama.cpp has it: which of its architectures, its numbers, and every tensor by its name there.

Llama's queries and keys are rotated there by neighbouring rows, where transformers rotates the two halves of a head, so
their rows change places.
"""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pared.checkpoint.portable import module_map, own_class
from pared.errors import ParedError
from pared.serving.gguf.architectures import NORMS_OF_HEADS, Architecture, require_covered, require_same

BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file.

    Attributes:
        name: in llama.cpp.
        shape: rows first.
        values: makes it, float32.
    """

    name: str
    shape: tuple[int, ...]
    values: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Description:
    """What a file says of a model.

    Attributes:
        architecture: llama.cpp's name of it.
        fields: numbers by key, without the architecture's name before it; lists have one for every layer.
        tensors: in the order of the file.
        rows: of the embeddings.
    """

    architecture: str
    fields: dict[str, int | float | list[int]]
    tensors: list[GgufTensor]
    rows: int


@torch.no_grad()
def described(model: PreTrainedModel, name: str) -> Description:
    """Return what a GGUF file says of a model, dense or with layers that lost channels or heads.

    Layers of other forms are multiplied out, in float32, when their tensor is made.

    Args:
        model: loaded; it must stay as it is while tensors are made.
        name: of the model, for messages.

    Raises:
        ParedError: no architecture of llama.cpp computes what the model does; says what stands in the way.
    """
    possible = require_covered([own_class(type(model)).__name__], name)
    config = model.config
    is_gemma = possible[0].is_gemma  # a family has one set of names
    require_same(config, is_gemma, name)
    tensors = _tensors(model, possible[0].names, name)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = _numbers(tensors, config.num_hidden_layers, head)
    factors = None if is_gemma else _rope_factors(model, head, name)
    refusals: dict[str, str] = {}
    for one in possible:
        why = _why_not(one, numbers, tensors, factors is not None, config.hidden_size // head)
        if why is None:
            break
        refusals[one.name] = why
    else:
        told = "; ".join(f"{one} {why}" for one, why in refusals.items())
        raise ParedError(f"model {name!r}: no architecture of llama.cpp computes what it does: {told}")
    fields: dict[str, int | float | list[int]] = {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        **{key: each if one.by_layer else each[0] for key, each in numbers.items()},
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
        **(_gemma_fields(config) if is_gemma else {"rope.freq_base": float(config.rope_parameters["rope_theta"])}),
    }
    if is_gemma:
        tensors = {key: _with_one(tensor) for key, tensor in tensors.items()}
    listed = [_rotated(tensor, head) if one.rotates_neighbours else tensor for tensor in tensors.values()]
    if factors is not None:
        listed.append(GgufTensor("rope_freqs.weight", tuple(factors.shape), lambda: factors))
    return Description(one.name, fields, listed, tensors["token_embd.weight"].shape[0])


def _gemma_fields(config: Any) -> dict[str, int | float]:
    return {
        "rope.freq_base": float(config.rope_parameters["full_attention"]["rope_theta"]),
        "attention.sliding_window": config.sliding_window,
    }


def _with_one(tensor: GgufTensor) -> GgufTensor:
    """Return a norm of Gemma as a file has it: transformers adds the 1 as it runs."""
    if not tensor.name.endswith("norm.weight"):
        return tensor
    return GgufTensor(tensor.name, tensor.shape, lambda: tensor.values() + 1.0)


def _tensors(model: PreTrainedModel, names: Mapping[str, str], name: str) -> dict[str, GgufTensor]:
    """Return every weight and bias of a model by its name in llama.cpp; what is tied is there once.

    Raises:
        ParedError: a parameter has no name there.
    """
    entries, found = module_map(model), dict[str, GgufTensor]()

    def add(module: str, part: str, shape: tuple[int, ...], values: Callable[[], torch.Tensor]) -> None:
        block = BLOCK.fullmatch(module)
        short = names.get(block[2] if block else module)
        if short is None or part not in ("weight", "bias"):
            raise ParedError(f"model {name!r}: {module}.{part} has no name in a .gguf file")
        told = f"blk.{block[1]}.{short}.{part}" if block else f"{short}.{part}"
        found[told] = GgufTensor(told, shape, values)

    for module, entry in entries.items():
        layer: Any = model.get_submodule(module)
        add(module, "weight", (entry["out_features"], entry["in_features"]), partial(_multiplied_out, layer))
        if entry["bias"]:
            add(module, "bias", (entry["out_features"],), partial(_float, layer.bias))
    for parameter, tensor in model.named_parameters():
        module, _, part = parameter.rpartition(".")
        if not any(module == one or module.startswith(f"{one}.") for one in entries):
            add(module, part, tuple(tensor.shape), partial(_float, tensor))
    return found


def _float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float()


@torch.no_grad()
def _multiplied_out(layer: nn.Module) -> torch.Tensor:
    """Return the weight ``(out, in)`` that a layer stands for, float32; factors are multiplied in float32."""
    weight: torch.Tensor = copy.deepcopy(layer).float().weight  # type: ignore[assignment]
    return weight.detach()


def _numbers(tensors: Mapping[str, GgufTensor], blocks: int, head: int) -> dict[str, list[int]]:
    """Return the widths of MLPs and the numbers of heads of every layer, from the shapes."""

    def rows(layer: str, unit: int = 1) -> list[int]:
        return [tensors[f"blk.{block}.{layer}.weight"].shape[0] // unit for block in range(blocks)]

    return {
        "feed_forward_length": rows("ffn_gate"),
        "attention.head_count": rows("attn_q", head),
        "attention.head_count_kv": rows("attn_k", head),
    }


def _why_not(
    one: Architecture, numbers: Mapping[str, list[int]], tensors: Mapping[str, GgufTensor], factors: bool, square: int
) -> str | None:
    """Return why an architecture does not compute what a model does, None where it does."""
    for name in tensors:
        layer, _, part = name.rpartition(".")
        layer = layer.rpartition(".")[2]
        if part == "bias" and layer not in one.biases:
            return f"reads no {name}"
        if layer in NORMS_OF_HEADS and not one.has_norms_of_heads:
            return f"reads no {name}"
    if factors and not one.rotates_neighbours:
        return "takes no scaled positions (rope_parameters)"
    if not one.by_layer and any(len(set(each)) > 1 for each in numbers.values()):
        return "has one width and one number of heads for all layers"
    if one.is_square and set(numbers["attention.head_count"]) != {square}:
        return f"has {square} heads"
    return None


def _rope_factors(model: PreTrainedModel, head: int, name: str) -> torch.Tensor | None:
    """Return by what the frequencies of the positions are divided ``(head / 2,)``; None where they are not.

    Raises:
        ParedError: they are scaled in a way that factors do not say.
    """
    told = model.config.rope_parameters
    rotary: Any = model.get_submodule("model.rotary_emb")
    kind, partial_of = told.get("rope_type", "default"), told.get("partial_rotary_factor", 1.0)
    if kind not in ("default", "linear", "llama3") or partial_of != 1.0 or rotary.attention_scaling != 1.0:
        raise ParedError(f"model {name!r}: positions are scaled by rope_type {kind!r} (rope_parameters); a .gguf file "
                         "is written of default, linear and llama3, of whole heads")  # fmt: skip
    if kind == "default":
        return None
    exponents = torch.arange(0, head, 2, dtype=torch.float32) / head
    return (1.0 / told["rope_theta"] ** exponents) / rotary.inv_freq.float().cpu()


def _rotated(tensor: GgufTensor, head: int) -> GgufTensor:
    """Return a tensor with the rows of queries and keys in the order of neighbours."""
    if tensor.name.split(".")[-2] not in ("attn_q", "attn_k"):
        return tensor
    return GgufTensor(tensor.name, tensor.shape, lambda: _neighbours(tensor.values(), head))


def _neighbours(rows: torch.Tensor, head: int) -> torch.Tensor:
    """Put row j of the second half of each head behind row j of the first, ``(heads * head, ...)``."""
    halves = rows.reshape(-1, 2, head // 2, *rows.shape[1:])  # heads, halves, j
    return halves.transpose(1, 2).reshape(rows.shape)
