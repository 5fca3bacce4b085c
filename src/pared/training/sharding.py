"""Parameters in shards: every process holds its part of each block, and the whole of a block only while it computes.

This is FSDP by torch's ``fully_shard`` (Zhao et al., VLDB 2023, arXiv 2304.11277). Parameters, their gradients and the
optimizer's state are divided among the processes. What is written is whole, so nothing that reads it knows of shards.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Divide a model's parameters among the processes, in place; every block is gathered by itself.

    Args:
        model: on the device it trains on, the same in every process.
        blocks: of it, in order.
    """
    for unit in units(blocks):
        fully_shard(unit)
    fully_shard(model)
    model._is_accelerate_prepared = True  # type: ignore[assignment]  # gradients are reduced already: no DDP around it


def units(blocks: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """Yield blocks that are gathered together: those that share a parameter, and the blocks between them."""
    seen = [{id(parameter) for parameter in block.parameters()} for block in blocks]
    start = 0
    while start < len(blocks):
        end = start + 1
        while later := [index for index in range(end, len(blocks)) if seen[index] & set().union(*seen[start:end])]:
            end = later[-1] + 1
        yield list(blocks[start:end])
        start = end


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds only a part of a tensor."""
    return isinstance(tensor, DTensor)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor; if it is in shards, every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(tensor: torch.Tensor, whole: torch.Tensor) -> None:
    """Give a tensor other values, of which every process has the whole."""
    tensor.copy_(_like(tensor, whole))


def save_whole(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer's state be whole outside of it: gathered when it is asked for, divided when it is given."""

    def gather(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "state": {
            index: {name: gathered(value) if isinstance(value, torch.Tensor) else value for name, value in one.items()}
            for index, one in state["state"].items()
        }}  # fmt: skip

    def divide(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        parameters = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
        return {**state, "state": {
            index: {name: _like(parameters[index], value) if _follows(value, parameters[index]) else value
                    for name, value in one.items()}
            for index, one in state["state"].items()
        }}  # fmt: skip

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(divide)


def _follows(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _like(tensor: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)
