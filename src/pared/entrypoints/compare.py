"""Models side by side, from what their folders record, results that lie beside them, and what they say."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pared.arguments import name_from
from pared.checkpoint import load
from pared.environment import device_of
from pared.errors import ParedError
from pared.evaluation.generation import greedy
from pared.io.files import path_of
from pared.io.guarded import read_json
from pared.io.record import MANIFEST
from pared.models.architecture import is_causal
from pared.models.source import find_model
from pared.models.trust import trusting
from pared.notebook import watcher_of
from pared.progress import Progress
from pared.schema.compare import ComparedModel, ComparedModels
from pared.schema.manifest import Manifest

PROMPTS = ("The capital of France is", "Once upon a time, there was a", "To make a cup of tea, first")
NEW_TOKENS = 32
HOW = "speed and tasks: of files beside a folder, such as smaller.bench.json, which pared bench writes"


def compare(
    models: Sequence[str | Path],
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = NEW_TOKENS,
    progress: Progress | bool | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
) -> ComparedModels:
    """Put models side by side.

    Perplexities are those that folders record, of their last training where there was one. Results of ``pared eval
    --json`` and ``pared bench --json`` are read where they lie beside a folder, in files that begin with its name and a
    point: ``smaller.arc.json`` beside ``smaller``. Memory: one model at a time.

    Args:
        models: folders that pared made, or names of any models.
        prompts: that every causal language model continues; none generates nothing and loads no weight.
        new_tokens: of each.
        progress: what reports progress, or whether bars are shown; by default in a notebook only.
        trust_remote_code: whether code that lies beside the weights may run.
        device: where they run.

    Returns:
        The comparison, shown as a table; ``as_markdown()`` writes it.

    Raises:
        ParedError: no model, one that cannot be loaded, or a result that is none.

    Example:
        >>> print(pared.compare(["embedded:smollm2-135m", "smaller"], prompts=[]))  # doctest: +SKIP
    """
    function = "pared.compare"
    if isinstance(models, (str, Path)) or not models:
        raise ParedError(f"{function} takes a list of names, such as ['smaller', 'smallest']; got {models!r}")
    names, watcher = [name_from(one, function) for one in models], watcher_of(progress, function)
    if new_tokens < 1:
        prompts = ()
    found = []
    with trusting(trust_remote_code), watcher.stage("compare", len(names), "model") as advance:
        for name in names:
            said = tuple(_generations(name, prompts, new_tokens, device))
            found.append(_described(name).model_copy(update={"generations": said}))
            advance()
    texts = {one.measured_on for one in found if one.measured_on is not None}
    notes = ["perplexities are of different texts, and cannot be compared"] if len(texts) > 1 else []
    if not any(one.speed or one.tasks for one in found):
        notes.append(HOW)
    return ComparedModels(models=_told_apart(found), prompts=tuple(prompts), new_tokens=new_tokens, notes=tuple(notes))


def _described(name: str) -> ComparedModel:
    """Return what is known of a model without reading a weight."""
    place = path_of(name)
    beside = _beside(place)
    if (place / MANIFEST).is_file():
        return of_manifest(Manifest.read(place), place.resolve().name).model_copy(update=beside)
    source = find_model(name)
    parameters = sum(one.numel() for one in source.skeleton().parameters())
    return ComparedModel(
        name=Path(source.name).name, made="dense", model_parameters=parameters,
        bytes_on_disk=parameters * source.weight_bytes(), **beside,
    )  # fmt: skip


def of_manifest(manifest: Manifest, name: str) -> ComparedModel:
    """Return what a folder records of itself.

    Args:
        manifest: of the folder.
        name: of it.
    """
    after, last = manifest.plan.after, manifest.training[-1] if manifest.training else None
    trained = last is not None and last.perplexity_after is not None
    on = last.evaluation if trained and last is not None else manifest.evaluation
    value = last.perplexity_after if trained and last is not None else manifest.perplexity_after
    same = on is not None and manifest.evaluation is not None and on["digest"] == manifest.evaluation["digest"]
    made = f"{manifest.recipe.method} {manifest.recipe.budget}" + "".join(
        f", {t.tuning.method}" for t in manifest.training
    )
    return ComparedModel(
        name=name, made=made, target_parameters=after.covered_parameters, model_parameters=after.model_parameters,
        bytes_on_disk=manifest.bytes_on_disk or after.bytes_on_disk, perplexity=value,
        perplexity_before=manifest.perplexity_before if same else None,
        measured_on=None if on is None or value is None
        else f"{on['text']}, {on['windows']} x {on['length']} ({on['digest'][:8]})",
    )  # fmt: skip


def _beside(place: Path) -> dict[str, Any]:
    """Return what results beside a folder say: figures of tasks, tokens per second, and ratios of them."""
    found: dict[str, dict[str, Any]] = {"tasks": {}, "speed": {}, "faster": {}}
    for _, result in results_beside(place):
        found["tasks"] |= dict(_figures(result))
        for case, one in _timed(result):
            found["speed"][case] = float(one["tokens_per_second"][0])
            if one.get("ratios") and one.get("ideal"):
                found["faster"][case] = statistics.median(one["ratios"]), float(one["ideal"])
    return found


def results_beside(place: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield the results that lie beside a folder, in files that begin with its name and a point; none beside no folder.

    Raises:
        ParedError: a file cannot be read.
    """
    if not place.name or not place.is_dir():
        return
    place = place.resolve()
    for file in sorted(place.parent.glob(f"{place.name}.*.json")):
        result = read_json(file, "result")
        if isinstance(result, Mapping):
            yield file, result


def _figures(result: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """Yield the metrics of every task of a result of ``pared eval``."""
    for one in result.get("tasks", ()):
        for metric, value in one.get("metrics", {}).items():
            yield f"{one.get('task', '')}: {metric}", float(value)


def _timed(result: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Yield the cases of a result of ``pared bench``, in words."""
    for one in result.get("timed", ()):
        case = one.get("case", {})
        if one.get("tokens_per_second"):
            new = f" + {case['new']}" if case.get("new") else ""
            yield f"{case.get('kind')} {case.get('batch')} x {case.get('length')}{new}", one


def _generations(name: str, prompts: Sequence[str], new_tokens: int, device: str) -> Iterable[str]:
    """Yield how a causal language model continues each prompt."""
    source = find_model(name)
    if not prompts or not is_causal(source.config().architectures or []):
        return
    model, tokenizer = load(name).to(device_of(device)), source.tokenizer()
    for prompt in prompts:
        yield greedy(model, tokenizer, prompt, new_tokens)


def _told_apart(found: Sequence[ComparedModel]) -> tuple[ComparedModel, ...]:
    """Return models with names of their own: a number behind one that is there already."""
    seen: dict[str, int] = {}
    told = []
    for one in found:
        seen[one.name] = seen.get(one.name, 0) + 1
        name = one.name if seen[one.name] == 1 else f"{one.name} ({seen[one.name]})"
        told.append(one.model_copy(update={"name": name}))
    return tuple(told)
