"""A whole training: a folder or model by name, its stages one after the other, a folder that appears whole."""

import gc
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers.integrations import get_available_reporting_integrations

from pared.arguments import asked_from, config_from
from pared.checkpoint import is_compressed, load, mark, module_map, save
from pared.data.lengths import Length
from pared.entrypoints.publish import Publication, Reread, ResidentSaver
from pared.entrypoints.training.parent import parent_of
from pared.entrypoints.training.training_perplexity import TrainingPerplexity, asked_evaluation
from pared.environment import machine, peak_memory_bytes, versions
from pared.errors import ParedError
from pared.io.files import path_of
from pared.io.inputs import inputs_of
from pared.io.output_dir import require_free, require_space, staged
from pared.models.architecture import is_causal
from pared.models.source import find_model
from pared.models.trust import trusting
from pared.names import called
from pared.notebook import watcher_of
from pared.progress import Progress, Silent, Stopwatch
from pared.report.results import trained_table
from pared.schema.manifest import Fingerprint, Manifest, StageRecord, Training, WindowsRead
from pared.schema.presets import note_of, record_of, require_user_fields
from pared.schema.training import TrainingConfig
from pared.tables import Shown, Table
from pared.training.dataset import Examples, find_rows
from pared.training.distributed import TrainingProcesses
from pared.training.early import require_possible, require_trackers
from pared.training.method import Context, Prepared, Stage, TuningMethod
from pared.training.precision import training_precision
from pared.training.registry import method_of, settled
from pared.training.run_dir import TrainingRun
from pared.training.trainable import unpack
from pared.training.trainer import StageResult, put_back, train


@dataclass(frozen=True, repr=False)
class Tuned(Shown):
    """A finished training; shown as a table, with what the command line prints of it.

    Attributes:
        folder: that was written.
        manifest: of it.
        is_first: whether this is the process that reports, of several that trained together.
    """

    folder: Path
    manifest: Manifest
    is_first: bool = True

    def table(self) -> Table:
        """Return sizes and perplexity, and how the training went."""
        return trained_table(self.manifest, str(self.folder))


def tune(
    config: TrainingConfig | Mapping[str, Any] | str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
    trust_remote_code: bool = False,
    resume: bool | None = None,
    **fields: Any,
) -> Tuned:
    """Train a folder that pared made and write the result.

    What can be refused is refused before a weight is read. The state is saved during training, in a hidden folder
    beside the output: the same call with ``resume=True`` resumes there after a crash, and ends as without one.

    Args:
        config: what is trained and how, with ``model`` and ``out``; a mapping of that; or the folder alone, with all
            else among the fields.
        overwrite: whether an output folder that is there may be replaced.
        progress: what reports progress, or whether bars are shown; by default in a notebook only.
        trust_remote_code: whether code that lies beside the model's weights may run.
        resume: True resumes from the last checkpoint of a killed training with the very same settings; False removes
            what it left, and starts over. None, the default, is refused where there is any.
        **fields: of :class:`pared.TrainingConfig`, laid over it.

    Raises:
        ParedError: anything wrong; the output was not written, and what was trained is kept beside it.

    Example:
        >>> pared.tune("smaller", method="distill", tokens=16384, out="better")  # doctest: +SKIP
    """
    function = "pared.tune"
    if isinstance(config, (str, Path)):
        config, fields = None, {"model": config, **fields}
    watcher = watcher_of(progress, function)
    if config is None and not fields:
        asked_from(TrainingConfig, config, function)  # says what is expected
    with trusting(trust_remote_code):
        asked = config_from(TrainingConfig, config, fields, function)
        require_possible(asked, overwrite)
        return _Job(asked, overwrite, watcher, resume).run()


class _Job:
    def __init__(self, tuning: TrainingConfig, overwrite: bool, progress: Progress, resume: bool | None = None) -> None:
        self.processes = TrainingProcesses(tuning.device)
        self.tuning, self.overwrite, self.resume = tuning, overwrite, resume
        self.progress = progress if self.processes.is_first else Silent()
        self.watch = Stopwatch()
        self.method: TuningMethod = method_of(tuning.method)
        self.options = settled(self.method, tuning.options)
        if self.processes.sharded and (reason := self.method.needs_whole(self.options)):
            raise ParedError(f"{reason}, and FSDP holds weights in shards; launch data parallel: accelerate launch "
                             "--multi_gpu, or torchrun --nproc-per-node N")  # fmt: skip
        require_user_fields(tuning)
        _require_trackers(tuning.report_to)
        if tuning.out is None:
            raise ParedError(f"no output folder is named; give {called('out', 'DIR')}, or 'out' in the file")
        self.out = path_of(tuning.out)
        self.read = inputs_of(tuning.model_dump())
        self.processes.first(lambda: require_free(self.out, overwrite, self.read))
        if "tensorboard" in tuning.report_to:  # by default beside the checkpoints, which go when training is done
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", f"{self.out}-runs")
        self.parent = parent_of(tuning, self.options, self.method.compresses)
        require_space(self.out, self.parent.bytes_needed)
        self.config = self.parent.config
        self.tokenizer = self.parent.tokenizer()
        self.causal = is_causal(self.config.architectures or [])
        measured = training_precision(tuning.precision, _stored_dtype(self.config), self.processes.device)
        # Each process measures by itself, but all must multiply alike.
        self.precision = self.processes.agreed(measured)

    def run(self) -> Tuned:
        """Do everything."""
        tuning = self.tuning
        if note := note_of(tuning):
            self.progress.note(note)
        with self.watch("load"):
            asked = asked_evaluation(tuning, self.parent) if self.causal else None
            evaluated = None if asked is None else asked.text
            examples = find_rows(tuning, self.tokenizer, self.config, self.causal, evaluated)
            perplexity = TrainingPerplexity(
                tuning, asked, self.parent, self.tokenizer, examples, self.processes, self.watch, self.progress
            )
        stages = self.method.stages(self.options)
        with TrainingRun.beside(self.out, self.settings(examples), self.processes, self.resume) as run:
            if run.resumed:
                self.progress.note(f"resuming the training that {run.folder} holds")
            elif self.resume:
                self.progress.note(f"nothing to resume: no state of a training lies beside {self.out}")
            before = perplexity.before(run)
            went = [self.trained(run, number, stages, examples) for number in range(1, len(stages) + 1)]
            self.processes.first(lambda: self.write(run, went, examples, perplexity, before))
            self.processes.first(run.close)
        return Tuned(self.out, Manifest.read(self.out), self.processes.is_first)

    def trained(self, run: TrainingRun, number: int, stages: tuple[Stage, ...], examples: Examples) -> StageResult:
        """Train a stage from the folder of the one before, unless its folder is there."""
        stage, folder = stages[number - 1], run.stage(number)
        if (known := run.recorded("stage", number)) is not None:
            return StageResult(**known)
        steps = self.steps(stage, stages, examples)
        prepared, stored = self.prepared(run, number, stage, steps, examples)
        with self.watch(stage.name):
            rate = prepared.rate * (self.tuning.learning_rate or self.method.learning_rate)
            state, checkpoint = run.state(number), run.last_checkpoint(number)
            went, state_in_shards = train(
                prepared,
                stage,
                self.tuning,
                rate,
                steps,
                examples,
                state,
                checkpoint,
                self.precision,
                self.processes,
                self.progress,
            )
        whole = None if self.processes.sharded else prepared
        del prepared
        gc.collect()

        def keep() -> None:
            ready = whole or self.prepared(run, number, stage, steps, examples)[0]
            if state_in_shards is not None:
                put_back(ready, state_in_shards, str(state))
            with self.watch(stage.name):
                trained = ready.finish()
            went.reached, went.notes = ready.reached, [*went.notes, *ready.notes]
            for note in went.notes:
                self.progress.note(note)
            with self.watch("save"), staged(folder, True, self.parent.bytes_needed, ours=True) as staging:
                trained.to(dtype=stored)
                if module_map(trained) or is_compressed(self.config):  # one of uniform widths stays a plain model
                    mark(trained)
                save(trained, self.tokenizer, staging)
            run.record("stage", number, asdict(went))
            run.forget(number)

        self.processes.first(keep)
        return went

    def prepared(
        self, run: TrainingRun, number: int, stage: Stage, steps: int, examples: Examples
    ) -> tuple[Prepared, torch.dtype]:
        """Return what the stage before has left, made ready, and the dtype it was stored in."""
        with self.watch("load"):
            model = self.parent.load() if number == 1 else load(run.stage(number - 1))
            stored = model.dtype
            model.to(self.processes.device, torch.float32 if self.precision == torch.float32 else None)
            unpack(model)
        torch.manual_seed(self.tuning.seed)
        context = Context(
            model,
            self.options,
            self.tuning,
            self.parent.manifest,
            steps,
            examples,
            self.processes.device,
            self.precision,
        )
        with self.watch(stage.name):
            return stage.prepare(context), stored

    def steps(self, stage: Stage, stages: tuple[Stage, ...], examples: Examples) -> int:
        """Return the steps of a stage."""
        tuning = self.tuning
        rows = tuning.batch * tuning.accumulation * self.processes.count
        if tuning.tokens is None:
            return max(
                1,
                math.ceil((tuning.epochs or self.method.epochs) * stage.share * math.ceil(len(examples.train) / rows)),
            )
        share = stage.share / sum(one.share for one in stages)
        return max(1, math.ceil(tuning.tokens * share / (rows * examples.tokens_per_row)))

    def write(
        self,
        run: TrainingRun,
        went: list[StageResult],
        examples: Examples,
        perplexity: TrainingPerplexity,
        before: float | None,
    ) -> None:
        """Write the folder of the last stage where it belongs, checked by reloading and measured."""

        def manifest(reread: Reread) -> Manifest:
            done = self.with_length()
            training = Training(
                tuning=done,
                preset=record_of(done),
                settled={
                    "precision": str(self.precision).removeprefix("torch."),
                    "device": self.processes.device.type,
                    **self.options,
                },
                parent={"name": self.parent.name, "digest": self.parent.digest},
                data=[cast("WindowsRead", one) for one in examples.described],
                stages=[cast("StageRecord", asdict(one)) for one in went],
                evaluation=perplexity.record(),
                perplexity_before=before,
                perplexity_after=reread.perplexity,
                seconds=self.watch.seconds,
                peak_memory_bytes=peak_memory_bytes(),
                versions=versions(),
                machine=machine(),
            )
            return self.parent.child(reread.model, training, reread.recorded)

        def save_last_stage(folder: Path) -> Fingerprint:
            model = load(run.stage(len(went)))
            return ResidentSaver(model, self.tokenizer, find_model(str(self.tuning.model)))(folder)

        self.progress.note("trained; the folder is written, reloaded and compared"
                           f"{'' if perplexity.on is None else ', then measured'}")  # fmt: skip
        Publication(
            self.out, self.parent.name, self.overwrite, self.parent.bytes_needed, inputs=self.read, watch=self.watch
        ).publish(save_last_stage, manifest, None if perplexity.on is None else perplexity.on.after)

    def with_length(self) -> TrainingConfig:
        """Return what is asked for with the length that a default came to on this model, for the record."""
        length = Length.of(self.tuning).within(self.config, "rows to train on").tokens
        return self.tuning if length == self.tuning.length else self.tuning.model_copy(update={"length": length})

    def settings(self, examples: Examples) -> dict[str, Any]:
        """Return everything the result depends on."""
        left_out = {"out", "report_to", "evaluation", "checkpoint_every", "device"}
        return {
            **self.tuning.model_dump(mode="json", exclude=left_out),
            "options": self.options,
            "parent": self.parent.digest,
            "multiplied in": str(self.precision),
            "processes": self.processes.count,
            "device": self.processes.device.type,
            "digests": [entry["digest"] for entry in examples.described],
            "versions": versions(),
        }


def _require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not there.

    Raises:
        ParedError: transformers does not know one, its package is missing, or it is not set up.
    """
    require_trackers(names)
    there = get_available_reporting_integrations()
    for name in names:
        if name not in there:
            raise ParedError(f"tracker {name!r} cannot be used as it is installed and set up here; "
                             f"these can: {', '.join(there) or 'none'}")  # fmt: skip


def _stored_dtype(config: Any) -> torch.dtype:
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32
