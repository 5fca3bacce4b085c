"""A model's blocks at work on the calibration tokens: probed, captured, run forward and backward."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from pared.calibration import (
    BlockInputs,
    BlockStatistics,
    DenseReference,
    Sampled,
    Wants,
    all_reduce,
    capture,
    choose_labels,
    expert_accumulators,
    gradient_accumulators,
    statistic_kind,
)
from pared.calibration.spool import ActivationMemory
from pared.data.windows import Windows
from pared.engine.blocks import Needs, Visit, run_blocks, run_blocks_backward, visit_blocks
from pared.engine.spec import CompressionSpec, PassSpec
from pared.engine.state.records import Kept, Records, is_done
from pared.engine.state.run_state import CompressionRun
from pared.engine.turns import Beside, Turn, in_turn
from pared.engine.windows import LEAST_TO_TRAIN, windows_to_read
from pared.environment import choose_dtype, device_of
from pared.memory import keep_freed
from pared.processes import ALONE, Processes, together
from pared.progress import Progress, Silent, Stopwatch
from pared.structure import Anatomy, probe
from pared.structure.store import BlockStore

TRAIL_BYTES = 2 * 2**30  # of what all blocks read of the batches that go backward together


@dataclass
class Observer:
    """Runs a model's blocks on the calibration tokens of one spec.

    Attributes:
        store: hands out the blocks, dense or compressed already.
        tokenizer: of the model.
        spec: whose method and calibration are read.
        progress: what reports progress.
        state: keeps what must outlive this process, None if nothing need.
        watch: seconds by stage.
        windows: the tokens, once :meth:`read` has cut them.
        tokens: how many they are, padding aside.
        dtype: what the blocks compute in, once anything ran.
        backward_tokens: of those, how many went through the backward pass.
        memory: what hidden states share.
        beside: visit a block beside the run of the next one, where that reads what dense blocks output; see
            :func:`pared.engine.cost.beside.pays`.
        processes: that observe together: each runs a part of the windows, and all are given what all have seen.
    """

    store: BlockStore
    tokenizer: PreTrainedTokenizerBase
    spec: CompressionSpec
    progress: Progress = field(default_factory=Silent)
    state: CompressionRun | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    windows: Windows | None = None
    tokens: int = 0
    dtype: torch.dtype | None = None
    backward_tokens: int = 0
    memory: ActivationMemory = field(default_factory=ActivationMemory)
    processes: Processes = ALONE
    beside: bool = False

    def __post_init__(self) -> None:
        self.model = self.store.model
        keep_freed()

    @property
    def records(self) -> Records:
        """What of this compression outlives the process."""
        return Records(self.store, self.anatomy, self.spec, self.state, self.processes)

    def probe(self, anatomy: Anatomy, read: bool = True) -> None:
        """Find which sites run, and how the model calls its blocks; as :func:`pared.structure.probe`."""
        with self.store.running():
            self.anatomy, self.calls = probe(self.model, anatomy, read=read)

    def read(self, windows: Windows | None = None) -> Windows:
        """Take these windows, or cut those of the recipe.

        Raises:
            ParedError: the text is unknown or too short, or a window is longer than the model can read.
        """
        with self.watch("text"):
            self.windows = windows_to_read(self.spec, self.tokenizer, self.model, windows)
            self.tokens = self.windows.real_tokens
        return self.windows

    def capture(self) -> BlockInputs:
        """Return what the first block reads of this process's part of the windows, and how all are called."""
        return self._captured(self._windows, self._own(self._windows))

    def capture_to_train(self, batch: int) -> BlockInputs:
        """Return what the first block reads of all windows, in float32; of none, in all processes but the first.

        ``dtype`` is then what products may be computed in.

        Args:
            batch: windows in a batch; fewer, where there are not two batches of so many.
        """
        windows = self._windows
        count = len(windows.tokens)
        own = range(count) if self.processes.is_first else range(0)
        self.dtype = self.processes.agreed(self._dtype(device_of(self.spec.recipe.device)))
        return self._captured(windows, own, torch.float32, min(batch, count // LEAST_TO_TRAIN))

    def _captured(
        self, windows: Windows, own: range, dtype: torch.dtype | None = None, batch: int | None = None
    ) -> BlockInputs:
        there = slice(own.start, own.stop)
        with self.watch("capture"):
            device = device_of(self.spec.recipe.device)
            if dtype is None:  # each process measures by itself, but all must multiply alike
                self.dtype = dtype = self.processes.agreed(self._dtype(device))
            beside = {name: one[there] for name, one in windows.beside.items()}
            how = batch or self.spec.calibration.batch, self.calls, dtype, device, beside, self.memory
            return capture(self.model, self.anatomy, windows.tokens[there], *how)

    def _own(self, windows: Windows, unit: int = 1) -> range:
        """Return which windows are this process's: neighbours, in whole batches.

        Args:
            windows: all that are to run.
            unit: so many that are next to each other are one observation (see :class:`Fisher`).
        """
        return self.processes.part(len(windows.tokens), math.lcm(self.spec.calibration.batch, unit))

    def _of_all(self, visit: Visit, inputs: BlockInputs) -> Visit:
        """Return a visit that is given what the blocks of all processes have seen, bit for bit the same in all."""
        if self.processes.count == 1:
            return visit

        def visit_all(block: BlockStatistics) -> None:
            with self.watch("all-reduce"), together():
                all_reduce(block.statistics)  # type: ignore[arg-type]  # accumulators, when a block is visited
            seen = self.processes.gather((block.influence, len(inputs.calls)))
            batches = sum(count for influence, count in seen if influence is not None)
            influence = sum(one * count / batches for one, count in seen if one is not None) if batches else None
            visit(replace(block, influence=influence))

        return visit_all

    def _dtype(self, device: torch.device) -> torch.dtype:
        """Return what the blocks compute in, which a process that resumes does not measure again."""
        if self.dtype is not None:
            return self.dtype
        chosen = choose_dtype(self.spec.calibration.dtype, self.model.dtype, device)
        if self.state is not None:
            self.state.put("dtype", str(chosen).removeprefix("torch."))
        return chosen

    def resume(self, state: CompressionRun | None) -> None:
        """Keep what is found in a state, and resume from what that holds."""
        self.state = state
        if state is not None:
            state.time_by(self.watch)
        if state is not None and (known := state.get("dtype")) is not None:
            self.dtype = getattr(torch, known)

    def reference(self, inputs: BlockInputs, block: Callable[[int], nn.Module] | None = None) -> DenseReference:
        """Return the dense model on these inputs; its blocks are those of the store before they are visited."""
        return DenseReference(inputs.hidden.clone(), block or self.store.load)

    def forward(
        self,
        inputs: BlockInputs,
        needs: Needs,
        visit: Visit,
        step: PassSpec,
        reference: DenseReference | None = None,
        influence: bool = False,
        name: str = "calibrate and solve",
        observed: Callable[[int], nn.Module] | None = None,
        kept: Kept | None = None,
    ) -> None:
        """Visit every block with statistics of the forward pass, beside that of the next block if it may.

        Args:
            inputs: of the first block; overwritten.
            needs: names of the statistics.
            visit: is given every block.
            step: says what later blocks read, and whether visits change blocks.
            reference: the dense model, if it runs alongside.
            influence: measure how much every block changes the hidden states.
            name: of the stage, for progress.
            observed: as of :func:`pared.engine.blocks.run_blocks`.
            kept: the record of the pass; blocks that it holds are not visited.
        """
        if is_done(kept):
            return
        visit = self._of_all(visit, inputs)
        with (
            self._stage(f"{name} ({inputs.dtype})", inputs) as advance,
            self.watch("walk"),
            self._turn(step.beside) as turn,
        ):
            run_blocks(
                self.store,
                self.anatomy,
                inputs,
                needs,
                visit,
                hand_on=step.hand_on,
                changes=step.changes,
                reference=reference,
                group=self.spec.group_of(step),
                influence=influence,
                observed=observed,
                kept=kept,
                turn=turn,
                on_batch=advance,
            )

    def backward(
        self,
        inputs: BlockInputs,
        names: frozenset[str],
        visit: Visit,
        share: float = 1.0,
        changes: bool = False,
        kept: Kept | None = None,
    ) -> None:
        """Visit every block, the last one first, with what the loss makes of its sites' outputs, and what they read.

        Args:
            inputs: of the first block; not changed.
            names: of statistics of sites; those of mixtures of experts that can be taken out are collected too.
            visit: is given every block.
            share: of the batches, from the first on, at least one.
            changes: whether visits change blocks.
            kept: the record of the pass.
        """
        windows, batch = self._windows, self.spec.calibration.batch
        if share < 1:  # windows that are there twice are one observation: a share is of those that differ
            differing = len(set(map(tuple, windows.tokens.tolist()))) / len(windows.tokens)
            batches = math.ceil(share * math.ceil(differing * math.ceil(len(windows.tokens) / batch)))
            inputs, windows = inputs.part(0, batches), windows.first(batches * batch)
        own = self._own(windows, math.lcm(*(statistic_kind(name).together for name in names)))
        if self.processes.count > 1:  # a share is of the first windows, which are divided again
            inputs = self._captured(windows, own)
        self.backward_tokens = windows.real_tokens
        labels = [
            choose_labels(self.model, self.spec.loss, self.spec.calibration.seed, windows.labels, draw)
            for draw in range(self.spec.labels_per_token)
        ]
        for one in labels:
            if isinstance(one, Sampled):
                one.pass_over(windows.tokens[: own.start], windows.mask)
        visit = self._of_all(visit, inputs)

        def wants(index: int) -> Wants:
            of_sites = gradient_accumulators(self.anatomy.sites_of(index), names, inputs.device) if names else {}
            return of_sites | expert_accumulators(self.anatomy.mixtures_of(index), inputs.device)

        with (
            self._stage(f"gradients ({inputs.dtype})", inputs) as advance,
            self.watch("backward"),
            self._turn(not changes) as turn,
        ):
            run_blocks_backward(
                self.store,
                self.anatomy,
                inputs,
                windows.tokens[own.start : own.stop],
                labels,
                wants,
                visit,
                clip=self.spec.gradient_clip,
                changes=changes,
                group=self.spec.group_size,
                batches=_batches_at_once(inputs, len(labels)),
                kept=kept,
                first_window=own.start,
                turn=turn,
                on_batch=advance,
            )

    def _turn(self, may_go_beside: bool) -> AbstractContextManager[Turn]:
        return Beside(lambda: self.watch("solve")) if self.beside and may_go_beside else nullcontext(in_turn)

    def without_data(self, visit: Visit, changes: bool, kept: Kept | None = None) -> None:
        """Visit every block without running anything."""
        with self.progress.stage("solve", len(self.store), "block") as advance:
            visit_blocks(self.store, visit, changes=changes, group=self.spec.group_size, kept=kept, on_block=advance)

    @property
    def _windows(self) -> Windows:
        assert self.windows is not None, "nothing was read"
        return self.windows

    def _stage(self, name: str, inputs: BlockInputs):  # type: ignore[no-untyped-def]
        return self.progress.stage(name, len(self.store) * len(inputs.calls), "batch")


def _batches_at_once(inputs: BlockInputs, draws: int) -> int | None:
    """Return how many batches may go backward together; None for all.

    What all blocks read of them, what the last one outputs and a gradient for every draw are in memory at once; where
    that is not all there are, the statistics of all blocks are, in its place.
    """
    if inputs.hidden.memory.limit is not None or not inputs.calls:
        return None  # what does not fit lies on the disk; other processes may have all batches
    itemsize = inputs.dtype.itemsize
    largest = max(shape.numel() * itemsize for shape in inputs.hidden.shapes) * (len(inputs.calls[0]) + 1 + draws)
    return None if largest * len(inputs.calls) <= TRAIL_BYTES else max(1, TRAIL_BYTES // largest)
