"""Loading a model, measuring it and compressing it: what a call in Python and a recipe have in common."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.calibration.spool import ActivationMemory
from pared.data.windows import Windows
from pared.engine.checks.early import require_suited
from pared.engine.checks.elastic import require_elastic
from pared.engine.checks.weights import require_finite_weights
from pared.engine.result import found_by
from pared.engine.spec import CompressionSpec, LowRankSpec
from pared.engine.state.run_state import CompressionRun, spent
from pared.entrypoints.compression.in_place import Collected, compress_in_place
from pared.entrypoints.compression.result import Before, Compressed
from pared.entrypoints.compression.resume import Resumable, fingerprint_of, measured_once
from pared.entrypoints.compression.streamed import StreamedModel, reading_of
from pared.entrypoints.compression.texts_read import TextsRead, read_texts
from pared.entrypoints.evaluation.measure import PerplexityOn
from pared.environment import device_of
from pared.io.apart import require_apart
from pared.memory import format_size
from pared.models.architecture import is_causal
from pared.models.source import ModelSource
from pared.processes import ALONE, Processes
from pared.progress import Progress, Stopwatch
from pared.schema.presets import note_of
from pared.schema.recipe import Recipe
from pared.structure import find_anatomy
from pared.structure.finite import require_finite


def compress_by_name(
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
        collected: as for :func:`pared.compress`.
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
        if isinstance(spec, LowRankSpec) and spec.elastic:
            require_elastic((), chosen, processes.count)  # before weights are read
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
    measure = measure_of(texts, tokenizer, recipe, watch, progress, memory)
    before = Before(source.name, source.origin, source, measure)
    state = None if resumable is None else resumable.open(fingerprint_of(spec, source, texts.calibration, chosen))
    if state is not None and streamed is not None:
        streamed.store.folder = state.folder
    with memory if streamed is None else nullcontext():  # that of a streamed model is needed until it is saved
        found = compressed(
            model, tokenizer, spec, progress, texts, collected, before, watch, state, streamed, memory, processes
        )
    found.memory_bound_bytes = reading.memory_bound
    return found


def compressed(
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
        **{**found_by(made), "seconds": seconds},
        resumed=len(earlier),
        earlier_peak_bytes=peak,
        streamed=streamed,
    )


def measure_of(
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
