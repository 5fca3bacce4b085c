"""One model, compressed in place: probe it, then take the passes of its spec one after the other."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.allocation import Evidence
from pared.calibration.spool import ActivationMemory
from pared.data.windows import Windows
from pared.engine.allocate import anatomy_of
from pared.engine.checks.elastic import require_elastic
from pared.engine.checks.enough import too_few
from pared.engine.checks.weights import require_finite_weights
from pared.engine.cost.beside import pays
from pared.engine.families.experts import ExpertWork
from pared.engine.families.low_rank import LowRankWork
from pared.engine.families.pruning import SparseWork
from pared.engine.families.trials import Trial
from pared.engine.observe import Observer
from pared.engine.quantize import quantize
from pared.engine.refine import refine
from pared.engine.result import CompressedBlocks, remarks, stacks
from pared.engine.spec import CompressionSpec, ExpertSpec, LowRankSpec, PassSpec, resolve_sparse
from pared.engine.state.kept_blocks import KeptBlocks
from pared.engine.state.run_state import CompressionRun
from pared.engine.statistics.of_method import Saved
from pared.engine.targets.opening import experts_opened, experts_to_open
from pared.processes import ALONE, Processes
from pared.progress import Progress, Silent
from pared.report.results import too_few_line
from pared.schema.recipe import Recipe
from pared.structure import Anatomy
from pared.structure.opening import open_experts
from pared.structure.probe import evaluating
from pared.structure.store import BlockStore, LazyBlocks, ResidentBlocks


class Work(AbstractContextManager["Work"], Protocol):
    """What a family of methods does in the passes of its spec; a context manager.

    Attributes:
        passes: what :meth:`run` is to be given, in order.
    """

    passes: tuple[PassSpec, ...]

    def run(self, step: PassSpec) -> None:
        """Do one step."""

    def report(self, result: CompressedBlocks) -> Iterator[str]:
        """Fill in the record of what was done, and yield what a user should read of it."""


def compress_blocks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: CompressionSpec,
    *,
    windows: Windows | None = None,
    saved: Saved | None = None,
    evidence: Evidence | None = None,
    trial: Trial | None = None,
    store: LazyBlocks | None = None,
    memory: ActivationMemory | None = None,
    state: CompressionRun | None = None,
    processes: Processes = ALONE,
    progress: Progress | None = None,
) -> CompressedBlocks:
    """Compress a model, in place, block by block, as its spec says.

    Experts that are targets are opened first. Finished blocks replace dense ones as the passes run; besides the model
    there is one block in the computing dtype, the hidden states of the calibration windows, and the statistics of that
    block (behind a compressed prefix with a dense path two blocks and three sets of hidden states).

    Args:
        model: dense, of an architecture the spec suits.
        tokenizer: of the model.
        spec: the resolved compression.
        windows: calibration tokens already cut, in place of the recipe's text.
        saved: statistics of these tokens, block by block, in place of a pass over them.
        evidence: what an allocation of zeros needs, in place of a pass for it.
        trial: measures the model on windows, for an allocation that tries what it proposes; less is better.
        store: hands out the model's blocks; the model is in memory as a whole if none is given.
        memory: what hidden states share; without a limit if not given.
        state: keeps what every block came to, and is gone on from; nothing outlives the process if none is given.
        processes: that compress together. Each has opened the same model, runs a part of the windows, and solves some
            of the sites; every block is the same in all of them, bit for bit, when it is finished. Against one process
            sums are taken in another order.
        progress: what reports progress; nothing by default.

    Raises:
        ParedError: anything in the model or the text that does not work.
    """
    with evaluating(model), torch.inference_mode(False):
        found = experts_to_open(model, spec)
        if isinstance(spec, LowRankSpec) and spec.elastic:
            require_elastic(found, store is not None, processes.count)
        if store is None:
            open_experts(model, found)
        else:
            store.open_experts(found)
        anatomy = anatomy_of(model, spec.recipe)
        blocks: BlockStore = store or _in_memory(model, anatomy, state)
        observer = _observe(blocks, anatomy, tokenizer, spec, windows, progress, processes)
        observer.memory = memory or observer.memory
        observer.resume(state)
        result = CompressedBlocks(model, spec)
        if observer.windows is not None and (few := too_few(observer.windows, observer.anatomy, spec)):
            result.too_few = few
            observer.progress.note(too_few_line(few))  # before anything that takes long
        with _work(observer, spec, evidence, trial, saved) as work:
            dense = blocks.dense() if spec.refine is not None else None  # before any block is changed
            for number, step in enumerate(work.passes, 1):
                blocks.passed = number
                if step.action == "refine":
                    assert dense is not None
                    result.refined = refine(observer, step, number, dense)
                elif step.action == "quantize":
                    assert isinstance(work, LowRankWork), "others are refused"
                    quantize(observer, step, number, work.plan)
                else:
                    work.run(step)
            if isinstance(spec, LowRankSpec) and spec.elastic:
                assert isinstance(work, LowRankWork)
                result.elastic = work.elastic()
            lines = [*work.report(result), *stacks(observer.anatomy), *remarks(result.plan, result.fallbacks)]
        if observer.windows is not None:
            result.calibration = {**observer.windows.describe(), "dtype": str(observer.dtype)}
        for line in lines:
            observer.progress.note(line)
        result.seconds = observer.watch.seconds
        return result


def _in_memory(model: PreTrainedModel, anatomy: Anatomy, state: CompressionRun | None) -> BlockStore:
    return ResidentBlocks(model, anatomy) if state is None else KeptBlocks(model, anatomy, state)


def collect_evidence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    progress: Progress | None = None,
    windows: Windows | None = None,
) -> Evidence:
    """Collect what a recipe's allocation of zeros needs of the dense model; it serves every sparsity and every pruner.

    Args:
        model: dense; not changed.
        tokenizer: of the model.
        recipe: of a pruning method; its allocation, ``granularity`` and calibration are read.
        progress: what reports progress; nothing by default.
        windows: calibration tokens already cut, in place of the recipe's text.

    Raises:
        ParedError: anything in the model, the recipe or the text that does not work.
    """
    spec = resolve_sparse(recipe)
    with evaluating(model), torch.inference_mode(False), experts_opened(model, spec):
        anatomy = anatomy_of(model, recipe)
        observer = _observe(ResidentBlocks(model, anatomy), anatomy, tokenizer, spec, windows, progress)
        with SparseWork(observer, spec) as work:
            for step in work.passes:
                if step.action == "evidence":
                    work.run(step)
            return work.evidence


def _observe(
    store: BlockStore,
    anatomy: Anatomy,
    tokenizer: PreTrainedTokenizerBase,
    spec: CompressionSpec,
    windows: Windows | None,
    progress: Progress | None,
    processes: Processes = ALONE,
) -> Observer:
    """Check the weights, find out how the blocks are called, and cut the tokens if any are needed."""
    observer = Observer(store, tokenizer, spec, progress or Silent(), processes=processes)
    with observer.watch("probe"):
        streamed = not isinstance(store, ResidentBlocks)
        require_finite_weights(store.model, anatomy, streamed)
        observer.probe(anatomy, read=spec.calibrated)
        observer.beside = pays(observer)
    if spec.calibrated:
        observer.read(windows)
    return observer


def _work(
    observer: Observer,
    spec: CompressionSpec,
    evidence: Evidence | None,
    trial: Trial | None,
    saved: Saved | None,
) -> Work:
    """Return the work that a spec describes: its type decides."""
    if isinstance(spec, LowRankSpec):
        return LowRankWork(observer, spec, trial, saved)
    if isinstance(spec, ExpertSpec):
        return ExpertWork(observer, spec, saved)
    return SparseWork(observer, spec, evidence)
