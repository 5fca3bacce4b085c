"""A block of a model in a file of its own, and what the block is without its tensors."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from pared.checkpoint.loader import empty_module
from pared.checkpoint.portable import module_map
from pared.errors import ParedError
from pared.io.files import appearing
from pared.models.stored import LINE
from pared.modules.narrow import counts_of
from pared.modules.shared import DOWN, BasisHolder
from pared.modules.sparse import SparseLinear

T = TypeVar("T")


@dataclass
class Before:
    """A module of a block before it was loaded: what it holds, and is given back."""

    module: nn.Module
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, torch.Tensor | None]
    children: dict[str, nn.Module | None]
    tensors: dict[str, torch.Tensor]  # in plain attributes: the stand-in for the weight of a packed layer

    @classmethod
    def of(cls, module: nn.Module) -> "Before":
        """Note what a module holds now."""
        tensors = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
        return cls(module, dict(module._parameters), dict(module._buffers), dict(module._modules), tensors)

    def restore(self) -> None:
        """Give it back what it held; what came meanwhile goes."""
        _exchange(self.module._parameters, self.parameters)
        _exchange(self.module._buffers, self.buffers)
        _exchange(self.module._modules, self.children)
        own = vars(self.module)
        for name in [name for name, value in own.items() if isinstance(value, torch.Tensor)]:
            del own[name]
        own.update(self.tensors)


def _exchange(now: dict[str, T], before: dict[str, T]) -> None:
    now.clear()
    now.update(before)


def pack_empty(module: SparseLinear) -> None:
    """Make an unpacked layer a packed one without values, as it is before it is read."""
    empty = empty_module({"kind": "sparse", **module.entry()}, device="meta", dtype=module.weight.dtype)
    assert isinstance(empty, SparseLinear)
    empty.values.requires_grad_(module.weight.requires_grad)
    bias = module.bias
    del module.weight  # the parameter
    vars(module)["weight"] = empty.weight
    module._parameters["values"] = empty.values
    module._parameters["bias"] = bias
    module._buffers["bits"] = empty.bits


def shared_members(block: nn.Module, name: str) -> Iterator[tuple[str, str, nn.Linear]]:
    """Yield for every basis in a block that another module owns its tensor's name, that of the owner's, and the layer.

    Args:
        block: whose modules these are.
        name: of it in the model.
    """
    for path, module in block.named_modules(prefix=name):
        if isinstance(module, BasisHolder) and module.shares not in (None, path + DOWN):
            yield path + DOWN, str(module.shares), module.down


def write_block(file: Path, model: PreTrainedModel, block: nn.Module, name: str) -> None:
    """Write what ``save_pretrained`` would write of a block, and a map of its changed modules.

    The file is there as a whole, on the disk, or not at all. A basis that blocks share is written by its owner.

    Args:
        file: to be.
        model: that the block is of.
        block: in memory.
        name: of it in the model.

    Raises:
        ParedError: it cannot be written, as where the disk is full.
    """
    shared = {tensor: owner for tensor, owner, _ in shared_members(block, name)}
    state = _state(model, block, name, {*shared, *(model._keys_to_ignore_on_save or ())})
    modules = {f"{name}.{path}".rstrip("."): entry for path, entry in module_map(block).items()}
    notes = {"modules": modules, "shared": shared, "heads": counts_of(block, name), "places": _places(block, state)}
    tensors = {key: _own_memory(tensor) for key, tensor in state.items()}
    try:
        with appearing(file) as partial:
            save_file(tensors, partial, metadata={"format": "pt", "pared": json.dumps(notes, sort_keys=True)})
            _sort_metadata(partial)
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise ParedError(f"{file} cannot be written ({message}); blocks before it are as they were") from error


def _state(model: PreTrainedModel, block: nn.Module, name: str, left_out: set[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of a block by the names that ``save_pretrained`` writes them by."""
    state: dict[str, torch.Tensor] = block.state_dict(prefix=f"{name}.")
    kept = {key: tensor.detach() for key, tensor in state.items() if key not in left_out}
    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, kept)
    return reverted


def _places(block: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return where in a cache line the parameters of a block lie that are in its state, but for those at its start."""
    live = {parameter.data_ptr() for parameter in block.parameters()}
    return {
        key: one.data_ptr() % LINE for key, one in state.items() if one.data_ptr() in live and one.data_ptr() % LINE
    }


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with memory of its own, as a file of tensors needs it."""
    tensor = tensor.contiguous().cpu()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes + LINE else tensor


def _sort_metadata(file: Path) -> None:
    """Put what a header says of its file in one order: safetensors writes it in another every time."""
    with file.open("r+b") as raw:
        size = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        raw.seek(8)
        raw.write(text.ljust(size))
