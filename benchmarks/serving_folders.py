"""Folders of tiny random models of every family of decoders, stored in every way, for `benchmarks/serving.py`."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pared.checkpoint import mark
from pared.modules import LowRankLinear, NMGroups, PivotedLinear, SparseLinear, inherit_requires_grad, replace_module
from pared.modules.narrow import narrowed, set_counts
from pared.modules.shared import share
from pared.structure import bias_of, weight_of

VOCABULARY = 256
_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.1,
}  # fmt: skip
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
# Heads of 32 channels, the fewest that vLLM's attention on a CPU takes.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_GROUPED, "attention_bias": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": 32}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig",
               {**_GROUPED, "head_dim": 32, "layer_types": _LAYERS, "sliding_window": 32,
                "tie_word_embeddings": False}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config",
             {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 256,
              "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**_SMALL, "ffn_dim": 192, "word_embed_proj_dim": 128, "init_std": 0.1}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_SMALL, "use_parallel_residual": True}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig",
                  {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                   "shared_expert_intermediate_size": 192}),
}  # fmt: skip
# The layers of an MLP that make channels, and the one that reads them; by the names of any family.
MLPS = [
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", 1),
    (("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"), "mlp.shared_expert.down_proj", 1),
    (("mlp.gate_up_proj",), "mlp.down_proj", 2),
    (("mlp.c_fc",), "mlp.c_proj", 1),
    (("fc1",), "fc2", 1),
    (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", 1),
]
ATTENTIONS = [
    (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj"), 1),
    (("c_attn",), ("c_proj",), 3),
]
ROUTERS = ("mlp.gate", "shared_expert_gate")  # what routes to experts is none that pared compresses


def tiny(family: str) -> PreTrainedModel:
    """Return the random model of a family, biases and norms too."""
    model_class, config_class, fields = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**fields)
    model: PreTrainedModel = getattr(transformers, model_class)._from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
            elif parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def layers_of(model: nn.Module) -> list[str]:
    """Return the names of the linear layers inside of the blocks."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and "." in name and not name.endswith(ROUTERS)
        and any(part.isdigit() for part in name.split("."))
    ]  # fmt: skip


@torch.no_grad()
def low_rank(model: nn.Module, name: str, pivoted: bool = False, rank: int = 0) -> None:
    """Put factors in place, of half of the full rank if no rank is given; pivots are random."""
    old = model.get_submodule(name)
    W_ON, bias_O = weight_of(old), bias_of(old)
    out, inputs = W_ON.shape
    rank = rank or min(out, inputs) // 2 + 1  # odd, so that it differs from every width
    new = (PivotedLinear if pivoted else LowRankLinear)(inputs, out, rank, bias_O is not None)
    left, values, right = torch.linalg.svd(W_ON.float(), full_matrices=False)
    new.up.weight.copy_(left[:, :rank] * values[:rank])
    new.down.weight.copy_(right[:rank, : new.down.weight.shape[1]])
    if isinstance(new, PivotedLinear):
        new.order.copy_(torch.cat([part.sort().values for part in torch.randperm(inputs).split([rank, inputs - rank])]))
    if bias_O is not None:
        new.up.bias.copy_(bias_O)
    inherit_requires_grad(new, old)
    replace_module(model, name, new)


@torch.no_grad()
def sparse(model: nn.Module, name: str, groups: NMGroups | None) -> None:
    """Put zeros in place, half of the weights."""
    old = model.get_submodule(name)
    W_ON = weight_of(old).detach().clone().contiguous()
    if groups is None:
        mask_ON = W_ON.abs() > W_ON.abs().median()
    else:
        grouped = W_ON.abs().view(len(W_ON), -1, groups.group)
        chosen = grouped.topk(groups.kept, -1).indices
        mask_ON = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, chosen, True).view_as(W_ON)
    replace_module(model, name, SparseLinear.of(W_ON * mask_ON, mask_ON, bias_of(old), groups))


def share_bases(model: nn.Module, pivoted: bool) -> None:
    """Put factors in place, each two blocks with one basis, and queries, keys and values of the last with one."""
    groups: dict[str, list[str]] = {}
    for name in layers_of(model):
        block, _, leaf = _block_of(name)
        last = leaf.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj") and block == "2"
        groups.setdefault("qkv" if last else f"{leaf} {int(block) // 2}", []).append(name)
    for names in groups.values():
        ranks = [min(weight_of(model.get_submodule(name)).shape) for name in names]
        for name in names:
            low_rank(model, name, pivoted)
        owner: Any = model.get_submodule(names[0])
        for name in names[1:] if len(set(ranks)) == 1 else ():
            member: Any = model.get_submodule(name)
            share(member, owner, f"{names[0]}.down.weight")
            if pivoted:
                member.order.copy_(owner.order)


def _block_of(name: str) -> tuple[str, str, str]:
    """Return the number of the block, what stands before it, and what behind."""
    parts = name.split(".")
    place = next(place for place, part in enumerate(parts) if part.isdigit())
    return parts[place], ".".join(parts[:place]), ".".join(parts[place + 1 :])


def narrow_mlps(model: nn.Module, only: str = "") -> None:
    """Take other channels out of every block's MLP."""
    for number, block in _blocks(model, only):
        for makers, reader, parts in MLPS:
            if not all(_has(model, f"{block}.{one}") for one in (*makers, reader)):
                continue
            width = weight_of(model.get_submodule(f"{block}.{reader}")).shape[1]
            kept = torch.randperm(width)[: width - 16 * (number + 1)].sort().values
            for maker in makers:
                _cut(model, f"{block}.{maker}", torch.cat([kept + width * one for one in range(parts)]), None, parts)
            _cut(model, f"{block}.{reader}", None, kept, 1)


def narrow_heads(model: nn.Module) -> None:
    """Take a key and its queries out of every other block's attention."""
    for number, block in _blocks(model, ""):
        attention = next(one for one in ("self_attn", "attn", "attention") if _has(model, f"{block}.{one}"))
        path = f"{block}.{attention}"
        for makers, readers, parts in ATTENTIONS:
            reader = next((one for one in readers if _has(model, f"{path}.{one}")), None)
            if reader is None or number % 2 or not all(_has(model, f"{path}.{one}") for one in makers):
                continue
            _cut_heads(model, path, makers, reader, parts)


def _cut_heads(model: Any, path: str, makers: tuple[str, ...], reader: str, parts: int) -> None:
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = len(weight_of(model.get_submodule(f"{path}.{makers[-1]}"))) // parts // size
    for maker in makers:
        rows = weight_of(model.get_submodule(f"{path}.{maker}")).shape[0] // parts
        gone = size if maker in ("k_proj", "v_proj") or parts == 3 else rows // keys
        kept = torch.arange(gone, rows)  # the first key and its queries go
        _cut(model, f"{path}.{maker}", torch.cat([kept + rows * one for one in range(parts)]), None, parts)
        if maker == makers[0]:
            read = kept
    _cut(model, f"{path}.{reader}", None, read, 1)
    counts = {name: len(read) // (size if "head" in name else 1) for name in ("num_heads", "split_size", "embed_dim")
              if type(vars(model.get_submodule(path)).get(name)) is int}  # fmt: skip
    if counts:
        set_counts(model.get_submodule(path), counts)


def _cut(model: nn.Module, name: str, rows: torch.Tensor | None, columns: torch.Tensor | None, parts: int) -> None:
    old = model.get_submodule(name)
    W_ON, bias_O = weight_of(old), bias_of(old)
    if rows is not None:
        W_ON, bias_O = W_ON[rows], None if bias_O is None else bias_O[rows]
    if columns is not None:
        W_ON = W_ON[:, columns]
    replace_module(model, name, narrowed(old, W_ON, bias_O, parts))


def _blocks(model: nn.Module, only: str) -> Iterator[tuple[int, str]]:
    found = dict.fromkeys(_block_of(name)[:2] for name in layers_of(model))
    return ((int(number), f"{path}.{number}") for number, path in found if only in ("", number))


def _has(model: nn.Module, name: str) -> bool:
    try:
        return model.get_submodule(name) is not None
    except AttributeError:
        return False


def every_kind(model: nn.Module) -> None:
    """Give neighbouring layers different kinds, dense among them, so that every fused layer has several."""
    kinds: list[Callable[[str], None]] = [
        lambda name: low_rank(model, name),
        lambda name: low_rank(model, name, pivoted=True),
        lambda _: None,
        lambda name: sparse(model, name, None),
        lambda name: sparse(model, name, NMGroups(2, 4)),
    ]
    names = layers_of(model)
    narrow_mlps(model, only="2")
    for place, name in enumerate(names):
        if isinstance(model.get_submodule(name), (nn.Linear, Conv1D)) and not hasattr(
            model.get_submodule(name), "entry"
        ):
            kinds[place % len(kinds)](name)


def at_keep(model: nn.Module, keep: float, pivoted: bool) -> None:
    """Put factors of so many of the parameters in place."""
    for name in layers_of(model):
        out, inputs = weight_of(model.get_submodule(name)).shape
        rank = round(keep * out * inputs / (out + inputs))
        if pivoted:  # k (out + in - k) parameters
            half = (out + inputs) / 2
            rank = round(half - math.sqrt(half * half - keep * out * inputs))
        low_rank(model, name, pivoted, rank)


def all_layers(change: Callable[[nn.Module, str], None]) -> Callable[[nn.Module], None]:
    """Return what changes every linear layer inside of the blocks."""

    def changed(model: nn.Module) -> None:
        for name in layers_of(model):
            change(model, name)

    return changed


STORAGES: dict[str, Callable[[nn.Module], None]] = {
    "dense": lambda _: None,
    "factors": all_layers(low_rank),
    "pivoted": all_layers(lambda model, name: low_rank(model, name, pivoted=True)),
    "shared": lambda model: share_bases(model, pivoted=False),
    "shared, pivoted": lambda model: share_bases(model, pivoted=True),
    "sparse": all_layers(lambda model, name: sparse(model, name, None)),
    "2:4": all_layers(lambda model, name: sparse(model, name, NMGroups(2, 4))),
    "widths": narrow_mlps,
    "heads": narrow_heads,
    "every kind": every_kind,
}


def make(family: str, storage: str, folder: Path) -> Path | None:
    """Write the folder of a tiny model, unless it is there.

    Returns:
        None where a family has nothing of the kind.
    """
    if not (folder / "config.json").exists():
        model = tiny(family)
        STORAGES[storage](model)
        if storage != "dense":
            mark(model)
            if not getattr(getattr(model.config, "quantization_config", None), "modules", None):
                return None
        model.save_pretrained(folder)
    return folder
