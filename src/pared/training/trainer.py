"""One stage through the Trainer of transformers: what it computes in, what it saves, how it resumes after a crash."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from pared.errors import ParedError
from pared.progress import Progress
from pared.schema.training import TrainingConfig
from pared.structure import find_blocks
from pared.training.callbacks import Validation, Watch, WholeCheckpoints
from pared.training.dataset import Examples, Row, collate
from pared.training.distributed import TrainingProcesses, collected, fill, full_optimizer_state, shard
from pared.training.method import Prepared, Stage
from pared.training.precision import mixed_precision
from pared.training.run_dir import CHECKPOINT

TRAINED = "trained.safetensors"
SCHEDULES: dict[str, tuple[str, dict[str, float]]] = {
    "constant": ("constant_with_warmup", {}),
    "linear": ("linear", {}),
    "cosine": ("cosine", {}),
    "cosine-to-tenth": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
}


@dataclass
class StageResult:
    """How a stage went.

    Attributes:
        name: of the stage.
        steps: optimiser steps.
        tokens: trained on, padding not counted.
        trained_parameters: numbers that were trained.
        loss: mean over the first and over the last tenth of the steps.
        validation: (step, loss) on the rows never trained on.
        reached: figures of the method's own, such as the mass that Basel has left.
        notes: what a user should know of the result.
    """

    name: str
    steps: int
    tokens: int
    trained_parameters: int
    loss: tuple[float, float]
    validation: list[tuple[int, float]] = field(default_factory=list)
    reached: dict[str, float | int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class StageTrainer(Trainer):
    """A Trainer whose loss is the stage's, and whose checkpoints hold what is trained and nothing else."""

    def __init__(self, prepared: Prepared, precision: torch.dtype, watch: Watch, **arguments: Any) -> None:
        self.prepared, self.precision, self.watch = prepared, precision, watch
        super().__init__(model=prepared.model, **arguments)
        self.model_accepts_loss_kwargs = False  # losses are means of a batch

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the stage's loss of a batch.

        Raises:
            ParedError: it is not a number.
        """
        del num_items_in_batch
        with mixed_precision(self.args.device, self.precision):
            loss = self.prepared.loss(model, inputs)
        self.watch.saw(value := float(loss.detach()))
        if not math.isfinite(value):
            raise ParedError(
                f"the loss is {value} at step {self.state.global_step + 1}; train with a smaller learning rate, "
                "or with precision float32"
            )
        return (loss, None) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer; parameters that learn faster have groups of their own."""
        made = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if made:
            full_optimizer_state(optimizer)
            for ending, times in self.prepared.faster.items():
                _set_apart(optimizer, self.prepared.model, ending, times)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained, gathered from all processes by the first."""
        state = state_of(self.prepared)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / TRAINED)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.should_save:
            self.optimizer.state_dict()  # the first, which writes it, waits for what the others hold
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:  # in the memory of the host: of what is in shards every process needs only its part
            for owner, name in ((self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)):
                owner.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        del model
        put_back(self.prepared, load_file(Path(resume_from_checkpoint) / TRAINED), resume_from_checkpoint)


def _set_apart(optimizer: torch.optim.Optimizer, model: nn.Module, ending: str, times: float) -> None:
    """Move parameters whose names end so to a group whose learning rate is so many times the others'."""
    apart = {id(parameter): parameter for name, parameter in model.named_parameters() if name.endswith(ending)}
    moved = []
    for group in optimizer.param_groups:
        moved += [parameter for parameter in group["params"] if id(parameter) in apart]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in apart]
    if moved:
        rate = times * optimizer.param_groups[0]["lr"]
        optimizer.add_param_group({"params": moved, "lr": rate, "weight_decay": 0.0})


def _changing(prepared: Prepared) -> dict[str, torch.Tensor]:
    """Return what a stage changes, by name: parameters that want gradients, once each, and the buffers it names."""
    model: nn.Module = prepared.model
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | {name: model.get_buffer(name) for name in prepared.buffers}


def state_of(prepared: Prepared) -> dict[str, torch.Tensor]:
    """Return what a stage changes, whole; if it is in shards, every process has to ask, and the first gets it."""
    return collected(_changing(prepared))


def put_back(prepared: Prepared, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Give a model a state, whole in every process, and say where it is from if it cannot be.

    Raises:
        ParedError: it is the state of another model.
    """
    here = _changing(prepared)
    if state.keys() != here.keys() or any(state[name].shape != here[name].shape for name in here):
        raise ParedError(f"{where} holds the state of another model; remove it to start over")
    for name, tensor in here.items():
        fill(tensor, state[name])


def warmup_steps(asked: float, steps: int) -> int:
    """Return the steps in which the learning rate rises: a share of them below 1, so many from 1; always one fewer."""
    return min(math.ceil(asked * steps) if asked < 1 else int(asked), steps - 1)


def train(
    prepared: Prepared,
    stage: Stage,
    tuning: TrainingConfig,
    learning_rate: float,
    steps: int,
    examples: Examples,
    folder: Path,
    checkpoint: Path | None,
    precision: torch.dtype,
    processes: TrainingProcesses,
    progress: Progress,
) -> tuple[StageResult, dict[str, torch.Tensor] | None]:
    """Train a stage to its end, from a checkpoint if there is one.

    Args:
        prepared: the model made ready.
        stage: what is trained.
        tuning: what was asked for.
        learning_rate: at the peak.
        steps: optimiser steps.
        examples: rows.
        folder: for checkpoints.
        checkpoint: what to resume from.
        precision: what products are made in.
        processes: that train together.
        progress: what reports progress.

    Returns:
        How it went; and, if the model is in shards, its state, for a whole model of the first process.

    Raises:
        ParedError: nothing is trained, or the loss is not a number.
    """
    count = sum(parameter.numel() for parameter in prepared.model.parameters() if parameter.requires_grad)
    if not count:
        raise ParedError(f"stage {stage.name!r} of method {tuning.method} has nothing to train in {tuning.model}")
    folder.mkdir(parents=True, exist_ok=True)
    watch = Watch(stage.name, progress, examples.tokens_per_row, folder)
    validation = Validation(
        examples.validation,
        tuning,
        precision,
        lambda: state_of(prepared),
        folder,
        stage.patient,
        processes.agreed,
    )
    arguments = _arguments(stage, tuning, learning_rate, steps, folder, processes)
    trainer = StageTrainer(
        prepared,
        precision,
        watch,
        args=arguments,
        train_dataset=_Rows(examples.train),
        data_collator=collate,
        callbacks=[*prepared.callbacks, watch, validation, WholeCheckpoints(processes)],
    )
    trainer.remove_callback(PrinterCallback)
    validation.log = trainer.log
    if tuning.gradient_checkpointing:
        _compute_again(prepared.model)
    done = 0 if checkpoint is None else int(checkpoint.name.removeprefix(CHECKPOINT))
    validation.recall(done)
    if checkpoint is not None and (done >= steps or validation.exhausted):  # the Trainer would go one step too far
        put_back(prepared, load_file(checkpoint / TRAINED), str(checkpoint))
        watch.recall(arguments, done)
    else:
        prepared.model.train()
        if processes.sharded:
            shard(prepared.model, find_blocks(prepared.model), processes.device)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        done = trainer.state.global_step
    processes.wait()
    state = _best_state(prepared, validation, processes)
    prepared.model.eval()
    went = StageResult(stage.name, done, watch.tokens, count, watch.losses(), validation.history)
    went.notes += validation.worse
    return went, state


def _arguments(
    stage: Stage, tuning: TrainingConfig, learning_rate: float, steps: int, folder: Path, processes: TrainingProcesses
) -> TrainingArguments:
    """Return what the Trainer is told of a stage; the arguments are those of :func:`train`."""
    schedule, more = SCHEDULES[stage.schedule if tuning.schedule == "auto" else tuning.schedule]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=tuning.batch,
        gradient_accumulation_steps=tuning.accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=more,
        warmup_steps=warmup_steps(stage.warmup if tuning.warmup is None else tuning.warmup, steps),
        weight_decay=tuning.weight_decay,
        max_grad_norm=tuning.clip,
        save_strategy="steps",
        save_steps=tuning.checkpoint_every,
        save_total_limit=2,
        logging_steps=10,
        logging_nan_inf_filter=False,
        report_to=list(tuning.report_to) or "none",
        seed=tuning.seed,
        use_cpu=processes.device.type == "cpu",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_broadcast_buffers=False,  # frozen bases are buffers, and large
        dataloader_pin_memory=processes.device.type != "cpu",
    )
    arguments._n_gpu = min(arguments._n_gpu, 1)  # the Trainer would split batches over all GPUs of one process
    return arguments


def _best_state(
    prepared: Prepared, validation: Validation, processes: TrainingProcesses
) -> dict[str, torch.Tensor] | None:
    """Have the model in the best state that was measured, the last where none was; return that of a model in shards."""
    state = None if validation.best is None else load_file(validation.best)
    if processes.sharded:
        return state or state_of(prepared)
    if state is not None:
        put_back(prepared, state, str(validation.best))
    return None


def _compute_again(model: Any) -> None:
    """Let the backward pass compute activations again.

    Raises:
        ParedError: the architecture cannot.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ParedError(f"gradient checkpointing: {error} Train without it") from None


class _Rows(torch.utils.data.Dataset[Row]):
    """Rows as torch counts them."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]
