"""The rest of the Python API: what the command line does for one model, as one call each.

Beside :func:`pared.compress`, :func:`pared.tune` and what loads and checks folders.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.arguments import (
    config_from,
    folder_from,
    kind_of,
    name_from,
    recipe_from,
    refuse_tokenizer,
    require_model,
    require_tokenizer,
)
from pared.checkpoint import load, load_tokenizer
from pared.data.handed import text_of
from pared.data.texts import handed_over
from pared.engine import collect
from pared.engine.checks.early import require_model as require_named_model
from pared.engine.checks.early import require_possible, require_suited
from pared.entrypoints.compression.in_place import where_it_is
from pared.entrypoints.evaluate import evaluate as measured
from pared.entrypoints.plan import plan_by_shapes, plan_of
from pared.entrypoints.search import pools_on
from pared.entrypoints.search import run as search_by_name
from pared.entrypoints.search import search as search_loaded
from pared.entrypoints.search_found import Found
from pared.errors import ParedError
from pared.models.loaded import LoadedModel
from pared.models.trust import trusting
from pared.notebook import watcher_of
from pared.progress import Progress
from pared.schema.cost import CostedPlan
from pared.schema.evaluate import EvaluationConfig
from pared.schema.plan import Plan
from pared.schema.recipe import Recipe
from pared.schema.search import SearchConfig
from pared.tables import Shown, Table

if TYPE_CHECKING:
    from datasets import Dataset

SEARCHED_ON = 64  # calibration windows of a search by default


def plan(
    model: PreTrainedModel | str | Path,
    recipe: Recipe | Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    *,
    cost: bool = False,
    machine: str | None = None,
    **fields: Any,
) -> Plan:
    """Decide what a compression would keep of every layer, from shapes alone: no weight is read.

    Where ranks or zeros depend on the data, those of uniform allocation stand in: the sizes are right to a rank. Where
    widths are decided, uniform ones of what is an MLP by its shapes stand in; attentions are left whole.

    Args:
        model: by name, or loaded; it is not changed.
        recipe: method and budget; a mapping of them, or none for the defaults.
        trust_remote_code: whether code that lies beside the model may run.
        cost: whether to predict time, memory and disk too, in the ``cost`` of what is returned; this machine is
            measured for about 20 seconds, unless it was within a week, and the texts of a model by name are read.
        machine: predict for another one, computed from published figures: ``h100``.
        **fields: of :class:`pared.Recipe`, laid over it.

    Raises:
        ParedError: what :func:`pared.compress` refuses of such a recipe and model, or there is no such machine.

    Example:
        >>> pared.plan("embedded:smollm2-135m", keep=0.8).after.bytes_on_disk  # doctest: +SKIP
    """
    function = "pared.plan"
    asked = recipe_from(recipe, fields, function)
    with trusting(trust_remote_code):
        if not isinstance(model, (str, Path)):
            require_model(model, function)
            spec = require_possible(asked)
            require_suited(model.config, spec, model.config.name_or_path or type(model).__name__)
            plan, found = plan_by_shapes(model, spec), None
            if cost or machine is not None:
                from pared.entrypoints.cost import cost_of_loaded, rates_of

                found = cost_of_loaded(model, spec, plan, rates_of(machine, asked.device))
        else:
            planned = plan_of(asked.model_copy(update={"model": name_from(model, function)}), cost, machine)
            plan, found = planned.plan, planned.cost
    return plan if found is None else CostedPlan(**dict(plan), cost=found)


def search(
    model: PreTrainedModel | str | Path,
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    recipe: Recipe | Mapping[str, Any] | None = None,
    config: SearchConfig | Mapping[str, Any] | None = None,
    progress: Progress | bool | None = None,
    ray: str | None = None,
    trust_remote_code: bool = False,
    resume: bool | None = None,
    **fields: Any,
) -> Found:
    """Search for the program that spreads zeros, or ranks, best over a model.

    Args:
        model: by name, or loaded with its tokenizer; the same bits afterwards.
        out: the folder of journal and result.
        tokenizer: of a loaded model.
        recipe: method, budget and calibration: ``method="wanda", sparsity=0.7``, or a low-rank method and ``keep``.
        config: how the search goes, and what candidates are measured on.
        progress: what reports progress, or whether bars are shown; by default in a notebook only.
        ray: measure on a Ray cluster: its address, ``auto`` or ``local``.
        trust_remote_code: whether code that lies beside the model may run.
        resume: True resumes a search of the very same settings that was stopped; False removes what it found, and
            starts over. None, the default, is refused where there is any.
        **fields: of :class:`pared.SearchConfig`, and of :class:`pared.Recipe` what that has not (``samples`` too).

    Raises:
        ParedError: anything that does not work; what can be refused is refused before a weight is read.

    Example:
        >>> pared.search("embedded:smollm2-135m", "found", method="wanda", sparsity=0.7).program  # doctest: +SKIP
    """
    function = "pared.search"
    if not isinstance(data := fields.get("data", ""), (str, Path)):
        raise ParedError(f"{function} takes data by name: a text, file:PATH, or NAME:SPLIT:FIELD; got {kind_of(data)}")
    own = {name: fields.pop(name) for name in list(fields) if name in SearchConfig.model_fields}
    settings = config_from(SearchConfig, config, own, function)
    if recipe is None and "calibration" not in fields:
        fields.setdefault("samples", SEARCHED_ON)
    asked = recipe_from(recipe, fields, function)
    folder, watcher = folder_from(out, function), watcher_of(progress, function)
    require_possible(asked)
    pools = pools_on(ray)
    with trusting(trust_remote_code):
        if isinstance(model, (str, Path)):
            asked = asked.model_copy(update={"model": name_from(model, function)})
            require_named_model(require_possible(asked))
            return search_by_name(asked, settings, folder, watcher, pools, resume)
        require_model(model, function)
        require_tokenizer(tokenizer, function)
        assert tokenizer is not None
        return search_loaded(model, tokenizer, asked, settings, folder, watcher, pools, resume)


@dataclass(frozen=True, repr=False)
class Evaluated(Shown):
    """What was measured of a model; shown as a table.

    Attributes:
        name: of the model.
        measure: what was measured: ``perplexity``, ``tasks``, both with ``and``, ``examples``, ``vqa``, ``fine_tune``.
        figures: everything that was found, and what it depends on, as ``pared eval --json`` writes it.
        told: each result in words, as ``pared eval`` prints it.
    """

    name: str
    measure: str
    figures: Mapping[str, Any]
    told: tuple[str, ...]

    def table(self) -> Table:
        """Return one row for each figure of each task, or of the text."""
        rows = [("perplexity", f"{self.figures['perplexity']:,.4f}")] if "perplexity" in self.figures else []
        results = self.figures.get("tasks", [{"task": self.measure, **self.figures}])
        rows += [
            (f"{one['task']}: {metric}", f"{value:.4f} ± {one.get('errors', {}).get(metric, 0):.4f}")
            for one in results
            for metric, value in one.get("metrics", {}).items()
        ]
        return Table(self.name, ("", self.measure), rows, self.told)


def evaluate(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: EvaluationConfig | Mapping[str, Any] | None = None,
    progress: Progress | bool | None = None,
    trust_remote_code: bool = False,
    *,
    perplexity: "str | Path | Sequence[str] | Dataset | None" = None,
    tasks: str | Sequence[str] | None = None,
    **fields: Any,
) -> Evaluated:
    """Measure what a model is worth: perplexity on a text, or the tasks it does.

    Args:
        model: a folder that pared made, any named model, or one that is loaded.
        tokenizer: of a loaded model.
        config: what is measured, and how; or all of it among the fields.
        progress: what reports progress, or whether bars are shown; by default in a notebook only.
        trust_remote_code: whether code that lies beside the weights of a model by name may run.
        perplexity: what perplexity is measured on: a text by name, a list of strings, or a ``datasets.Dataset`` with a
            ``text`` in every row.
        tasks: names of tasks: ``["arc_easy", "gsm8k"]``.
        **fields: of :class:`pared.EvaluationConfig`: ``examples``, ``vqa`` and ``fine_tune`` in place of the two
            above, and how it is measured: ``windows``, ``length``, ``limit``, ``shots``.

    Raises:
        ParedError: nothing to measure, or two things other than perplexity and tasks, a field that the measure does not
            read, or anything that does not work; what can be refused is refused before a weight is read.

    Example:
        >>> pared.evaluate("smaller", perplexity="wikitext2:test", windows=20)  # doctest: +SKIP
        >>> pared.evaluate(model, tokenizer, tasks=["arc_easy"], limit=100).figures["tasks"]  # doctest: +SKIP
    """
    function, told = "pared.evaluate", list[str]()
    watcher = watcher_of(progress, function)
    with trusting(trust_remote_code):
        subject: str | LoadedModel
        if isinstance(model, (str, Path)):
            subject = name_from(model, function)
            refuse_tokenizer(tokenizer, function)
        else:
            require_model(model, function)
            require_tokenizer(tokenizer, function)
            assert tokenizer is not None
            subject = LoadedModel(model, tokenizer)
            fields.setdefault("device", model.device)
        text = None
        if perplexity is not None and not isinstance(perplexity, (str, Path)):
            text = text_of(perplexity, tokenizer, function)
            perplexity = text.name
        given = {"perplexity": perplexity, "tasks": tasks}
        fields |= {name: value for name, value in given.items() if value is not None}
        with handed_over(text):
            asked = config_from(EvaluationConfig, config, fields, function)
            found = measured(subject, asked, watcher, told.append)
        return Evaluated(subject if isinstance(subject, str) else subject.name, asked.measure, found, tuple(told))


def collect_statistics(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    statistics: Iterable[str],
    recipe: Recipe | Mapping[str, Any] | None = None,
    progress: Progress | bool | None = None,
    data: "str | Path | Sequence[str] | Dataset | None" = None,
    trust_remote_code: bool = False,
    **fields: Any,
) -> Path:
    """Collect statistics once, on disk, for any number of compressions of the same dense model.

    Args:
        model: dense, loaded or by name; unchanged.
        tokenizer: of the model; that of a model by name is loaded with it.
        folder: where one file a block is written.
        statistics: their names: of inputs (``gram``, ``mean_gram``, ``magnitude``), or of gradients.
        recipe: its calibration is read, and the options ``loss``, ``labels_per_token`` and ``gradient_clip`` of its
            method where gradients are among the names.
        progress: what reports progress, or whether bars are shown; by default in a notebook only.
        data: as for :func:`pared.compress`.
        trust_remote_code: whether code that lies beside the weights of a model by name may run.
        **fields: of :class:`pared.Recipe` and its calibration, laid over it.

    Returns:
        The folder, which :func:`pared.compress` takes as ``collected``.

    Raises:
        ParedError: an unknown statistic, or a model or text that does not allow it.

    Example:
        >>> saved = pared.collect_statistics(model, tokenizer, "grams", ["gram"], samples=64)  # doctest: +SKIP
        >>> pared.compress(model, tokenizer, method="svd-llm", samples=64, collected=saved)  # doctest: +SKIP
    """
    function = "pared.collect_statistics"
    place, watcher = folder_from(folder, function), watcher_of(progress, function)
    names = frozenset(statistics) if isinstance(statistics, Iterable) and not isinstance(statistics, str) else None
    if not names or not all(isinstance(name, str) for name in names):
        raise ParedError(
            f"{function}: expected the names of statistics in a list, such as ['gram'], got {statistics!r}"
        )
    with trusting(trust_remote_code):
        if isinstance(model, (str, Path)):
            name = name_from(model, function)
            model, tokenizer = load(name), tokenizer or load_tokenizer(name)
        require_model(model, function)
        require_tokenizer(tokenizer, function)
        assert tokenizer is not None
        text = None
        if isinstance(data, (str, Path)):
            fields["data"] = data
        elif data is not None:
            text = text_of(data, tokenizer, function)
            fields["data"] = text.name
        with handed_over(text):
            collect(model, tokenizer, where_it_is(recipe_from(recipe, fields, function), model), names, place, watcher)
    return place
