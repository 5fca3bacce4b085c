"""A whole training: a folder or model by name, its stages one after the other, a folder that appears whole."""

import gc
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.calibration.precision import choose_dtype
from pared.checkpoint import Manifest, compare, load, require_tensors, save, take_fingerprint
from pared.checkpoint.manifest import Training, machine, versions
from pared.engine.asked import checked_options
from pared.engine.progress import Progress, Silent, Stopwatch, peak_memory_bytes
from pared.errors import ParedError
from pared.evaluation import perplexity
from pared.hardware import device_of
from pared.recipe import Evaluation
from pared.report.card import model_card
from pared.sources.models import find_model, is_causal
from pared.sources.texts import find_text
from pared.sources.windows import Windows, cut, require_fits
from pared.staging import require_free, require_space, staged
from pared.training.examples import Examples, find_rows
from pared.training.methods import method_of
from pared.training.parts import unpack
from pared.training.stage import Context, Stage, TuningMethod
from pared.training.trainer import Went, train
from pared.training.workshop import Workshop
from pared.tuning import Tuning


@dataclass(frozen=True)
class Tuned:
    """A finished training: the folder and its manifest."""

    folder: Path
    manifest: Manifest


def tune(tuning: Tuning, overwrite: bool = False, progress: Progress | None = None) -> Tuned:
    """Train a folder that pared made and write it anew.

    What can be refused is refused before a weight is read. The state is saved as training goes on, in a hidden folder
    beside the output: the same call goes on from there after a crash, and ends as it would have without one.

    Args:
        tuning: with ``model`` and ``out``.
        overwrite: whether an output folder that is there may be replaced.
        progress: who watches; nobody by default.

    Raises:
        ParedError: anything wrong; the output was not written, and what was trained is kept beside it.
    """
    progress = progress or Silent()
    return _Job(tuning, overwrite, progress).run()


class _Job:
    def __init__(self, tuning: Tuning, overwrite: bool, progress: Progress) -> None:
        self.tuning, self.overwrite, self.progress = tuning, overwrite, progress
        self.watch = Stopwatch()
        self.method: TuningMethod = method_of(tuning.method)
        self.options = checked_options(tuning.options, self.method.options, f"training method {self.method.name}")
        try:
            self.method.check(self.options)
        except ValueError as error:
            raise ParedError(f"training method {self.method.name}: {error}") from None
        device_of(tuning.device)
        if tuning.model is None:
            raise ParedError("no model is named; give a folder that pared made")
        if tuning.out is None:
            raise ParedError("no output folder is named; give --out DIR, or 'out' in the file")
        self.model_name, self.out = tuning.model, Path(tuning.out).expanduser()
        require_free(self.out, overwrite)
        if Path(self.model_name).expanduser().absolute() == self.out.absolute():
            raise ParedError(f"output {self.out} is the model itself; name another folder")
        self.parent = Manifest.read(Path(self.model_name).expanduser())
        require_space(self.out, self.parent.bytes_on_disk)
        self.config = find_model(self.model_name).config()
        self.tokenizer: PreTrainedTokenizerBase = find_model(self.model_name).tokenizer()
        self.causal = is_causal(self.config.architectures or [])
        self.precision = choose_dtype(tuning.precision, _stored_dtype(self.config), device_of(tuning.device))

    def run(self) -> Tuned:
        """Do everything."""
        tuning = self.tuning
        with self.watch("load"):
            examples = find_rows(tuning, self.tokenizer, self.config, self.causal)
            windows = self.evaluation_windows()
        stages = self.method.stages(self.options)
        with Workshop.beside(self.out, self.settings(examples)) as workshop:
            if workshop.resumed:
                self.progress.note(f"going on with the training that {workshop.folder} holds")
            before = self.measured(workshop, windows)
            went = [self.trained(workshop, number, stages, examples) for number in range(1, len(stages) + 1)]
            made = self.written(workshop, len(stages), went, examples, windows, before)
            workshop.close()
        return made

    def trained(self, workshop: Workshop, number: int, stages: tuple[Stage, ...], examples: Examples) -> Went:
        """Train a stage from the folder of the one before, unless its folder is there."""
        stage, folder = stages[number - 1], workshop.stage(number)
        record = folder / "went.json"
        if record.exists():
            return Went(**json.loads(record.read_text(encoding="utf-8")))
        with self.watch("load"):
            model = load(self.model_name if number == 1 else workshop.stage(number - 1)).to(self.tuning.device)
            dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
            unpack(model)
        steps, epochs = self.length(stage, examples)
        torch.manual_seed(self.tuning.seed)
        context = Context(model, self.options, self.tuning, self.parent, steps, epochs)
        with self.watch(stage.name):
            prepared = stage.prepare(context)
            rate = stage.learning_rate * (self.tuning.learning_rate or self.method.learning_rate)
            state, checkpoint = workshop.state(number), workshop.last_checkpoint(number)
            went = train(
                prepared, stage, self.tuning, rate, steps, examples, state, checkpoint, self.precision, self.progress
            )
            trained = prepared.finish()
        with self.watch("save"), staged(folder, True, needed=self.parent.bytes_on_disk) as staging:
            stored = next(iter(dtypes.values()))
            trained.to(dtype=stored)
            save(trained, self.tokenizer, staging)
            (staging / "went.json").write_text(json.dumps(asdict(went)), encoding="utf-8")
        workshop.forget(number)
        return went

    def length(self, stage: Stage, examples: Examples) -> tuple[int, float]:
        """Return the steps of a stage, and how often it goes through the data."""
        tuning = self.tuning
        rows = tuning.batch * tuning.accumulation
        per_epoch = math.ceil(len(examples.train) / rows)
        if tuning.tokens is None:
            steps = math.ceil(tuning.epochs * stage.share * per_epoch)
        else:
            steps = math.ceil(tuning.tokens * stage.share / (rows * examples.tokens_per_row))
        return max(1, steps), max(1, steps) / per_epoch

    def evaluation_windows(self) -> Windows | None:
        """Return what perplexity is measured on, None for nothing."""
        asked = self.asked_evaluation()
        if asked is None or not self.causal:
            return None
        windows = cut(find_text(asked.text, evaluation=True), self.tokenizer, asked.length, asked.windows)
        require_fits(self.config, windows)
        return windows

    def asked_evaluation(self) -> Evaluation | None:
        """Return what to measure on, the parent's where it is left to us."""
        asked, then = self.tuning.evaluation, self.parent.evaluation
        if asked is None or asked.text != "auto":
            return asked
        if then is None:
            return None
        return Evaluation(text=then["text"], length=then["length"], windows=then["windows"], bos=then["bos"])

    def measured(self, workshop: Workshop, windows: Windows | None) -> float | None:
        """Return the perplexity of the folder before it is trained, once for all tries."""
        if windows is None:
            return None
        if self.parent.evaluation is not None and self.parent.evaluation["digest"] == windows.digest:
            return self.parent.perplexity_after
        file = workshop.folder / "before.json"
        if not file.exists():
            with self.watch("perplexity before"):
                value = self.perplexity(load(self.model_name), windows, "before")
            file.write_text(json.dumps(value), encoding="utf-8")
        return float(json.loads(file.read_text(encoding="utf-8")))

    def perplexity(self, model: PreTrainedModel, windows: Windows, when: str) -> float:
        """Measure a model."""
        asked = self.asked_evaluation()
        assert asked is not None
        with self.progress.stage(f"perplexity {when}", len(windows.tokens), "window") as advance:
            return perplexity(model.to(self.tuning.device), self.tokenizer, windows, asked.bos, advance).value

    def written(
        self,
        workshop: Workshop,
        number: int,
        went: list[Went],
        examples: Examples,
        windows: Windows | None,
        before: float | None,
    ) -> Tuned:
        """Write the folder of the last stage where it belongs, checked by reloading and measured."""
        with staged(self.out, self.overwrite, needed=self.parent.bytes_on_disk) as staging:
            with self.watch("save"):
                model = load(workshop.stage(number))
                fingerprint = take_fingerprint(model)
                save(model, self.tokenizer, staging)
                bytes_on_disk = require_tensors(staging)
            del model
            gc.collect()
            with self.watch("verify"):
                model = load(staging)
                difference = compare(model, fingerprint)
            after = None
            if windows is not None:
                with self.watch("perplexity after"):
                    after = self.perplexity(model, windows, "after")
            asked = self.asked_evaluation()
            training = Training(
                tuning=self.tuning,
                settled={"precision": str(self.precision).removeprefix("torch."), **self.options},
                parent={"folder": self.model_name, "digest": _digest(self.parent)},
                data=list(examples.described),
                stages=[asdict(one) for one in went],
                evaluation=None if windows is None or asked is None else {**windows.describe(), "bos": asked.bos},
                perplexity_before=before,
                perplexity_after=after,
                seconds=self.watch.seconds,
                peak_memory_bytes=peak_memory_bytes(),
                versions=versions(),
                machine=machine(),
            )
            manifest = self.parent.model_copy(
                update={
                    **self.remeasured(windows, after),
                    "training": (*self.parent.training, training),
                    "bytes_on_disk": bytes_on_disk,
                    "fingerprint": fingerprint,
                    "self_check": difference,
                }
            )
            manifest.write(staging)
            (staging / "README.md").write_text(model_card(manifest, self.out.name), encoding="utf-8")
        return Tuned(self.out, manifest)

    def remeasured(self, windows: Windows | None, after: float | None) -> dict[str, Any]:
        """Return what the manifest says of perplexity: the figures of a text that was not measured again go."""
        then = self.parent.evaluation
        if windows is not None and then is not None and then["digest"] == windows.digest:
            return {"perplexity_after": after}
        return {"evaluation": None, "perplexity_before": None, "perplexity_after": None}

    def settings(self, examples: Examples) -> dict[str, Any]:
        """Return everything the result depends on."""
        left_out = {"out", "report_to", "evaluation", "checkpoint_every"}
        return {
            **self.tuning.model_dump(mode="json", exclude=left_out),
            "options": self.options,
            "parent": _digest(self.parent),
            "multiplied in": str(self.precision),
            "digests": [entry["digest"] for entry in examples.described],
            "versions": versions(),
        }


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()


def _stored_dtype(config: Any) -> torch.dtype:
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32
