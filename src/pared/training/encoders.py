"""Encoders on a task: a fresh head, fine-tuning, and the score on examples that were not trained on."""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pared.checkpoint import load_tokenizer, read_config
from pared.errors import ParedError
from pared.evaluation.classification import Score, classify
from pared.sources.labelled import Examples, find_examples
from pared.sources.labelled_windows import cut_examples
from pared.sources.models import find_model, is_causal
from pared.training.examples import collate, rows_of

WARMUP = 0.1  # of the steps


@dataclass(frozen=True)
class FineTuning:
    """How an encoder is trained for a task; the defaults are among BERT's own (Devlin et al., 2019).

    Attributes:
        epochs: over the examples.
        learning_rate: at most; it rises over the first tenth of the steps and falls evenly to 0.
        batch: examples a step.
        length: the most tokens of an example.
        examples: to train on, from the first; None means all.
        seed: of the head and of the order.
    """

    epochs: float = 3.0
    learning_rate: float = 5e-5
    batch: int = 32
    length: int = 128
    examples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "seed" and value is not None and not value > 0:
                raise ParedError(f"fine-tuning: expected {name} above 0, found {value:g}")


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
    kind, _, name = task.partition(":")
    if kind not in ("glue", "ner") or not name or ":" in name:
        raise ParedError(f"unknown task {task!r} for an encoder; expected glue:NAME, such as glue:cola, or ner:NAME")
    return TaskExamples(find_examples(f"{task}:train"), find_examples(f"{task}:{'dev' if kind == 'glue' else 'test'}"))


def with_head(name: str, examples: Examples, seed: int = 0) -> PreTrainedModel:
    """Load an encoder, dense or compressed, with a fresh head for the classes of examples, or for their scores.

    Raises:
        ParedError: a language model, or nothing that can be read.
    """
    config = read_config(name)
    if is_causal(config.architectures or []):
        raise ParedError(f"{name} is a language model; tasks of GLUE and entities are for encoders")
    transformers.set_seed(seed)
    kind = AutoModelForTokenClassification if examples.by_word else AutoModelForSequenceClassification
    classes = _classes(examples)
    named: dict[str, Any] = {
        "id2label": dict(enumerate(classes)),
        "label2id": {label: number for number, label in enumerate(classes)},
    }
    try:
        model = kind.from_pretrained(find_model(name).location, dtype=torch.float32, **named)
    except Exception as error:  # safetensors, torch and transformers each raise their own
        raise ParedError(f"model {name!r} cannot be given a head for {examples.name} ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:200]})") from error  # fmt: skip
    return model.eval()


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
    tokenizer: Any,
    examples: Examples,
    asked: FineTuning | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> PreTrainedModel:
    """Train all of a model on labelled examples, in place.

    Args:
        model: with a head for them, in float32.
        tokenizer: of the model.
        examples: to train on.
        asked: for how long, and how.
        on_step: called after every step.

    Raises:
        ParedError: accelerate is not installed, or an example the model has no class for.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise ParedError("training needs the package accelerate; install it with: pip install 'pared[train]'")
    asked = asked or FineTuning()
    rows = rows_of(cut_examples(examples, tokenizer, model.config, asked.length, asked.examples))
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
        Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[_Told(on_step)]
        ).train()
    return model.eval()


def steps_of(rows: int, asked: FineTuning) -> int:
    """Return the steps of a training on so many examples."""
    counted = rows if asked.examples is None else min(rows, asked.examples)
    return max(1, int(-(-counted // asked.batch) * asked.epochs))


def score_on(model: PreTrainedModel, tokenizer: Any, examples: Examples, length: int = FineTuning.length) -> Score:
    """Score a model on examples.

    Raises:
        ParedError: an example the model has no class for.
    """
    return classify(model, cut_examples(examples, tokenizer, model.config, length, None))


def fine_tuned_score(
    name: str,
    task: str,
    asked: FineTuning | None = None,
    device: torch.device | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Score:
    """Give an encoder a head for a task, train all of it, and score it on what it was not trained on.

    Raises:
        ParedError: anything in the model, the task or the settings that does not work.
    """
    asked, parts = asked or FineTuning(), examples_of(task)
    model, tokenizer = with_head(name, parts.train, asked.seed), load_tokenizer(name)
    fine_tune(model.to(device or "cpu"), tokenizer, parts.train, asked, on_step)
    return score_on(model, tokenizer, parts.test, asked.length)


class _Told(TrainerCallback):
    """Tells of every step."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        self.on_step = on_step

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.on_step()
