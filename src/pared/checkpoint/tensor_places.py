"""Where the tensors of a checkpoint go in a model, and which block each of them is of."""

import re
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pared.errors import ParedError
from pared.models.stored import StoredTensor, metadata_of, stored_tensors
from pared.models.weights import WeightNames, require_none_missing, warn_of_unused
from pared.names import called


class TensorPlaces:
    """Reads the tensors of one block, or those of none, into their places in a model.

    Args:
        model: parameters on the meta device.
        path: name of its list of blocks.
        names: maps names of the checkpoint to those of the model.
        stored: the tensors of the checkpoint.
        name: of the model, for messages.

    Attributes:
        keys: the names of the blocks in their list, in order.

    Raises:
        ParedError: a tensor becomes parts of several blocks.
    """

    def __init__(
        self, model: PreTrainedModel, path: str, names: WeightNames, stored: dict[str, StoredTensor], name: str
    ) -> None:
        self._model, self._path, self._names, self._name = model, path, names, name
        self.keys = [key for key, block in model.get_submodule(path)._modules.items() if block is not None]
        self._placed = names.placed(stored)
        self._of_block: list[dict[str, StoredTensor]] = [{} for _ in self.keys]
        self._outside: dict[str, StoredTensor] = {}
        self._where: dict[str, StoredTensor] = {}  # by the name of the parameter, of what is only renamed
        self._sort_in(stored)

    def _sort_in(self, stored: dict[str, StoredTensor]) -> None:
        """Note which tensors are whose block's; those that have no place in the model are left out."""
        known = self._model.state_dict().keys()
        for key, tensor in stored.items():
            names, converted = self._placed[key]
            if not any(name in known for name in names):
                continue
            indices = {self.index_of(name) for name in names}
            if len(indices) > 1:
                raise ParedError(
                    f"model {self._name!r}: {key} becomes parts of several blocks, which cannot be read one by one; "
                    f"work with the whole model in memory ({called('stream', 'off')})"
                )
            index = indices.pop()
            (self._outside if index is None else self._of_block[index])[key] = tensor
            if not converted:
                self._where[names[0]] = tensor

    def index_of(self, tensor: str) -> int | None:
        """Return the block that a parameter lies in."""
        if not tensor.startswith(f"{self._path}."):
            return None
        key = tensor.removeprefix(f"{self._path}.").partition(".")[0]
        return self.keys.index(key) if key in self.keys else None

    def of_block(self, index: int) -> dict[str, StoredTensor]:
        """Return the tensors of a block as they lie in files now, by their names there."""
        return self._of_block[index]

    def where(self, parameter: str) -> StoredTensor | None:
        """Return the tensor that a parameter has the values of as they are; None if it is made of others."""
        return self._where.get(parameter)

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """Return one tensor as it is stored.

        Raises:
            DamagedError: its file cannot be read.
        """
        return self._names.read(tensor)

    def fill_block(self, index: int) -> None:
        """Read the tensors of a block into the model.

        Raises:
            DamagedError: a file cannot be read, or a tensor has another shape than its place.
        """
        self._names.fill(list(self._of_block[index].values()), self._placed)

    def fill_outside(self) -> None:
        """Read what is outside of the blocks into the model; raises as :meth:`fill_block`."""
        self._names.fill(list(self._outside.values()), self._placed)

    def require_whole(self) -> set[str]:
        """Return what the checkpoint lacks as it is tied to what it has.

        Raises:
            DamagedError: it lacks anything else, which transformers would fill with random numbers.
        """
        missing = self._names.missing(self._placed)
        tied: dict[str, str] = getattr(self._model, "all_tied_weights_keys", None) or {}
        found = {name for pair in tied.items() for name in pair if not set(pair) <= missing}
        require_none_missing(missing - found, self._name)
        known = self._model.state_dict().keys()
        ignored = re.compile("|".join(self._model._keys_to_ignore_on_load_unexpected or ["$^"]))  # as transformers does
        unused = {name for one in self._placed.values() for name in one.names if name not in known}
        unused = {name for name in unused if not ignored.search(name)}
        warn_of_unused(unused, self._name)
        return missing

    def take_file(self, index: int, file: Path) -> None:
        """Read a block from a file from now on.

        Raises:
            DamagedError: it cannot be read.
        """
        for key in self._of_block[index]:
            for name in self._placed.pop(key).names:
                self._where.pop(name, None)
        stored = stored_tensors([file], self._name, metadata_of(file, self._name)["places"])
        self._placed |= self._names.placed(stored)
        self._of_block[index] = stored
        self._where |= {
            self._placed[key].names[0]: one for key, one in stored.items() if not self._placed[key].converted
        }
