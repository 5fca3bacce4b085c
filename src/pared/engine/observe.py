"""Statistics for one spec, block by block: of a forward pass, of a backward pass, or from a folder."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.calibration import (
    BlockInputs,
    BlockStatistics,
    DenseReference,
    Sampled,
    StatisticView,
    Wants,
    all_reduce,
    capture,
    choose_labels,
    gradient_accumulators,
    require_statistics,
    save_block,
    saved_block,
    statistic_kind,
)
from pared.calibration.cache import begin
from pared.calibration.cache import require_fits as require_saved
from pared.calibration.spool import ActivationMemory
from pared.data.windows import Windows, require_fits
from pared.engine.allocate import anatomy_of
from pared.engine.blocks import Needs, Visit, run_blocks, run_blocks_backward, visit_blocks
from pared.engine.pass_record import PassRecord
from pared.engine.run_state import CompressionRun
from pared.engine.shared_record import SharedRecord
from pared.engine.spec import CompressionSpec, HandOn, LowRankSpec, PassSpec, resolve_low_rank
from pared.engine.windows import calibration_windows
from pared.environment import choose_dtype, device_of
from pared.errors import ParedError
from pared.io.digests import model_digest
from pared.lowrank import GradientOptions
from pared.lowrank.registry import nothing
from pared.memory import give_back
from pared.methods import METHODS
from pared.models.architecture import is_causal
from pared.names import called
from pared.processes import ALONE, Processes, together
from pared.progress import Progress, Silent, Stopwatch
from pared.schema.plan import Plan
from pared.schema.recipe import Recipe
from pared.structure import Anatomy, probe
from pared.structure.store import BlockStore, ResidentBlocks

Loss = Literal["sampled", "labels"]
Saved = Callable[[], Iterator[BlockStatistics]]
Kept = PassRecord | SharedRecord
Order = Callable[[Any], None]  # sends something to the other processes, which do it at the same time
BySite = dict[str, dict[str, StatisticView]]  # statistics by site and name

LEAST_TO_TRAIN = 2  # windows: one to train on, one to hold out
TRAIL_BYTES = 2 * 2**30  # of what all blocks read of the batches that go backward together


@dataclass
class Observer:
    """Runs a model's blocks on the calibration tokens of one spec.

    Attributes:
        store: hands out the blocks, dense or compressed already.
        tokenizer: of the model.
        spec: whose method and calibration are read.
        progress: what reports progress.
        saved: statistics that were saved, in place of the first pass over the dense model.
        state: keeps what must outlive this process, None if nothing need.
        watch: seconds by stage.
        windows: the tokens, once :meth:`read` has cut them.
        tokens: how many they are, padding aside.
        dtype: what the blocks compute in, once anything ran.
        backward_tokens: of those, how many went through the backward pass.
        memory: what hidden states share.
        processes: that observe together: each runs a part of the windows, and all are given what all have seen.
    """

    store: BlockStore
    tokenizer: PreTrainedTokenizerBase
    spec: CompressionSpec
    progress: Progress = field(default_factory=Silent)
    saved: Saved | None = None
    state: CompressionRun | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    windows: Windows | None = None
    tokens: int = 0
    dtype: torch.dtype | None = None
    backward_tokens: int = 0
    memory: ActivationMemory = field(default_factory=ActivationMemory)
    processes: Processes = ALONE

    def __post_init__(self) -> None:
        self.model = self.store.model
        self._gradients: BySite = {}  # of the dense model, for a pass behind compressed blocks

    def probe(self, anatomy: Anatomy, read: bool = True) -> None:
        """Find which sites run, and how the model calls its blocks; as :func:`pared.structure.probe`."""
        with self.store.running():
            self.anatomy, self.calls = probe(self.model, anatomy, read=read)

    def use(self, saved: Saved | None) -> None:
        """Take statistics that were saved, in place of the first pass over the dense model, which is there still.

        Raises:
            ParedError: they are of another model or other tokens, or a block is lacking.
        """
        if saved is not None and isinstance(self.spec, LowRankSpec) and self.spec.calibrated:
            require_saved(saved(), self.source(bool(self.spec.gradients)))
        self.saved = saved

    def source(self, gradients: bool) -> dict[str, Any]:
        """Return what statistics depend on, for their files; ``gradients`` says whether some are of a loss."""
        store = self.store
        digest = model_digest(self.model, None if isinstance(store, ResidentBlocks) else cast(Any, store).tensors())
        found = {
            "architecture": type(self.model).__name__,
            "blocks": len(store),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "model": digest,
            "tokens": self._windows.digest,
        }
        if gradients and isinstance(self.spec, LowRankSpec):
            found["loss"] = self.spec.loss
            if self.spec.loss == "sampled":
                found["seed"] = self.spec.calibration.seed  # of the labels
        return found

    def read(self, windows: Windows | None = None) -> Windows:
        """Take these windows, or cut those of the recipe.

        Raises:
            ParedError: the text is unknown or too short, or a window is longer than the model can read.
        """
        with self.watch("text"):
            causal = is_causal([type(self.model).__name__])
            self.windows = windows or calibration_windows(self.spec.recipe, self.tokenizer, self.model.config, causal)
            require_fits(self.model.config, self.windows)
            self._require_enough(self.windows)
            self.tokens = self.windows.real_tokens
        return self.windows

    def _require_enough(self, windows: Windows) -> None:
        """Refuse what leaves nothing to train on beside what is held out."""
        if self.spec.refine is not None and (count := len(windows.tokens)) < LEAST_TO_TRAIN:
            raise ParedError(
                f"{called('refine', 'True')} trains on some windows and is checked on others, and the calibration text "
                f"gives {count}: raise {called('samples')}, lower {called('length')}, or name a longer text"
            )

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

    def run(self, step: PassSpec, visit: Visit, influence: bool = False, kept: Kept | None = None) -> None:
        """Collect what a low-rank method reads, and visit every block with the statistics of its sites.

        Args:
            step: a solve; says what runs, and whether visits change blocks.
            visit: is given every block once, in the model's order or from the last to the first.
            influence: measure how much every block changes the hidden states.
            kept: the record of the pass; blocks that it holds are not visited.
        """
        assert isinstance(self.spec, LowRankSpec)
        behind, names = step.hand_on == "compressed", self.spec.gradients
        if step.runs == "nothing":
            self.without_data(visit, step.installs, kept)
            return
        if self.is_done(kept) and not (names and self.spec.sequential and not behind):
            return
        inputs = self.capture()
        if self.saved is not None and not behind:
            self._from_saved(visit, step.installs)
            return
        needs: Needs = self.spec.requires
        if step.runs == "backward":
            self._run_backward(inputs, names | needs([(1, 1)]), visit, step, kept)
            return
        if step.runs == "backward, then forward" and not self._gradients:
            forward = behind or self.spec.gradient_share < 1
            read = frozenset() if forward else needs([(1, 1)])
            needs = needs if forward else nothing
            if self.saved is not None:
                for block in self.saved():
                    self._gradients |= _only(block.statistics, names)
            else:
                self.backward(inputs, names | read, lambda block: self._spool(block, names | read))
        reference = self.reference(inputs) if step.reference else None
        if reference is not None:
            needs = self._with_input_gram(needs)

        def visit_with_gradients(block: BlockStatistics) -> None:
            sites = [site.name for site in self.anatomy.sites_of(block.index)]
            both = {name: {**self._gradients.get(name, {}), **block.take(name)} for name in sites}
            visit(replace(block, statistics=both))

        self.forward(inputs, needs, visit_with_gradients, step, reference, influence=influence, kept=kept)
        self._gradients = _only(self._gradients, names) if self.spec.sequential and not behind else {}

    def _run_backward(
        self, inputs: BlockInputs, names: frozenset[str], visit: Visit, step: PassSpec, kept: Kept | None
    ) -> None:
        """Visit every block with statistics of the backward pass, and keep what a second pass needs of them."""

        def keep_and_visit(block: BlockStatistics) -> None:
            self._keep(block)
            if kept is None or not kept.holds(block.index):
                with self._on_disk(block) as found:
                    visit(found)

        self.backward(inputs, names, keep_and_visit, changes=step.installs, kept=kept)

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
        """Visit every block with statistics of the forward pass.

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
        if self.is_done(kept):
            return
        hand_on: HandOn = step.hand_on
        visit = self._of_all(visit, inputs)
        with self._stage(f"{name} ({inputs.dtype})", inputs) as advance, self.watch("walk"):
            run_blocks(
                self.store,
                self.anatomy,
                inputs,
                needs,
                visit,
                hand_on=hand_on,
                changes=step.changes,
                reference=reference,
                group=self.group_of(step),
                influence=influence,
                observed=observed,
                kept=kept,
                on_batch=advance,
            )

    def backward(
        self,
        inputs: BlockInputs,
        names: frozenset[str],
        visit: Visit,
        share: float | None = None,
        changes: bool = False,
        kept: Kept | None = None,
    ) -> None:
        """Visit every block, the last one first, with what the loss makes of its sites' outputs, and what they read.

        Args:
            inputs: of the first block; not changed.
            names: of statistics.
            visit: is given every block.
            share: of the batches, from the first on, at least one; the method's own if none is given.
            changes: whether visits change blocks.
            kept: the record of the pass.
        """
        windows, batch = self._windows, self.spec.calibration.batch
        if share is None:
            share = self.spec.gradient_share if isinstance(self.spec, LowRankSpec) else 1.0
        if share < 1:  # windows that are there twice are one observation: a share is of those that differ
            differing = len(set(map(tuple, windows.tokens.tolist()))) / len(windows.tokens)
            batches = math.ceil(share * math.ceil(differing * math.ceil(len(windows.tokens) / batch)))
            inputs, windows = inputs.part(0, batches), windows.first(batches * batch)
        own = self._own(windows, math.lcm(*(statistic_kind(name).together for name in names)))
        if self.processes.count > 1:  # a share is of the first windows, which are divided again
            inputs = self._captured(windows, own)
        self.backward_tokens = windows.real_tokens
        labels = choose_labels(self.model, self.spec.loss, self.spec.calibration.seed, windows.labels)
        if isinstance(labels, Sampled):
            labels.pass_over(windows.tokens[: own.start], windows.mask)
        visit = self._of_all(visit, inputs)

        def wants(index: int) -> Wants:
            return gradient_accumulators(self.anatomy.sites_of(index), names, inputs.device)

        with self._stage(f"gradients ({inputs.dtype})", inputs) as advance, self.watch("backward"):
            run_blocks_backward(
                self.store,
                self.anatomy,
                inputs,
                windows.tokens[own.start : own.stop],
                labels,
                wants,
                visit,
                changes=changes,
                group=self.spec.group_size,
                batches=_batches_at_once(inputs),
                kept=kept,
                first_window=own.start,
                on_batch=advance,
            )

    def without_data(self, visit: Visit, changes: bool, kept: Kept | None = None) -> None:
        """Visit every block without running anything."""
        with self.progress.stage("solve", len(self.store), "block") as advance:
            visit_blocks(self.store, visit, changes=changes, group=self.spec.group_size, kept=kept, on_block=advance)

    def group_of(self, step: PassSpec) -> int:
        """Return how many neighbouring blocks a pass changes together: one where each is fitted behind the others."""
        return 1 if step.replaces else self.spec.group_size

    def record(
        self,
        step: PassSpec,
        number: int,
        tables: Callable[[], Mapping[str, Mapping[str, Any]]] = dict,
        written: Callable[[], list[Path]] = list,
    ) -> Kept | None:
        """Return the record of a pass; none if nothing is kept, by the first process where there are several.

        Args:
            step: the pass.
            number: of it.
            tables: as of :class:`PassRecord`.
            written: as of :class:`PassRecord`.
        """
        own = None
        if self.state is not None:
            own = PassRecord(
                self.state,
                self.store,
                number,
                tables,
                written=written,
                changes=step.changes,
                group=self.group_of(step),
                replaces=step.replaces,
            )
        if self.processes.count == 1 or not self.processes.agreed(own is not None):
            return own
        return SharedRecord(own, self.processes, self.store, self.anatomy, step.changes)

    def decided(
        self, decide: Callable[[Order], Plan], fallbacks: dict[str, str], follow: Order = lambda _: None
    ) -> Plan:
        """Return the plan that the first process, or one that was killed, has decided; decide it and keep it if not.

        Args:
            decide: makes the plan; is given what lets the other processes follow.
            fallbacks: what stood in for what said nothing, by unit; grows by what the decision finds.
            follow: what those do with what they are sent.
        """

        def first(order: Order) -> tuple[Plan, dict[str, str]]:
            if self.state is None:
                return decide(order), fallbacks
            if self.state.get("plan") is None:
                plan = decide(order)
                self.state.put("plan", {"plan": plan.model_dump(mode="json"), "fallbacks": dict(fallbacks)})
            found = self.state.get("plan")
            return Plan.model_validate(found["plan"]), found["fallbacks"]

        plan, found = self.processes.led(first, follow)
        fallbacks |= found
        return plan

    @property
    def is_decided(self) -> bool:
        """Whether a process that was killed has decided the plan."""
        return self.processes.agreed(self.state is not None and self.state.get("plan") is not None)

    def is_done(self, kept: Kept | None) -> bool:
        """Whether an earlier process has finished a pass; the blocks are then what it made of them."""
        if kept is None or not kept.complete:
            return False
        for index in range(len(self.store)):
            kept.restore(index)
        return True

    @property
    def _windows(self) -> Windows:
        assert self.windows is not None, "nothing was read"
        return self.windows

    def _stage(self, name: str, inputs: BlockInputs):  # type: ignore[no-untyped-def]
        return self.progress.stage(name, len(self.store) * len(inputs.calls), "batch")

    def _from_saved(self, visit: Visit, changes: bool) -> None:
        """Visit every block with the statistics that were saved of it."""
        assert self.saved is not None
        blocks = self.saved()

        def visit_saved(_: BlockStatistics) -> None:
            there = next(blocks, None)
            if there is None:
                raise ParedError("the collected statistics came to an end; give what can be read more than once")
            self._keep(there)
            visit(replace(there, statistics=dict(there.statistics)))  # a visit uses them up; they may be given again

        self.without_data(visit_saved, changes)

    def _keep(self, block: BlockStatistics) -> None:
        """Keep what a second pass, behind compressed blocks, needs of the dense model's gradients."""
        assert isinstance(self.spec, LowRankSpec)
        if self.spec.sequential:
            self._spool(block, self.spec.gradients)

    def _spool(self, block: BlockStatistics, names: frozenset[str]) -> None:
        """Keep statistics of a block until they are asked for: on the disk, where memory may not hold those of all."""
        found = replace(block, statistics=_only(block.statistics, names))
        if self._spools and self.saved is None:
            found = saved_block(save_block(self.memory.folder / "statistics", found))
        self._gradients |= _only(found.statistics, names)

    @property
    def _spools(self) -> bool:
        """Whether statistics wait on the disk."""
        return not isinstance(self.store, ResidentBlocks) and self.memory.limit is not None

    @contextmanager
    def _on_disk(self, block: BlockStatistics) -> Iterator[BlockStatistics]:
        """Have the statistics of a block on the disk while it is solved, where those of all do not wait in memory.

        Both Grams of its sites would lie beside the square of one, which solving works in.
        """
        if not self._spools:
            yield block
            return
        file = save_block(self.memory.folder / "block", block)
        for site in [*block.statistics]:
            block.take(site)
        give_back()
        yield saved_block(file)
        file.unlink(missing_ok=True)

    def _with_input_gram(self, needs: Needs) -> Needs:
        """Return the needs with the input Gram in place of that of outputs, as targets are made from both paths."""
        assert isinstance(self.spec, LowRankSpec)
        gram = self.spec.method.input_gram
        return lambda shapes: needs(shapes) - {"output_gram"} | {gram}


def _only(statistics: Mapping[str, Mapping[str, StatisticView]], names: frozenset[str]) -> BySite:
    return {site: {name: own[name] for name in names if name in own} for site, own in statistics.items()}


def _batches_at_once(inputs: BlockInputs) -> int | None:
    """Return how many batches may go backward together; None for all.

    What all blocks read of them is in memory at once; where that is not all there are, the statistics of all blocks
    are, in its place.
    """
    if inputs.hidden.memory.limit is not None or not inputs.calls:
        return None  # what does not fit lies on the disk; other processes may have all batches
    itemsize = inputs.dtype.itemsize
    largest = max(shape.numel() * itemsize for shape in inputs.hidden.shapes) * (len(inputs.calls[0]) + 1)
    return None if largest * len(inputs.calls) <= TRAIL_BYTES else max(1, TRAIL_BYTES // largest)


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    names: frozenset[str],
    folder: Path,
    progress: Progress | None = None,
) -> None:
    """Collect statistics once, on disk, for any number of compressions of the same dense model.

    Args:
        model: dense; unchanged.
        tokenizer: of the model.
        recipe: its calibration is read, and the option ``loss`` of its method where gradients are among the names.
        names: of statistics of inputs (``gram``, ``mean_gram``, ``magnitude``) and of gradients.
        folder: where one file a block is written; read by :func:`pared.calibration.saved_blocks`.
        progress: what reports progress; nothing by default.

    Raises:
        ParedError: the model or the text does not allow it, or the folder holds statistics of something else.
    """
    spec = resolve_low_rank(recipe)
    anatomy = anatomy_of(model, recipe)
    work = Observer(ResidentBlocks(model, anatomy), tokenizer, spec, progress or Silent())
    require_statistics(names)
    gradients = any(statistic_kind(name).backward for name in names)
    if gradients and (apart := sorted(name for name in names if statistic_kind(name).of == "output")):
        raise ParedError(f"statistic {apart[0]} is of what sites output; collect it apart from gradients")
    if gradients and not isinstance(spec.config, GradientOptions):
        having = [name for name, method in METHODS.available().items() if issubclass(method.config, GradientOptions)]
        raise ParedError(
            f"method {recipe.method} has no option loss, which says whose gradients {', '.join(sorted(names))} are of; "
            f"collect them with a recipe of {' or '.join(having)}"
        )
    work.probe(anatomy)
    work.read()
    source = work.source(gradients)
    begin(folder, source)
    inputs = work.capture()

    def save(block: BlockStatistics) -> None:
        save_block(folder, replace(block, source=source))

    if gradients:
        work.backward(inputs, names, save, share=1.0)
    else:
        work.forward(inputs, lambda _: names, save, PassSpec("evidence", "forward"), influence=True)
