"""Encoders on a task: a fresh head, fine-tuning, and the score on examples that were not trained on."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pared.checkpoint import load_tokenizer, read_config
from pared.data.encoding import cut_examples
from pared.data.examples import Examples
from pared.data.labelled import find_examples, parts_of_task
from pared.data.lengths import Length
from pared.data.windows import Windows
from pared.errors import ParedError
from pared.evaluation.classification import Score, classify
from pared.models.architecture import is_causal
from pared.models.source import find_model
from pared.models.trust import trusted
from pared.names import called
from pared.training.dataset import collate, rows_of

WARMUP = 0.1  # of the steps
LENGTH = 128  # tokens of an example at most, by default


@dataclass(frozen=True)
class FineTuning:
    """How an encoder is trained for a task; the defaults are among BERT's own (Devlin et al., 2019).

    Attributes:
        epochs: over the examples.
        learning_rate: at most; it rises over the first tenth of the steps and falls evenly to 0.
        batch: examples a step.
        length: the most tokens of an example; None is 128, or what the model takes if that is less.
        examples: to train on, from the first; None means all.
        seed: of the head and of the order.
    """

    epochs: float = 3.0
    learning_rate: float = 5e-5
    batch: int = 32
    length: int | None = None
    examples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "seed" and value is not None and not value > 0:
                raise ParedError(f"fine-tuning: expected {name} above 0, got {value:g}")


def within(asked: FineTuning, config: PretrainedConfig) -> FineTuning:
    """Return a fine-tuning with the length that a model takes.

    Raises:
        ParedError: more was asked for than it has positions.
    """
    length = Length.given(asked.length, LENGTH).within(config, "labelled examples")
    return replace(asked, length=length.tokens)


@dataclass(frozen=True)
class TaskExamples:
    """What an encoder is trained on for a task, and scored on.

    Attributes:
        train: its training part.
        test: the part whose labels are known and that is not trained on: of GLUE the development part.
    """

    train: Examples
    test: Examples


def examples_of(task: str) -> TaskExamples:
    """Return the examples of a task.

    Args:
        task: ``glue:NAME``, or ``ner:NAME``.

    Raises:
        ParedError: there is no such task, or a part of it is missing.
    """
    train, test = parts_of_task(task)
    return TaskExamples(find_examples(train), find_examples(test))


def require_encoder(name: str) -> None:
    """Refuse a language model.

    Raises:
        ParedError: it is one.
    """
    if is_causal(read_config(name).architectures or []):
        raise ParedError(f"{name} is a language model; fine-tuning for GLUE and entities is for encoders. Ask a "
                         f"language model what it can do as it is: {called('tasks', 'rte,boolq')}")  # fmt: skip


def with_head(name: str, examples: Examples, seed: int = 0) -> PreTrainedModel:
    """Load an encoder, dense or compressed, with a fresh head for the classes of examples, or for their scores.

    A head that it had, for whatever task, is dropped.

    Raises:
        ParedError: a language model, or nothing that can be read as an encoder; names a weight that is missing.
    """
    require_encoder(name)
    transformers.set_seed(seed)
    kind = AutoModelForTokenClassification if examples.by_word else AutoModelForSequenceClassification
    classes = _classes(examples)
    named: dict[str, Any] = {
        "id2label": dict(enumerate(classes)),
        "label2id": {label: number for number, label in enumerate(classes)},
    }
    found: dict[str, Any] = {"dtype": torch.float32, "problem_type": None, "output_loading_info": True,
                             "trust_remote_code": trusted()}  # fmt: skip
    try:
        model, info = kind.from_pretrained(find_model(name).location, ignore_mismatched_sizes=True, **found, **named)
    except Exception as error:  # safetensors, torch and transformers each raise their own
        raise ParedError(f"model {name!r} cannot be given a head for {examples.name} ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:200]})") from error  # fmt: skip
    base = f"{model.base_model_prefix}."
    lost = sorted(key for key in info["missing_keys"] if key.startswith(base) and ".pooler." not in key)
    if lost:
        raise ParedError(
            f"model {name!r}: {len(lost)} weights of the encoder are missing from the checkpoint, the first is "
            f"{lost[0]!r}; transformers would fill them with random numbers; fetch it again"
        )
    _renew_head(model)
    return model.eval()


@torch.no_grad()
def _renew_head(model: PreTrainedModel) -> None:
    """Draw every linear layer outside of the encoder again, as transformers draws a head that a checkpoint lacks."""
    spread = float(getattr(model.config, "initializer_range", 0.02))
    for part, child in model.named_children():
        for layer in child.modules() if part != model.base_model_prefix else ():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(0.0, spread)
                if layer.bias is not None:
                    layer.bias.zero_()


def _classes(examples: Examples) -> tuple[str, ...]:
    """Return the names of the classes of examples in order; a single one where labels are scores."""
    if examples.classes:
        return examples.classes
    labels = {label for row in examples.rows for label in (row.label if isinstance(row.label, tuple) else (row.label,))}
    if any(isinstance(label, float) for label in labels):
        return ("LABEL_0",)
    if all(isinstance(label, int) for label in labels):
        return tuple(f"LABEL_{number}" for number in range(max(map(int, labels)) + 1))
    return tuple(sorted(map(str, labels)))


def fine_tune(
    model: PreTrainedModel,
    windows: Windows,
    asked: FineTuning | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> PreTrainedModel:
    """Train all of a model on labelled examples, in place.

    Args:
        model: with a head for them, in float32.
        windows: what to train on, cut.
        asked: for how long, and how.
        on_step: called after every step.

    Raises:
        ParedError: accelerate is not installed.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ParedError("training needs the package accelerate; install it with: pip install accelerate")
    asked = asked or FineTuning()
    rows = rows_of(windows)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=asked.epochs,
            per_device_train_batch_size=asked.batch,
            learning_rate=asked.learning_rate,
            warmup_steps=int(WARMUP * steps_of(len(rows), asked)),
            lr_scheduler_type="linear",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
            seed=asked.seed,
            remove_unused_columns=False,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # batches are as large as was said, however many GPUs there are
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[_Told(on_step)]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.eval()


def steps_of(rows: int, asked: FineTuning) -> int:
    """Return the steps of a training on so many examples."""
    counted = rows if asked.examples is None else min(rows, asked.examples)
    return max(1, math.ceil(-(-counted // asked.batch) * asked.epochs))


def fine_tuned_score(
    name: str,
    task: TaskExamples,
    asked: FineTuning | None = None,
    device: torch.device | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Score:
    """Give an encoder a head for a task, train all of it, and score it on what it was not trained on.

    Raises:
        ParedError: anything in the model, the examples or the settings that does not work, before anything is trained.
    """
    asked = asked or FineTuning()
    model, tokenizer = with_head(name, task.train, asked.seed), load_tokenizer(name)
    length = within(asked, model.config).length
    assert length is not None
    train = cut_examples(task.train, tokenizer, model.config, length, asked.examples)
    test = cut_examples(task.test, tokenizer, model.config, length, None)
    fine_tune(model.to(device or "cpu"), train, asked, on_step)
    return classify(model, test)


class _Told(TrainerCallback):
    """Tells of every step."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        self.on_step = on_step

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.on_step()
