"""One model, compressed in place: probe, plan, walk, solve, install."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.allocation import make_plan
from pared.anatomy import Anatomy, find_anatomy, probe, weight_of
from pared.calibration import BlockInputs, WalkedBlock, capture, choose_dtype, walk
from pared.calibration.walk import StatisticsOfSite
from pared.checkpoint import mark, module_map
from pared.engine.install import install, require_finite_weights
from pared.engine.progress import Progress, Silent, Stopwatch
from pared.errors import ParedError
from pared.hardware import device_of
from pared.lowrank import METHODS, LowRankMethod
from pared.names import did_you_mean
from pared.plan import Dense, LowRank, Plan, SitePlan
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


def plan_of(model: PreTrainedModel, recipe: Recipe, bytes_per_parameter: int | None = None) -> Plan:
    """Decide every site from shapes alone; the model may be on the meta device.

    Raises:
        ParedError: unknown method or allocation, nothing to compress, or a budget too small.
    """
    method_of(recipe)
    anatomy = find_anatomy(model).without(recipe.skip)
    return make_plan(anatomy, recipe.allocation, recipe.keep, bytes_per_parameter or model.dtype.itemsize)


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
    method = method_of(recipe)
    _require_compressible(model)
    was_training = model.training
    model.eval()
    try:
        return _compress(model, tokenizer, recipe, method, progress or Silent(), windows)
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


def _compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    method: LowRankMethod,
    progress: Progress,
    windows: Windows | None,
) -> Compressed:
    watch = Stopwatch()
    result = Compressed(model, recipe)
    inputs = None
    with watch("probe"):
        anatomy = find_anatomy(model).without(recipe.skip)
        require_finite_weights(model, anatomy)
        anatomy, calls = probe(model, anatomy)
        plan = make_plan(anatomy, recipe.allocation, recipe.keep, model.dtype.itemsize)
    if method.calibrated:
        with watch("text"):
            windows = windows or calibration_windows(recipe, tokenizer)
            require_fits(model.config, windows)
        with watch("capture"):
            device = device_of(recipe.device)
            dtype = choose_dtype(recipe.calibration.dtype, model.dtype, device)
            inputs = capture(model, anatomy, windows.tokens, recipe.calibration.batch, calls, dtype, device)
        result.calibration = {**windows.describe(), "dtype": str(dtype)}
    decisions = {site.name: site for site in plan.sites}
    for walked in _walked(anatomy.blocks(model), anatomy, inputs, method, watch, progress):
        with watch("solve"):
            for site in anatomy.sites_of(walked.index):
                statistics = walked.statistics.get(site.name, {})
                decisions[site.name] = _solve(model, decisions[site.name], statistics, method, result.damping)
    result.plan = plan.model_copy(update={"sites": tuple(decisions[site.name] for site in plan.sites)})
    _tell(result.plan, progress)
    result.seconds = watch.seconds
    return result


def _walked(
    blocks: list[nn.Module],
    anatomy: Anatomy,
    inputs: BlockInputs | None,
    method: LowRankMethod,
    watch: Stopwatch,
    progress: Progress,
) -> Iterator[WalkedBlock]:
    """Yield every block with the statistics the method needs; without running anything if it needs none."""
    if inputs is None:
        with progress.stage("solve", len(blocks), "block") as advance:
            for index in range(len(blocks)):
                yield WalkedBlock(index, {})
                advance()
        return
    with progress.stage(f"calibrate and solve ({inputs.dtype})", len(blocks) * len(inputs.calls), "batch") as advance:
        steps = walk(blocks, anatomy, inputs, method.needs, advance)
        while True:
            with watch("walk"):
                walked = next(steps, None)
            if walked is None:
                return
            yield walked


def _solve(
    model: PreTrainedModel,
    site: SitePlan,
    statistics: StatisticsOfSite,
    method: LowRankMethod,
    damping: dict[str, float],
) -> SitePlan:
    """Put the factors of one site in place; return the site's plan, changed if calibration never reached it."""
    if not isinstance(site.decision, LowRank):
        return site
    if any(statistic.tokens == 0 for statistic in statistics.values()):
        return site.model_copy(update={"decision": Dense(reason="no calibration token reached it")})
    linear = model.get_submodule(site.name)
    try:
        values = {name: statistic.value for name, statistic in statistics.items()}
        weight = weight_of(linear).detach()
        decomposition = method.decompose(weight.to(next(iter(values.values()), weight).device), values)
    except (ValueError, RuntimeError) as error:
        raise ParedError(f"site {site.name}: {error}") from error
    if decomposition.damping:
        damping[site.name] = decomposition.damping
    install(model, site.name, decomposition.factors(site.decision.rank))
    return site


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
