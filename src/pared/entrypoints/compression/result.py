"""What a compression hands back to Python: the model, how it came about, and the way to a folder."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.arguments import folder_from
from pared.checkpoint.elastic import write_elastic
from pared.checkpoint.format import FORMAT_VERSION
from pared.engine.elastic import ElasticFactors
from pared.engine.result import Findings
from pared.entrypoints.compression.streamed import StreamedModel, StreamedReload, StreamedSaver
from pared.entrypoints.evaluation.measure import PerplexityOn
from pared.entrypoints.publish import Publication, Reread, ResidentSaver, Saver, reload_resident
from pared.environment import machine, peak_memory_bytes, versions
from pared.io.inputs import inputs_of
from pared.models.published import published_facts
from pared.models.source import ModelSource
from pared.notebook import watcher_of
from pared.progress import Progress, Stopwatch
from pared.report.plan_map import draw_plan
from pared.report.results import compressed_table
from pared.schema.manifest import Fingerprint, Manifest, WindowsRead
from pared.schema.plan import Plan
from pared.schema.presets import record_of
from pared.schema.recipe import Recipe
from pared.tables import Row, Shown, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Outcome(Shown):
    """A compressed folder; shown as the table that the command line prints.

    Attributes:
        folder: where it lies.
        manifest: its record.
        is_first: whether this is the process that tells, of several that compressed together.
    """

    folder: Path
    manifest: Manifest
    is_first: bool = True

    def table(self) -> Table:
        """Return sizes, perplexity, time and memory."""
        return compressed_table(self.manifest, str(self.folder))


@dataclass(frozen=True)
class Before:
    """What is known of the dense model that was compressed.

    Attributes:
        name: as the user gave it, or what it says it was loaded from.
        origin: what that is, in words.
        source: where it was loaded from by pared, or lies beside; none for a model that was made in memory.
        measure: what perplexity is measured on; none if it is not.
        perplexity: of the dense model on that.
        learned_from: the share of that text that was calibrated on.
    """

    name: str
    origin: str
    source: ModelSource | None
    measure: PerplexityOn | None = None
    perplexity: float | None = None
    learned_from: float = 0.0


@dataclass(repr=False)
class Compressed(Findings, Shown):
    """A compressed model and how it came about; shown as the table that the command line prints.

    What it found besides its plan are the attributes of :class:`~pared.engine.result.Findings`; ``seconds`` are
    those of all processes, where this one resumed what others began.

    Attributes:
        model: the model, changed in place; plain ``save_pretrained`` writes a folder that loads again. Where it is read
            block by block (see ``streamed``) its blocks are on the meta device, and only ``save`` writes it.
        tokenizer: of it; none where none was needed.
        recipe: what was asked for.
        settled: what ``auto`` stood for in it.
        plan: what was decided, with what calibration taught.
        before: the dense model, and its perplexity if that was measured.
        resumed: how many processes were at it before this one.
        earlier_peak_bytes: the highest memory that one of those took.
        memory_bound_bytes: what a streamed compression is to keep to; 0 for none.
        saved: the folder it was last saved to, with its manifest; none before.
        streamed: the model's blocks, where they are not in memory: it is called with ``streamed.store.running()``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    recipe: Recipe
    settled: Mapping[str, Any]
    plan: Plan
    before: Before
    saved: Outcome | None = None
    streamed: StreamedModel | None = None
    resumed: int = 0
    earlier_peak_bytes: int = 0
    memory_bound_bytes: int = 0

    def save(self, folder: str | Path, overwrite: bool = False, progress: Progress | bool | None = None) -> Outcome:
        """Write the folder that the command line writes: reloaded, compared, measured, with its manifest and card.

        The reloaded model stands beside this one in memory while it is compared.

        Args:
            folder: to make; ``~`` is written out.
            overwrite: whether a folder there that pared wrote may be replaced.
            progress: what reports progress, or whether bars are shown; by default in a notebook only.

        Returns:
            The folder and its manifest. Its perplexity is that of the reloaded model, where that of the dense one was
            measured too (see :func:`pared.compress`).

        Raises:
            ParedError: the place is taken, the disk is full, or the reloaded model does not answer as this one;
                nothing was written or replaced.

        Example:
            >>> result = pared.compress("embedded:smollm2-135m", keep=0.8)  # doctest: +SKIP
            >>> result.save("smaller").manifest.perplexity_after  # doctest: +SKIP
        """
        out = folder_from(folder, "Compressed.save")
        return publish(self, self.saver(), out, overwrite, watcher_of(progress, "Compressed.save"))

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw what stays of every layer; see :func:`pared.report.plan_map.draw_plan`."""
        return draw_plan(self.plan, path)

    def saver(self, last: bool = False) -> ResidentSaver | StreamedSaver:
        """Return what writes the model; ``last`` if nothing of it is used afterwards."""
        if self.streamed is not None:
            return StreamedSaver(self.streamed, self.tokenizer, self.before.source, last)
        return ResidentSaver(self.model, self.tokenizer, self.before.source)

    def table(self) -> Table:
        """Return sizes, and what was measured so far: all of it once it was saved."""
        if self.saved is not None:
            return self.saved.table()
        rows = [Row("method", "dense", self.recipe.method, self.recipe.budget), *self.plan.sizes()]
        if self.before.perplexity is not None:
            rows.append(Row("perplexity", f"{self.before.perplexity:,.2f}", "", ""))
        rows.append(Row("seconds", "", f"{sum(self.seconds.values()):,.1f}", ""))
        lines = [*([self.plan.missed] if self.plan.missed else []), "not saved yet: save(FOLDER) writes and checks it"]
        return Table.comparison(self.before.name, rows, lines)


def publish(
    result: Compressed,
    saver: ResidentSaver | StreamedSaver,
    out: Path,
    overwrite: bool,
    progress: Progress,
    sealed: Callable[[Path], None] | None = None,
) -> Outcome:
    """Write the folder of a compression.

    Args:
        result: of it.
        saver: writes its model; what it releases needs no memory while the folder is reloaded.
        out: the folder to make.
        overwrite: whether a folder there that pared wrote may be replaced.
        progress: what reports progress.
        sealed: as of :class:`Publication`.

    Raises:
        ParedError: as :meth:`Compressed.save`.
    """
    watch, before, asked = Stopwatch(), result.before, _named(result, out)
    streamed = StreamedReload() if isinstance(saver, StreamedSaver) else None
    measure = None if before.measure is None else replace(before.measure, watch=watch, progress=progress)
    publication = Publication(
        out,
        before.name,
        overwrite,
        (saver.needed if isinstance(saver, StreamedSaver) else result.plan.after.bytes_on_disk)
        + (0 if result.elastic is None else result.elastic.record.bytes),
        inputs=inputs_of(asked.model_dump()),
        beside=[] if before.source is None else [Path(before.source.location)],
        watch=watch,
        sealed=sealed,
    )
    manifest = publication.publish(
        saver if result.elastic is None else _with_factors(saver, result.elastic),
        lambda reread: _manifest(result, reread, asked, watch),
        None if measure is None else lambda model: measure.after(model, streamed.store if streamed else None),
        streamed or reload_resident,
    )
    result.saved = Outcome(out, manifest)
    return result.saved


def _with_factors(saver: Saver, elastic: ElasticFactors) -> Saver:
    """Return what writes a model, and beside it what smaller sizes are made of."""

    def write(folder: Path) -> Fingerprint:
        fingerprint = saver(folder)
        write_elastic(folder, elastic.tensors)
        return fingerprint

    return write


def _manifest(result: Compressed, reread: Reread, asked: Recipe, watch: Stopwatch) -> Manifest:
    done, before = _with_lengths(result, asked), result.before
    return Manifest(
        format_version=FORMAT_VERSION,
        model={
            "name": before.name,
            "origin": before.origin,
            "architecture": type(reread.model).__name__,
            **published_facts(before.source),
        },
        recipe=done,
        preset=record_of(done),
        settled=dict(result.settled),
        plan=result.plan,
        damping=result.damping,
        shrinkage=result.shrinkage,
        fallbacks=result.fallbacks,
        sharing=[asdict(one) for one in result.sharing],
        refined=result.refined,
        elastic=None if result.elastic is None else result.elastic.record,
        calibration=cast("WindowsRead | None", result.calibration),
        too_few=result.too_few,
        evaluation=None if before.measure is None else before.measure.record(before.learned_from),
        perplexity_before=before.perplexity,
        perplexity_after=reread.perplexity,
        seconds={**result.seconds, **watch.seconds},
        peak_memory_bytes=max(peak_memory_bytes(), result.earlier_peak_bytes),
        memory_bound_bytes=result.memory_bound_bytes,
        resumed=result.resumed,
        bytes_before=result.plan.before.bytes_on_disk,
        versions=versions(),
        machine=machine(),
        **reread.recorded,
    )


def _named(result: Compressed, out: Path) -> Recipe:
    """Return the recipe with the names that a model in memory and a call leave open, as the command line has it."""
    update: dict[str, object] = {"out": str(out)}
    if result.recipe.model is None and result.before.source is not None:
        update["model"] = result.before.source.name
    return result.recipe.model_copy(update=update)


def _with_lengths(result: Compressed, asked: Recipe) -> Recipe:
    """Return the recipe with the lengths that defaults came to on this model and text, for the record."""
    update: dict[str, object] = {}
    read, measure = result.calibration, result.before.measure
    if read is not None and "labels" not in read:
        update["calibration"] = asked.calibration.model_copy(update={"length": read["length"]})
    if measure is not None and asked.evaluation is not None:
        update["evaluation"] = asked.evaluation.model_copy(update={"length": measure.windows.tokens.shape[1]})
    return asked.model_copy(update=update)
