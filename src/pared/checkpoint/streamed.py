"""A model of which one block at a time is in memory: read from its checkpoint, changed, written to a file of its own.

The model is one tree of modules all the while. Parameters of a block that is not in memory are on the meta device.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from pared.checkpoint.block_files import Before, pack_empty, shared_members, write_block
from pared.checkpoint.loader import install_empty, tie
from pared.checkpoint.opened_blocks import OpenedBlocks
from pared.checkpoint.save import shared_tensors
from pared.checkpoint.tensor_places import TensorPlaces
from pared.errors import DamagedError, ParedError
from pared.memory import give_back
from pared.models.architecture import first_line
from pared.models.stored import (
    StoredTensor,
    metadata_of,
    read_ahead,
)
from pared.modules.quantized import QuantizedLinear
from pared.modules.shared import DOWN, BasisHolder
from pared.modules.sparse import SparseLinear
from pared.structure.finite import require_finite
from pared.structure.opening import Openable
from pared.structure.store import block_file, embeddings_and_head


class StreamedBlocks:
    """The blocks of a model, each in memory only between ``load`` and ``release`` or ``commit``.

    Args:
        model: parameters on the meta device; what is outside of the blocks is read here.
        path: name of the list of blocks.
        places: where every tensor of the checkpoint goes.
        folder: where changed blocks are written, None if nothing is.
        name: of the model, for messages.
        again: opens the checkpoint once more, for its blocks alone; None for one that was opened by it.

    Attributes:
        model: the whole model.
        path: name of the list of blocks.
        folder: where changed blocks are written, None if nothing is.
        passed: number of the pass, which stands in the names of the files it writes.
        files: for every block the file it was committed to last, None for one that is as the checkpoint has it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        path: str,
        places: TensorPlaces,
        folder: Path | None,
        name: str,
        again: "Callable[[], StreamedBlocks] | None" = None,
    ) -> None:
        self.model, self.path, self.passed, self._again = model, path, 1, again
        self.folder, self._places, self._name = folder, places, name
        stack = model.get_submodule(path)
        self._blocks = [stack.get_submodule(key) for key in places.keys]
        self.files: list[Path | None] = [None] * len(self._blocks)
        self._loaded: dict[int, list[Before]] = {}
        self._opened = OpenedBlocks(model)
        self._to_share: dict[str, str] = {}  # of adopted blocks, by the name of the tensor that another owns
        self._change: Callable[[int], None] | None = None
        self._checked: set[int] = set()  # blocks of the checkpoint whose numbers are finite
        self._empty: Any = cast("Any", WeakTensorKeyDictionary())  # parameter in memory -> the one on meta for it
        missing = places.require_whole()
        if again is not None:
            places.fill_outside()
        model.tie_weights(missing_keys=missing, recompute_mapping=False)

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules, in order, in memory or not."""
        return list(self._blocks)

    def block_name(self, index: int) -> str:
        """Return the full name of a block."""
        return f"{self.path}.{self._places.keys[index]}"

    def load(self, index: int) -> nn.Module:
        """Return a block, in its place in the model, with its tensors in memory as they were committed last.

        Raises:
            DamagedError: its file is missing or truncated, or it holds NaN or infinity.
        """
        block = self._blocks[index]
        if index in self._loaded:
            return block
        before = [Before.of(module) for module in block.modules()]
        self._loaded[index] = before
        try:
            self._fill(index)
            self._fill_shared(block, index)
            self._require_finite(block, index)
        except BaseException:
            self.release(index)
            raise
        for one in before:
            for leaf, empty in one.parameters.items():
                if empty is not None and (now := one.module._parameters.get(leaf)) is not None and now is not empty:
                    self._empty[now] = empty
            if isinstance(one.module, SparseLinear):
                one.module.unpack_()
            elif isinstance(one.module, QuantizedLinear):
                one.module.check()
        if self._change is not None:
            self._change(index)
        return block

    def expect(self, index: int) -> None:
        """Have the system read a block ahead; behind the last one and before the first there is none."""
        if 0 <= index < len(self) and index not in self._loaded:
            read_ahead(self._places.of_block(index).values())

    def release(self, index: int) -> None:
        """Give a block's tensors up; modules and values that were changed since it was loaded are as before."""
        for before in self._loaded.pop(index, []):
            before.restore()
        give_back()

    def commit(self, index: int) -> None:
        """Write a block as it stands in the model now to its file, from which it is read from now on; give it up.

        The file is there as a whole or not at all. It holds what ``save_pretrained`` would write of the block, and a
        map of its changed modules. A basis that blocks share is written by the block that owns it.

        Raises:
            ParedError: it is not loaded, there is no folder, or the disk is full.
        """
        if index not in self._loaded:
            raise ParedError(f"block {self.block_name(index)} is not in memory and cannot be committed")
        if self.folder is None:
            raise ParedError(f"model {self._name!r} was opened to be read; no folder was named for changed blocks")
        block, file = self._blocks[index], self.file_of(index)
        write_block(file, self.model, block, self.block_name(index))
        del self._loaded[index]
        self._empty_out(block)
        self._take_file(index, file)
        give_back()

    def file_of(self, index: int) -> Path:
        """Return the file that a block is committed to in this pass."""
        assert self.folder is not None
        return self.folder / block_file(self.passed, index)

    def adopt(self, index: int, file: Path) -> None:
        """Take a file that an earlier run committed for the newest form of a block, as a resumed one does.

        A block that is in memory is released.

        Raises:
            ParedError: it is no such file, or of another model.
        """
        told = metadata_of(file, self._name)
        self.release(index)  # what is put in its place now would be taken for what was read
        try:
            self._to_share |= shared_tensors(self.model) | told["shared"]
            install_empty(self.model, told["modules"], heads=told.get("heads"))
            tie(self.model, {alias: owner for alias, owner in self._to_share.items() if self._holds_basis(owner)})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(
                f"{file} does not fit block {self.block_name(index)} ({first_line(error)})",
                "remove it and start again",
            ) from None
        self._take_file(index, file)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the whole model be called inside: a block is read when it is called, and given up at the next one's call.

        A block that is called several times in a row is read once. What was loaded before stays.
        """
        current: list[int] = []

        def give_up() -> None:
            while current:
                self.release(current.pop())

        def hook(index: int) -> Any:
            def before_call(*_: object) -> None:
                if index not in self._loaded:
                    give_up()
                    current.append(index)
                    self.load(index)

            return before_call

        with contextlib.ExitStack() as stack:
            stack.callback(give_up)
            for index, block in enumerate(self._blocks):
                handle = block.register_forward_pre_hook(hook(index), prepend=True)
                stack.callback(handle.remove)
            yield

    @contextmanager
    def without_embeddings(self) -> Iterator[None]:
        """Give up the embeddings of tokens and the head for the length of a ``with`` block; they are read again then.

        Of a large vocabulary they take more than many blocks. Their parameters stay what they are, of the same shape
        and tied as before; what reads one inside all the same reads NaN.

        Raises:
            DamagedError: they cannot be read again.
        """
        given_up = list(self._embeddings())
        with torch.no_grad():
            for parameter, _ in given_up:
                parameter.data = parameter.new_full((), torch.nan).expand(parameter.shape)
        give_back()
        yield
        for parameter, stored in given_up:
            parameter.data = self._places.read(stored).to(parameter.dtype)

    def _embeddings(self) -> Iterator[tuple[nn.Parameter, StoredTensor]]:
        """Yield the embeddings and the head, where they can be read again as they are, with what they are read from."""
        own = set(map(id, embeddings_and_head(self.model)))
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            stored = self._places.where(name)
            if id(parameter) in own and stored is not None and self._places.index_of(name) is None:
                own.remove(id(parameter))  # of tied ones one is enough
                yield parameter, stored

    @contextmanager
    def patched(self, change: Callable[[int], None]) -> Iterator[None]:
        """Have every block changed when it is loaded, for the length of a ``with`` block; nothing of it is kept.

        Args:
            change: is given the index of a block that was loaded, and changes it in the model.
        """
        assert not self._loaded, "a block that is in memory would not be changed"
        self._change = change
        try:
            yield
        finally:
            self._change = None

    def dense(self) -> Callable[[int], nn.Module]:
        """Return what hands out the blocks as the checkpoint has them, one at a time, whatever is committed here."""
        assert self._again is not None, "what is outside of the blocks was not read"
        store, there = self._again(), list[int]()
        store.open_experts(self._opened.found)

        def block(index: int) -> nn.Module:
            if there != [index]:
                while there:
                    store.release(there.pop())
                there.append(index)
            return store.load(index)

        return block

    def open_experts(self, found: Sequence[Openable]) -> None:
        """Make the experts of mixtures layers of their own, wherever a block is in memory from now on; none is now."""
        assert not self._loaded, "a block that is in memory would not be opened"
        self._opened.open(found)

    def _fill(self, index: int) -> None:
        """Read a block: from the checkpoint, which has its experts closed, or from its own file."""
        with self._opened.closed(index) if self.files[index] is None else contextlib.nullcontext():
            self._places.fill_block(index)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor of the model's state by name, in the order of the names."""
        index: int | None = None
        for name in sorted(self.model.state_dict()):
            if (own := self._places.index_of(name)) != index:
                if index is not None:
                    self.release(index)
                index = own
                if index is not None:
                    self.load(index)
            module, _, leaf = name.rpartition(".")
            yield name, getattr(self.model.get_submodule(module), leaf)
        if index is not None:
            self.release(index)

    @contextmanager
    def holding(self, module: str) -> Iterator[None]:
        """Have the block that a module lies in, by the module's full name, in memory for the length of a ``with``."""
        index = self._places.index_of(f"{module}.")
        if index is None or index in self._loaded:
            yield
            return
        self.load(index)
        try:
            yield
        finally:
            self.release(index)

    def outside_state(self) -> dict[str, torch.Tensor]:
        """Return the tensors outside of the blocks by name, as the model's ``state_dict`` has them."""
        state = self.model.state_dict()
        return {name: tensor for name, tensor in state.items() if not name.startswith(f"{self.path}.")}

    def stored(self, index: int) -> dict[str, StoredTensor]:
        """Return the tensors of a block as they lie in files now, by their names there."""
        return dict(self._places.of_block(index))

    def _require_finite(self, block: nn.Module, index: int) -> None:
        """Refuse NaN and infinity in a block of the checkpoint, when it is read first."""
        if self.files[index] is None and index not in self._checked:
            require_finite(block, self._name, self.block_name(index))
            self._checked.add(index)

    def _fill_shared(self, block: nn.Module, index: int) -> None:
        """Give the members of shared bases in a block the tensor that another block owns."""
        for _, owner, member in shared_members(block, self.block_name(index)):
            source = self._places.index_of(owner)
            if source in self._loaded:
                member._parameters["weight"] = self.model.get_parameter(owner)
            elif (stored := self._places.where(owner)) is not None:
                values = self._places.read(stored)
                empty = member.weight
                member._parameters["weight"] = nn.Parameter(values.to(empty.dtype), requires_grad=empty.requires_grad)
            else:
                raise ParedError(f"{owner}, a basis that block {self.block_name(index)} shares, is in no file yet")

    def _holds_basis(self, tensor: str) -> bool:
        """Whether the owner of a shared basis is in its place yet: blocks may be taken in any order."""
        return isinstance(self.model.get_submodule(tensor.removesuffix(DOWN)), BasisHolder)

    def _take_file(self, index: int, file: Path) -> None:
        """Read a block from a file from now on."""
        self._places.take_file(index, file)
        self.files[index] = file

    def _empty_out(self, block: nn.Module) -> None:
        """Put every tensor of a block that its file holds on the meta device."""
        for module in block.modules():
            if isinstance(module, SparseLinear) and not module.packed:
                pack_empty(module)
            for leaf, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    module._parameters[leaf] = self._stand_in(parameter)
            for leaf, buffer in module._buffers.items():
                if buffer is not None and leaf not in module._non_persistent_buffers_set:
                    module._buffers[leaf] = buffer.to("meta")

    def _stand_in(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the one parameter on the meta device that stands for one in memory, wherever that is used."""
        found: nn.Parameter | None = self._empty.get(parameter)
        if found is None or found.shape != parameter.shape or found.dtype != parameter.dtype:
            found = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
            self._empty[parameter] = found
        return found
