"""Where the blocks of a model are while they are not computed with: in memory all the time, or somewhere else."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from pared.structure.model import Anatomy
from pared.structure.opening import Openable
from pared.structure.state import copy_block

# Hands out the blocks of a model as they were before it was compressed, by index: each has its parameters in memory
# until another is asked for, and is not to be changed.
DenseBlocks = Callable[[int], nn.Module]


def block_file(passed: int, index: int) -> str:
    """Return what the file of a block is called that a pass commits: two passes never share one."""
    return f"pass-{passed}-block-{index:05}.safetensors"


def embeddings_and_head(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the matrices that embed tokens and make logits, tied ones once: what no block runs with."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(module, "weight", None) for module in ends]
    return list({id(weight): weight for weight in weights if isinstance(weight, nn.Parameter)}.values())


class BlockStore(Protocol):
    """Hands out the blocks of one model, in the model's own module tree.

    A block's parameters are in memory between :meth:`load` and :meth:`release` or :meth:`commit`; they are not used at
    any other time. Everything outside of the blocks is there all the time, but for :meth:`without_embeddings`.

    Attributes:
        model: the one module tree.
        passed: number of the pass that commits, which the names of files it writes begin with.
        files: for every block the file it was committed to last, None where it was to none.
    """

    model: PreTrainedModel
    passed: int
    files: list[Path | None]

    def __len__(self) -> int:
        """How many blocks there are."""

    def load(self, index: int) -> nn.Module:
        """Return a block with its parameters in memory, in the form it was committed in last."""

    def expect(self, index: int) -> None:
        """Be told which block will be loaded next, so that reading it and running the one before overlap."""

    def release(self, index: int) -> None:
        """Release a block that was loaded; what was changed in it since then may be lost."""

    def commit(self, index: int) -> None:
        """Keep what stands in a block's place now as its form, and release it."""

    def adopt(self, index: int, file: Path) -> None:
        """Take the file of a block, committed by an earlier process, for its form.

        Raises:
            ParedError: it is none of this model.
        """

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the whole model be called for the length of a ``with`` block: every block is there when it runs."""

    @contextmanager
    def without_embeddings(self) -> Iterator[None]:
        """Need no embeddings of tokens, nor the head, for the length of a ``with`` block: only blocks run inside."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor of the model's state by name, in the order of the names."""

    def dense(self) -> DenseBlocks:
        """Return what hands out the blocks in the form they have now, before any is changed."""


class LazyBlocks(BlockStore, Protocol):
    """Blocks that are read when they are loaded."""

    @contextmanager
    def patched(self, change: Callable[[int], None]) -> Iterator[None]:
        """Have every block changed when it is loaded, for the length of a ``with`` block; nothing of it is kept."""

    def open_experts(self, found: Sequence[Openable]) -> None:
        """Make the experts of mixtures layers of their own, before any block is loaded."""


class ResidentBlocks:
    """The blocks of a model that is in memory as a whole. Satisfies :class:`BlockStore`.

    Args:
        model: changed in place by visits.
        anatomy: of it.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        self.model = model
        self._blocks = anatomy.blocks(model)
        self.passed = 1
        self.files: list[Path | None] = [None] * len(self._blocks)

    def __len__(self) -> int:
        """How many blocks there are."""
        return len(self._blocks)

    def load(self, index: int) -> nn.Module:
        """Return a block."""
        return self._blocks[index]

    def expect(self, index: int) -> None:
        """Do nothing: it is there."""

    def release(self, index: int) -> None:
        """Do nothing: it stays."""

    def commit(self, index: int) -> None:
        """Do nothing: the tree holds it."""

    def adopt(self, index: int, file: Path) -> None:
        """Refuse: nothing is committed to files here."""
        raise NotImplementedError

    @contextmanager
    def running(self) -> Iterator[None]:
        """Change nothing: the model can always be called."""
        yield

    @contextmanager
    def without_embeddings(self) -> Iterator[None]:
        """Change nothing: they stay."""
        yield

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor of the model's state by name, in the order of the names."""
        yield from sorted(self.model.state_dict().items())

    def dense(self) -> DenseBlocks:
        """Return what hands out the blocks as they are now; they keep their weights when others come in their place.

        Parameters are not copied: whatever changes a block has to replace them, not to write to them.
        """
        blocks = [copy_block(block, same_parameters=True) for block in self._blocks]
        return lambda index: blocks[index]
