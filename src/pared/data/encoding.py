"""Token windows of labelled examples, one each, with the labels as the model counts its classes."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pared.data.examples import Example, Examples, Label
from pared.data.labelled import SETS, find_examples, is_labelled
from pared.data.lengths import Length
from pared.data.texts import find_text
from pared.data.windows import NO_LABEL, Windows, cut, digest_of, padded
from pared.errors import ParedError
from pared.names import did_you_mean
from pared.schema.recipe import Sampling

log = logging.getLogger(__name__)


def cut_examples(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    length: int,
    samples: int | None,
    sampling: Sampling = "consecutive",
    seed: int = 0,
) -> Windows:
    """Tokenise examples as their model was trained, with special tokens, and pad them on the right to one length.

    Args:
        examples: the examples.
        tokenizer: of the model.
        config: of the model, which knows the numbers of its classes.
        length: the most tokens of an example; a longer one is cut. All are padded to the longest there is.
        samples: how many; None means all.
        sampling: ``consecutive`` takes the first, the others a seeded choice.
        seed: of the choice.

    Returns:
        One window an example, with its labels: of a token classification one for the first piece of a word, and -100
        for the others, for special tokens and for padding.

    Raises:
        ParedError: a label the model has no class for, a tokenizer that cannot pad or tell words apart, or an example
            without a token.
    """
    if length < 1 or (samples is not None and samples < 1):
        raise ParedError(f"labelled examples {examples.name!r}: cannot cut {samples} examples of {length} tokens")
    rows = list(examples.rows)
    if sampling != "consecutive":
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = [rows[index] for index in order]
    if samples is not None and samples > len(rows):
        log.warning("%r has only %d of the %d examples requested", examples.name, len(rows), samples)
    rows = rows[:samples]
    number_of = _scores(examples) if is_regression(config) else _class_numbers(examples, config)
    encoded = _encode(examples, rows, tokenizer, length)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    if not all(lengths):
        raise ParedError(f"labelled examples {examples.name!r}: example {lengths.index(0) + 1} has no tokens")
    padding = tokenizer.pad_token_id
    if padding is None:
        if len(set(lengths)) > 1:
            raise ParedError(f"labelled examples {examples.name!r}: this tokenizer has no padding token; give it one")
        padding = 0
    tokens = padded(encoded["input_ids"], padding)
    mask = padded([[1] * count for count in lengths], 0)
    segments = padded(encoded["token_type_ids"], 0) if "token_type_ids" in encoded else None
    if examples.by_word:
        given = [
            _first_pieces(encoded.word_ids(index), [int(number_of(label)) for label in _as_tuple(row.label)])
            for index, row in enumerate(rows)
        ]
        labels = padded(given, NO_LABEL)
    else:
        kind = torch.float32 if is_regression(config) else torch.int64
        labels = torch.tensor([number_of(row.label) for row in rows], dtype=kind)
    mask_or_none = None if bool(mask.all()) else mask
    segments = segments if segments is not None and bool(segments.any()) else None  # zeros are a model's own default
    digest = digest_of(tokens, mask_or_none, labels, segments)
    return Windows(tokens, digest, examples.name, examples.origin, False, mask_or_none, labels, segments)


def find_windows(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    causal: bool,
    length: int | Length,
    samples: int | None,
    sampling: Sampling = "consecutive",
    seed: int = 0,
) -> Windows:
    """Return what a name to calibrate on stands for, cut: labelled examples, or the windows of a text.

    Args:
        name: as ``find_examples`` or ``find_text``; a file that is both is read as a text for a language model.
        tokenizer: of the model.
        config: of the model.
        causal: whether the model is a causal language model; the others take labelled examples.
        length: tokens in a window, or the most of an example; a default is what the model takes.
        samples: how many windows or examples; None means all.
        sampling: where windows start, or which examples are taken.
        seed: of the sampling.

    Raises:
        ParedError: as ``find_examples``, ``cut_examples``, ``find_text`` and ``cut``; or a language model is given
            examples that are no text.
    """
    if causal and name.startswith(SETS):
        raise ParedError(f"{name!r} are labelled examples for a classifier, and this is a language model; name a text")
    if is_labelled(name) and not causal:
        most = (length if isinstance(length, Length) else Length(length)).within(config, "labelled examples")
        return cut_examples(find_examples(name), tokenizer, config, most.tokens, samples, sampling, seed)
    fitting = (length if isinstance(length, Length) else Length(length)).within(config)
    return cut(find_text(name, tokenizer=tokenizer), tokenizer, fitting, samples, sampling, seed)


def _encode(examples: Examples, rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, length: int) -> Any:
    if examples.by_word and not tokenizer.is_fast:
        raise ParedError(f"labelled examples {examples.name!r}: {type(tokenizer).__name__} does not tell which word a "
                         "token belongs to; use the model's fast tokenizer")  # fmt: skip
    try:
        if examples.by_word:
            words = [list(row.texts) for row in rows]
            return tokenizer(words, is_split_into_words=True, truncation=True, max_length=length)
        pairs = any(len(row.texts) > 1 for row in rows)
        if pairs and not all(len(row.texts) > 1 for row in rows):
            raise ParedError(f"labelled examples {examples.name!r}: some are pairs of texts and some are not")
        second = [row.texts[1] for row in rows] if pairs else None
        return tokenizer([row.texts[0] for row in rows], second, truncation=True, max_length=length)
    except (ValueError, AssertionError, TypeError) as error:  # each tokenizer has its own conditions
        raise ParedError(
            f"labelled examples {examples.name!r}: {type(tokenizer).__name__} cannot take them "
            f"({type(error).__name__}: {' '.join(str(error).split())[:160]})"
        ) from None


def is_regression(config: PretrainedConfig) -> bool:
    """Whether a model predicts one number, a score, and no classes."""
    return int(config.num_labels) == 1


def _scores(examples: Examples) -> Callable[[object], float]:
    """Return what takes a label for the score it is."""

    def score_of(label: object) -> float:
        if isinstance(label, (int, float)):
            return float(label)
        raise ParedError(
            f"labelled examples {examples.name!r}: label {label!r} is not a score, and this model predicts one number"
        )

    return score_of


def _class_numbers(examples: Examples, config: PretrainedConfig) -> Callable[[object], int]:
    """Return what turns a label into the number of the model's class."""
    classes = int(config.num_labels)
    named: dict[str, int] = dict(getattr(config, "label2id", None) or {})
    nameless = all(name.startswith("LABEL_") for name in named)
    if nameless and len(examples.classes) == classes:
        named = {name: number for number, name in enumerate(examples.classes)}

    def number_of(label: object) -> int:
        if isinstance(label, int):
            if 0 <= label < classes or label == NO_LABEL:
                return label
            raise ParedError(f"labelled examples {examples.name!r}: label {label}, but the model has {classes} classes")
        if str(label) in named:
            return named[str(label)]
        if isinstance(label, float):
            raise ParedError(f"labelled examples {examples.name!r}: label {label:g} is a score, and the model predicts "
                             f"{classes} classes; a model of one label predicts scores")  # fmt: skip
        raise ParedError(
            f"labelled examples {examples.name!r}: the model has no class {label!r}; {did_you_mean(str(label), named)}"
        )

    return number_of


def _as_tuple(label: Label | tuple[Label, ...]) -> tuple[Label, ...]:
    return label if isinstance(label, tuple) else (label,)


def _first_pieces(words: Sequence[int | None], numbers: Sequence[int]) -> list[int]:
    """Return the label of every token: that of its word if it is the first piece of one."""
    previous = [None, *words]
    return [
        NO_LABEL if word is None or word == before else numbers[word]
        for word, before in zip(words, previous, strict=False)
    ]
