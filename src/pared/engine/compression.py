"""One model, compressed in place: probe, plan, walk, solve, install."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.allocation import allocator_of, make_plan
from pared.anatomy import Anatomy, find_anatomy, probe
from pared.anatomy.probe import BlockCall
from pared.calibration import (
    BlockInputs,
    GradientStatistic,
    WalkedBlock,
    backward,
    capture,
    choose_dtype,
    choose_labels,
    gradient_accumulators,
    walk,
)
from pared.checkpoint import mark, module_map
from pared.engine.install import require_finite_weights
from pared.engine.progress import Progress, Silent, Stopwatch
from pared.engine.solver import Solver, without
from pared.errors import ParedError
from pared.hardware import device_of
from pared.lowrank import METHODS, LowRankMethod
from pared.names import did_you_mean
from pared.plan import Dense, Plan
from pared.recipe import Recipe
from pared.sources.models import require_dense
from pared.sources.texts import find_text
from pared.sources.windows import Windows, cut, require_fits


@dataclass
class Compressed:
    """A compressed model and how it came about.

    Attributes:
        model: the model, changed in place; plain ``save_pretrained`` writes a folder that loads again.
        recipe: what was asked for.
        plan: what was decided, with what calibration taught.
        damping: sites whose Gram was rank-deficient, with the relative damping used.
        calibration: what was calibrated on; none for a method that needs no data.
        seconds: by stage.
    """

    model: PreTrainedModel
    recipe: Recipe
    plan: Plan = field(init=False)
    damping: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, object] | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def method_of(recipe: Recipe) -> LowRankMethod:
    """Return the method a recipe names.

    Raises:
        ParedError: there is none of that name.
    """
    if recipe.method not in METHODS:
        raise ParedError(f"unknown method {recipe.method!r}; {did_you_mean(recipe.method, METHODS)}")
    return METHODS[recipe.method]


def options_of(recipe: Recipe) -> dict[str, object]:
    """Return the method's options, those of the recipe over the defaults.

    Raises:
        ParedError: an option the method does not have, or a value of another type.
    """
    method = method_of(recipe)
    for name, value in recipe.options.items():
        if name not in method.options:
            valid = did_you_mean(name, method.options) if method.options else "it has none"
            raise ParedError(f"method {method.name} has no option {name!r}; {valid}")
        default = method.options[name]
        if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            raise ParedError(
                f"option {name} of method {method.name}: expected a {type(default).__name__}, found {value!r}"
            )
    options: dict[str, object] = {**method.options, **recipe.options}
    try:
        method.gradients(options)
    except ValueError as error:
        raise ParedError(f"method {method.name}: {error}") from None
    return options


def allocation_of(recipe: Recipe) -> str:
    """Return the name of the allocator a recipe asks for, the method's own if it says ``auto``."""
    return method_of(recipe).allocation if recipe.allocation == "auto" else recipe.allocation


def plan_of(model: PreTrainedModel, recipe: Recipe, bytes_per_parameter: int | None = None) -> Plan:
    """Decide every site from shapes alone; the model may be on the meta device.

    Where the ranks depend on the data, those of uniform allocation stand in: the sizes are right to a rank.

    Raises:
        ParedError: unknown method or allocation, nothing to compress, or a budget too small.
    """
    options_of(recipe)
    allocation = allocation_of(recipe)
    by_shape = "uniform" if allocator_of(allocation).by_spectrum else allocation
    anatomy = find_anatomy(model).without(recipe.skip)
    return make_plan(anatomy, by_shape, recipe.keep, bytes_per_parameter or model.dtype.itemsize)


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    progress: Progress | None = None,
    windows: Windows | None = None,
) -> Compressed:
    """Compress a loaded model, in place, block by block.

    Finished blocks replace dense ones as the walk goes; beside the model there is one block in the computing dtype,
    the hidden states of the calibration windows, and the statistics of that block. If it is interrupted midway the
    model still works and can be saved, with some blocks compressed: reload it to start again.

    Args:
        model: a dense causal language model or encoder in a floating point dtype, its weights in memory.
        tokenizer: of the model.
        recipe: method, budget and calibration; ``model``, ``out`` and ``evaluation`` are not read.
        progress: who watches; nobody by default.
        windows: calibration tokens already cut, in place of the recipe's text.

    Returns:
        The same model, and the record.

    Raises:
        ParedError: anything in the model, the recipe or the text that does not work; nothing is changed unless the
            message says so.
    """
    options_of(recipe)  # what can be refused is refused first
    _require_compressible(model)
    was_training = model.training
    model.eval()
    try:
        return _Compression(model, tokenizer, recipe, progress or Silent()).run(windows)
    except ParedError as error:
        if module_map(model):
            raise ParedError(f"{error}; the blocks before it are compressed already: load the model again") from error
        raise
    finally:
        if module_map(model):
            mark(model)  # also after Ctrl-C: what is saved then must load again
        model.train(was_training)


def _require_compressible(model: PreTrainedModel) -> None:
    name = model.config.name_or_path or type(model).__name__
    if hasattr(model, "peft_config"):
        raise ParedError(f"model {name!r} carries PEFT adapters; merge them first (merge_and_unload)")
    if module_map(model):
        raise ParedError(f"model {name!r} is compressed already, at least in part; load the dense model again")
    require_dense(model.config, name)


Felt = dict[str, dict[str, GradientStatistic]]  # what the loss feels, by site and statistic


@dataclass
class _Compression:
    """One compression under way: what the stations of the road hand on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    progress: Progress
    watch: Stopwatch = field(default_factory=Stopwatch)

    def run(self, windows: Windows | None) -> Compressed:
        """Probe, plan, collect, solve, install."""
        result = Compressed(self.model, self.recipe)
        method, options = method_of(self.recipe), options_of(self.recipe)
        with self.watch("probe"):
            anatomy = find_anatomy(self.model).without(self.recipe.skip)
            require_finite_weights(self.model, anatomy)
            anatomy, calls = probe(self.model, anatomy)
            known = None if allocator_of(allocation_of(self.recipe)).by_spectrum else self.plan(anatomy)
        inputs: BlockInputs | None = None
        felt: Felt = {}
        if method.calibrated:
            with self.watch("text"):
                windows = windows or calibration_windows(self.recipe, self.tokenizer)
                require_fits(self.model.config, windows)
            inputs = self.capture(anatomy, calls, windows)
            felt = self.feel(anatomy, inputs, windows, method.gradients(options), str(options.get("loss")))
            result.calibration = {**windows.describe(), "dtype": str(inputs.dtype)}
        with Solver(self.model, method, options, known) as solver:
            for walked in self.walk(anatomy, inputs if method.walked else None, method):
                with self.watch("solve"):
                    for site in anatomy.sites_of(walked.index):
                        solver.take(site, {**walked.statistics.get(site.name, {}), **felt.get(site.name, {})})
            with self.watch("solve"):
                plan = known or self.plan(anatomy.with_idle(solver.unreached), solver.spectra)
                solver.finish(plan)
            result.plan, result.damping = without(plan, solver.unreached), solver.damping
        _tell(result.plan, self.progress)
        result.seconds = self.watch.seconds
        return result

    def plan(self, anatomy: Anatomy, spectra: Mapping[str, torch.Tensor] | None = None) -> Plan:
        """Decide every site."""
        allocation = allocation_of(self.recipe)
        return make_plan(anatomy, allocation, self.recipe.keep, self.model.dtype.itemsize, spectra)

    def capture(self, anatomy: Anatomy, calls: list[BlockCall], windows: Windows) -> BlockInputs:
        """Get the input of the first block and the calls of all."""
        asked = self.recipe.calibration
        with self.watch("capture"):
            device = device_of(self.recipe.device)
            dtype = choose_dtype(asked.dtype, self.model.dtype, device)
            return capture(self.model, anatomy, windows.tokens, asked.batch, calls, dtype, device)

    def feel(self, anatomy: Anatomy, inputs: BlockInputs, windows: Windows, names: frozenset[str], loss: str) -> Felt:
        """Collect what the loss feels at every site: one backward pass, none if the method does not ask."""
        if not names:
            return {}
        felt = gradient_accumulators(anatomy, names, inputs.device)
        labels = choose_labels(self.model, "sampled" if loss == "sampled" else "labels", self.recipe.calibration.seed)
        steps = len(anatomy.blocks(self.model)) * len(inputs.calls)
        with (
            self.watch("backward"),
            self.progress.stage(f"gradients ({inputs.dtype})", steps, "batch") as advance,
        ):
            backward(self.model, anatomy, inputs, windows.tokens, felt, labels, advance)
        return felt

    def walk(self, anatomy: Anatomy, inputs: BlockInputs | None, method: LowRankMethod) -> Iterator[WalkedBlock]:
        """Yield every block with the statistics the method needs; without running anything if it needs none."""
        blocks = anatomy.blocks(self.model)
        if inputs is None:
            with self.progress.stage("solve", len(blocks), "block") as advance:
                for index in range(len(blocks)):
                    yield WalkedBlock(index, {})
                    advance()
            return
        steps = len(blocks) * len(inputs.calls)
        with self.progress.stage(f"calibrate and solve ({inputs.dtype})", steps, "batch") as advance:
            passes = walk(blocks, anatomy, inputs, method.needs, advance)
            while True:
                with self.watch("walk"):
                    walked = next(passes, None)
                if walked is None:
                    return
                yield walked


def calibration_windows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Windows:
    """Cut a recipe's calibration text.

    Raises:
        ParedError: the text is unknown, or shorter than one window.
    """
    asked = recipe.calibration
    return cut(find_text(asked.text), tokenizer, asked.length, asked.samples, asked.sampling, asked.seed)


def _tell(plan: Plan, progress: Progress) -> None:
    """Say what is not covered, and what the budget could not reach."""
    if plan.uncovered:
        first = plan.uncovered[0]
        progress.note(
            f"not covered: {len(plan.uncovered)} weights, {plan.uncovered_share:.1%} of the parameters inside the "
            f"blocks, the first is {first.name} {first.shape} ({first.reason})"
        )
    dense = [site for site in plan.sites if isinstance(site.decision, Dense)]
    if dense and plan.keep < 1:
        progress.note(f"{len(dense)} sites stay dense, the first is {dense[0].name}")
    if plan.shortfall:
        progress.note(f"the budget is missed by {plan.shortfall:,} parameters: too many sites must stay dense")
