"""What an encoder gets right on labelled examples, as GLUE and CoNLL count it."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from pared.data.windows import NO_LABEL, Windows
from pared.errors import ParedError
from pared.evaluation.batch_size import BatchSize

BATCH = 32


@dataclass(frozen=True)
class Score:
    """How a model did.

    Attributes:
        metrics: by name; of examples ``accuracy`` and ``matthews``, of two classes ``f1`` of the second too; of scores
            ``pearson`` and ``spearman``; of tokens ``f1``, ``precision``, ``recall`` of whole entities and ``accuracy``
            of tokens. All from 0 to 1, correlations from -1.
        examples: how many were labelled.
        labels: how many labels there were.
    """

    metrics: dict[str, float]
    examples: int
    labels: int


def classify(
    model: PreTrainedModel,
    windows: Windows,
    on_example: Callable[[], None] = lambda: None,
    batch: int | BatchSize = BATCH,
) -> Score:
    """Let a model label examples and score it as GLUE and CoNLL do.

    Args:
        model: with a head for classes of examples or of tokens; unchanged.
        windows: labelled examples, cut.
        on_example: called for every example that is labelled.
        batch: examples at a time; those of like length are taken together.

    Raises:
        ParedError: the windows have no labels, all labels of tokens are left out, seqeval is missing, or the model
            outputs NaN.
    """
    if windows.labels is None:
        raise ParedError(f"{windows.text!r} is a text; name labelled examples, such as glue:sst2:dev")
    predicted = predictions(model, windows, on_example, batch)
    counted = windows.labels != NO_LABEL
    if windows.labels.is_floating_point():
        metrics = score_metrics(predicted, windows.labels)
    elif windows.labels.ndim == 2:
        metrics = entity_metrics(predicted, windows.labels, dict(model.config.id2label))
    else:
        metrics = example_metrics(predicted, windows.labels)
    return Score(metrics, len(windows.tokens), int(counted.sum()))


@torch.no_grad()
def predictions(
    model: PreTrainedModel, windows: Windows, on_example: Callable[[], None], batch: int | BatchSize = BATCH
) -> torch.Tensor:
    """Return the class with the largest logit, or the score, of the shape of the labels; 0 where there is padding."""
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    mask = torch.ones_like(windows.tokens) if windows.mask is None else windows.mask
    lengths = mask.sum(dim=1)
    found = torch.zeros_like(windows.labels if windows.labels is not None else windows.tokens)
    size = BatchSize.of(batch)
    size.fit(model, int(lengths.max()))

    def classes_of(chosen: Sequence[int]) -> torch.Tensor:
        rows = torch.tensor(chosen)
        longest = int(lengths[rows].max())
        inputs = {name: tensor[rows, :longest].to(device) for name, tensor in windows.beside.items()}
        logits = model(input_ids=windows.tokens[rows, :longest].to(device), **inputs).logits
        _require_finite(logits, rows, windows)
        return (logits.squeeze(-1).float() if found.is_floating_point() else logits.argmax(dim=-1)).cpu()

    for chosen, classes in size.over(lengths.argsort(stable=True).tolist(), classes_of):
        rows = torch.tensor(chosen)
        if classes.ndim == 1:
            found[rows] = classes
        else:
            found[rows, : classes.shape[1]] = classes
        for _ in chosen:
            on_example()
    model.train(was_training)
    return found


def _require_finite(logits: torch.Tensor, rows: torch.Tensor, windows: Windows) -> None:
    """Refuse predictions that are none: the largest of NaN is a class like any other."""
    broken = ~logits.flatten(1).isfinite().all(dim=1).cpu()
    if bool(broken.any()):
        row = int(rows[broken][0]) + 1
        raise ParedError(f"the model outputs NaN or infinity for example {row} of {windows.text!r}; check its "
                         "weights, or train it more slowly")  # fmt: skip


def example_metrics(predicted: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return accuracy and Matthews' correlation of classes ``(examples,)``, and where there are two F1 of the second.

    Matthews' is 0 where either side has one class only, and F1 where neither has the second, as in scikit-learn.
    """
    classes = int(torch.maximum(predicted, labels).max()) + 1
    counts = torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes).double()
    total, right = counts.sum(), counts.diag().sum()
    true, guessed = counts.sum(dim=1), counts.sum(dim=0)
    spread = ((total**2 - true.square().sum()) * (total**2 - guessed.square().sum())).sqrt()
    matthews = (right * total - true @ guessed) / spread if float(spread) > 0 else torch.zeros(())
    found = {"accuracy": float(right / total), "matthews": float(matthews)}
    if classes <= 2:
        positive = true[-1] + guessed[-1] if classes == 2 else torch.zeros(())
        found["f1"] = float(2 * counts[-1, -1] / positive) if float(positive) > 0 else 0.0
    return found


def score_metrics(predicted: torch.Tensor, scores: torch.Tensor) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation of scores ``(examples,)``; 0 where either side does not vary."""
    return {"pearson": _correlation(predicted, scores), "spearman": _correlation(_ranks(predicted), _ranks(scores))}


def _correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.double() - one.double().mean(), other.double() - other.double().mean()
    spread = float(one.norm() * other.norm())
    return float(one @ other) / spread if spread > 0 else 0.0


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the rank of every value, equal ones the mean of theirs."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2)[place]


def entity_metrics(predicted: torch.Tensor, labels: torch.Tensor, names: dict[int, str]) -> dict[str, float]:
    """Return F1, precision and recall of whole entities, and accuracy of tokens; labels of -100 do not count.

    Raises:
        ParedError: seqeval is missing, or no token has a label.
    """
    if importlib.util.find_spec("seqeval") is None:
        raise ParedError("entities are scored by the package seqeval; install it with: pip install seqeval")
    from seqeval.metrics import f1_score, precision_score, recall_score

    counted = labels != NO_LABEL
    if not bool(counted.any()):
        raise ParedError("no token of the examples has a label")
    rows = [row for row in range(len(labels)) if bool(counted[row].any())]
    true = [[names[int(label)] for label in labels[row][counted[row]]] for row in rows]
    guessed = [[names[int(label)] for label in predicted[row][counted[row]]] for row in rows]
    return {
        "f1": float(f1_score(true, guessed, zero_division=0)),
        "precision": float(precision_score(true, guessed, zero_division=0)),
        "recall": float(recall_score(true, guessed, zero_division=0)),
        "accuracy": float((predicted[counted] == labels[counted]).double().mean()),
    }
