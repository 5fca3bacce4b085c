"""A compression: a model by name or from memory, compressed block by block, and the folder that is made of it."""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.arguments import asked_from, kind_of, name_from, recipe_from, require_model, require_tokenizer
from pared.calibration import saved_blocks
from pared.calibration.spool import ActivationMemory
from pared.checkpoint import verify
from pared.checkpoint.seal import published_recipe
from pared.data.handed import text_of
from pared.data.texts import Text, handed_over
from pared.data.windows import Windows
from pared.engine.checks import require_finite_weights
from pared.engine.early import require_job, require_possible, require_suited, require_texts
from pared.engine.early import require_model as require_named_model
from pared.engine.run_state import CompressionRun, spent
from pared.engine.spec import CompressionSpec
from pared.entrypoints.in_place import Collected, compress_in_place, require_compressible, where_it_is
from pared.entrypoints.measure import PerplexityOn
from pared.entrypoints.result import Before, Compressed, Outcome, publish
from pared.entrypoints.resume import Resumable, fingerprint_of, measured_once, published
from pared.entrypoints.streamed import StreamedModel, reading_of
from pared.entrypoints.texts_read import TextsRead, read_texts
from pared.environment import device_of, versions
from pared.errors import ParedError
from pared.io.apart import require_apart
from pared.io.files import path_of
from pared.memory import format_size
from pared.models.architecture import is_causal
from pared.models.loaded import name_of
from pared.models.source import ModelSource, find_model
from pared.models.trust import trusting
from pared.notebook import watcher_of
from pared.processes import ALONE, Processes, launched
from pared.progress import Progress, Silent, Stopwatch
from pared.schema.manifest import Manifest
from pared.schema.options import Options
from pared.schema.presets import note_of
from pared.schema.recipe import Recipe
from pared.structure import find_anatomy
from pared.structure.finite import require_finite

if TYPE_CHECKING:
    from datasets import Dataset


def compress(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    recipe: Recipe | Mapping[str, Any] | None = None,
    progress: Progress | bool | None = None,
    windows: Windows | None = None,
    collected: Collected | str | Path | None = None,
    *,
    data: "str | Path | Sequence[str] | Dataset | Windows | None" = None,
    method: str | Options | None = None,
    keep: float | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    trust_remote_code: bool = False,
    **fields: Any,
) -> Compressed:
    """Compress a model, block by block.

    A loaded model is changed in place. Finished blocks replace dense ones during the work: besides the model there
    is one block in the computing dtype, the hidden states of the calibration windows, and the statistics of that block
    (behind a compressed prefix with a dense path two blocks and three sets of hidden states; for gradients those of all
    blocks). If it is interrupted the model still works and can be saved, with some blocks compressed: reload it to
    start again.

    Args:
        model: a dense causal language model or encoder in a floating point dtype, its weights in memory; or the name of
            one, which is loaded: ``embedded:smollm2-135m``, a Hub id, a folder, a ``.gguf`` file.
        tokenizer: of the model; that of a model by name is loaded with it.
        recipe: method, budget and calibration, a mapping of them, or none for the defaults. Its ``model`` and ``out``
            are not read.
        progress: what reports progress, or whether bars are shown; by default in a notebook only.
        windows: calibration tokens already cut, in place of a text; the same as ``data``.
        collected: the folder of statistics of these tokens that :func:`pared.collect_statistics` wrote, in place of a
            pass over them.
        data: what is calibrated on: a text by name, a list of strings, a ``datasets.Dataset`` with a ``text`` (or
            ``messages``) in every row, or windows. Texts are joined by blank lines, tokenised, and cut as the
            recipe's calibration says.
        method: of the recipe, or its typed options; as are the others below, which are laid over it.
        keep: fraction of the target modules' parameters that stays; 0.8 removes 20%.
        sparsity: fraction of zeros, for methods that prune.
        pattern: ``N:M``, for methods that prune.
        trust_remote_code: whether code that lies beside the weights of a model by name may run.
        **fields: further fields of :class:`pared.Recipe`; of its calibration also ``samples``, ``length``, ``seed``
            and ``sampling``.

    Returns:
        The compressed model and its record, whose ``save`` writes the folder that the command line writes. The
        perplexity of the dense model is measured on the way, as the command line does, of a model by name, and of a
        loaded one where ``evaluation`` is given, other than by a preset; ``evaluation=None`` measures nothing.

    Raises:
        ParedError: anything in the model, the recipe or the text that does not work; nothing is changed unless the
            message says so.

    Example:
        >>> result = pared.compress("embedded:smollm2-135m", keep=0.8, samples=64, length=1024)  # doctest: +SKIP
        >>> result.save("smaller")  # doctest: +SKIP
    """
    function = "pared.compress"
    asked = {"method": method, "keep": keep, "sparsity": sparsity, "pattern": pattern}
    fields |= {name: value for name, value in asked.items() if value is not None}
    by_name = isinstance(model, (str, Path))
    if not by_name:
        require_model(model, function)
    watcher, text = watcher_of(progress, function), None
    if isinstance(collected, (str, Path)):
        collected = partial(saved_blocks, path_of(collected))
    elif collected is not None and not callable(collected):
        raise ParedError(f"{function} takes the folder of collected statistics, got {kind_of(collected)}")
    if data is not None:
        windows, text, fields = _calibrated_on(data, tokenizer if not by_name else model, windows, fields, function)
    asked_for = recipe_from(recipe, fields, function)
    if windows is not None and not isinstance(windows, Windows):
        raise ParedError(f"pared.compress takes windows as pared.data.cut makes them, got a "
                         f"{type(windows).__name__}; give a list of strings as data instead")  # fmt: skip
    with trusting(trust_remote_code), handed_over(text):
        if isinstance(model, (str, Path)):
            asked_for = asked_for.model_copy(update={"model": name_from(model, function)})
            spec = require_possible(asked_for)
            require_texts(asked_for)
            source = require_named_model(spec)
            if tokenizer is not None:
                require_tokenizer(tokenizer, function)
            return _by_name(source, spec, watcher, tokenizer=tokenizer, windows=windows, collected=collected)
        measured = "evaluation" in fields or (asked_for.preset is None and "evaluation" in asked_for.model_fields_set)
        return _in_memory(model, tokenizer, asked_for, measured, watcher, windows, collected)


def run(
    recipe: Recipe,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
    trust_remote_code: bool = False,
    resume: bool | None = None,
) -> Outcome:
    """Carry out a recipe from model name to folder.

    What can be refused is refused before the first weight is read. The folder is made beside its place, reloaded,
    compared with the model in memory, evaluated, and only then renamed. Every block is kept in a hidden folder beside
    the output as it is finished, which goes when the output is there.

    Where ``torchrun`` or ``accelerate launch`` has started several processes, each calls this with the same arguments:
    they share the windows and the sites, and the first writes and measures. A run that was killed resumes with any
    number of them.

    Args:
        recipe: with ``model`` and ``out``.
        overwrite: whether an output folder that is there may be replaced.
        progress: what reports progress, or whether bars are shown; by default in a notebook only.
        trust_remote_code: whether code that lies beside the model's weights may run.
        resume: True resumes from the last block that a killed run of the very same recipe, model, data and versions
            finished, to the same bytes; False removes what it finished, and starts over. None, the default, is refused
            where there is any.

    Raises:
        ParedError: anything wrong; nothing was written or overwritten, and what is finished is kept.
    """
    with trusting(trust_remote_code):
        asked, watcher = asked_from(Recipe, recipe, "pared.run"), watcher_of(progress, "pared.run")
        with launched(asked.device) as processes:
            watcher = watcher if processes.is_first else Silent()
            if resume is not False and (there := processes.first(lambda: _published(asked))) is not None:
                return replace(there, is_first=processes.is_first)
            spec, source, out = require_job(asked, overwrite, bool(resume))
            state = Resumable.beside(out, resume, watcher) if processes.is_first else nullcontext()
            with state as resumable:
                result = _by_name(source, spec, watcher, out, resumable=resumable, processes=processes)
                saver, streamed, result.streamed = result.saver(last=True), result.streamed, None
                del result.model  # there may be room for only one of it and what is reloaded
                with nullcontext() if streamed is None else streamed.handed_over():
                    sealed = None if resumable is None else resumable.publishing
                    outcome = processes.first(lambda: publish(result, saver, out, overwrite, watcher, sealed))
            return replace(outcome, is_first=processes.is_first)


def _published(recipe: Recipe) -> Outcome | None:
    """Return the outcome of a run that was killed after its output took its place; its state is removed."""
    out, spec = path_of(recipe.out or ""), require_possible(recipe)
    if recipe.out is None or not published(spec, lambda: require_named_model(spec), out):
        return None
    return Outcome(out, Manifest.read(out))


def reusable(recipe: Recipe) -> Outcome | None:
    """Return the outcome in a recipe's output folder if this very recipe and these versions made it and it is whole."""
    folder = path_of(recipe.out or "")
    try:
        manifest = Manifest.read(folder)
        if manifest.recipe != published_recipe(recipe) or manifest.versions != versions():
            return None
        verify(folder)
    except ParedError:
        return None
    return Outcome(folder, manifest)


def _calibrated_on(
    data: Any, tokenizer: Any, windows: Windows | None, fields: dict[str, Any], function: str
) -> tuple[Windows | None, Text | None, dict[str, Any]]:
    """Return what ``data`` stands for: windows, a text that was passed in, or the name of one among the fields."""
    if windows is not None:
        raise ParedError(f"{function} takes data or windows, got both; leave one of them out")
    if isinstance(data, Windows):
        return data, None, fields
    if isinstance(data, (str, Path)):
        return None, None, {**fields, "data": data}
    if isinstance(tokenizer, (str, Path)):  # of a model by name
        tokenizer = None
    text = text_of(data, tokenizer, function)
    return None, text, {**fields, "data": text.name}


def _by_name(
    source: ModelSource,
    spec: CompressionSpec,
    progress: Progress,
    out: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    windows: Windows | None = None,
    collected: Collected | None = None,
    resumable: Resumable | None = None,
    processes: Processes = ALONE,
) -> Compressed:
    """Load a model, measure it and compress it; what can be refused is refused before weights are read.

    Args:
        source: of the model.
        spec: of the recipe.
        progress: what reports progress.
        out: where it will be written, if that is known.
        tokenizer: in place of the model's own.
        windows: in place of the recipe's text.
        collected: as for :func:`compress`.
        resumable: opens the state that outlives a killed process.
        processes: that compress together; the first alone writes and measures.
    """
    recipe = spec.recipe
    device_of(recipe.device)
    config = source.config()
    require_suited(config, spec, source.name)
    if out is not None:
        require_apart(out, [Path(source.location)])  # of an embedded model or a .gguf file in the cache
    watch, causal = Stopwatch(), is_causal(config.architectures or [])
    if note := note_of(recipe):
        progress.note(note)
    with watch("load"):
        tokenizer = tokenizer or source.tokenizer()
        texts = read_texts(spec, config, causal, tokenizer, progress, windows)
        if source.is_dequantised:
            progress.note(f"{source.name} is {source.origin}; sizes are compared with the dequantised weights")
        resumed = processes.agreed(None if resumable is None else resumable.streamed)
        reading = reading_of(source, spec, texts, progress, out, resumed)
        chosen = processes.agreed(reading.streamed)
        if source.is_multimodal and not source.processor_files():
            progress.note(f"{source.name} is a vision-language model without files of its image processor: "
                          "the folder will have none either")  # fmt: skip
        streamed, memory = None, ActivationMemory(reading.activation_memory, out)
        if chosen:
            streamed = StreamedModel(source, recipe, memory, out)
            model = streamed.store.model
        else:
            model = source.load(recipe.dtype).to(device_of(recipe.device))
            # Before perplexity, which could only say "nan".
            require_finite_weights(model, find_anatomy(model, recipe.blocks))
            require_finite(model, source.name)
    measure = _measure(texts, tokenizer, recipe, watch, progress, memory)
    before = Before(source.name, source.origin, source, measure)
    state = None if resumable is None else resumable.open(fingerprint_of(spec, source, texts.calibration, chosen))
    if state is not None and streamed is not None:
        streamed.store.folder = state.folder
    with memory if streamed is None else nullcontext():  # that of a streamed model is needed until it is saved
        found = _compressed(
            model, tokenizer, spec, progress, texts, collected, before, watch, state, streamed, memory, processes
        )
    found.memory_bound_bytes = reading.memory_bound
    return found


def _in_memory(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    measured: bool,
    progress: Progress,
    windows: Windows | None,
    collected: Collected | None,
) -> Compressed:
    """Compress a loaded model, and measure it before if that is wanted."""
    name = name_of(model)
    source, watch = _lies_beside(name), Stopwatch()
    name = recipe.model or name or type(model).__name__
    texts, measure, asked = TextsRead(windows), None, recipe.device
    recipe = where_it_is(recipe, model)
    spec = require_compressible(model, tokenizer, recipe, windows)
    if windows is None and (note := note_of(recipe)):
        progress.note(note)
    if measured and recipe.evaluation is not None:
        require_tokenizer(tokenizer, "pared.compress")
        assert tokenizer is not None
        causal = is_causal([type(model).__name__])
        with watch("load"):
            texts = read_texts(spec, model.config, causal, tokenizer, progress, windows)
        measure = _measure(texts, tokenizer, recipe, watch, progress)
    before = Before(name, "loaded in Python", source, measure)
    made = _compressed(model, tokenizer, spec, progress, texts, collected, before, watch)
    made.recipe = made.recipe.model_copy(update={"device": asked})
    return made


def _lies_beside(name: str) -> ModelSource | None:
    """Return where a loaded model says it was loaded from, if that is on this machine."""
    with suppress(ParedError):
        source = find_model(name) if name else None
        if source is not None and os.path.exists(source.place):
            return source
    return None


def _compressed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    spec: CompressionSpec,
    progress: Progress,
    texts: TextsRead,
    collected: Collected | None,
    before: Before,
    watch: Stopwatch,
    state: CompressionRun | None = None,
    streamed: StreamedModel | None = None,
    memory: ActivationMemory | None = None,
    processes: Processes = ALONE,
) -> Compressed:
    """Measure the dense model where that is asked for, and compress it."""
    store = None if streamed is None else streamed.store
    if state is not None:
        state.time_by(watch)
    if before.measure is not None:
        measure = before.measure
        value = processes.first(lambda: measured_once(measure, model, state, store))
        before = replace(before, perplexity=value, learned_from=texts.learned_from)
    made = compress_in_place(
        model,
        tokenizer,
        spec,
        progress,
        texts.calibration,
        collected,
        state=state,
        store=store,
        memory=memory,
        processes=processes,
    )
    if memory is not None and memory.spilled:
        progress.note(f"up to {format_size(memory.spilled)} of hidden states lay on the disk")
    earlier = () if state is None else state.earlier
    seconds, peak = spent(earlier, {**watch.seconds, **made.seconds})
    return Compressed(
        model=made.model,
        tokenizer=tokenizer,
        recipe=spec.recipe,
        settled={**spec.describe(), "device": str(device_of(spec.recipe.device))},
        plan=made.plan,
        before=before,
        sharing=made.sharing,
        damping=made.damping,
        shrinkage=made.shrinkage,
        fallbacks=made.fallbacks,
        refined=made.refined,
        calibration=made.calibration,
        seconds=seconds,
        resumed=len(earlier),
        earlier_peak_bytes=peak,
        streamed=streamed,
    )


def _measure(
    texts: TextsRead,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    watch: Stopwatch,
    progress: Progress,
    memory: ActivationMemory | None = None,
) -> PerplexityOn | None:
    """Return what perplexity is measured by, none for nothing."""
    if texts.evaluation is None or recipe.evaluation is None:
        return None
    return PerplexityOn(
        texts.evaluation, tokenizer, recipe.evaluation.bos, device_of(recipe.device), watch, progress, memory
    )
