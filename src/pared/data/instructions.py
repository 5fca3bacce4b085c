"""Instructions with answers: prompts made by a template, and windows in which only the answer is learned."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pared.data.chat import Message, is_conversation, messages_of, rendered
from pared.data.data_sets import ALPACA, ALPACA_CLEANED, GSM8K_TEST, GSM8K_TRAIN, MATH500, MBPP
from pared.data.files import read_rows, require_there
from pared.data.templates import prompt
from pared.errors import ParedError
from pared.io.files import path_of
from pared.names import did_you_mean

if TYPE_CHECKING:  # names are looked up without torch
    from transformers import PreTrainedTokenizerBase

    from pared.data.windows import Windows

log = logging.getLogger(__name__)

PREFIX = "instruct:"
MBPP_TRAIN = range(601, 975)  # the authors' part to train on; `pared eval --tasks mbpp` measures on another
SETS = {
    "gsm8k:train": GSM8K_TRAIN,
    "gsm8k:test": GSM8K_TEST,
    "math500": MATH500,
    "mbpp:train": MBPP,
    "alpaca": ALPACA,
    "alpaca-cleaned": ALPACA_CLEANED,
}
# The fields of a row that are asked and answered, the first pair that is there.
FIELDS = (
    ("prompt", "response"),
    ("query", "response"),
    ("instruction", "output"),
    ("question", "answer"),
    ("problem", "solution"),
    ("text", "code"),
)


@dataclass(frozen=True)
class Instruction:
    """What is asked, perhaps with an input, and the answer; a conversation is a prompt already."""

    instruction: str
    answer: str
    input: str = ""
    is_prompt: bool = False


def require_instructions(name: str) -> None:
    """Check that a name is one of instructions, without reading them.

    Args:
        name: as :func:`find_instructions`.

    Raises:
        ParedError: nothing of that name; offers the nearest.
    """
    asked = name.removeprefix(PREFIX)
    if asked in SETS:
        SETS[asked].origin(f"instructions {name!r}")
        return
    path = path_of(asked)
    if ".jsonl" not in path.suffixes:
        raise ParedError(f"unknown instructions {name!r}; {did_you_mean(asked, SETS)}, or a .jsonl file")
    require_there(path, "file")


def find_instructions(name: str, tokenizer: "PreTrainedTokenizerBase | None" = None) -> tuple[list[Instruction], str]:
    """Find instructions by name, and say where they are from.

    Args:
        name: ``instruct:gsm8k:train``, another known set, or ``instruct:PATH`` (.jsonl or .jsonl.gz) with the fields
            ``prompt`` and ``response``, another pair that is usual, or ``messages``, of which the last is the answer.
        tokenizer: of the model, whose chat template makes a prompt of a conversation.

    Raises:
        ParedError: nothing of that name, unreadable, or a row without such fields; names the file and the row.
    """
    require_instructions(name)
    asked = name.removeprefix(PREFIX)
    if asked in SETS:
        what = f"instructions {name!r}"
        origin, rows = SETS[asked].origin(what), list(SETS[asked].rows(what))
    else:
        path = path_of(asked)
        origin = str(path)
        rows = [(f"{path}, row {number}", row) for number, row in read_rows(path)]
    if asked == "mbpp:train":
        rows = [(which, row) for which, row in rows if isinstance(row, dict) and row.get("task_id") in MBPP_TRAIN]
    found = [_instruction(which, row, tokenizer) for which, row in rows]
    if not found:
        raise ParedError(f"instructions {name!r} ({origin}) have no rows")
    return found, origin


def cut_instructions(
    name: str, tokenizer: "PreTrainedTokenizerBase", length: int, count: int | None, template: str
) -> "Windows":
    """Tokenise prompt and answer, one window each, padded on the right; only the answer and its end have labels.

    Args:
        name: as :func:`find_instructions`.
        tokenizer: of the model.
        length: the most tokens of a window. What is longer is cut; an example whose prompt leaves none is left out.
        count: how many, from the first; None means all.
        template: of the prompts.

    Raises:
        ParedError: as :func:`find_instructions`, or every answer is cut off.
    """
    from pared.data.windows import NO_LABEL, Windows, digest_of, padded

    examples, origin = find_instructions(name, tokenizer)
    start = _own_start(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows: list[tuple[list[int], list[int]]] = []
    for example in examples[:count]:
        made = example.instruction if example.is_prompt else prompt(template, example.instruction, example.input)
        asked, answer = _pieces(tokenizer, made, example.answer)
        asked = asked if asked[: len(start)] == start else [*start, *asked]  # a chat template may begin with it
        answer = answer if set(end) & set(answer[-2:]) else [*answer, *end]  # and end a message with it, and a newline
        if len(asked) < length:
            rows.append(((asked + answer)[:length], ([NO_LABEL] * len(asked) + answer)[:length]))
    left_out = len(examples[:count]) - len(rows)
    if not rows:
        raise ParedError(f"instructions {name!r}: every prompt fills its {length} tokens; use a larger length")
    if left_out:
        log.warning(
            "%r: %d of %d prompts fill %d tokens and are left out", name, left_out, len(rows) + left_out, length
        )
    tokens = padded([ids for ids, _ in rows], tokenizer.pad_token_id or 0)
    labels = padded([labels for _, labels in rows], NO_LABEL)
    mask = padded([[1] * len(ids) for ids, _ in rows], 0)
    return Windows(tokens, digest_of(tokens, mask, labels), name, origin, False, mask, labels)


def _instruction(which: str, row: Any, tokenizer: "PreTrainedTokenizerBase | None") -> Instruction:
    if isinstance(row, dict):
        for asked, answer in FIELDS:
            if isinstance(row.get(asked), str) and isinstance(row.get(answer), str):
                beside = row.get("input")
                return Instruction(row[asked], row[answer], beside if isinstance(beside, str) else "")
    if is_conversation(row):
        return _conversation(which, messages_of(which, row), tokenizer)
    found = "null" if row is None else sorted(row) if isinstance(row, dict) else type(row).__name__
    pairs = ", ".join(f"{asked} and {answer}" for asked, answer in FIELDS)
    raise ParedError(f"{which}: expected strings {pairs}; or a list in messages; got {found}")


def _conversation(which: str, messages: list[Message], tokenizer: "PreTrainedTokenizerBase | None") -> Instruction:
    """Return the last message as the answer to what was said before, both as the chat template has them."""
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ParedError(f"{which}: expected a conversation that ends with the answer of 'assistant', got "
                         f"{', '.join(one['role'] for one in messages)}")  # fmt: skip
    asked = rendered(which, messages[:-1], tokenizer, answer_follows=True)
    whole = rendered(which, messages, tokenizer)
    answer = whole[len(asked) :] if whole.startswith(asked) else messages[-1]["content"]
    return Instruction(asked, answer, is_prompt=True)


def _own_start(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the token that the tokenizer itself puts before every text, if it does."""
    first = tokenizer.bos_token_id
    return [first] if first is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [first] else []


def _pieces(tokenizer: "PreTrainedTokenizerBase", asked: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt, and those of its answer as one text with it where no token spans the two."""
    prompt_ids, whole = _ids(tokenizer, asked), _ids(tokenizer, asked + answer)
    if whole[: len(prompt_ids)] == prompt_ids:
        return prompt_ids, whole[len(prompt_ids) :]
    return prompt_ids, _ids(tokenizer, answer)


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
