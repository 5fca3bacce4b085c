"""A size cut out of a folder of every size, without data: a folder of its own, or a model in memory."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from pared.arguments import folder_from, name_from
from pared.checkpoint.elastic import StoredFactors
from pared.checkpoint.load import load as load_whole
from pared.checkpoint.load import require_recorded
from pared.checkpoint.save import mark
from pared.checkpoint.verify import require_tensors
from pared.engine.elastic import Cut, cut, install_cut
from pared.engine.spec.nested import NESTED
from pared.entrypoints.compression.result import Outcome
from pared.entrypoints.publish import Publication, Reread, ResidentSaver
from pared.environment import peak_memory_bytes
from pared.errors import ParedError
from pared.io.output_dir import require_free
from pared.models.source import find_model
from pared.models.trust import trusting
from pared.notebook import watcher_of
from pared.progress import Progress, Stopwatch
from pared.schema.elastic import Elastic, require_size
from pared.schema.manifest import Manifest
from pared.schema.plan import Plan
from pared.schema.presets import record_of


def slice(
    folder: str | Path,
    out: str | Path,
    keep: float,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | bool | None = None,
) -> Outcome:
    """Cut a smaller size out of a folder that was compressed with ``elastic=True``.

    No data is read. The allocation decides as it would in a compression to that size, from spectra that the folder
    holds, and the factors are the first of those that are there: at every multiple of 0.01 the outcome is that of a
    compression of its own with storage ``factors``, statistics ``once`` and no refit. Perplexity is not measured.

    Args:
        folder: of every size.
        out: the folder to make.
        keep: the fraction of the target modules' parameters that stays, at most the folder's own.
        overwrite: whether a folder there that pared wrote may be replaced.
        trust_remote_code: whether code that lies in the folder may run.
        progress: what reports progress, or whether bars are shown; by default in a notebook only.

    Returns:
        The new folder and its manifest.

    Raises:
        ParedError: the folder holds one size, is damaged, or holds no such size; the output is taken; or the new folder
            does not answer as the model did in memory. Nothing was written.

    Example:
        >>> pared.slice("elastic", "smaller", keep=0.65).manifest.plan.achieved_keep  # doctest: +SKIP
    """
    function = "pared.slice"
    folder, out, watcher = Path(name_from(folder, function)), folder_from(out, function), watcher_of(progress, function)
    watch = Stopwatch()
    with trusting(trust_remote_code):
        require_free(out, overwrite, [folder])
        manifest = Manifest.read(folder)
        elastic = require_size(manifest.elastic, str(folder), keep)
        require_tensors(folder)
        require_recorded(folder)  # else what is damaged would be listed as whole
        with watch("load"):
            model = load_whole(folder)
        with watch("slice"):
            found = _cut_in_place(model, StoredFactors(folder, elastic), elastic, manifest.plan, keep, watcher)
        source = find_model(str(folder))
        saver = ResidentSaver(model, source.tokenizer(), source)
        del model
        publication = Publication(
            out, str(folder), overwrite, found.plan.after.bytes_on_disk, beside=[folder], watch=watch
        )
        made = publication.publish(saver, lambda reread: _manifest(manifest, found, keep, reread, watch))
    return Outcome(out, made)


def load(
    name: str | Path,
    dtype: str | torch.dtype = "auto",
    check: bool = False,
    trust_remote_code: bool = False,
    keep: float | None = None,
) -> PreTrainedModel:
    """Load a model, dense or compressed, in evaluation mode on the CPU.

    Args:
        name: a folder that pared made, or any name of a model that pared knows.
        dtype: ``auto`` keeps what is stored, bfloat16 for a quantised ``.gguf`` file; else ``float32``,
            ``bfloat16`` or ``float16``.
        check: first, before its configuration or code is read, compare every file of a folder that pared made with
            its recorded SHA-256; a model of the Hub is fetched whole for that, and one that lists none is refused.
        trust_remote_code: whether code that lies beside the weights may run. What pared makes of a model of
            transformers needs none.
        keep: of a folder that was compressed with ``elastic=True``, the fraction of the target modules' parameters
            that stays, cut out as by :func:`pared.slice`; by default its largest size.

    Raises:
        ParedError: not a model, truncated, of a newer format version, NaN or infinity in a weight, or not the files
            that were written; with ``check`` also one that lists no SHA-256 to compare with; with ``keep`` a folder
            of one size, or without such a size.

    Example:
        >>> model = pared.load("elastic", keep=0.65)  # doctest: +SKIP
    """
    if keep is None:
        return load_whole(name, dtype, check, trust_remote_code)
    folder = Path(name_from(name, "pared.load"))
    if not folder.is_dir():
        raise ParedError(f"model {str(folder)!r}: keep needs a folder of every size on this machine; fetch it first")
    with trusting(trust_remote_code):
        manifest = Manifest.read(folder)
        elastic = require_size(manifest.elastic, str(folder), keep)
        model = load_whole(folder, dtype, check, trust_remote_code)
        stored, watcher = StoredFactors(folder, elastic), watcher_of(None, "pared.load")
        _cut_in_place(model, stored, elastic, manifest.plan, keep, watcher)
    return model


def _cut_in_place(
    model: PreTrainedModel, stored: StoredFactors, elastic: Elastic, largest: Plan, keep: float, progress: Progress
) -> Cut:
    """Make a model of the largest size one of a smaller, which describes itself."""
    found = cut(elastic, largest, stored.spectra(), keep)
    install_cut(model, largest, found.plan, stored.more, progress)
    mark(model)
    if found.short:
        progress.note(f"{len(found.short)} weights have a rank below that of a compression of its own, the first is "
                      f"{found.short[0]}: the folder holds no more of them; multiples of 0.01 are exact")  # fmt: skip
    return found


def _manifest(manifest: Manifest, found: Cut, keep: float, reread: Reread, watch: Stopwatch) -> Manifest:
    """Return the record of a slice: what was measured of the largest size goes."""
    asked = manifest.recipe.model_copy(update={"keep": keep, "elastic": False, "structures": "ranks", **NESTED})
    return manifest.model_copy(update={
        **reread.recorded, "recipe": asked, "preset": record_of(asked), "plan": found.plan, "elastic": None,
        "perplexity_after": None, "seconds": watch.seconds, "peak_memory_bytes": peak_memory_bytes(),
        "memory_bound_bytes": 0, "resumed": 0,
    })  # fmt: skip
