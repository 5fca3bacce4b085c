"""What is trained: a folder that pared made, or a dense model that a training makes smaller itself."""

import logging
from typing import Any, Protocol

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pared.checkpoint import is_compressed, load
from pared.checkpoint.format import FORMAT_VERSION
from pared.checkpoint.load import require_recorded
from pared.checkpoint.portable import module_map
from pared.data.texts import held_out
from pared.engine.allocate import whole_plan
from pared.environment import machine, versions
from pared.errors import ParedError
from pared.io.files import path_of
from pared.io.inputs import found_again
from pared.models.published import published_facts
from pared.models.source import find_model, require_dense
from pared.names import called
from pared.schema.manifest import Manifest, Training
from pared.schema.plan import Decision, Dense, LowRank, Plan
from pared.schema.recipe import Evaluation, Recipe
from pared.schema.training import TrainingConfig
from pared.structure import find_anatomy
from pared.training.early import require_named

log = logging.getLogger(__name__)


class Parent(Protocol):
    """What a training starts from.

    Attributes:
        name: as the user gave it.
        manifest: of a compressed folder, none of a dense model.
        config: of the model.
        bytes_needed: of the output, at most.
        digest: distinguishes it from every other.
    """

    name: str
    manifest: Manifest | None
    config: PretrainedConfig
    bytes_needed: int
    digest: str

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return its tokenizer."""

    def load(self) -> PreTrainedModel:
        """Load it on the CPU."""

    def evaluation(self) -> Evaluation | None:
        """Return what to measure perplexity on where nothing is asked for."""

    def perplexity_on(self, digest: str) -> float | None:
        """Return what is known of its perplexity on some tokens."""

    def child(self, model: PreTrainedModel, training: Training, measured: dict[str, Any]) -> Manifest:
        """Return the manifest of what it became."""


class CompressedParent:
    """A folder that pared made."""

    def __init__(self, name: str) -> None:
        self.name = name
        if not (path_of(name) / "pared.json").is_file() and not is_compressed(find_model(name).config()):
            raise ParedError(f"{name} is a dense model, and this method trains a folder that pared made; compress it "
                             "first (pared compress), or make it smaller while it trains: "
                             f"{called('method', 'basel')}")  # fmt: skip
        self.manifest: Manifest | None = Manifest.read(path_of(name))
        self._manifest: Manifest = self.manifest
        self.config = find_model(name).config()
        self.bytes_needed = self._manifest.bytes_on_disk
        self.digest = find_model(name).digest()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return its tokenizer."""
        return find_model(self.name).tokenizer()

    def load(self) -> PreTrainedModel:
        """Load it on the CPU, every file as it was written: what is damaged would be listed as whole in the child.

        Raises:
            ParedError: a file is not the one that was written.
        """
        model = load(self.name)  # says more of what is damaged than a digest
        require_recorded(path_of(self.name))
        return model

    def evaluation(self) -> Evaluation | None:
        """Return what it was measured on when it was compressed."""
        then = self._manifest.evaluation
        if then is None:
            return None
        text = found_again(str(then["text"]), self._manifest.inputs)
        if text == then["text"] and text.startswith("file:"):
            log.warning("%s was measured on %s, and where that lies is not known here; name it with %s",
                        self.name, text, called("evaluation.text", "file:PATH"))  # fmt: skip
            return None
        return Evaluation(text=text, length=then["length"], windows=then["windows"], bos=then["bos"])

    def perplexity_on(self, digest: str) -> float | None:
        """Return what its manifest says."""
        then = self._manifest.evaluation
        return self._manifest.perplexity_after if then is not None and then["digest"] == digest else None

    def child(self, model: PreTrainedModel, training: Training, measured: dict[str, Any]) -> Manifest:
        """Return its own manifest with one training more; figures of a text not measured again go."""
        del model
        now, then = training.evaluation, self._manifest.evaluation
        same = now is not None and then is not None and now["digest"] == then["digest"]
        figures = {"perplexity_after": training.perplexity_after} if same else {
            "evaluation": None, "perplexity_before": None, "perplexity_after": None}  # fmt: skip
        chain = (*self._manifest.training, training)
        return self._manifest.model_copy(update={**measured, **figures, "training": chain, "elastic": None})


class DenseParent:
    """A dense model by name, which a training makes smaller."""

    manifest: Manifest | None = None

    def __init__(self, tuning: TrainingConfig, options: dict[str, Any]) -> None:
        assert tuning.model is not None
        self.name, self._tuning, self._options = tuning.model, tuning, options
        self._source = find_model(self.name)
        self.config = self._source.config()
        require_dense(self.config, self.name)
        self._skeleton = self._source.skeleton()
        skipped = [pattern for pattern in str(options.get("skip", "")).split(",") if pattern]
        self._anatomy = find_anatomy(self._skeleton).without(skipped)
        self.bytes_needed = self._anatomy.model_parameters * self._source.weight_bytes()
        self.digest = self._source.digest()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return its tokenizer."""
        return self._source.tokenizer()

    def load(self) -> PreTrainedModel:
        """Load it on the CPU."""
        return load(self.name)

    def evaluation(self) -> Evaluation | None:
        """Return the held-out part of what is trained on, if it has one."""
        name = held_out(self._tuning.data[0])
        return None if name is None else Evaluation(text=name)

    def perplexity_on(self, digest: str) -> float | None:
        """Return nothing: it was not measured before."""
        del digest
        return None

    def child(self, model: PreTrainedModel, training: Training, measured: dict[str, Any]) -> Manifest:
        """Return a manifest of its own."""
        plan = self._plan(model)
        evaluation = self._tuning.evaluation
        return Manifest(
            format_version=FORMAT_VERSION,
            model={
                "name": self._source.name,
                "origin": self._source.origin,
                "architecture": type(self._skeleton).__name__,
                **published_facts(self._source),
            },
            recipe=Recipe(
                model=self.name,
                method=self._tuning.method,
                keep=min(1.0, max(plan.achieved_keep, 1e-9)),
                options=self._options,
                evaluation=evaluation,
            ),
            plan=plan,
            evaluation=training.evaluation,
            perplexity_before=training.perplexity_before,
            perplexity_after=training.perplexity_after,
            seconds=training.seconds,
            peak_memory_bytes=training.peak_memory_bytes,
            bytes_before=plan.before.bytes_on_disk,
            versions=versions(),
            machine=machine(),
            training=(training,),
            **measured,
        )

    def _plan(self, model: PreTrainedModel) -> Plan:
        """Return what became of every site."""
        entries = module_map(model)
        decisions: dict[str, Decision] = {
            site.name: LowRank(rank=entries[site.name]["rank"])
            if site.name in entries
            else Dense(reason="factors would be no smaller")
            for site in self._anatomy.sites
        }
        plan = whole_plan(self._anatomy, 1.0, decisions, model.dtype.itemsize)
        return plan.model_copy(update={"keep": min(plan.achieved_keep, 1.0)})


def parent_of(tuning: TrainingConfig, options: dict[str, Any], compresses: bool) -> Parent:
    """Return what a tuning names.

    Raises:
        ParedError: a folder that is compressed already where a dense model is needed, or the other way round.
    """
    require_named(tuning)
    return DenseParent(tuning, options) if compresses else CompressedParent(str(tuning.model))
