"""One calibration, every budget: what a model of any size is predicted to lose, measured where that is asked for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.allocation.curves import Scale, knee
from pared.arguments import asked_from, name_from, recipe_from, refuse_tokenizer, require_model, require_tokenizer
from pared.data.handed import text_of
from pared.data.texts import handed_over
from pared.data.uses import with_use
from pared.engine.allocate import Allocated
from pared.engine.checks.early import require_model as require_named_model
from pared.engine.checks.early import require_suited, require_texts
from pared.engine.checks.explorable import recipe_of, require_explorable
from pared.engine.explore import Curve, explored
from pared.engine.spec import CompressionSpec, resolve_low_rank
from pared.entrypoints.compression.in_place import require_compressible, where_it_is
from pared.entrypoints.compression.texts_read import read_texts
from pared.entrypoints.evaluation.measure import PerplexityOn
from pared.entrypoints.picking import Picker
from pared.environment import device_of, machine, versions
from pared.errors import ParedError
from pared.models.architecture import is_causal
from pared.models.loaded import name_of
from pared.models.trust import trusting
from pared.names import called
from pared.notebook import watcher_of
from pared.progress import Progress, Stopwatch
from pared.report.curves import draw
from pared.schema.explore import Exploration, ExploreConfig, Point
from pared.schema.plan import NM, Plan, Sparse
from pared.schema.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure


class Explored(Exploration):
    """One model at every budget, as :func:`pared.explore` returns it."""

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw loss over size; see :func:`pared.report.curves.draw`."""
        return draw(self, path)


def explore(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    recipe: Recipe | Mapping[str, Any] | None = None,
    config: ExploreConfig | Mapping[str, Any] | None = None,
    progress: Progress | bool | None = None,
    trust_remote_code: bool = False,
    *,
    data: "str | Path | Sequence[str] | Dataset | None" = None,
    **fields: Any,
) -> Explored:
    """Decompose a model once, and predict what it loses at every budget.

    Memory: the model, and what its calibration takes; decompositions lie on the disk meanwhile.

    Args:
        model: dense, by name or loaded; the same bits afterwards.
        tokenizer: of a loaded model.
        recipe: method, storage, calibration and evaluation; its budget and its structures are not read.
        config: budgets, structures, what is measured and what is looked for.
        progress: what reports progress, or whether bars are shown; by default in a notebook only.
        trust_remote_code: whether code that lies beside the weights of a model by name may run.
        data: what is calibrated on, as for :func:`pared.compress`.
        **fields: of :class:`pared.ExploreConfig`, and of :class:`pared.Recipe` what that has not (``samples`` too).

    Returns:
        The curves, shown as a table, whose ``plot`` draws them; ``picked`` is a recipe for :func:`pared.compress`.

    Raises:
        ParedError: no causal language model, losses that cannot be added up, a target out of reach, or anything that a
            compression refuses.

    Example:
        >>> found = pared.explore("embedded:smollm2-135m", samples=32, length=512, measure=5)  # doctest: +SKIP
        >>> pared.compress("embedded:smollm2-135m", recipe=found.picked).save("smaller")  # doctest: +SKIP
    """
    function, text = "pared.explore", None
    own = {name: fields.pop(name) for name in list(fields) if name in ExploreConfig.model_fields}
    settings = ExploreConfig.of({**(asked_from(ExploreConfig, config, function).model_dump(exclude_unset=True)
                                    if config is not None else {}), **own}, function)  # fmt: skip
    watcher = watcher_of(progress, function)
    if isinstance(data, (str, Path)):
        fields["data"] = data
    elif data is not None:
        text = text_of(data, tokenizer, function)
        fields["data"] = text.name
    asked = recipe_from(recipe, fields, function)
    with trusting(trust_remote_code), handed_over(text):
        if isinstance(model, (str, Path)):
            refuse_tokenizer(tokenizer, function)
            return run(asked.model_copy(update={"model": name_from(model, function)}), settings, watcher)
        require_model(model, function)
        require_tokenizer(tokenizer, function)
        assert tokenizer is not None
        require_compressible(model, tokenizer, recipe_of(asked, settings.structures[0], 0.8, settings.pruner), None)
        name = asked.model or name_of(model) or type(model).__name__
        return _Exploring(model, tokenizer, where_it_is(with_use(asked), model), settings, watcher, name).run()


def run(recipe: Recipe, config: ExploreConfig, progress: Progress) -> Explored:
    """Explore a model by name.

    Raises:
        ParedError: as :func:`explore`; what can be refused is refused before a weight is read.
    """
    spec = next(iter(require_explorable(recipe, config.structures, config.pruner).values()))
    recipe = with_use(recipe)
    require_texts(recipe)
    source = require_named_model(spec)
    settings = source.config()
    require_suited(settings, spec, source.name)
    if not is_causal(settings.architectures or []):
        raise ParedError(f"{source.name} is not a causal language model; an exploration predicts its loss")
    watch = Stopwatch()
    with watch("load"):
        tokenizer = source.tokenizer()
        model = source.load(recipe.dtype).to(device_of(recipe.device))
    return _Exploring(model, tokenizer, recipe, config, progress, source.name, watch).run()


@dataclass
class _Exploring:
    """One exploration under way."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    config: ExploreConfig
    progress: Progress
    name: str
    watch: Stopwatch = field(default_factory=Stopwatch)
    notes: list[str] = field(default_factory=list)

    def run(self) -> Explored:
        """Read the texts, decompose, allocate, measure, pick."""
        config = self.config
        specs = require_explorable(self.recipe, config.structures, config.pruner)
        if not is_causal([type(self.model).__name__]):
            raise ParedError(f"{type(self.model).__name__} is not a causal language model; an exploration predicts "
                             "its loss")  # fmt: skip
        with self.watch("text"):
            texts = read_texts(next(iter(specs.values())), self.model.config, True, self.tokenizer, self.progress)
        assert texts.calibration is not None
        on, dense = self._measure(texts.evaluation), None
        if on is not None:
            dense = on.before(self.model)
        with explored(self.model, self.tokenizer, specs, texts.calibration, self.progress) as curves:
            self.notes += [f"the model has no {name} to decide" for name in config.structures if name not in curves]
            points, found = self._points(curves)
            if not points:
                raise ParedError(f"no budget of {', '.join(f'{keep:g}' for keep in config.keep)} can be met; keep more")
            if on is not None:
                points = self._measured(on, curves, points, found)
            whole = self._dense(points, found, dense)
            pick = self._pick(curves, points, whole, on)
        self.notes += self._behind(specs, points)
        evaluation = None if on is None else dict(on.record(texts.learned_from))
        return Explored(
            model=self.name, recipe=self.recipe, config=config, calibration=texts.calibration.describe(),
            evaluation=evaluation, dense=whole, points=tuple(points), knees=_knees(whole, points),
            measured_knees=_measured_knees(whole, points), pick=pick,
            picked=None if pick is None else recipe_of(self.recipe, pick.structure, pick.keep, config.pruner),
            notes=tuple(self.notes), seconds=self.watch.seconds, versions=versions(), machine=machine(),
        )  # fmt: skip

    def _behind(self, specs: Mapping[str, CompressionSpec], points: Sequence[Point]) -> list[str]:
        """Return a note where a compression collects its statistics again, which is better than what is explored."""
        low_rank = [one for one in points if one.structure in specs and one.structure != "zeros"]
        pruner = self.config.pruner
        again = [one.keep for one in low_rank
                 if resolve_low_rank(recipe_of(self.recipe, one.structure, one.keep, pruner)).sequential]  # fmt: skip
        return [f"at keep {max(again):g} and below a compression collects statistics again, behind what is compressed; "
                "here all are the dense model's"] if again else []  # fmt: skip

    def _measure(self, windows: Any) -> PerplexityOn | None:
        if not self.config.measure:
            return None
        if windows is None or self.recipe.evaluation is None:
            raise ParedError(f"nothing to measure perplexity on; name a text ({called('evaluation.text')})")
        device = device_of(self.recipe.device)
        return PerplexityOn(windows, self.tokenizer, self.recipe.evaluation.bos, device, self.watch, self.progress)

    def _points(self, curves: Mapping[str, Curve]) -> tuple[list[Point], dict[tuple[str, float], Allocated]]:
        """Allocate every budget that can be met."""
        keeps, points, found = sorted(self.config.keep, reverse=True), list[Point](), {}
        with self.watch("allocate"), self.progress.stage("budgets", len(curves) * len(keeps), "budget") as advance:
            for structure, curve in curves.items():
                for keep in keeps:
                    advance()
                    try:
                        found[structure, keep] = one = curve.decide(keep)
                    except ParedError as error:
                        self.notes.append(f"{structure}: no keep {keep:g} or less: {error}")
                        break
                    points.append(self.point(structure, keep, one))
        return points, found

    def point(self, structure: str, keep: float, found: Allocated, perplexity: float | None = None) -> Point:
        """Return a budget as the record has it."""
        after = found.plan.after
        return Point(
            structure=structure, keep=keep, target_parameters=after.covered_parameters,
            model_parameters=after.model_parameters, bytes_on_disk=after.bytes_on_disk,
            speed=ideal_speed(found.plan, self._looked_up), loss=found.loss, perplexity=perplexity,
        )  # fmt: skip

    @property
    def _looked_up(self) -> int:
        """Parameters that no token is multiplied with: input embeddings, where the head has its own."""
        inputs, outputs = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        weight = getattr(inputs, "weight", None)
        return 0 if weight is None or getattr(outputs, "weight", None) is weight else int(weight.numel())

    def _dense(self, points: list[Point], found: Mapping[tuple[str, float], Allocated], value: float | None) -> Point:
        before = found[points[0].structure, points[0].keep].plan.before
        return Point(
            structure="dense", keep=1.0, target_parameters=before.covered_parameters, speed=1.0, loss=0.0,
            model_parameters=before.model_parameters, bytes_on_disk=before.bytes_on_disk, perplexity=value,
        )  # fmt: skip

    def _measured(
        self,
        on: PerplexityOn,
        curves: Mapping[str, Curve],
        points: list[Point],
        found: Mapping[tuple[str, float], Allocated],
    ) -> list[Point]:
        """Return the points, some of every structure with their perplexity."""
        told: dict[tuple[str, float], float] = {}
        for structure, curve in curves.items():
            own = [point for point in points if point.structure == structure]
            for point in _evenly(own, self.config.measure):
                told[structure, point.keep] = self.perplexity(on, curve, found[structure, point.keep])
        return [point.model_copy(update={"perplexity": told.get((point.structure, point.keep))}) for point in points]

    def perplexity(self, on: PerplexityOn, curve: Curve, found: Allocated) -> float:
        """Measure a budget."""
        with self.watch("install"), curve.installed(found):
            return on.after(self.model)

    def _pick(
        self, curves: Mapping[str, Curve], points: Sequence[Point], dense: Point, on: PerplexityOn | None
    ) -> Point | None:
        """Return the budget that is looked for, measured where anything is."""
        config, value = self.config, dense.perplexity
        scales = {name: Scale(_pairs(dense, points, name)) for name in curves}
        measure = None
        if on is not None and value is not None:
            before = value

            def measure(name: str, found: Allocated) -> float:
                return math.log(self.perplexity(on, curves[name], found) / before)

        with self.watch("allocate"):
            picked = Picker(curves, scales, min(config.keep), self.point, measure).pick(config)
        if picked is None:
            return None
        ratio = None if picked.measured is None or value is None else value * math.exp(picked.measured)
        return self.point(picked.structure, picked.keep, picked.found, ratio)


def ideal_speed(plan: Plan, looked_up: int) -> float:
    """Return how many times as fast a model is if time is what it is multiplied with, which zeros do not change.

    Args:
        plan: of the model.
        looked_up: parameters that no token is multiplied with.
    """
    zeros = (Sparse, NM)
    dense = plan.model_parameters - looked_up
    saved = sum(site.before - site.after for site in plan.sites if not isinstance(site.decision, zeros))
    return dense / (dense - saved)


def _evenly(points: list[Point], count: int) -> list[Point]:
    """Return so many of the points, the first and the last among them."""
    if count >= len(points):
        return points
    if count == 1:
        return points[len(points) // 2 : len(points) // 2 + 1]
    return [points[round(place * (len(points) - 1) / (count - 1))] for place in range(count)]


def _pairs(dense: Point, points: Sequence[Point], structure: str) -> list[tuple[float, float]]:
    """Return what was predicted and what was measured of a structure's points."""
    before = dense.perplexity
    return [
        (one.loss, math.log(one.perplexity / before))
        for one in points
        if one.structure == structure and one.perplexity is not None and before is not None
    ]


def _knees(dense: Point, points: Sequence[Point]) -> dict[str, float]:
    """Return the budget of every structure at which the predicted curve bends most."""
    found = {}
    for name in dict.fromkeys(one.structure for one in points):
        own = [dense, *(one for one in points if one.structure == name)]
        place = knee([one.keep for one in own], [one.loss for one in own])
        if place is not None:
            found[str(name)] = own[place].keep
    return found


def _measured_knees(dense: Point, points: Sequence[Point]) -> dict[str, float]:
    """Return the same of what was measured, where five points of a structure or more were."""
    before, found = dense.perplexity, {}
    for name in dict.fromkeys(one.structure for one in points):
        own = [one for one in (dense, *points) if one.structure in ("dense", name) and one.perplexity is not None]
        if before is None or len(own) < 6:
            continue
        losses = [math.log(one.perplexity / before) for one in own if one.perplexity is not None]
        place = knee([one.keep for one in own], losses)
        if place is not None:
            found[str(name)] = own[place].keep
    return found
