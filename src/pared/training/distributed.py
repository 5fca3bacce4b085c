"""The processes of a training: one, or several that a launcher started, of which the first writes.

Parameters may be in shards: every process holds its part of each block, and the whole of a block only while it
computes. This is FSDP by torch's ``fully_shard`` (Zhao et al., VLDB 2023, arXiv 2304.11277). Parameters, their
gradients and the optimizer's state are divided among the processes. What is written is whole, so nothing that reads it
knows of shards.
"""

import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pared.environment import device_of
from pared.errors import ParedError
from pared.processes import PATIENCE, Processes


class TrainingProcesses(Processes):
    """This process among those that train together, as Accelerate knows them.

    Args:
        device: where it trains.

    Attributes:
        sharded: whether each holds only its part of what trains (FSDP), as ``accelerate launch --use_fsdp`` asks for.

    Raises:
        ParedError: Accelerate is missing, the device is not here or is one by number, or the launcher asks for
            DeepSpeed or for parameters that wait in the memory of the host.
    """

    def __init__(self, device: str) -> None:
        if importlib.util.find_spec("accelerate") is None:
            raise ParedError("training needs the package accelerate; install it with: pip install accelerate")
        for name in ("ACCELERATE_USE_DEEPSPEED", "FSDP_OFFLOAD_PARAMS"):
            if _is_set(name):
                raise ParedError(f"training does not know what {name} asks for; launch with FSDP that does not offload "
                                 "(accelerate launch --use_fsdp), or data parallel (--multi_gpu)")  # fmt: skip
        if ":" in device:
            raise ParedError(
                f"device {device!r}: a process takes the device of its own number; choose one by "
                f"CUDA_VISIBLE_DEVICES={device.partition(':')[2]} in the environment, and device cuda"
            )
        where = device_of(device)
        from accelerate import PartialState

        state: Any = PartialState(cpu=where.type == "cpu", timeout=PATIENCE)
        super().__init__(state.process_index, state.num_processes, torch.device(state.device))
        self.sharded: bool = _asks_for_shards() and self.count > 1


@functools.cache
def _asks_for_shards() -> bool:
    """Whether the launcher of this process asks for FSDP.

    That is kept from Accelerate, which would shard what is in shards already, as is a precision other than that of the
    training.
    """
    asked = _is_set("ACCELERATE_USE_FSDP")
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    return asked


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true")


def shard(model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Divide a model's parameters among the processes, in place; every block is gathered by itself.

    Args:
        model: on the device it trains on; what the first process holds is what is divided.
        blocks: of it, in order.
        device: of this process.

    Raises:
        ParedError: torch cannot divide a parameter.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point() and tensor.numel():
            distributed.broadcast(tensor.detach(), src=0)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    empty = {parameter for parameter in model.parameters() if not parameter.numel()}
    try:
        for unit in (*units(blocks), [model]):
            fully_shard(unit if len(unit) > 1 else unit[0], mesh=mesh, ignored_params=empty)
    except ValueError as error:
        raise ParedError(f"FSDP cannot divide this model: {error}; launch data parallel (--multi_gpu)") from None
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


@torch.no_grad()
def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor; if it is in shards, every process has to ask.

    Not by ``full_tensor``: over gloo its functional all-gather corrupts the heap once in some 100,000 calls (2.13.0).
    """
    if not isinstance(tensor, DTensor):
        return tensor
    part, processes = tensor.to_local(), tensor.device_mesh.size()
    rows = -(-len(tensor) // processes)  # of the first parts; the last ones are shorter, or empty
    padded = part.new_zeros(rows, *tensor.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(processes)]
    distributed.all_gather(parts, padded, group=tensor.device_mesh.get_group())
    return torch.cat(parts)[: len(tensor)]


def collected(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the whole of every tensor; if they are in shards, every process has to ask, and the first alone gets them.

    One is gathered at a time, and waits in the memory of the host.
    """
    found = {}
    for name, tensor in tensors.items():
        whole = gathered(tensor)
        if not is_sharded(tensor):
            found[name] = whole
        elif distributed.get_rank() == 0:
            found[name] = whole.cpu()
    return found


@torch.no_grad()
def fill(tensor: torch.Tensor, whole: torch.Tensor) -> None:
    """Give a tensor other values, of which every process has the whole."""
    tensor.copy_(_like(tensor, whole))


def full_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer's state be whole outside of it: collected when it is asked for, divided when it is given."""

    def collect(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "state": {
            index: {**one, **collected({name: value for name, value in one.items() if isinstance(value, DTensor)})}
            for index, one in state["state"].items()
        }}  # fmt: skip

    def divide(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        parameters = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
        return {**state, "state": {
            index: {name: _like(parameters[index], value) if _follows(value, parameters[index]) else value
                    for name, value in one.items()}
            for index, one in state["state"].items()
        }}  # fmt: skip

    optimizer.register_state_dict_post_hook(collect)
    optimizer.register_load_state_dict_pre_hook(divide)


def _follows(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _like(tensor: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)
