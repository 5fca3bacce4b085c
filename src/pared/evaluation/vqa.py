"""Questions about images, answered in a few words or by a letter; prompts are LLaVA-1.5's (Liu et al., 2023)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin

from pared.errors import ParedError
from pared.evaluation.batch_size import BatchSize
from pared.evaluation.generation import GREEDY, padding_left
from pared.evaluation.judging import Result, standard_error
from pared.evaluation.questions import LETTER, SHORT, Question
from pared.models.architecture import first_line
from pared.models.source import find_model
from pared.models.trust import trusted

TOKENS = 16
BATCH = 4


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
        The means of what :meth:`Question.judged` counts; of questions with and without an image apart, where there are
        both.

    Raises:
        ParedError: an image cannot be read, or the processor cannot ask.
    """
    rows: dict[int, dict[str, Any]] = {}
    apart: dict[str, list[dict[str, float]]] = {}
    size = BatchSize.of(batch)

    def answered(chosen: Sequence[int]) -> list[tuple[Question, str]]:
        asked = [questions[index] for index in chosen]
        with padding_left(processor.tokenizer):
            inputs = _inputs(processor, asked).to(model.device)
            pad = processor.tokenizer.pad_token_id
            ids = model.generate(**inputs, **GREEDY, max_new_tokens=TOKENS, pad_token_id=pad)
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [(one, text.strip()) for one, text in zip(asked, texts, strict=True)]

    if size.is_found and questions:  # how many tokens an image is, only the processor knows
        with padding_left(processor.tokenizer):
            size.fit(model, _inputs(processor, questions[:1])["input_ids"].shape[1] + TOKENS)
    for chosen, found in size.over(range(len(questions)), answered):
        for index, (question, text) in zip(chosen, found, strict=True):
            verdict = question.judged(text)
            rows[index] = {"row": index, "answers": [text], "verdicts": [verdict]}
            apart.setdefault("without" if question.image is None else "with", []).append(verdict)
            on_question()
    kept = tuple(rows[index] for index in range(len(questions)))
    whole = _counted([row["verdicts"][0] for row in kept])
    groups = {name: _counted(own) for name, own in sorted(apart.items())}
    by_image = {"image": groups} if len(groups) > 1 else {}
    return Result("vqa", whole["metrics"], whole["errors"], len(kept), 0, kept, by_image)


def _counted(verdicts: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return the number of rows, and of every metric the mean and its standard error."""
    values = {name: [float(one[name]) for one in verdicts] for name in verdicts[0]}
    means = {name: sum(own) / len(own) for name, own in values.items()}
    errors = {name: standard_error(own, means[name]) for name, own in values.items()}
    return {"rows": len(verdicts), "metrics": means, "errors": errors}


def _inputs(processor: ProcessorMixin, questions: Sequence[Question]) -> Any:
    images = [_image(question.image) for question in questions if question.image is not None]
    prompts = [_prompt(processor, question) for question in questions]
    try:
        first = processor.tokenizer.bos_token
        begun = bool(first) and prompts[0].startswith(first)  # by the template
        special = {"add_special_tokens": False} if begun else {}
        return processor(images=images or None, text=prompts, padding=True, return_tensors="pt", **special)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ParedError(
            f"{type(processor).__name__} cannot ask {questions[0].text[:60]!r} ({' '.join(str(error).split())[:200]})"
        ) from error


def _image(path: Any) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ParedError("images are read by pillow; install it with: pip install pillow") from None
    if isinstance(path, Image.Image):
        return path.convert("RGB")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ParedError(f"image {path}: not readable ({error})") from None


def _prompt(processor: ProcessorMixin, question: Question) -> str:
    asked = f"{question.text}\n{LETTER if question.by == 'letter' else SHORT}"
    sees = question.image is not None
    if getattr(processor, "chat_template", None):
        content = [*([{"type": "image"}] if sees else []), {"type": "text", "text": asked}]
        turns = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    token = getattr(processor, "image_token", None)
    if token is None:
        raise ParedError(f"{type(processor).__name__} has neither a chat template nor an image token to ask with")
    return f"USER: {f'{token}{chr(10)}' if sees else ''}{asked} ASSISTANT:"
