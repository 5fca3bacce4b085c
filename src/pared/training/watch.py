"""What a training tells while it goes on, and that its checkpoints are whole."""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from pared.engine.progress import Advance, Progress
from pared.files import write_whole
from pared.training.processes import Processes
from pared.training.workshop import CHECKPOINT, mark_whole

LOSSES = "losses.json"


class Watch(TrainerCallback):
    """Tells loss and tokens per second of every step.

    Attributes:
        by_step: the loss of every step of this process, with those before a crash.
        tokens: trained on, padding not counted, with what was trained on before a crash.
    """

    def __init__(self, name: str, progress: Progress, tokens_per_row: float, folder: Path) -> None:
        self.name, self.progress, self.tokens_per_row = name, progress, tokens_per_row
        self._file = folder / LOSSES
        self.by_step: list[float] = []
        self.tokens = 0
        self._running: list[float] = []
        self._stack = ExitStack()
        self._advance: Advance
        self._start = 0.0
        self._begun_at = 0

    def saw(self, loss: float) -> None:
        """Take the loss of a batch."""
        self._running.append(loss)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Open the stage; steps done before a crash count as done."""
        self.recall(args, state.global_step)
        self._advance = self._stack.enter_context(self.progress.stage(self.name, state.max_steps, "step"))
        self._start, self._begun_at = time.perf_counter(), state.global_step
        for _step in range(state.global_step):
            self._advance(recalled=True)

    def recall(self, args: TrainingArguments, step: int) -> None:
        """Recall the losses up to a step."""
        stored = json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else []
        self.by_step = stored[:step]
        self.tokens = round(step * self._rows(args) * self.tokens_per_row)

    def _rows(self, args: TrainingArguments) -> int:
        rows: int = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return rows

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Keep the losses beside the checkpoint."""
        del args
        if state.is_world_process_zero:
            write_whole(self._file, json.dumps(self.by_step))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Tell of a step."""
        self.by_step.append(sum(self._running) / max(1, len(self._running)))
        self._running.clear()
        rows = self._rows(args)
        self.tokens = round(state.global_step * rows * self.tokens_per_row)
        done = (state.global_step - self._begun_at) * rows * self.tokens_per_row
        rate = done / (time.perf_counter() - self._start)
        self._advance(f"loss {self.by_step[-1]:.4f}, {rate:,.0f} tokens/s")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the stage."""
        self._stack.close()

    def losses(self) -> tuple[float, float]:
        """Return the mean loss over the first and over the last tenth of the steps of this process."""
        count = max(1, len(self.by_step) // 10)
        first, last = self.by_step[:count], self.by_step[-count:]
        return sum(first) / max(1, len(first)), sum(last) / max(1, len(last))


class WholeCheckpoints(TrainerCallback):
    """Marks every checkpoint that was written to its end, by all; only those are gone on from."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Mark the newest."""
        self.processes.wait()
        if state.is_world_process_zero:
            mark_whole(Path(args.output_dir) / f"{CHECKPOINT}{state.global_step}")
