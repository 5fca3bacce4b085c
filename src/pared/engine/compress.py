"""One model, compressed in place: probe, plan, walk, solve, install."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version as pared_version
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.allocation import Evidence, Unit, allocator_of
from pared.arguments import asked_from, require_model, require_tokenizer
from pared.calibration import (
    BlockInputs,
    WalkedBlock,
)
from pared.checkpoint import mark, module_map
from pared.data.windows import Windows, require_fits
from pared.engine.allocate import make_plan
from pared.engine.checks import require_finite_weights
from pared.engine.early import require_possible, require_suited
from pared.engine.grouping import candidate_units, told
from pared.engine.observe import Passes
from pared.engine.pruning import prune
from pared.engine.refit import dense_blocks, sequential, update
from pared.engine.result import Compressed, remarks, stacks
from pared.engine.solve import Solver, StatisticsOfSite, without
from pared.engine.spec import (
    allocation_of,
    anatomy_of,
    budget_of,
    calibrates,
    dense_path_of,
    is_pruning,
    low_rank_of,
    options_of,
    rank_options_of,
    refit_of,
    tries,
)
from pared.engine.windows import trial_windows
from pared.environment import device_of
from pared.errors import ParedError
from pared.evaluation import perplexity
from pared.io.digests import model_digest
from pared.lowrank.registry import mean_gram
from pared.progress import Progress, Silent, Stopwatch
from pared.schema.plan import Decision, Plan
from pared.schema.presets import note_of, require_user_fields
from pared.schema.recipe import Recipe
from pared.structure import Anatomy, probe
from pared.structure.probe import evaluating


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    progress: Progress | None = None,
    windows: Windows | None = None,
    collected: Callable[[], Iterator[WalkedBlock]] | None = None,
) -> Compressed:
    """Compress a loaded model, in place, block by block.

    Finished blocks replace dense ones as the walk goes; beside the model there is one block in the computing dtype,
    the hidden states of the calibration windows, and the statistics of that block (behind a compressed prefix with a
    dense path two blocks and three sets of hidden states; for gradients those of all blocks). If it is interrupted the
    model still works and can be saved, with some blocks compressed: reload it to start again.

    Args:
        model: a dense causal language model or encoder in a floating point dtype, its weights in memory.
        tokenizer: of the model.
        recipe: method, budget and calibration; ``model``, ``out`` and ``evaluation`` are not read.
        progress: who watches; nobody by default.
        windows: calibration tokens already cut, in place of the recipe's text.
        collected: statistics of these tokens that :func:`collect` saved, in place of a pass over them.

    Returns:
        The same model, and the record.

    Raises:
        ParedError: anything in the model, the recipe or the text that does not work; nothing is changed unless the
            message says so.
    """
    require_model(model, "pared.compress")
    recipe = asked_from(Recipe, recipe, "pared.compress")
    require_possible(recipe)  # what can be refused is refused first
    if windows is None:  # pared.run, which cuts them itself, has told already
        require_user_fields(recipe)
        if note := note_of(recipe):
            (progress or Silent()).note(note)
    _require_compressible(model, recipe)
    device_of(recipe.device)
    if progress is not None and not hasattr(progress, "stage"):
        raise ParedError(f"pared.compress takes who watches as progress, with stage() and note(); found a "
                         f"{type(progress).__name__}")  # fmt: skip
    if windows is not None and not isinstance(windows, Windows):
        raise ParedError(f"pared.compress takes windows as pared.data.cut makes them, found a "
                         f"{type(windows).__name__}; name a text in the recipe's calibration instead")  # fmt: skip
    if tries(recipe) or (windows is None and calibrates(recipe)):
        require_tokenizer(tokenizer, "pared.compress")
    try:
        with evaluating(model), torch.inference_mode(False):
            if is_pruning(recipe):
                return prune(model, tokenizer, recipe, progress or Silent(), windows)
            return _Compression(model, tokenizer, recipe, progress or Silent(), collected).run(windows)
    except ParedError as error:
        if module_map(model):
            raise ParedError(f"{error}; the blocks before it are compressed already: load the model again") from error
        raise
    finally:
        if module_map(model):
            mark(model)  # also after Ctrl-C: what is saved then must load again


def _require_compressible(model: PreTrainedModel, recipe: Recipe) -> None:
    name = model.config.name_or_path or type(model).__name__
    if hasattr(model, "peft_config"):
        raise ParedError(f"model {name!r} carries PEFT adapters; merge them first (merge_and_unload)")
    if module_map(model):
        raise ParedError(f"model {name!r} is compressed already, at least in part; load the dense model again")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ParedError(f"model {name!r} was loaded under torch.inference_mode(); load it outside of it")
    require_suited(model.config, recipe, name)


@dataclass
class _Compression:
    """One compression under way: what the stations of the road hand on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    progress: Progress
    collected: Callable[[], Iterator[WalkedBlock]] | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)

    def __post_init__(self) -> None:
        self.method, self.options = low_rank_of(self.recipe), options_of(self.recipe)
        self.allocator, self.budget = allocator_of(allocation_of(self.recipe)), budget_of(self.recipe)
        self.spread = rank_options_of(self.recipe)
        self.refit, self.dense_path = refit_of(self.recipe), dense_path_of(self.recipe)
        self.influence: dict[int, float] = {}
        self.passes = Passes(self.model, self.tokenizer, self.recipe, self.progress, self.collected, self.watch)

    def run(self, windows: Windows | None) -> Compressed:
        """Probe, collect and solve, plan, install, refit."""
        result = Compressed(self.model, self.recipe)
        with self.watch("probe"):
            anatomy = anatomy_of(self.model, self.recipe)
            require_finite_weights(self.model, anatomy)
            anatomy, calls = probe(self.model, anatomy, read=self.calibrated)
            units = self.units(anatomy)
            grouped = any(len(unit.members) > 1 for unit in units)
            # What the probe's few tokens did not reach the text may not reach either; the others then pay for it.
            open_ended = self.calibrated and not all(site.seen for site in anatomy.sites)
            late = self.allocator.needs or grouped or open_ended or self.refit != "off"
            known = None if late else self.plan(anatomy)
        inputs: BlockInputs | None = None
        if self.calibrated:
            with self.watch("text"):
                windows = windows or self.passes.windows()
                require_fits(self.model.config, windows)
            inputs = self.passes.capture(anatomy, calls, windows)
            result.calibration = {**windows.describe(), "dtype": str(inputs.dtype)}
        with self.solver(known, self.refit != "off") as solver:
            self.solve(solver, anatomy, units, inputs, windows, behind=self.passes.again and known is not None)
            plan = known or self.decide(solver, anatomy.with_idle(solver.unreached), windows)
            result.plan = without(plan, solver.unreached)
            if self.passes.again and known is None:
                assert windows is not None
                with self.solver(plan) as second:
                    inputs = self.passes.capture(anatomy, calls, windows)
                    self.solve(second, anatomy, solver.units, inputs, windows, behind=True)
                self.settle(solver, second, plan)
            else:
                with self.watch("solve"):
                    solver.finish(plan)
            if self.refit != "off":
                assert windows is not None
                inputs = self.passes.capture(anatomy, calls, windows)
                stage, behind = (update, False) if self.refit == "update" else (sequential, True)
                dense_block = dense_blocks(self.model, anatomy, solver, plan)
                walked = self.passes.walk(
                    anatomy,
                    inputs,
                    mean_gram,
                    behind=behind,
                    dense=self.passes.beside(inputs, dense_block),
                    name="refit",
                    observed=dense_block if self.refit == "sequential-dense-block" else None,
                )
                stage(self.model, solver, plan, walked, self.dense_path)
            result.damping, result.sharing = solver.damping, tuple(solver.comparisons)
            result.fallbacks |= solver.fallbacks
        for line in (*told(result.sharing), *stacks(anatomy), *remarks(result.plan, result.fallbacks)):
            self.progress.note(line)
        result.seconds = self.watch.seconds
        return result

    def settle(self, first: Solver, second: Solver, plan: Plan) -> None:
        """Put in place what the second pass could not decompose, as the first one has it; say what has no targets."""
        missed = {unit.name for unit in second.missed}
        for unit, decision in first.decided(plan):
            if unit.name in missed:
                first.install(unit, decision)
        first.damping |= second.damping
        first.fallbacks |= second.fallbacks
        if missed:
            self.progress.note(
                f"{len(missed)} units are not reached behind the compressed blocks and are decomposed by the dense "
                f"model's statistics, the first is {sorted(missed)[0]}"
            )
        if second.untargeted:
            self.progress.note(
                f"{len(second.untargeted)} sites read other tokens than in the dense model and are given no targets of "
                f"its path, the first is {sorted(second.untargeted)[0]}"
            )

    def solver(self, plan: Plan | None, keep_dense: bool = False) -> Solver:
        """Return a solver of this method and budget."""
        tokens = self.passes.tokens
        beside = None if self.recipe.out is None else Path(self.recipe.out)
        return Solver(
            self.model, self.method, self.options, self.budget, plan, keep_dense, self.dense_path, tokens, beside
        )

    @property
    def calibrated(self) -> bool:
        """Whether anything is done on text."""
        return calibrates(self.recipe)

    def units(self, anatomy: Anatomy) -> list[Unit]:
        """Return what is decomposed: sites, and groups of them that may share a basis."""
        if self.method.group_rule is None:
            return [Unit((site,)) for site in anatomy.sites]
        return candidate_units(anatomy, cast("int", self.options["group_size"]), str(self.options["sharing"]))

    def plan(self, anatomy: Anatomy, units: Sequence[Unit] | None = None, evidence: Evidence | None = None) -> Plan:
        """Decide every site."""
        return make_plan(anatomy, self.allocator.name, self.budget, self.model.dtype.itemsize, units, evidence)

    def decide(self, solver: Solver, anatomy: Anatomy, windows: Windows | None) -> Plan:
        """Decide every site from what was found."""
        idle = {site.name for site in anatomy.sites if site.idle}
        units = [Unit(tuple(replace(s, idle=s.name in idle) for s in unit.members)) for unit in solver.units]
        evidence = Evidence(solver.spectra, self.influence, options=self.spread, notes=solver.fallbacks)
        if tries(self.recipe):
            trials = trial_windows(self.recipe, self.tokenizer, self.model.config)
            require_fits(self.model.config, trials)
            evidence = replace(evidence, trial=self.trial(solver, trials), key=self.key(trials, windows))
        with self.watch("allocate"):
            return self.plan(anatomy, units, evidence)

    def key(self, trials: Windows, windows: Windows | None) -> str:
        """Return what the perplexity of a trial depends on, but for the decisions tried."""
        calibrated = None if windows is None else windows.digest
        asked = [self.method.name, self.options, self.budget.pivoted, self.recipe.calibration.model_dump()]
        return json.dumps([model_digest(self.model), trials.digest, calibrated, *asked, pared_version("pared")])

    def trial(self, solver: Solver, windows: Windows) -> Callable[[Mapping[str, Decision]], float]:
        """Return what measures decisions, on tokens that are not calibrated on."""

        def measure(decisions: Mapping[str, Decision]) -> float:
            with solver.installed(decisions):
                return perplexity(self.model, self.tokenizer, windows).value

        return measure

    def solve(
        self,
        solver: Solver,
        anatomy: Anatomy,
        units: list[Unit],
        inputs: BlockInputs | None,
        windows: Windows | None,
        behind: bool,
    ) -> None:
        """Hand the solver every unit as soon as the statistics of all its members are there.

        With ``behind`` they are those of the inputs behind the blocks the solver has compressed already.
        """
        waiting, held = list(units), dict[str, StatisticsOfSite]()
        influence = "influence" in self.allocator.needs and not behind
        for walked in self.passes.statistics(anatomy, inputs, windows, behind, influence):
            if walked.influence is not None:
                self.influence[walked.index] = walked.influence
            with self.watch("solve"):
                held |= {site.name: walked.statistics.get(site.name, {}) for site in anatomy.sites_of(walked.index)}
                ready = [unit for unit in waiting if all(site.name in held for site in unit.members)]
                waiting = [unit for unit in waiting if unit not in ready]
                for unit in ready:
                    solver.take(unit, {site.name: held.pop(site.name) for site in unit.members})
