"""What a training reports and measures while it runs: losses, whole checkpoints, and the loss on rows kept apart."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pared.data.windows import NO_LABEL
from pared.io.files import write_whole
from pared.names import called
from pared.processes import Processes
from pared.progress import Advance, Progress
from pared.schema.training import TrainingConfig
from pared.training.dataset import Row, collate
from pared.training.method import own_loss
from pared.training.precision import mixed_precision
from pared.training.run_dir import CHECKPOINT, mark_whole

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


HISTORY, BEST = "validation.jsonl", "best.safetensors"


class Validation(TrainerCallback):
    """Measures before the first step, every so many and at the end; with patience, the best state is kept.

    Where the model is made smaller on the way nothing is measured before, as that was of a larger one.

    Attributes:
        history: (step, loss).
        log: receives every loss, for trackers.
        best: the file of the best state if it is wanted, none before there is one.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tuning: TrainingConfig,
        precision: torch.dtype,
        state: Callable[[], dict[str, torch.Tensor]],
        folder: Path,
        patient: bool,
        agreed: Callable[[float], float],
    ) -> None:
        self.agreed = agreed
        self.rows, self.tuning, self.precision, self.state, self.folder = rows, tuning, precision, state, folder
        self.patient, self.patience = patient, tuning.patience if patient else None
        self.history: list[tuple[int, float]] = []
        self.log: Callable[[dict[str, float]], None] = lambda _: None

    @property
    def best(self) -> Path | None:
        """The file of the best state."""
        file = self.folder / BEST
        return file if self.patience is not None and file.exists() else None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Recall what was measured before a crash, or measure what training begins with."""
        self.recall(state.global_step)
        if self.patient and self.rows and state.global_step == 0 and not self.history:
            self._measure(args, state, kwargs["model"])

    def recall(self, step: int) -> None:
        """Recall what was measured up to a step."""
        file = self.folder / HISTORY
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        measured = [tuple(json.loads(line)) for line in lines]
        self.history = [(at, loss) for at, loss in measured if at <= step]

    @property
    def exhausted(self) -> bool:
        """Whether there were so many measurements without a smaller loss that training stops."""
        losses = [value for _, value in self.history]
        if self.patience is None or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self.patience

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if it is time."""
        every = self.tuning.evaluate_every
        due = every is not None and state.global_step % every == 0
        if not self.rows or not (due or state.global_step == state.max_steps):
            return
        self._measure(args, state, kwargs["model"])
        if self.exhausted:
            control.should_training_stop = True

    def _measure(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        loss = self.agreed(mean_loss(model, self.rows, self.tuning.batch, args.device, self.precision))
        earlier = min((value for _, value in self.history), default=float("inf"))
        self.history.append((state.global_step, loss))
        self.log({"validation_loss": loss})
        best = self.state() if loss < earlier and self.patience is not None else None  # gathered from all processes
        if state.is_world_process_zero:
            self._write(best)

    @property
    def worse(self) -> Iterator[str]:
        """Say that the state that is kept has a larger loss than what training began with, if it has."""
        if self.patience is not None or not self.history:
            return
        (step, before), (_, after) = self.history[0], self.history[-1]
        if step == 0 and after > before:
            yield (
                f"the loss on rows never trained on rose from {before:.4f} to {after:.4f}: train at a lower "
                f"{called('learning_rate')}, on more or other data, or keep the best state with {called('patience')}"
            )

    def _write(self, best: Mapping[str, torch.Tensor] | None) -> None:
        text = "".join(json.dumps(entry) + "\n" for entry in self.history)
        write_whole(self.folder / HISTORY, text)
        if best is not None:
            save_file({name: value.contiguous() for name, value in best.items()}, self.folder / BEST)


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Sequence[Row], batch: int, device: torch.device, precision: torch.dtype) -> float:
    """Return a model's own loss on rows, the mean over labels, each batch in evaluation mode."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), batch):
        inputs = {name: value.to(device) for name, value in collate(rows[start : start + batch]).items()}
        labels = int((inputs["labels"] != NO_LABEL).sum())
        with mixed_precision(device, precision):
            total += float(own_loss(model, inputs)) * labels
        count += labels
    model.train(was_training)
    return total / max(1, count)
