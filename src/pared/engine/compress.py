"""One model, compressed in place: probe, plan, walk, solve, install."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.allocation import make_plan
from pared.anatomy import Anatomy, bias_of, find_anatomy, probe, weight_of
from pared.anatomy.probe import BlockCall
from pared.calibration import Gram, WalkedBlock, capture, choose_dtype, walk
from pared.calibration.walk import StatisticsOfSite
from pared.checkpoint import mark, module_map
from pared.engine.progress import Progress, Silent, Stopwatch
from pared.errors import ParedError
from pared.lowrank import METHODS, Factors, LowRankMethod
from pared.modules import LowRankLinear
from pared.names import did_you_mean
from pared.plan import Dense, LowRank, Plan, SitePlan
from pared.recipe import Recipe
from pared.sources.models import require_dense
from pared.sources.texts import find_text
from pared.sources.windows import Windows, cut


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
    plan: Plan
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
) -> Compressed:
    """Compress a loaded model, in place, block by block.

    Finished blocks replace dense ones as the walk goes, so memory stays near that of the model plus one block. If it
    is interrupted midway the model still works, with some blocks compressed: reload it to start again.

    Args:
        model: a dense causal language model or encoder in a floating point dtype, its weights in memory.
        tokenizer: of the model.
        recipe: method, budget and calibration; ``model``, ``out`` and ``evaluation`` are not read.
        progress: who watches; nobody by default.

    Returns:
        The same model, and the record.

    Raises:
        ParedError: anything in the model, the recipe or the text that does not work; nothing is changed unless the
            message says so.
    """
    name = model.config.name_or_path or type(model).__name__
    method = method_of(recipe)
    require_dense(model.config, name)
    if module_map(model):
        raise ParedError(f"model {name!r} is compressed in part; load the dense model again")
    was_training = model.training
    model.eval()
    try:
        return _compress(model, tokenizer, recipe, method, progress or Silent())
    except ParedError as error:
        if module_map(model):
            raise ParedError(f"{error}; the blocks before it are compressed already: load the model again") from error
        raise
    finally:
        model.train(was_training)


def _compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    method: LowRankMethod,
    progress: Progress,
) -> Compressed:
    watch = Stopwatch()
    device = torch.device(recipe.device)
    with watch("probe"):
        anatomy = find_anatomy(model).without(recipe.skip)
        require_finite_weights(model, anatomy)
        anatomy, calls = probe(model, anatomy)
        plan = make_plan(anatomy, recipe.allocation, recipe.keep, model.dtype.itemsize)
    _tell(plan, progress)

    result = Compressed(model, recipe, plan)
    windows = None
    if method.calibrated:
        with watch("text"):
            windows = _windows(recipe, tokenizer)
        result.calibration = {
            **windows.describe(),
            "dtype": str(choose_dtype(recipe.calibration.dtype, model.dtype, device)),
        }
    decisions = {site.name: site for site in plan.sites}
    for walked in _walk(model, anatomy, calls, windows, method, recipe, device, watch, progress):
        with watch("solve"):
            for site in anatomy.sites_of(walked.index):
                decided = _solve(
                    model, decisions[site.name], walked.statistics.get(site.name, {}), method, result.damping
                )
                decisions[site.name] = decided
    result.plan = plan.model_copy(update={"sites": tuple(decisions[site.name] for site in plan.sites)})
    mark(model)
    result.seconds = watch.seconds
    return result


def _walk(
    model: PreTrainedModel,
    anatomy: Anatomy,
    calls: list[BlockCall],
    windows: Windows | None,
    method: LowRankMethod,
    recipe: Recipe,
    device: torch.device,
    watch: Stopwatch,
    progress: Progress,
) -> Iterator[WalkedBlock]:
    """Yield every block with the statistics the method needs; without running anything if it needs none."""
    blocks = anatomy.blocks(model)
    if windows is None:
        with progress.stage("solve", len(blocks), "block") as advance:
            for index in range(len(blocks)):
                yield WalkedBlock(index, {})
                advance()
        return
    dtype = choose_dtype(recipe.calibration.dtype, model.dtype, device)
    with watch("capture"):
        inputs = capture(model, anatomy, windows.tokens, recipe.calibration.batch, calls, dtype, device)
    with ExitStack() as stack:
        advance = stack.enter_context(
            progress.stage(f"calibrate and solve ({dtype})", len(blocks) * len(inputs.calls), "batch")
        )
        steps = walk(blocks, anatomy, inputs, method.needs, dtype, device, advance)
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
        decomposition = method.decompose(weight_of(linear).detach(), _values(statistics))
    except (ValueError, RuntimeError) as error:
        raise ParedError(f"site {site.name}: {error}") from error
    if decomposition.damping:
        damping[site.name] = decomposition.damping
    install(model, site.name, decomposition.factors(site.decision.rank))
    return site


def _values(statistics: StatisticsOfSite) -> Mapping[str, torch.Tensor]:
    return {name: statistic.value for name, statistic in statistics.items() if isinstance(statistic, Gram)}


def install(model: nn.Module, name: str, factors: Factors) -> None:
    """Put a ``LowRankLinear`` of these factors where a linear layer stands, with its bias, dtype and device."""
    old = model.get_submodule(name)
    weight, bias = weight_of(old), bias_of(old)
    out_features, in_features = weight.shape
    rank = factors.down.shape[0]
    new = LowRankLinear(in_features, out_features, rank, bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        new.down.weight.copy_(factors.down)
        new.up.weight.copy_(factors.up)
        if bias is not None:
            new.up.bias.copy_(bias)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new.train(old.training))


def _windows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Windows:
    asked = recipe.calibration
    return cut(find_text(asked.text), tokenizer, asked.length, asked.samples, asked.sampling, asked.seed)


def require_finite_weights(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Refuse a model whose sites hold anything but finite floating point numbers in memory; names the site."""
    for site in anatomy.sites:
        weight = weight_of(model.get_submodule(site.name))
        if weight.is_meta:
            raise ParedError(f"site {site.name} is on the meta device (offloaded); load the model without offloading")
        if not weight.is_floating_point():
            raise ParedError(f"site {site.name} holds {weight.dtype}; pared needs floating point weights")
        if not bool(weight.isfinite().all()):
            raise ParedError(f"site {site.name} has NaN or infinity in its weight; the checkpoint is damaged")


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
