"""The metadata of a model card, as the Hub reads it: where a model is from, its licence, task and measurements."""

from collections.abc import Iterator, Mapping
from typing import Any

from pared.data.published import hub_set_of
from pared.schema.manifest import Manifest, Measured
from pared.schema.plan import LowRank, Shared
from pared.schema.width import Width

# end of the name of an architecture -> what it is for
TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageTextToText": "image-text-to-text",
}
READS_IMAGES = ("vision_config", "image_token_id", "image_token_index")


def metadata(manifest: Manifest, folder: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields above a card's text.

    Args:
        manifest: of the folder.
        folder: its name, which the measurements are of.
        config: what its ``config.json`` holds.
    """
    task = task_of(config)
    found = {
        "library_name": "transformers",
        "pipeline_tag": task,
        **_origin(manifest),
        "datasets": list(datasets_of(manifest)),
        "tags": ["pared", _kind(manifest), manifest.recipe.method],
        "model-index": list(_model_index(manifest, folder, task)),
    }
    return {name: value for name, value in found.items() if value}


def task_of(config: Mapping[str, Any]) -> str | None:
    """Return the task on the Hub of a configuration's architecture; None where it has no head that says."""
    for own in config.get("architectures") or ():
        if own.endswith("ForConditionalGeneration"):
            return "image-text-to-text" if any(key in config for key in READS_IMAGES) else None
        for end, task in TASKS.items():
            if own.endswith(end):
                return task
    return None


def datasets_of(manifest: Manifest) -> Iterator[str]:
    """Yield the data sets on the Hub that were calibrated or trained on, each once."""
    names = [] if manifest.calibration is None else [manifest.calibration["text"]]
    names += [read["text"] for training in manifest.training for read in training.data]
    found = (hub_set_of(str(name)) for name in names)
    yield from dict.fromkeys(one.repository for one in found if one is not None)


def _origin(manifest: Manifest) -> dict[str, str]:
    """Return where the model is from, and its licence, as its publisher says."""
    model = dict(manifest.model)
    fields = ("base_model", "license", "license_name", "license_link")
    if "base_model" not in model and model["name"].count("/") == 1 and model["origin"] == "Hugging Face Hub":
        model["base_model"] = model["name"]
    return {name: str(model[name]) for name in fields if model.get(name)}


def _kind(manifest: Manifest) -> str:
    if manifest.recipe.sparsity is not None or manifest.recipe.pattern is not None:
        return "sparse"
    decided = {type(site.decision) for site in manifest.plan.sites}
    return "pruned" if Width in decided and not decided & {LowRank, Shared} else "low-rank"


def _model_index(manifest: Manifest, folder: str, task: str | None) -> Iterator[dict[str, Any]]:
    """Yield what was measured, in the form of Papers with Code that the Hub reads."""
    measured: list[tuple[Measured | None, float | None, float | None]] = [
        (manifest.evaluation, manifest.perplexity_before, manifest.perplexity_after)
    ]
    if manifest.training:  # what is in the folder is what was trained last
        last = manifest.training[-1]
        measured = [(last.evaluation, None, last.perplexity_after)]
    results = [
        _result(on, before, after, task or "text-generation")
        for on, before, after in measured
        if on is not None and after is not None
    ]
    if results:
        yield {"name": folder, "results": results}


def _result(on: Measured, before: float | None, after: float, task: str) -> dict[str, Any]:
    where = hub_set_of(str(on["text"]))
    dataset: dict[str, Any] = {
        "name": str(on["text"]),
        "type": where.repository if where else str(on["text"]).rpartition(":")[0] or str(on["text"]),
    }
    if where is not None:
        dataset |= {"config": where.config} if where.config else {}
        dataset |= {"split": where.split}
    dataset["args"] = {"windows": on["windows"], "length": on["length"], "bos": on["bos"]}
    dense = [] if before is None else [{"type": "perplexity", "name": "Perplexity of the dense model", "value": before}]
    metrics = [{"type": "perplexity", "name": "Perplexity", "value": after}, *dense]
    return {"task": {"type": task}, "dataset": dataset, "metrics": metrics}
