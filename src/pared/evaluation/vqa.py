"""Questions about images, answered in a few words and counted as right if an annotator gave the very answer.

The prompt and the request for a short answer are those of LLaVA-1.5 (Liu et al., 2023); answers are written one way
before they are compared, as in VQA (Antol et al., 2015): lower case, numbers as digits, no articles, no punctuation.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin

from pared.data.files import read_rows
from pared.errors import ParedError
from pared.evaluation.batch_size import BatchSize
from pared.evaluation.generation import GREEDY, padding_left
from pared.evaluation.judging import Result, standard_error
from pared.models.architecture import first_line
from pared.models.source import find_model
from pared.models.trust import trusted

SHORT = "Answer the question using a single word or phrase."
TOKENS = 16
BATCH = 4
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS)}}
ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class Question:
    """A question about an image.

    Attributes:
        image: its file.
        text: the question.
        answers: of annotators.
    """

    image: Path
    text: str
    answers: tuple[str, ...]


def questions_of(path: Path, limit: int | None = None) -> list[Question]:
    """Read questions about images.

    Args:
        path: a .jsonl or .jsonl.gz file of rows with ``image`` (a file, seen from the folder of this one),
            ``question`` and ``answers``, a list of texts.
        limit: the most rows, from the first.

    Raises:
        ParedError: not such a file, a row that is none, an image that is not there, or nothing to ask; names file and
            row.
    """
    if limit is not None and limit < 1:
        raise ParedError(f"{path}: a limit of {limit} rows leaves nothing to measure")
    found = list(_questions(path, limit))
    if not found:
        raise ParedError(f"{path} has no rows")
    return found


def _questions(path: Path, limit: int | None) -> Iterator[Question]:
    for number, row in islice(read_rows(path, "file of questions"), limit):
        fields = row if isinstance(row, dict) else {}
        answers = fields.get("answers")
        answers = answers if isinstance(answers, list) and answers else [None]
        if not all(map(_is_text, (fields.get("image"), fields.get("question"), *answers))):
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ParedError(f"{path}, row {number}: expected 'image', 'question' and 'answers', one text or more; "
                             f"got {found}")  # fmt: skip
        image = path.parent / fields["image"]
        if not image.is_file():
            raise ParedError(f"{path}, row {number}: no image {image}")
        yield Question(image, fields["question"], tuple(answers))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def processor_of(name: str) -> ProcessorMixin:
    """Load what turns images and text into a model's inputs.

    Raises:
        ParedError: the model has none, and so reads no images.
    """
    source = find_model(name)
    try:
        found = AutoProcessor.from_pretrained(source.location, trust_remote_code=trusted())
    except Exception as error:  # many kinds
        raise ParedError(f"model {name!r} has no readable processor of images ({first_line(error)})") from None
    if getattr(found, "image_processor", None) is None:
        raise ParedError(f"model {name!r} is not a vision-language model: it has no image processor, only a tokenizer")
    return found


@torch.no_grad()
def answer_questions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    batch: int | BatchSize = BATCH,
    on_question: Callable[[], None] = lambda: None,
) -> Result:
    """Let a model answer questions about images, and count.

    Args:
        model: one that reads images and text and writes text, dense or compressed.
        processor: of the model.
        questions: what is asked.
        batch: questions at a time.
        on_question: called for every question that is answered.

    Returns:
        ``exact_match``: the share of answers that are one of the annotators'.

    Raises:
        ParedError: an image cannot be read, or the processor cannot ask.
    """
    answers: dict[int, str] = {}
    size = BatchSize.of(batch)

    def answered(chosen: Sequence[int]) -> list[str]:
        with padding_left(processor.tokenizer):
            inputs = _inputs(processor, [questions[index] for index in chosen]).to(model.device)
            pad = processor.tokenizer.pad_token_id
            ids = model.generate(**inputs, **GREEDY, max_new_tokens=TOKENS, pad_token_id=pad)
        new = ids[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]

    if size.is_found and questions:  # how many tokens an image is, only the processor knows
        with padding_left(processor.tokenizer):
            size.fit(model, _inputs(processor, questions[:1])["input_ids"].shape[1] + TOKENS)
    for chosen, texts in size.over(range(len(questions)), answered):
        answers.update(zip(chosen, texts, strict=True))
        for _ in chosen:
            on_question()
    written = [answers[index] for index in range(len(questions))]
    right = [is_right(text, one.answers) for text, one in zip(written, questions, strict=True)]
    mean = sum(right) / len(right)
    rows = tuple(
        {"row": index, "answers": [text], "verdicts": [{"exact_match": own}]}
        for index, (text, own) in enumerate(zip(written, right, strict=True))
    )
    errors = {"exact_match": standard_error([float(own) for own in right], mean)}
    return Result("vqa", {"exact_match": mean}, errors, len(rows), 0, rows)


def is_right(answer: str, answers: Sequence[str]) -> bool:
    """Whether an answer is one of the annotators', both written one way."""
    return written_one_way(answer) in {written_one_way(one) for one in answers}


def written_one_way(answer: str) -> str:
    """Return an answer in lower case, numbers as digits, without articles, punctuation and surplus blanks."""
    plain = re.sub(r"(?<=\d)[,](?=\d)", "", answer.lower())
    plain = re.sub(r"(?<!\d)\.|\.(?!\d)|[-;/\[\]\"{}()=+\\_<>@`,?!:*]", " ", plain.replace("'", ""))
    return " ".join(DIGITS.get(word, word) for word in plain.split() if word not in ARTICLES)


def _inputs(processor: ProcessorMixin, questions: Sequence[Question]) -> Any:
    images = [_image(question.image) for question in questions]
    prompts = [_prompt(processor, question.text) for question in questions]
    try:
        first = processor.tokenizer.bos_token
        begun = bool(first) and prompts[0].startswith(first)  # by the template
        special = {"add_special_tokens": False} if begun else {}
        return processor(images=images, text=prompts, padding=True, return_tensors="pt", **special)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ParedError(
            f"{type(processor).__name__} cannot ask about {questions[0].image} ({' '.join(str(error).split())[:200]})"
        ) from error


def _image(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ParedError("images are read by pillow; install it with: pip install pillow") from None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ParedError(f"image {path}: not readable ({error})") from None


def _prompt(processor: ProcessorMixin, question: str) -> str:
    asked = f"{question}\n{SHORT}"
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": asked}]
        turns = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    token = getattr(processor, "image_token", None)
    if token is None:
        raise ParedError(f"{type(processor).__name__} has neither a chat template nor an image token to ask with")
    return f"USER: {token}\n{asked} ASSISTANT:"
