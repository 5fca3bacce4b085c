"""A whole job: a model by name, compressed, checked by reloading, evaluated, in a folder that appears whole."""

import gc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.arguments import asked_from
from pared.checkpoint import save, take_fingerprint, verify
from pared.checkpoint.finite import require_finite
from pared.checkpoint.format import FORMAT_VERSION
from pared.checkpoint.seal import published_recipe, seal
from pared.checkpoint.self_check import reloaded, written
from pared.data.evaluated import evaluation_windows
from pared.data.overlap import overlap
from pared.data.texts import learned_part
from pared.data.windows import Windows, require_fits
from pared.engine.allocate import plan_of
from pared.engine.checks import require_finite_weights
from pared.engine.compress import compress
from pared.engine.early import require_job, require_suited
from pared.engine.spec import calibrates, evaluated_text, settled
from pared.engine.windows import calibration_windows
from pared.environment import device_of, machine, peak_memory_bytes, versions
from pared.errors import ParedError, TextTooShortError
from pared.evaluation import perplexity
from pared.io.apart import require_apart
from pared.io.files import path_of
from pared.io.inputs import inputs_of
from pared.io.output_dir import require_space, staged
from pared.models.architecture import is_causal
from pared.models.source import ModelSource
from pared.models.trust import trusting
from pared.progress import Progress, Silent, Stopwatch
from pared.report.card import model_card
from pared.report.table import WORTH_SAYING
from pared.schema.manifest import Manifest, Measured, WindowsRead
from pared.schema.presets import note_of, record_of
from pared.schema.recipe import Recipe
from pared.structure import find_anatomy


@dataclass(frozen=True)
class Outcome:
    """A finished job: the folder and its manifest."""

    folder: Path
    manifest: Manifest


def run(
    recipe: Recipe, overwrite: bool = False, progress: Progress | None = None, trust_remote_code: bool = False
) -> Outcome:
    """Carry out a recipe from model name to folder.

    What can be refused is refused before the first weight is read. The folder is made beside its place, reloaded,
    compared with the model in memory, evaluated, and only then renamed.

    Args:
        recipe: with ``model`` and ``out``.
        overwrite: whether an output folder that is there may be replaced.
        progress: who watches; nobody by default.
        trust_remote_code: whether code that lies beside the model's weights may run.

    Raises:
        ParedError: anything wrong; nothing was written or overwritten.
    """
    with trusting(trust_remote_code):
        return _run(asked_from(Recipe, recipe, "pared.run"), overwrite, progress or Silent())


def _run(recipe: Recipe, overwrite: bool, progress: Progress) -> Outcome:
    watch = Stopwatch()
    source, out = _checked(recipe, overwrite)
    if note := note_of(recipe):
        progress.note(note)
    with watch("load"):
        tokenizer = source.tokenizer()
        calibration = _calibration_windows(recipe, source, tokenizer)
        windows = _evaluation_windows(recipe, source, tokenizer, calibration, progress)
        seen = _overlap(windows, calibration, progress)
        if "dequantised" in source.origin:
            progress.note(f"{source.name} is {source.origin}; sizes are compared with the dequantised weights")
        planned = plan_of(source.skeleton(), recipe, source.weight_bytes(recipe.dtype))
        require_space(out, planned.after.bytes_on_disk)
        if source.sees and not source.processor_files():
            progress.note(f"{source.name} sees images, and no files of its image processor were found: the folder will "
                          "have none either")  # fmt: skip
        model = source.load(recipe.dtype).to(recipe.device)
        require_finite_weights(
            model, find_anatomy(model, recipe.blocks)
        )  # before perplexity, which could only say "nan"
        require_finite(model, source.name)
    before = _measure(model, tokenizer, windows, recipe, "before", watch, progress)
    compressed = compress(model, tokenizer, recipe, progress, calibration)
    read = [*inputs_of(recipe.model_dump()), Path(source.location)]
    with staged(out, overwrite, needed=compressed.plan.after.bytes_on_disk, inputs=read) as staging:
        with watch("save"):
            fingerprint = take_fingerprint(model)
            save(model, tokenizer, staging, source)
            bytes_on_disk = written(staging, source.name)
        # The reloaded model is measured, not the one in memory; there is room for only one of them.
        compressed.model = model = None
        gc.collect()
        with watch("verify"):
            model, difference = reloaded(staging, fingerprint, source.name)
            model = model.to(recipe.device)
        after = _measure(model, tokenizer, windows, recipe, "after", watch, progress)
        done = _with_lengths(recipe, calibration, windows)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            model={"name": source.name, "origin": source.origin, "architecture": type(model).__name__},
            recipe=done,
            preset=record_of(done),
            settled=settled(recipe),
            plan=compressed.plan,
            damping=compressed.damping,
            fallbacks=compressed.fallbacks,
            sharing=[asdict(one) for one in compressed.sharing],
            calibration=cast("WindowsRead | None", compressed.calibration),
            evaluation=None if windows is None or recipe.evaluation is None
            else cast("Measured", {**windows.describe(), "bos": recipe.evaluation.bos, "learned_from": seen}),
            perplexity_before=before,
            perplexity_after=after,
            seconds={**watch.seconds, **compressed.seconds},
            peak_memory_bytes=peak_memory_bytes(),
            bytes_before=compressed.plan.before.bytes_on_disk,
            bytes_on_disk=bytes_on_disk,
            fingerprint=fingerprint,
            self_check=difference,
            versions=versions(),
            machine=machine(),
        )  # fmt: skip
        manifest = seal(staging, manifest, out.name, inputs_of(recipe.model_dump()), model_card)
    return Outcome(out, manifest)


def _checked(recipe: Recipe, overwrite: bool) -> tuple[ModelSource, Path]:
    """Refuse whatever can be refused without reading weights."""
    source, out = require_job(recipe, overwrite)
    device_of(recipe.device)
    require_suited(source.config(), recipe, source.name)
    require_apart(out, [Path(source.location)])  # of an embedded model or a .gguf file in the cache
    return source, out


def _calibration_windows(recipe: Recipe, source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> Windows | None:
    if not calibrates(recipe):
        return None
    windows = calibration_windows(recipe, tokenizer, source.config(), is_causal(source.config().architectures or []))
    require_fits(source.config(), windows)
    return windows


def _evaluation_windows(
    recipe: Recipe,
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Windows | None,
    progress: Progress,
) -> Windows | None:
    asked = recipe.evaluation
    if asked is None:
        return None
    if not is_causal(source.config().architectures or []):
        progress.note("no perplexity: this architecture is not a causal language model")
        return None
    name = evaluated_text(recipe)
    if (
        asked.text == "auto"
        and calibration is not None
        and calibration.text != learned_part(recipe.calibration.text, name)
    ):
        name = None  # too short to keep a part apart: all of it is calibrated on
    if name is None:
        progress.note(
            f"no perplexity: {recipe.calibration.text!r} has no held-out part; name another text to measure "
            "it on (--eval TEXT)"
        )
        return None
    try:
        windows = evaluation_windows(asked, tokenizer, source.config(), name)
    except TextTooShortError as error:
        if asked.text != "auto" or "length" in asked.model_fields_set:
            raise
        progress.note(f"no perplexity: {error}; name another to measure it on (--eval TEXT)")
        return None
    if windows.stand_in:
        progress.note(f"the text {name!r} ({windows.origin}) only stands in for a real corpus")
    return windows


def _overlap(measured: Windows | None, calibrated: Windows | None, progress: Progress) -> float:
    """Return the share of what is measured on that is calibrated on, and say so if it is more than phrases."""
    if measured is None or calibrated is None:
        return 0.0
    seen = overlap(measured, [calibrated.describe()], [calibrated.tokens])
    if seen >= WORTH_SAYING:
        progress.note(
            f"{seen:.0%} of what perplexity is measured on ({measured.text!r}) is calibrated on ({calibrated.text!r}): "
            "it tells nothing of text the model has not seen; name another with --eval TEXT"
        )
    return seen


def _with_lengths(recipe: Recipe, calibration: Windows | None, windows: Windows | None) -> Recipe:
    """Return the recipe with the lengths that defaults came to on this model and text, for the record."""
    update: dict[str, object] = {}
    if calibration is not None and calibration.labels is None:
        update["calibration"] = recipe.calibration.model_copy(update={"length": calibration.tokens.shape[1]})
    if windows is not None and recipe.evaluation is not None:
        update["evaluation"] = recipe.evaluation.model_copy(update={"length": windows.tokens.shape[1]})
    return recipe.model_copy(update=update)


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Windows | None,
    recipe: Recipe,
    when: str,
    watch: Stopwatch,
    progress: Progress,
) -> float | None:
    if windows is None or recipe.evaluation is None:
        return None
    with (
        watch(f"perplexity {when}"),
        progress.stage(f"perplexity {when}", len(windows.tokens), "window") as advance,
    ):
        return perplexity(model, tokenizer, windows, recipe.evaluation.bos, advance).value


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
