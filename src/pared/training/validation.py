"""The loss on rows that are never trained on: measured now and then, kept for the best, and a reason to stop."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pared.files import write_whole
from pared.sources.windows import NO_LABEL
from pared.training.examples import Row, collate
from pared.training.precision import precise
from pared.training.stage import own_loss
from pared.tuning import Tuning

HISTORY, BEST = "validation.jsonl", "best.safetensors"


class Validation(TrainerCallback):
    """Measures every so many steps and at the end; with patience, the best state is kept and training stops.

    Attributes:
        history: (step, loss).
        log: is told of every loss, for trackers.
        best: the file of the best state if it is wanted, none before there is one.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tuning: Tuning,
        precision: torch.dtype,
        state: Callable[[], dict[str, torch.Tensor]],
        folder: Path,
        patient: bool,
        agreed: Callable[[float], float],
    ) -> None:
        self.agreed = agreed
        self.rows, self.tuning, self.precision, self.state, self.folder = rows, tuning, precision, state, folder
        self.patience = tuning.patience if patient else None
        self.history: list[tuple[int, float]] = []
        self.log: Callable[[dict[str, float]], None] = lambda _: None

    @property
    def best(self) -> Path | None:
        """The file of the best state."""
        file = self.folder / BEST
        return file if self.patience is not None and file.exists() else None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Recall what was measured before a crash."""
        del args
        self.recall(state.global_step)

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
        loss = self.agreed(mean_loss(kwargs["model"], self.rows, self.tuning.batch, args.device, self.precision))
        earlier = min((value for _, value in self.history), default=float("inf"))
        self.history.append((state.global_step, loss))
        self.log({"validation_loss": loss})
        best = self.state() if loss < earlier and self.patience is not None else None  # gathered from all processes
        if state.is_world_process_zero:
            self._write(best)
        if self.exhausted:
            control.should_training_stop = True

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
        with precise(device, precision):
            total += float(own_loss(model, inputs)) * labels
        count += labels
    model.train(was_training)
    return total / max(1, count)
