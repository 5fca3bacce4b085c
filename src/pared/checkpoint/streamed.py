"""A model of which one block at a time is in memory: read from its checkpoint, changed, written to a file of its own.

The model is one tree of modules all the while. Parameters of a block that is not in memory are on the meta device.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.auto import get_hf_quantizer

from pared.checkpoint.block_files import Before, own_memory, pack_empty, write_block
from pared.checkpoint.loader import install_empty, tie
from pared.checkpoint.portable import module_map
from pared.checkpoint.save import shared_tensors
from pared.environment import dtype_of
from pared.errors import DamagedError, ParedError
from pared.memory import give_back
from pared.models.architecture import architecture, first_line, raised_in
from pared.models.source import ModelSource
from pared.models.stored import (
    LINE,
    StoredTensor,
    first_floating,
    metadata_of,
    read_ahead,
    stored_tensors,
    weight_files,
)
from pared.models.trust import trusted
from pared.models.weights import Placed, WeightNames, require_none_missing, warn_of_unused
from pared.modules.narrow import counts_of
from pared.modules.shared import DOWN, BasisHolder
from pared.modules.sparse import SparseLinear
from pared.names import called
from pared.structure.finite import require_finite
from pared.structure.model import find_blocks_path
from pared.structure.store import block_file


def open_streamed(
    source: ModelSource,
    dtype: "str | torch.dtype" = "auto",
    folder: Path | None = None,
    blocks_path: str | None = None,
    outside: bool = True,
) -> "StreamedBlocks":
    """Open a model so that its blocks are read when they are needed; everything outside of them is read now.

    Every tensor has the bits and dtype that ``source.load()`` gives it. Memory: what is outside of the blocks.

    Args:
        source: a model in safetensors, dense or made by pared.
        dtype: ``auto`` keeps what is stored.
        folder: where changed blocks are written; without one none may be changed.
        blocks_path: name of the list of blocks, where it is not the one that ``find_anatomy`` finds.
        outside: whether what is outside of the blocks is read at all; without it the model cannot be called.

    Raises:
        ParedError: as ``source.load()``; also where weights of blocks are tied to others, or no safetensors are there.
    """
    source.require_files()
    name, location = source.name, source.location
    files = weight_files(location, name)
    stored = stored_tensors(files, name)
    model, quantizer, path = _empty_model(source, dtype, stored, blocks_path)
    _require_untied(model, path, name)
    names = WeightNames(model, model.dtype, quantizer, name)
    placed, again = names.placed(stored), partial(open_streamed, source, dtype, None, blocks_path, outside=False)
    store = StreamedBlocks(model, path, names, placed, stored, folder, name, again if outside else None)
    if not outside:
        return store
    if quantizer is not None:
        quantizer.postprocess_model(model)  # as from_pretrained does; what is not in memory stays packed
    require_finite(model, name)
    return store


def _empty_model(
    source: ModelSource, dtype: "str | torch.dtype", stored: dict[str, StoredTensor], blocks_path: str | None
) -> tuple[PreTrainedModel, Any, str]:
    """Build the model as ``from_pretrained`` does: parameters without values, buffers with theirs.

    Returns:
        The model, what put compressed modules in place, if anything, and the name of its list of blocks.
    """
    config = source.config()
    kind = architecture(config, source.name, source.location)
    quantizer, config, _ = get_hf_quantizer(config, None, None, True, {})
    chosen = dtype_of(dtype) or getattr(config, "dtype", None) or first_floating(stored.values())
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = kind._from_config(config, dtype=chosen)
            path = find_blocks_path(model, blocks_path)  # of packed layers it could not be told
            if quantizer is not None:
                quantizer.preprocess_model(model=model, dtype=chosen, device_map=None, checkpoint_files=[])
    except ParedError:
        raise
    except Exception as error:  # whatever a nonsensical configuration leads to
        raise ParedError(
            f"model {source.name!r}: config.json makes no model ({first_line(error)}, {raised_in(error)})"
        ) from error
    model.config.name_or_path = source.location
    if model.can_generate() and hasattr(model, "adjust_generation_fn"):
        model.adjust_generation_fn(
            None, False, None, source.location, cache_dir=None, force_download=False, proxies=None,
            local_files_only=False, token=None, revision="main", subfolder="", trust_remote_code=trusted(),
        )  # fmt: skip
    return model.eval(), quantizer, path


def _require_untied(model: PreTrainedModel, path: str, name: str) -> None:
    for alias, owner in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        inside = [tensor for tensor in (alias, owner) if tensor.startswith(f"{path}.")]
        if inside and not alias.endswith(DOWN):
            raise ParedError(
                f"model {name!r}: {alias} is tied to {owner}, and a block that shares a weight cannot be read by "
                f"itself; work with the whole model in memory ({called('stream', 'off')})"
            )


class StreamedBlocks:
    """The blocks of a model, each in memory only between ``load`` and ``release`` or ``commit``.

    Args:
        model: parameters on the meta device; what is outside of the blocks is read here.
        path: name of the list of blocks.
        names: maps names of the checkpoint to those of the model.
        placed: where every tensor of the checkpoint goes.
        stored: the tensors of the checkpoint.
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
        names: WeightNames,
        placed: dict[str, Placed],
        stored: dict[str, StoredTensor],
        folder: Path | None,
        name: str,
        again: "Callable[[], StreamedBlocks] | None" = None,
    ) -> None:
        self.model, self.path, self.passed, self._again = model, path, 1, again
        self.folder, self._names, self._name = folder, names, name
        stack = model.get_submodule(path)
        self._blocks = {key: block for key, block in stack._modules.items() if block is not None}
        self._keys = list(self._blocks)
        self.files: list[Path | None] = [None] * len(self._keys)
        self._stored: list[dict[str, StoredTensor]] = [{} for _ in self._keys]
        self._placed = dict(placed)
        self._where: dict[str, StoredTensor] = {}  # by the name of the parameter, of what is only renamed
        self._loaded: dict[int, list[Before]] = {}
        self._to_share: dict[str, str] = {}  # of adopted blocks, by the name of the tensor that another owns
        self._change: Callable[[int], None] | None = None
        self._checked: set[int] = set()  # blocks of the checkpoint whose numbers are finite
        self._empty: Any = cast("Any", WeakTensorKeyDictionary())  # parameter in memory -> the one on meta for it
        outside = self._sort_in(stored)
        missing = self._require_whole()
        names.fill(list(outside.values()) if again is not None else [], placed)
        model.tie_weights(missing_keys=missing, recompute_mapping=False)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules, in order, in memory or not."""
        return list(self._blocks.values())

    def block_name(self, index: int) -> str:
        """Return the full name of a block."""
        return f"{self.path}.{self._keys[index]}"

    def load(self, index: int) -> nn.Module:
        """Return a block, in its place in the model, with its tensors in memory as they were committed last.

        Raises:
            DamagedError: its file is missing or truncated, or it holds NaN or infinity.
        """
        block = self._blocks[self._keys[index]]
        if index in self._loaded:
            return block
        before = [Before.of(module) for module in block.modules()]
        self._loaded[index] = before
        try:
            self._names.fill(list(self._stored[index].values()), self._placed)
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
        if self._change is not None:
            self._change(index)
        return block

    def expect(self, index: int) -> None:
        """Have the system read a block ahead; behind the last one and before the first there is none."""
        if 0 <= index < len(self) and index not in self._loaded:
            read_ahead(self._stored[index].values())

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
        block, file = self._blocks[self._keys[index]], self.file_of(index)
        state = self._state(block, index)
        places = _places(block, state)
        notes = {"modules": self._map(block, index), "shared": self._shared(block, index), "places": places}
        notes["heads"] = counts_of(block, self.block_name(index))
        write_block(file, {key: own_memory(tensor) for key, tensor in state.items()}, notes)
        del self._loaded[index]
        self._empty_out(block)
        self._take_file(index, file)
        del block, state
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
            for index, key in enumerate(self._keys):
                handle = self._blocks[key].register_forward_pre_hook(hook(index), prepend=True)
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
        given_up = [(parameter, self._where[name]) for name, parameter in self._embeddings()]
        with torch.no_grad():
            for parameter, _ in given_up:
                parameter.data = parameter.new_full((), torch.nan).expand(parameter.shape)
        give_back()
        yield
        for parameter, stored in given_up:
            parameter.data = self._names.read(stored).to(parameter.dtype)

    def _embeddings(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the embeddings and the head, where they can be read again as they are, by a name they are stored by."""
        ends = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        own = {id(module.weight) for module in ends if isinstance(getattr(module, "weight", None), nn.Parameter)}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if id(parameter) in own and name in self._where and self._index_of(name) is None:
                own.remove(id(parameter))  # of tied ones one is enough
                yield name, parameter

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

        def block(index: int) -> nn.Module:
            if there != [index]:
                while there:
                    store.release(there.pop())
                there.append(index)
            return store.load(index)

        return block

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor of the model's state by name, in the order of the names."""
        index: int | None = None
        for name in sorted(self.model.state_dict()):
            if (own := self._index_of(name)) != index:
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
        index = self._index_of(f"{module}.")
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
        return dict(self._stored[index])

    def _index_of(self, tensor: str) -> int | None:
        """Return the block that a parameter lies in."""
        if not tensor.startswith(f"{self.path}."):
            return None
        key = tensor.removeprefix(f"{self.path}.").partition(".")[0]
        return self._keys.index(key) if key in self._blocks else None

    def _sort_in(self, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Note which tensors are whose block's; return those of none that have a place in the model."""
        known, outside = self.model.state_dict().keys(), dict[str, StoredTensor]()
        for key, tensor in stored.items():
            names, converted = self._placed[key]
            if not any(name in known for name in names):
                continue
            indices = {self._index_of(name) for name in names}
            if len(indices) > 1:
                raise ParedError(
                    f"model {self._name!r}: {key} becomes parts of several blocks, which cannot be read one by one; "
                    f"work with the whole model in memory ({called('stream', 'off')})"
                )
            index = indices.pop()
            (outside if index is None else self._stored[index])[key] = tensor
            if not converted:
                self._where[names[0]] = tensor
        return outside

    def _require_whole(self) -> set[str]:
        """Return what the checkpoint lacks as it is tied to what it has.

        Raises:
            DamagedError: it lacks anything else, which transformers would fill with random numbers.
        """
        missing = self._names.missing(self._placed)
        tied: dict[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        found = {name for pair in tied.items() for name in pair if not set(pair) <= missing}
        require_none_missing(missing - found, self._name)
        known = self.model.state_dict().keys()
        unused = {name for one in self._placed.values() for name in one.names if name not in known}
        warn_of_unused(unused, self._name)
        return missing

    def _require_finite(self, block: nn.Module, index: int) -> None:
        """Refuse NaN and infinity in a block of the checkpoint, when it is read first."""
        if self.files[index] is None and index not in self._checked:
            require_finite(block, self._name, self.block_name(index))
            self._checked.add(index)

    def _fill_shared(self, block: nn.Module, index: int) -> None:
        """Give the members of shared bases in a block the tensor that another block owns."""
        for owner, member in self._members(block, index):
            source = self._index_of(owner)
            if source in self._loaded:
                member._parameters["weight"] = self.model.get_parameter(owner)
            elif owner in self._where:
                values = self._names.read(self._where[owner])
                empty = member.weight
                member._parameters["weight"] = nn.Parameter(values.to(empty.dtype), requires_grad=empty.requires_grad)
            else:
                raise ParedError(f"{owner}, a basis that block {self.block_name(index)} shares, is in no file yet")

    def _members(self, block: nn.Module, index: int) -> Iterator[tuple[str, nn.Linear]]:
        """Yield for every shared basis in a block that is another module's the owner's tensor and the ``down``."""
        for path, module in block.named_modules(prefix=self.block_name(index)):
            if isinstance(module, BasisHolder) and module.shares not in (None, path + DOWN):
                yield str(module.shares), module.down

    def _shared(self, block: nn.Module, index: int) -> dict[str, str]:
        """Return the tensors of a block that others own, each with its owner."""
        return {
            path + DOWN: str(module.shares)
            for path, module in block.named_modules(prefix=self.block_name(index))
            if isinstance(module, BasisHolder) and module.shares not in (None, path + DOWN)
        }

    def _map(self, block: nn.Module, index: int) -> dict[str, dict[str, Any]]:
        return {f"{self.block_name(index)}.{path}".rstrip("."): entry for path, entry in module_map(block).items()}

    def _state(self, block: nn.Module, index: int) -> dict[str, torch.Tensor]:
        """Return what ``save_pretrained`` would write of a block."""
        state: dict[str, torch.Tensor] = block.state_dict(prefix=f"{self.block_name(index)}.")
        left_out = {*self._shared(block, index), *(self.model._keys_to_ignore_on_save or ())}
        state = {name: tensor.detach() for name, tensor in state.items() if name not in left_out}
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(self.model, state)
        return reverted

    def _holds_basis(self, tensor: str) -> bool:
        """Whether the owner of a shared basis is in its place yet: blocks may be taken in any order."""
        return isinstance(self.model.get_submodule(tensor.removesuffix(DOWN)), BasisHolder)

    def _take_file(self, index: int, file: Path) -> None:
        """Read a block from a file from now on."""
        for key in self._stored[index]:
            for name in self._placed.pop(key).names:
                self._where.pop(name, None)
        stored = stored_tensors([file], self._name, metadata_of(file, self._name)["places"])
        self._placed |= self._names.placed(stored)
        self._stored[index], self.files[index] = stored, file
        self._where |= {
            self._placed[key].names[0]: one for key, one in stored.items() if not self._placed[key].converted
        }

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


def _places(block: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return where in a cache line the parameters of a block lie that are in its state, but for those at its start."""
    live = {parameter.data_ptr() for parameter in block.parameters()}
    return {
        key: one.data_ptr() % LINE for key, one in state.items() if one.data_ptr() in live and one.data_ptr() % LINE
    }
