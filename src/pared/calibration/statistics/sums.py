"""A tensor added up over the ranks of a process group."""

import torch
from torch import distributed
from torch.distributed import ProcessGroup


def is_distributed() -> bool:
    """Whether this process is one of a group."""
    return distributed.is_available() and distributed.is_initialized()


def sum_over_ranks(total: torch.Tensor, tokens: int, group: ProcessGroup | None) -> int:
    """Add up a tensor over ranks in place, on whatever device the group's backend works; return the sum of tokens."""
    if not is_distributed():
        return tokens
    device = _device_for(total.device, group)
    moved, counted = total.to(device), torch.tensor(tokens, device=device)
    distributed.all_reduce(moved, group=group)
    distributed.all_reduce(counted, group=group)
    if moved is not total:
        total.copy_(moved)
    return int(counted)


def _device_for(device: torch.device, group: ProcessGroup | None) -> torch.device:
    """Return the device itself if the group's backend takes its tensors, else one that it does."""
    taken = [pair.partition(":")[0] for pair in str(distributed.get_backend_config(group)).split(",")]
    return device if device.type in taken else torch.device("cpu" if "cpu" in taken else taken[0])
