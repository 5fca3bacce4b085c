"""Questions about images, the answers on record, and what an answer to one counts; nothing here needs torch.

Answers are written one way before they are compared, as in VQA (Antol et al., 2015): lower case, numbers as digits, no
articles, no punctuation. Requests for a short answer are those of LLaVA-1.5 (Liu et al., 2023).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pared.data.files import read_rows
from pared.errors import ParedError

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
ENOUGH = 3  # annotators whose answer is wholly right
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS)}}
ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class Question:
    """A question about an image, or about none.

    Attributes:
        image: its file, or as pillow has it; none if there is no image.
        text: the question.
        answers: of annotators; of a choice the right letter.
        by: how an answer is judged: ``exact`` for one of the annotators', ``annotators`` for how many of them gave it
            too, ``letter`` for the letter of a choice.
    """

    image: Any
    text: str
    answers: tuple[str, ...]
    by: Literal["exact", "annotators", "letter"] = "exact"

    def judged(self, answer: str) -> dict[str, float]:
        """Return what an answer counts, by metric."""
        if self.by == "letter":
            return {"acc": letter_of(answer) == self.answers[0]}
        exact: dict[str, float] = {"exact_match": is_right(answer, self.answers)}
        return exact if self.by == "exact" else {"vqa_score": annotator_score(answer, self.answers), **exact}


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


def annotator_score(answer: str, answers: Sequence[str]) -> float:
    """Return VQA's accuracy: of the annotators but one, how many gave the answer, over three and at most 1.

    The mean over leaving out each of them, so that of ten annotators one makes 0.3, two 0.6, three 0.9 and four 1.
    """
    own, given = written_one_way(answer), [written_one_way(one) for one in answers]
    matches = given.count(own)
    counts = [min(1.0, (matches - (one == own)) / ENOUGH) for one in given]
    return sum(counts) / len(counts)


def letter_of(answer: str) -> str | None:
    """Return the letter that an answer gives: alone, before its text (``B. the sun``), or where it says so."""
    text = answer.strip()
    found = re.match(r"\(?([A-Z])\)?(?:[.:),]|$)", text) or re.search(r"answer is:?\s*\(?([A-Z])\b", text)
    return found[1] if found else None


def is_right(answer: str, answers: Sequence[str]) -> bool:
    """Whether an answer is one of the annotators', both written one way."""
    return written_one_way(answer) in {written_one_way(one) for one in answers}


def written_one_way(answer: str) -> str:
    """Return an answer in lower case, numbers as digits, without articles, punctuation and surplus blanks."""
    plain = re.sub(r"(?<=\d)[,](?=\d)", "", answer.lower())
    plain = re.sub(r"(?<!\d)\.|\.(?!\d)|[-;/\[\]\"{}()=+\\_<>@`,?!:*]", " ", plain.replace("'", ""))
    return " ".join(DIGITS.get(word, word) for word in plain.split() if word not in ARTICLES)
