"""Layers of an inference engine, filled from modules as a checkpoint has them, with no engine."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pared.checkpoint.loader import empty_module
from pared.serving.vllm.layer import Bases, FusedLayer, Matrix, MemberLayer
from pared.serving.vllm.layout import members_of
from pared.serving.vllm.narrowing import Narrowed, Shape, arrange

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
Entry = dict[str, Any]


def factors(out: int, inputs: int, rank: int, kind: str = "low_rank", bias: bool = False) -> Entry:
    return {"kind": kind, "in_features": inputs, "out_features": out, "rank": rank, "bias": bias}


def multiply(matrix: Matrix, x: torch.Tensor, bias: bool) -> torch.Tensor:
    return functional.linear(x, matrix.weight, matrix.bias if bias else None)


def checkpoint(modules: Mapping[str, Entry], shapes: Mapping[str, tuple[int, int]], bias: bool) -> nn.ModuleDict:
    """Random modules, by their last names, of a map's kinds and dense ones; of shape ``(out, in)``."""
    made = nn.ModuleDict()
    for name, (out, inputs) in shapes.items():
        made[name] = empty_module(modules[name]) if name in modules else nn.Linear(inputs, out, bias)
        for parameter in made[name].parameters():
            nn.init.normal_(parameter)
        if modules.get(name, {}).get("kind") == "pivoted":
            made[name].order.copy_(torch.randperm(inputs))
    return made


def engine(
    prefix: str, modules: Mapping[str, Entry], made: nn.ModuleDict, shape: Shape, bias: bool = False,
    shared: Mapping[str, str] | None = None, change: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    narrowed: Narrowed | None = None,
) -> FusedLayer:  # fmt: skip
    """The layer that one rank has, filled with the checkpoint's tensors."""
    members = members_of(prefix, len(shape.sizes), FUSED, modules, shared or {})
    arranged = arrange(prefix, members, shape, {} if narrowed is None else narrowed)
    bases: Bases = {}
    layers = [MemberLayer(member, arranged, bias, torch.float32, bases) for member in members]
    for layer in layers:
        for name, tensor in made[layer.member.name].state_dict().items():
            layer.load("bias" if name == "up.bias" else name, change(tensor))
        layer.finish(lambda _: None)
    return FusedLayer(layers)
