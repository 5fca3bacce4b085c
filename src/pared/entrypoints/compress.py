"""A compression in Python: a model by name or from memory, and what it is calibrated on."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.arguments import kind_of, name_from, recipe_from, require_model, require_tokenizer
from pared.calibration import saved_blocks
from pared.data.handed import text_of
from pared.data.texts import Text, handed_over
from pared.data.windows import Windows
from pared.engine.checks.early import require_model as require_named_model
from pared.engine.checks.early import require_possible, require_texts
from pared.entrypoints.compression.compressing import compress_by_name, compressed, measure_of
from pared.entrypoints.compression.in_place import Collected, require_compressible, where_it_is
from pared.entrypoints.compression.result import Before, Compressed
from pared.entrypoints.compression.texts_read import TextsRead, read_texts
from pared.errors import ParedError
from pared.io.files import path_of
from pared.models.architecture import is_causal
from pared.models.loaded import name_of
from pared.models.source import ModelSource, find_model
from pared.models.trust import trusting
from pared.notebook import watcher_of
from pared.progress import Progress, Stopwatch
from pared.schema.options import Options
from pared.schema.presets import note_of
from pared.schema.recipe import Recipe

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
            require_texts(spec.recipe)
            source = require_named_model(spec)
            if tokenizer is not None:
                require_tokenizer(tokenizer, function)
            return compress_by_name(source, spec, watcher, tokenizer=tokenizer, windows=windows, collected=collected)
        measured = "evaluation" in fields or (asked_for.preset is None and "evaluation" in asked_for.model_fields_set)
        return _in_memory(model, tokenizer, asked_for, measured, watcher, windows, collected)


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
        measure = measure_of(texts, tokenizer, recipe, watch, progress)
    before = Before(name, "loaded in Python", source, measure)
    made = compressed(model, tokenizer, spec, progress, texts, collected, before, watch)
    made.recipe = made.recipe.model_copy(update={"device": asked})
    return made


def _lies_beside(name: str) -> ModelSource | None:
    """Return where a loaded model says it was loaded from, if that is on this machine."""
    with suppress(ParedError):
        source = find_model(name) if name else None
        if source is not None and os.path.exists(source.place):
            return source
    return None
