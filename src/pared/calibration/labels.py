"""Where the labels of a loss come from, and the gradient of that loss with respect to the logits.

The loss is the cross entropy, summed, or the squared error of a score. Legend: R rows of logits (the tokens of a
window, or one for a whole window), C classes or tokens of the vocabulary.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from transformers import PreTrainedModel

from pared.errors import ParedError

NONE = -100  # the label of a row that has none; transformers' own
SECTION = 256  # classes whose probabilities are summed at once


class Labels(Protocol):
    """A source of labels."""

    def __call__(
        self, window: int, tokens_T: torch.Tensor, p_RC: torch.Tensor, rows: range | None = None
    ) -> torch.Tensor:
        """Return the labels ``(R,)`` of one window from its number, its tokens and the probabilities predicted.

        Args:
            window: its number.
            tokens_T: all of its tokens.
            p_RC: predicted probabilities, of all rows or of some.
            rows: which tokens those are of; all rows that there are if none are given.
        """


@dataclass(frozen=True)
class Sampled:
    """Labels drawn from the model's own predictions: the true Fisher, which needs none from outside.

    The labels of a window depend on the seed and the number of the window alone, not on the batch it is in; a window
    that was there before has the labels it had, so that a text that is given twice says what it says once.

    Attributes:
        seed: of the draws.
        like: labels of a data set; where those have none, none is drawn.
        draw: its number, where a token is given several labels.
    """

    seed: int
    like: torch.Tensor | None = None
    draw: int = 0
    _first: dict[bytes, int] = field(default_factory=dict, compare=False, repr=False)

    def pass_over(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Take note of windows that another process draws for, the first ones: those that come again are told by them.

        Args:
            tokens: of the windows ``(windows, length)``.
            mask: 0 for padding, ``(at least as many windows, length)``; none without padding.
        """
        for number, tokens_T in enumerate(tokens):
            real_T = tokens_T if mask is None else tokens_T.masked_fill(~mask[number].bool(), NONE)
            self._first.setdefault(real_T.cpu().numpy().tobytes(), number)

    def __call__(
        self, window: int, tokens_T: torch.Tensor, p_RC: torch.Tensor, rows: range | None = None
    ) -> torch.Tensor:
        """Draw one label for every row: the first whose cumulative probability exceeds a uniform number.

        ``torch.multinomial`` draws a number for every class, which takes longer than a large part of the model.
        """
        number = self._first.setdefault(tokens_T.cpu().numpy().tobytes(), window)
        generator = _generator(self.seed, number, self.draw)
        uniform_R1 = torch.rand(len(p_RC if rows is None else tokens_T), 1, generator=generator)
        drawn_R = _first_above(p_RC, _of(rows, uniform_R1).to(p_RC.device))
        if self.like is None:
            return drawn_R
        given_R = Given(self.like)(window, tokens_T, p_RC, rows).to(p_RC.device)
        if len(given_R) != len(drawn_R):
            raise ParedError(f"labels: window {window} has {len(given_R)}, the head predicts {len(drawn_R)}")
        return drawn_R.masked_fill(given_R == NONE, NONE)


@dataclass(frozen=True)
class NextToken:
    """The next token of the text: the loss of a causal language model. The last token has no label."""

    def __call__(
        self,
        window: int,  # noqa: ARG002
        tokens_T: torch.Tensor,
        p_RC: torch.Tensor,  # noqa: ARG002
        rows: range | None = None,
    ) -> torch.Tensor:
        """Shift the tokens by one."""
        return _of(rows, torch.cat([tokens_T[1:], tokens_T.new_full((1,), NONE)]))


@dataclass(frozen=True)
class Given:
    """Labels from a data set.

    Attributes:
        labels: one class a window ``(windows,)`` or a token ``(windows, length)``; -100 where there is none.
    """

    labels: torch.Tensor

    def __call__(
        self,
        window: int,
        tokens_T: torch.Tensor,
        p_RC: torch.Tensor,  # noqa: ARG002
        rows: range | None = None,
    ) -> torch.Tensor:
        """Look the labels up."""
        if window >= len(self.labels):
            raise ParedError(f"labels: window {window} has none; {len(self.labels)} were given")
        labels_R = self.labels[window].reshape(-1)
        if rows is not None and len(labels_R) != len(tokens_T):
            raise ParedError(f"labels: window {window} has {len(labels_R)}, the head predicts {len(tokens_T)}")
        return _of(rows, labels_R)


@dataclass(frozen=True)
class Scores:
    """Scores of a data set for a head that predicts one number a window; the loss is the squared error.

    Attributes:
        given: ``(windows,)``, NaN where there is none. Without them scores are drawn from what the head predicts, with
            the Gaussian whose negative log-likelihood the squared error is, of variance ½: the true Fisher.
        seed: of the draws.
        draw: its number, where a window is given several scores.
    """

    given: torch.Tensor | None = None
    seed: int = 0
    draw: int = 0

    def __call__(
        self,
        window: int,
        tokens_T: torch.Tensor,  # noqa: ARG002
        p_RC: torch.Tensor,
        rows: range | None = None,  # noqa: ARG002 - a window has one score
    ) -> torch.Tensor:
        """Return the scores ``(R,)`` of one window from its number and the scores predicted ``(R, 1)``."""
        if self.given is None:
            generator = _generator(self.seed, window, self.draw)
            drawn_R = torch.randn(len(p_RC), generator=generator).to(p_RC.device)
            return p_RC[:, 0] + math.sqrt(0.5) * drawn_R
        if window >= len(self.given):
            raise ParedError(f"labels: window {window} has none; {len(self.given)} were given")
        return self.given[window].reshape(-1).float()


def choose_labels(
    model: PreTrainedModel,
    loss: Literal["sampled", "labels"],
    seed: int,
    given: torch.Tensor | None = None,
    draw: int = 0,
) -> Labels:
    """Return the labels for a model's loss.

    Args:
        model: a causal language model, or an encoder with a head that predicts classes, of a text or its tokens, or one
            score.
        loss: ``sampled`` from the model's predictions, or the ``labels`` given, for a language model the next token.
        seed: for sampling.
        given: ``(windows,)`` or ``(windows, length)``, -100 where there is none; none is sampled there either.
        draw: number of a sample, of which a token may be given several; each number has labels of its own.

    Raises:
        ParedError: the head predicts something else, or labels are needed and none were given.
    """
    problem = getattr(model.config, "problem_type", None)
    outputs = int(getattr(model.config, "num_labels", 2))
    if problem == "multi_label_classification" or (problem == "regression" and outputs > 1):
        raise ParedError(
            f"{type(model).__name__}: gradients of a {problem} head of {outputs} outputs are not supported; those of "
            "classes and of one score are"
        )
    if outputs == 1 and not model.can_generate():
        if loss == "labels" and given is None:
            raise ParedError(
                f"{type(model).__name__} predicts a score, and the text holds none: calibrate on scored examples "
                "(glue:stsb:train, file:PATH), or use scores sampled from its predictions"
            )
        return Scores(given if loss == "labels" else None, seed, draw)
    if loss == "sampled":
        return Sampled(seed, given, draw)
    if given is not None:
        return Given(given)
    if not model.can_generate():
        raise ParedError(
            f"{type(model).__name__} is not a causal language model, so a text has no labels: calibrate on labelled "
            "examples (glue:NAME:SPLIT, ner:NAME:SPLIT, file:PATH), or use labels sampled from its predictions"
        )
    return NextToken()


def logit_gradient(
    logits: torch.Tensor,
    window: int,
    tokens_T: torch.Tensor,
    labels: Labels,
    mask_T: torch.Tensor | None = None,
    rows: range | None = None,
) -> torch.Tensor:
    """Return the gradient of the summed loss, zero where there is no label.

    Of the cross entropy ``softmax(z) - onehot(y)``; of the squared error of scores ``2 (z - y)``. Taken in closed form,
    so that besides the logits there is one float32 tensor of their size.

    Args:
        logits: of one window, ``(1, T, C)`` or ``(1, C)``, or of some of its tokens.
        window: its number.
        tokens_T: its tokens.
        labels: where the labels come from.
        mask_T: which tokens are no padding; padding has no label and is never a next token.
        rows: which tokens the logits are of; all if none are given.

    Raises:
        ParedError: NaN in the logits, a single class, or labels that do not fit them.
    """
    if isinstance(labels, Scores):
        return _score_gradient(logits, window, tokens_T, labels)
    classes = logits.shape[-1]
    if classes < 2:
        raise ParedError("the head outputs one logit, a regression; only classes have labels")
    p_RC = logits.detach().reshape(-1, classes).softmax(dim=-1, dtype=torch.float32)
    if not p_RC.sum().isfinite():
        raise ParedError("the head outputs NaN or infinity; check its weights, or load the model in float32")
    if mask_T is not None:
        tokens_T = tokens_T.masked_fill(~mask_T, NONE)
    labels_R = labels(window, tokens_T, p_RC, rows).to(p_RC.device)
    if len(labels_R) != len(p_RC):
        raise ParedError(f"labels: window {window} has {len(labels_R)}, the head predicts {len(p_RC)}")
    has_R = labels_R != NONE
    if mask_T is not None and logits.ndim == 3:  # a row a token, not one for the whole window
        has_R &= _of(rows, mask_T).to(has_R.device)
    outside = labels_R[has_R & ((labels_R < 0) | (labels_R >= classes))]
    if len(outside):
        raise ParedError(f"labels: window {window} has label {int(outside[0])}, the head has {classes} classes")
    labelled = has_R.nonzero().squeeze(1)
    p_RC[labelled, labels_R[labelled]] -= 1
    p_RC[~has_R] = 0
    return p_RC.reshape(logits.shape).to(logits.dtype)


def _score_gradient(logits: torch.Tensor, window: int, tokens_T: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Return ``2 (z - y)``, the gradient of the squared error, zero where there is no score."""
    if logits.numel() != 1:
        raise ParedError(
            f"the head outputs logits {tuple(logits.shape)} for a window; scores need a head that outputs one number"
        )
    z_11 = logits.detach().reshape(1, 1).float()
    if not z_11.isfinite().all():
        raise ParedError("the head outputs NaN or infinity; check its weights, or load the model in float32")
    y_1 = scores(window, tokens_T, z_11).to(z_11.device)
    if len(y_1) != 1:
        raise ParedError(f"labels: window {window} has {len(y_1)}, the head predicts 1")
    return (2 * (z_11[:, 0] - y_1)).nan_to_num(nan=0.0).reshape(logits.shape).to(logits.dtype)


def _of(rows: range | None, values_T: torch.Tensor) -> torch.Tensor:
    """Return the entries of some tokens; all if none are named."""
    return values_T if rows is None else values_T[rows.start : rows.stop]


def _generator(seed: int, window: int, draw: int) -> torch.Generator:
    """Return what the labels of a window are drawn with, of its own for every seed, window and draw."""
    return torch.Generator().manual_seed(1_000_003 * seed + window + 2_654_435_761 * draw)  # of which 32 bits count


def _first_above(p_RC: torch.Tensor, uniform_R1: torch.Tensor) -> torch.Tensor:
    """Return for every row the first class at which the cumulative probability exceeds a share of the whole, ``(R,)``.

    In two steps, the section first: a cumulative sum over all classes of a large vocabulary is the slowest thing there
    is held besides the model.
    """
    classes = p_RC.shape[1]
    p_RSC = torch.nn.functional.pad(p_RC, (0, -classes % SECTION)).reshape(len(p_RC), -1, SECTION)
    sections_RS = p_RSC.sum(dim=-1).cumsum(dim=-1)
    wanted_R1 = uniform_R1 * sections_RS[:, -1:]
    section_R1 = torch.searchsorted(sections_RS, wanted_R1, right=True).clamp(max=sections_RS.shape[1] - 1)
    before_R1 = torch.where(section_R1 > 0, sections_RS.gather(1, (section_R1 - 1).clamp(min=0)), 0)
    within_RC = p_RSC.take_along_dim(section_R1[..., None], dim=1).squeeze(1).cumsum(dim=-1)
    within_R1 = torch.searchsorted(within_RC, wanted_R1 - before_R1, right=True).clamp(max=SECTION - 1)
    return (section_R1 * SECTION + within_R1).clamp(max=classes - 1).squeeze(1)
