"""Questions about images by name: VQAv2, TextVQA and ScienceQA, from files under ``PARED_DATA`` or from the Hub."""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from pared.data.data_sets import DataSet
from pared.data.files import data_file, data_folder, require_there
from pared.data.hub import HubSet
from pared.errors import ParedError
from pared.evaluation.questions import Question, questions_of
from pared.io.files import path_of
from pared.names import did_you_mean

Row = Mapping[str, Any]


@dataclass(frozen=True)
class VisionSet:
    """Questions by name.

    Attributes:
        data: their rows; in a file ``image`` is the name of an image, as seen from the folder of the file.
        question: from a row and its image to the question, None where the row is none.
        expected: what a row needs, for messages.
    """

    data: DataSet
    question: Callable[[Row, Any], Question | None]
    expected: str


def _annotated(row: Row, image: Any) -> Question | None:
    """Return a question that annotators answered: texts, or on the Hub mappings that hold one."""
    answers: list[Any] = [one.get("answer") if isinstance(one, Mapping) else one for one in row.get("answers") or ()]
    right = answers and all(isinstance(one, str) for one in answers) and isinstance(row.get("question"), str)
    return Question(image, row["question"], tuple(answers), "annotators") if right and image is not None else None


def _chosen(row: Row, image: Any) -> Question | None:
    """Return a question with choices, behind the hint that it may have, as LLaVA asks it."""
    question, choices, answer, hint = (row.get(name) for name in ("question", "choices", "answer", "hint"))
    if not isinstance(question, str) or not isinstance(answer, int) or not 0 <= answer < len(choices or ()):
        return None
    lines = [f"Context: {hint}"] if isinstance(hint, str) and hint.strip() else []
    letters = string.ascii_uppercase
    lines += [question, *(f"{letter}. {choice}" for letter, choice in zip(letters, choices or (), strict=False))]
    return Question(image, "\n".join(lines), (letters[answer],), "letter")


ANNOTATED = "'image', 'question' and 'answers', one text or more"
VISION_SETS = {
    "vqav2": VisionSet(
        DataSet("vqa/vqav2_validation.jsonl", HubSet("lmms-lab/VQAv2", split="validation")), _annotated, ANNOTATED
    ),
    "textvqa": VisionSet(
        DataSet("vqa/textvqa_validation.jsonl", HubSet("lmms-lab/textvqa", split="validation")), _annotated, ANNOTATED
    ),
    "scienceqa": VisionSet(
        DataSet("vqa/scienceqa_test.jsonl", HubSet("derek-thomas/ScienceQA", split="test")),
        _chosen,
        "'question', 'choices', and 'answer' counted from 0, perhaps 'image' and 'hint'",
    ),
}


def require_questions(name: str) -> None:
    """Check that a name is one of questions about images, without reading them.

    Args:
        name: a set of :data:`VISION_SETS`, or a file.

    Raises:
        ParedError: neither; offers the nearest.
    """
    if name in VISION_SETS:
        VISION_SETS[name].data.origin(f"questions {name!r}")
    elif ".jsonl" not in path_of(name).suffixes and not path_of(name).exists():
        raise ParedError(f"unknown questions {name!r}; {did_you_mean(name, VISION_SETS)}, or a .jsonl file")
    else:
        require_there(path_of(name), "file of questions")


def find_questions(name: str, limit: int | None = None) -> Sequence[Question]:
    """Find questions about images.

    Args:
        name: a set of :data:`VISION_SETS`, or a file as :func:`pared.evaluation.questions.questions_of` reads it.
        limit: the most rows, from the first.

    Returns:
        Those of the Hub are made when they are asked for, as there are more images than memory holds.

    Raises:
        ParedError: nothing of that name, unreadable, a row that is none, or nothing to ask; names file and row.
    """
    require_questions(name)
    if name not in VISION_SETS:
        return questions_of(path_of(name), limit)
    if limit is not None and limit < 1:
        raise ParedError(f"{name}: a limit of {limit} rows leaves nothing to measure")
    chosen = VISION_SETS[name]
    if data_folder() is None:
        return _OnHub(chosen, limit)
    folder = data_file(chosen.data.file, f"questions {name!r}").parent
    found: list[Question] = []
    for which, row in chosen.data.rows(f"questions {name!r}"):
        if limit is not None and len(found) == limit:
            break
        found.append(_question(chosen, which, row, _image_beside(which, row, folder)))
    if not found:
        raise ParedError(f"{chosen.data.origin(name)} has no rows")
    return found


def _image_beside(which: str, row: Any, folder: Path) -> Path | None:
    named = row.get("image") if isinstance(row, Mapping) else None
    if not isinstance(named, str):
        return None
    if not (folder / named).is_file():
        raise ParedError(f"{which}: no image {folder / named}")
    return folder / named


def _question(chosen: VisionSet, which: str, row: Any, image: Any) -> Question:
    found = chosen.question(row, image) if isinstance(row, Mapping) else None
    if found is None:
        got = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ParedError(f"{which}: expected {chosen.expected}; got {got}")
    return found


class _OnHub(Sequence[Question]):
    """Questions of the Hub, each read when it is asked for."""

    def __init__(self, chosen: VisionSet, limit: int | None) -> None:
        self._set, self._rows = chosen, chosen.data.hub.table()
        self._count = len(self._rows) if limit is None else min(limit, len(self._rows))
        self[0]  # a wrong row is told before the model is loaded

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | Sequence[Question]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        row = self._rows[index]
        return _question(self._set, f"{self._set.data.hub}, row {index + 1}", row, row.get("image"))
