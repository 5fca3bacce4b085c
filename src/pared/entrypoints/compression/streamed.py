"""A compression whose model is read and written block by block, as memory does not hold it as a whole."""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.calibration.spool import ActivationMemory
from pared.checkpoint.open_streamed import open_streamed
from pared.checkpoint.self_check import reopened
from pared.checkpoint.shards import save_streamed
from pared.checkpoint.streamed import StreamedBlocks
from pared.checkpoint.verify import take_fingerprint
from pared.engine.allocate import anatomy_of, plan_from_shapes
from pared.engine.cost.needs import Needs, needs_of
from pared.engine.cost.sizes import Tokens
from pared.engine.spec import CompressionSpec
from pared.engine.targets.opening import opened_shapes
from pared.entrypoints.compression.resume import KIND
from pared.entrypoints.compression.texts_read import TextsRead
from pared.environment import dtype_of, resident_memory_bytes
from pared.errors import ParedError
from pared.io.leftovers import scratch
from pared.io.run_dir import run_folder
from pared.memory import Available, available_memory, parse_size
from pared.models.source import ModelSource
from pared.progress import Progress
from pared.schema.manifest import Fingerprint
from pared.schema.plan import Plan
from pared.schema.recipe import Recipe
from pared.structure import Anatomy
from pared.structure.probe import probe_shapes

LEAST = 64 * 2**20  # bytes for hidden states, however much else is needed
DEFAULT_SHARE = 4  # of the memory that is left, this part is for hidden states unless a recipe says otherwise


class Reading(NamedTuple):
    """How a model is read.

    Attributes:
        streamed: block by block.
        activation_memory: bytes that hidden states may take in memory; None for no limit.
        memory_bound: bytes that the process is to keep to if it is read block by block; 0 for none.
    """

    streamed: bool
    activation_memory: int | None
    memory_bound: int = 0


def activation_limit(recipe: Recipe, streamed: bool, available: Available | None = None, beside: int = 0) -> int | None:
    """Return the bytes that hidden states may take in memory; None for no limit.

    Args:
        recipe: that may say so.
        streamed: whether the model is read block by block.
        available: memory of the machine, by default what this one leaves.
        beside: bytes that all else needs, which go first.
    """
    if recipe.activation_memory is not None:
        return parse_size(recipe.activation_memory, "activation_memory")
    available = (available or available_memory()) if streamed else None
    if available is None:
        return None
    share = available.bytes // DEFAULT_SHARE
    return max(min(share, available.bytes - beside), min(LEAST, share))


def with_limits(
    skeleton: PreTrainedModel,
    anatomy: Anatomy,
    spec: CompressionSpec,
    plan: Plan,
    calibrated: Tokens | None,
    evaluated: Tokens | None,
    compute: torch.dtype,
    available: Available | None,
) -> tuple[tuple[int | None, int | None], tuple[Needs, Needs]]:
    """Return what hidden states may take in memory, and what is needed then: by a model in memory, by a streamed one.

    Args:
        skeleton: the model on the meta device, in the dtype it is loaded in.
        anatomy: of it, with what its sites read.
        spec: of the compression.
        plan: made from shapes.
        calibrated: what is calibrated on; none where nothing is.
        evaluated: what perplexity is measured on; none where it is not.
        compute: what blocks compute in.
        available: memory of the machine.
    """

    def needs(streamed: bool, activation_memory: int | None) -> Needs:
        return needs_of(
            skeleton,
            anatomy,
            spec,
            calibrated,
            streamed=streamed,
            itemsize=compute.itemsize,
            output_bytes=plan.after.bytes_on_disk,
            activation_memory=activation_memory,
            evaluated=evaluated,
        )

    recipe = spec.recipe
    limits = activation_limit(recipe, False), activation_limit(recipe, True, available, needs(True, 0).memory_bytes)
    return limits, (needs(False, limits[0]), needs(True, limits[1]))


def reading_of(
    source: ModelSource,
    spec: CompressionSpec,
    texts: TextsRead,
    progress: Progress,
    out: Path | None,
    before: bool | None = None,
) -> Reading:
    """Return whether a model is to be read block by block: if it is asked for, or needed, as computed from shapes.

    Args:
        source: of the model; no weight of it is read before it is known that it fits.
        spec: of the compression; its recipe says whether the model is read block by block.
        texts: that are read.
        progress: what reports progress.
        out: the folder to make, None if it is not known.
        before: whether it was by the process that this one resumes from; ``auto`` is that again.

    Raises:
        ParedError: the disk does not hold the output and what is kept beside it; or, where ``stream`` is ``auto``,
            memory holds the compression neither as a whole nor block by block: says what would fit.
    """
    recipe, available = spec.recipe, available_memory()
    skeleton = source.skeleton().to(source.declared_dtype(recipe.dtype))
    skeleton = opened_shapes(skeleton, spec)
    anatomy = probe_shapes(skeleton, anatomy_of(skeleton, recipe))
    plan = plan_from_shapes(skeleton, spec, source.weight_bytes(recipe.dtype))
    calibrated = Tokens.of(texts.calibration, recipe.calibration.batch) if spec.calibrated else None
    evaluated = Tokens.of(texts.evaluation, 1)
    compute = skeleton.dtype if recipe.calibration.dtype == "auto" else dtype_of(recipe.calibration.dtype)
    limits, (whole, streamed) = with_limits(
        skeleton, anatomy, spec, plan, calibrated, evaluated, compute or skeleton.dtype, available
    )
    automatic = recipe.stream == "auto" and before is None
    chosen = recipe.stream == "on" or (recipe.stream == "auto" and bool(before))
    if automatic:
        chosen = bool(whole.too_much(available))
    found = streamed if chosen else whole
    if out is not None:
        state = run_folder(out, KIND)
        there = 0 if before is None else sum(path.stat().st_size for path in state.iterdir() if path.is_file())
        found.require_disk(out, there)
    if problem := found.too_much(available):
        if automatic:
            raise ParedError(f"not enough memory, even block by block: {problem}")
        progress.note(f"this may not fit in memory: {problem}")
    if chosen and automatic:
        progress.note(f"the model is read block by block: {whole.too_much(available).partition(';')[0]}")
    bound = found.bound + resident_memory_bytes() if chosen else 0
    return Reading(chosen, limits[chosen], bound)


class StreamedModel:
    """A model that is opened to be changed block by block, with what it needs on the disk meanwhile.

    Args:
        source: of the model.
        recipe: whose dtype and list of blocks are read.
        memory: what hidden states share.
        out: the folder to make, beside which changed blocks lie; the user's cache folder without one.

    Attributes:
        store: the blocks.
        memory: what hidden states share.
    """

    def __init__(self, source: ModelSource, recipe: Recipe, memory: ActivationMemory, out: Path | None) -> None:
        stack = ExitStack()
        self._close = weakref.finalize(self, stack.close)
        self.memory = stack.enter_context(memory)
        self.store = open_streamed(source, recipe.dtype, stack.enter_context(scratch(out)), recipe.blocks)

    @contextmanager
    def handed_over(self) -> Iterator[None]:
        """Release the blocks, which have another owner now; their files are removed at the end of a ``with``."""
        del self.store
        try:
            yield
        finally:
            self._close()


class StreamedSaver:
    """Saves a model that is read block by block. Satisfies :class:`~pared.entrypoints.publish.Saver`.

    Args:
        streamed: marked.
        tokenizer: of the model.
        source: what it was made from.
        last: whether the files of blocks go afterwards, and may be the folder's: they are copied otherwise.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        source: ModelSource | None,
        last: bool = False,
    ) -> None:
        self._store: StreamedBlocks | None = streamed.store
        self._tokenizer, self._source, self._last = tokenizer, source, last

    @property
    def needed(self) -> int:
        """Bytes that the disk must have free: of what is not in files yet, and of copies of those that are."""
        store = self._store
        assert store is not None
        sizes = [sum(tensor.nbytes for tensor in store.stored(index).values()) for index in range(len(store))]
        new = sum(size for size, file in zip(sizes, store.files, strict=True) if file is None)
        copies = 0 if self._last else sum(sizes)
        return sum(tensor.nbytes for tensor in store.outside_state().values()) + new + copies

    def __call__(self, folder: Path) -> Fingerprint:
        """Write the model."""
        store, self._store = self._store, None
        assert store is not None
        fingerprint = take_fingerprint(store.model, store)
        save_streamed(store, self._tokenizer, folder, self._source, link=self._last)
        return fingerprint


class StreamedReload:
    """Opens a folder block by block. Satisfies :class:`~pared.entrypoints.publish.Reloader`.

    Attributes:
        store: of what was opened, none before.
    """

    def __init__(self) -> None:
        self.store: StreamedBlocks | None = None

    @contextmanager
    def __call__(self, folder: Path, fingerprint: Fingerprint, source: str) -> Iterator[tuple[PreTrainedModel, float]]:
        """Open what was written and compare it."""
        self.store, difference = reopened(folder, fingerprint, source)
        yield self.store.model, difference
