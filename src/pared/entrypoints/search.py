"""A whole search: a model by name, its scores once, candidates one after the other, the best of them in a file."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.allocation.dsa import SCORE_TOKENS
from pared.data.lengths import Length
from pared.data.windows import Windows, cut, require_fits
from pared.engine.spec import CompressionSpec, ExpertSpec, LowRankSpec, SparseSpec, method_of, resolve, resolve_low_rank
from pared.engine.targets.opening import experts_opened
from pared.entrypoints.compression.in_place import where_it_is
from pared.entrypoints.search_found import FOUND, JOURNAL, TRACE, Found, write_found
from pared.environment import device_of
from pared.errors import ParedError
from pared.io.apart import require_apart
from pared.io.digests import model_digest
from pared.io.inputs import inputs_of, told_apart, without_places
from pared.io.output_dir import require_short
from pared.models.architecture import is_causal
from pared.models.source import find_model, require_dense
from pared.names import called, ways_on
from pared.progress import Progress, Silent
from pared.schema.recipe import Recipe
from pared.schema.search import SearchConfig
from pared.search.data_split import search_texts
from pared.search.evidence import FILE as EVIDENCE
from pared.search.evolution import Candidate, Measured, Result, evolve
from pared.search.journal import SearchJournal
from pared.search.objective import Measure, Trial, first, successive_halving_splits
from pared.search.pool import InProcess, Processes
from pared.search.prepare import prepare
from pared.search.ranks import require_rankable
from pared.search.zeros import require_pruner
from pared.sparsity import PruningMethod
from pared.sparsity.registry import Wanda

LENGTH = 1024  # tokens of a window by default
# What a journal holds of a search's own settings, in this order: the same settings write the same bytes.
SETTINGS = ("iterations", "population", "sample_ratio", "top", "seed", "strategy", "workers", "rungs", "windows",
            "length", "final_windows", "halving")  # fmt: skip


class Pool(Protocol):
    """Measures candidates, and the best of them on the full split."""

    def submit(self, candidate: Candidate, final: bool = False) -> None:
        """Begin with a candidate."""

    def next(self) -> tuple[int, Measured]:
        """Wait for any candidate that was begun."""


Pools = Callable[[Measure, int], AbstractContextManager[Pool]]


def run(
    recipe: Recipe,
    config: SearchConfig,
    out: Path,
    progress: Progress | None = None,
    pools: Pools | None = None,
    resume: bool | None = True,
) -> Found:
    """Search for a model by name.

    Args:
        recipe: model, pruner or low-rank method, budget and calibration; evaluation and allocation are not read.
        config: how the search goes, and what candidates are measured on.
        out: the folder, made if it is not there.
        progress: what reports progress; nothing by default.
        pools: makes what measures, given how and how many workers; processes on this machine by default.
        resume: take up the journal of this very search in the folder, or remove that of any; None refuses both where
            the search there is unfinished. One that is finished is told again.

    Raises:
        ParedError: anything that does not work; what can be refused is refused before a weight is read.
    """
    recipe = require_searchable(recipe).recipe
    device_of(recipe.device)
    if recipe.model is None:
        raise ParedError("name a model: embedded:smollm2-135m, a folder or a Hub id")
    source = find_model(recipe.model, recipe.dtype)
    require_dense(source.config(), recipe.model)
    require_place(out, inputs_of(recipe.model_dump()))
    tokenizer = source.tokenizer()
    search_texts(recipe.calibration.text, tokenizer)
    model = source.load(recipe.dtype).to(device_of(recipe.device))
    return search(model, tokenizer, recipe, config, out, progress, pools, resume)


def search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    config: SearchConfig,
    out: Path,
    progress: Progress | None = None,
    pools: Pools | None = None,
    resume: bool | None = True,
) -> Found:
    """Search for a loaded model, which is the same bits afterwards; the other arguments are those of :func:`run`.

    Raises:
        ParedError: anything that does not work.
    """
    progress = progress or Silent()
    recipe = where_it_is(recipe, model)
    spec = require_searchable(recipe)
    recipe = spec.recipe
    require_place(out)
    if not is_causal([type(model).__name__]):
        raise ParedError(f"{type(model).__name__} is not a causal language model; candidates need a perplexity")
    windows, full = _windows(model, tokenizer, recipe, config)
    config = config.model_copy(update={"length": full.tokens.shape[1]})
    steps = successive_halving_splits(first(full, config.windows), config.halving)
    if config.final_windows is not None:
        full = first(full, config.final_windows)
    settings = _settings(model, spec, config, windows, full)
    out.mkdir(parents=True, exist_ok=True)
    if resume is False:
        SearchJournal.remove(out / JOURNAL, [out / name for name in (FOUND, TRACE, EVIDENCE)])
    with SearchJournal(out / JOURNAL, settings) as journal, experts_opened(model, spec):
        if resume is None and journal.resumed and not (out / FOUND).exists():
            raise ParedError(f"{out} holds an unfinished search of these very settings: {ways_on()}")
        if resume and not journal.resumed:
            progress.note(f"nothing to resume: {out} holds no measurements")
        if journal.resumed:
            progress.note(f"{out} holds {journal.resumed} measurements of this search; it resumes from there")
        trial = prepare(model, tokenizer, spec, windows, out, progress)
        measure = Measure(trial, tokenizer, steps, full)
        references = _references(measure, trial, journal, "", progress)
        with (pools or local)(measure, config.workers) as pool:
            with progress.stage("search", config.total, "candidate") as advance:
                results = evolve(config, trial.allocate, pool, journal, advance=lambda known: advance(recalled=known))
            if len(results) < config.total:
                progress.note(f"the search ends after {len(results)} candidates: no other allocations were found")
            if config.final_windows is None and len(full.tokens) > config.windows:
                progress.note(f"the best are measured on the full split, {len(full.tokens):,} windows each; with fewer "
                              "final windows this is shorter")  # fmt: skip
            finals = _finals(results, config, pool, journal, progress)
        references |= _references(measure, trial, journal, " final", progress)
        return write_found(out, trial, settings, results, finals, references)


def require_searchable(recipe: Recipe) -> CompressionSpec:
    """Resolve a recipe, and refuse one that cannot be searched for.

    Raises:
        ParedError: the method, its budget or the allocation do not allow it.
    """
    if recipe.allocation not in ("auto", "dsa"):
        raise ParedError(f"a search looks for programs of allocation dsa; got allocation {recipe.allocation!r}")
    if isinstance(method_of(recipe), PruningMethod):
        require_pruner(recipe.method)
        if recipe.pattern is not None:
            raise ParedError(f"a search needs a sparsity ({called('sparsity', '0.7')}); pattern {recipe.pattern} "
                             "leaves no zeros to spread")  # fmt: skip
    spec = resolve(recipe)
    if isinstance(spec, ExpertSpec):
        raise ParedError(f"a search finds ranks or zeros, got structures experts; take {called('structures', 'ranks')}")
    if isinstance(spec, LowRankSpec):
        if recipe.structures == "auto" and spec.structures == "mixed":  # by itself; a program finds ranks
            spec = resolve_low_rank(recipe.model_copy(update={"structures": "ranks"}))
        require_rankable(spec)
    if isinstance(spec.config, Wanda) and spec.config.variant:
        raise ParedError("Wanda's variant chooses zeros row by row from all scores; search without it")
    return spec


def require_place(out: Path, inputs: Iterable[Path] = ()) -> None:
    """Check that a folder is new, empty, or that of a search, and apart from what is read.

    Raises:
        ParedError: it is something else.
    """
    require_short(out)
    require_apart(out, inputs)
    if out.exists() and not out.is_dir():
        raise ParedError(f"output {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / JOURNAL).exists():
        raise ParedError(f"output folder {out} holds something other than a search; name another")


def pools_on(ray: str | None) -> Pools | None:
    """Return what makes the measuring processes.

    Args:
        ray: the address of a Ray cluster, ``auto`` or ``local``; none measures on this machine.

    Raises:
        ParedError: Ray is not installed.
    """
    if ray is None:
        return None
    from pared.search.ray_pool import on_ray

    return on_ray(ray)


@contextmanager
def local(measure: Measure, workers: int) -> Iterator[Pool]:
    """Measure in this process, or in several on this machine."""
    with InProcess(measure) if workers == 1 else Processes(measure, workers) as pool:
        yield pool


def _windows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, config: SearchConfig
) -> tuple[Windows, Windows]:
    """Cut what is calibrated on, and the whole search split."""
    asked = recipe.calibration
    calibration, text = search_texts(asked.text, tokenizer)
    length = Length.given(config.length, LENGTH).within(model.config)
    own = Length.of(asked).within(model.config) if recipe.preset or "length" in asked.model_fields_set else length
    windows = cut(calibration, tokenizer, own, asked.samples, asked.sampling, asked.seed)
    full = cut(text, tokenizer, length, None)
    require_fits(model.config, windows)
    require_fits(model.config, full)
    least = max(config.windows, config.final_windows or 1)
    if len(full.tokens) < least:
        raise ParedError(
            f"text {text.name!r} has {len(full.tokens)} windows of {full.tokens.shape[1]} tokens, fewer than the "
            f"{least} requested; take fewer or shorter windows, or a longer text"
        )
    return windows, full


def _settings(
    model: PreTrainedModel, spec: CompressionSpec, config: SearchConfig, windows: Windows, full: Windows
) -> dict[str, Any]:
    """Return everything that results depend on."""
    recipe, prunes = spec.recipe, isinstance(spec, SparseSpec)
    budget = {"sparsity": recipe.sparsity} if prunes else {"keep": recipe.keep, "storage": recipe.storage}
    settings = {
        "pared": version("pared"),
        "model": recipe.model or type(model).__name__,
        "weights": model_digest(model),
        "dtype": str(model.dtype),
        "device": recipe.device,
        "method": recipe.method,
        **budget,
        "options": spec.config.model_dump(),
        "skip": list(recipe.skip),
        **({"blocks": recipe.blocks} if recipe.blocks else {}),
        **{f"calibration {name}": value for name, value in recipe.calibration.model_dump().items()},
        "calibration length": windows.tokens.shape[1],
        "calibration digest": windows.digest,
        "score_tokens": SCORE_TOKENS if prunes else 1,  # programs read numbers of so many tokens
        "search digest": full.digest,
        **{("search seed" if name == "seed" else name): getattr(config, name) for name in SETTINGS},
    }
    private = told_apart(inputs_of(recipe.model_dump()))  # the folder may be published
    told: dict[str, Any] = without_places(settings, private)
    return told


def _references(
    measure: Measure, trial: Trial, journal: SearchJournal, name: str, progress: Progress
) -> dict[str, float]:
    """Measure the dense model and the uniform allocation, to compare with; on the full split if their name ends so."""
    steps, split = ([measure.full], "the full split") if name else (measure.steps, "the windows of the search")
    found: dict[str, float] = {}
    for kind in ("dense", "uniform"):
        measured = journal.get(kind + name, kind)
        if measured is None:
            windows = sum(len(step.tokens) for step in steps)
            placed: AbstractContextManager[None]
            placed = nullcontext() if kind == "dense" else trial.installed(trial.uniform())
            with (
                placed,
                progress.stage(f"{kind} on {split}", windows, "window") as advance,
            ):
                measured = measure.evaluate_current(steps, on_window=advance)
        value = measured.values[-1] if measured.values else math.inf
        if kind == "dense" and not math.isfinite(value):
            raise ParedError(f"the dense model has no perplexity on the search split: {measured.why or 'infinite'}")
        journal.put(kind + name, kind, measured)
        found[kind + name] = value
    return found


def _finals(
    results: list[Result], config: SearchConfig, pool: Pool, journal: SearchJournal, progress: Progress
) -> list[tuple[Result, float]]:
    """Measure the best on the full split; return them with what was found, in the order of the search."""
    best = sorted((one for one in results if one.complete), key=lambda one: one.rank)[: config.top]
    names = [f"final {one.candidate.number}" for one in best]
    found = [journal.get(name, str(one.candidate.program)) for name, one in zip(names, best, strict=True)]
    missing = {one.candidate.number: place for place, one in enumerate(best) if found[place] is None}
    for place in missing.values():
        pool.submit(best[place].candidate, final=True)
    written = 0
    with progress.stage("the best on the full split", len(best), "candidate") as advance:
        while written < len(best):
            measured = found[written]
            if measured is None:
                number, measured = pool.next()
                found[missing[number]] = measured
                continue
            journal.put(names[written], str(best[written].candidate.program), measured)
            advance(recalled=best[written].candidate.number not in missing)
            written += 1
    return [(one, measured.values[-1] if measured and measured.values else math.inf)
            for one, measured in zip(best, found, strict=True)]  # fmt: skip
