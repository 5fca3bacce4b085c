"""What the perplexity of a training is measured on, before and after, and how much of it is trained on."""

from transformers import PreTrainedTokenizerBase

from pared.data.evaluated import evaluation_windows
from pared.data.overlap import overlap
from pared.data.texts import learned_part
from pared.data.windows import Windows
from pared.entrypoints.evaluation.measure import PerplexityOn
from pared.entrypoints.training.parent import Parent
from pared.errors import TextTooShortError
from pared.names import called
from pared.progress import Progress, Stopwatch
from pared.report.table import WORTH_SAYING
from pared.schema.manifest import Measured
from pared.schema.recipe import Evaluation
from pared.schema.training import TrainingConfig
from pared.training.dataset import Examples
from pared.training.distributed import TrainingProcesses
from pared.training.run_dir import TrainingRun


def asked_evaluation(tuning: TrainingConfig, parent: Parent) -> Evaluation | None:
    """Return what to measure on, the parent's where it is left to us; None for nothing."""
    asked = tuning.evaluation
    if asked is None or asked.text != "auto":
        return asked
    there = parent.evaluation()
    own = asked.model_dump(include=asked.model_fields_set - {"text"})
    return None if there is None else there.model_copy(update=own)


class TrainingPerplexity:
    """The perplexity of one training of a causal language model; of any other model there is none.

    Attributes:
        on: what it is measured on and by; None for nothing.
    """

    def __init__(
        self,
        tuning: TrainingConfig,
        asked: Evaluation | None,
        parent: Parent,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        processes: TrainingProcesses,
        watch: Stopwatch,
        progress: Progress,
    ) -> None:
        """Cut the windows.

        Args:
            tuning: what was asked for.
            asked: what to measure on, as :func:`asked_evaluation` returns it; None for nothing.
            parent: what is trained.
            tokenizer: of it.
            examples: what it is trained on.
            processes: that train together.
            watch: seconds by stage.
            progress: what reports progress.

        Raises:
            ParedError: the text is unknown or too short.
        """
        self._tuning, self._parent, self._examples = tuning, parent, examples
        self._processes, self._progress = processes, progress
        self._tokenizer = tokenizer
        windows = None if asked is None else self._windows(asked)
        self.on: PerplexityOn | None = None
        if windows is not None and asked is not None:
            self.on = PerplexityOn(windows, self._tokenizer, asked.bos, processes.device, watch, progress)

    def _windows(self, asked: Evaluation) -> Windows | None:
        """Return what perplexity is measured on, None for nothing: a part too short to be kept apart is not."""
        chosen = self._tuning.evaluation
        if chosen is None:
            return None
        learned = {str(row["text"]) for row in self._examples.described}
        why = ""
        if all(name not in learned or learned_part(name, asked.text) == name for name in self._tuning.data):
            try:
                return evaluation_windows(asked, self._tokenizer, self._parent.config)
            except TextTooShortError as error:
                if chosen.text != "auto" or "length" in chosen.model_fields_set:
                    raise
                why = str(error)
        elif chosen.text != "auto":
            return evaluation_windows(asked, self._tokenizer, self._parent.config)
        why = why or f"all of {asked.text!r} is trained on"
        self._progress.note(f"no perplexity: {why}; name a text to measure it on ({called('evaluation.text')})")
        return None

    def before(self, run: TrainingRun) -> float | None:
        """Return the perplexity of the folder before it is trained, once for all tries."""
        measure = self.on
        if measure is None:
            return None
        digest = measure.windows.digest
        if (known := self._parent.perplexity_on(digest)) is not None:
            return known

        def record() -> None:
            if run.recorded("perplexity before", digest) is None:
                run.record("perplexity before", digest, measure.before(self._parent.load()))

        self._processes.first(record)
        return float(run.recorded("perplexity before", digest))

    def record(self) -> Measured | None:
        """Return what a manifest records of the text."""
        return None if self.on is None else self.on.record(self._learned_from(self.on.windows))

    def _learned_from(self, windows: Windows) -> float:
        """Return the share of what is measured on that is trained on, or was calibrated on."""
        parent, examples = self._parent.manifest, self._examples
        calibrated = [] if parent is None or parent.calibration is None else [parent.calibration]
        share = overlap(windows, [*calibrated, *examples.described], [row["input_ids"] for row in examples.train])
        if share >= WORTH_SAYING:
            self._progress.note(f"{share:.0%} of what perplexity is measured on ({windows.text!r}) was trained or "
                                "calibrated on: it says nothing about text the model has not seen")  # fmt: skip
        return share
