"""VQAv2, TextVQA and ScienceQA: what an answer counts, and the same questions from files and from the Hub."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from PIL import Image

from pared import ParedError
from pared.evaluation.questions import Question, annotator_score, letter_of
from pared.evaluation.vision_sets import VISION_SETS, find_questions, require_questions

Put = Callable[..., None]


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (10, 1.0)])
def test_of_ten_annotators_four_make_an_answer_wholly_right(matches: int, score: float) -> None:
    answers = ["two"] * matches + [f"other {index}" for index in range(10 - matches)]
    assert annotator_score("The 2.", answers) == pytest.approx(score)


def test_the_score_is_the_mean_over_leaving_out_each_annotator() -> None:
    answers = ["red", "red", "blue", "Red!", "green"]
    by_hand = [min(1.0, sum(one.lower().strip("!") == "red" for one in answers[:out] + answers[out + 1 :]) / 3)
               for out in range(5)]  # fmt: skip
    assert annotator_score("red", answers) == pytest.approx(sum(by_hand) / 5)
    found = Question(None, "?", tuple(answers), "annotators").judged("red")
    assert found == {"vqa_score": pytest.approx(sum(by_hand) / 5), "exact_match": True}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), (" B.", "B"), ("(C)", "C"), ("B. the sun", "B"), ("D) a dog", "D"), ("The answer is A.", "A"),
        ("the answer is: (E)", "E"), ("A dog", None), ("b", None), ("", None), ("Because", None),
    ],
)  # fmt: skip
def test_a_letter_is_found_alone_before_its_text_or_where_it_is_said(answer: str, letter: str | None) -> None:
    assert letter_of(answer) == letter
    assert Question(None, "?", ("B",), "letter").judged(answer) == {"acc": letter == "B"}


ASKED = {"question": "What colour?", "answers": ["red"] * 9 + ["blue"]}
SCIENCE = {"question": "Which is hot?", "choices": ["the moon", "the sun"], "answer": 1, "hint": "Look up."}


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Puts rows of a set into a folder that PARED_DATA names, beside an image."""
    monkeypatch.setenv("PARED_DATA", str(tmp_path))
    (tmp_path / "vqa").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "vqa" / "a.png")

    def put(name: str, *rows: Any) -> None:
        (tmp_path / VISION_SETS[name].data.file).write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")

    return put


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Put:
    """Puts rows of a set on a Hub that is a table."""
    table: dict[str, Dataset] = {}
    monkeypatch.delenv("PARED_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda repository, *_, **__: table[repository])

    def put(name: str, *rows: dict[str, Any]) -> None:
        table[VISION_SETS[name].data.hub.repository] = Dataset.from_list([dict(row) for row in rows])

    return put


def image() -> Image.Image:
    return Image.new("RGB", (8, 8), "red")


@pytest.mark.parametrize("name", ["vqav2", "textvqa"])
def test_questions_with_annotators_are_the_same_from_both_places(name: str, local: Put, hub: Put, tmp_path: Path):
    answers = ASKED["answers"]
    there_answers = [{"answer": one, "answer_id": 1} for one in answers] if name == "vqav2" else answers
    hub(name, {**ASKED, "answers": there_answers, "image": image()})
    (there,) = find_questions(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARED_DATA", str(tmp_path))
        local(name, {**ASKED, "image": "a.png"})
        (here,) = find_questions(name)
    assert (there.text, there.answers, there.by) == (here.text, here.answers, here.by)
    assert (here.text, here.answers, here.by) == ("What colour?", tuple(answers), "annotators")
    assert there.image.size == (8, 8)
    assert here.image == tmp_path / "vqa" / "a.png"


def test_choices_are_asked_by_letter_behind_their_hint_with_an_image_or_without(local: Put) -> None:
    local("scienceqa", {**SCIENCE, "image": "a.png"}, {**SCIENCE, "hint": "", "image": None})
    seen, unseen = find_questions("scienceqa")
    assert seen.text == "Context: Look up.\nWhich is hot?\nA. the moon\nB. the sun"
    assert unseen.text == "Which is hot?\nA. the moon\nB. the sun"
    assert seen.answers == unseen.answers == ("B",)
    assert seen.image is not None
    assert unseen.image is None


def test_questions_of_the_hub_are_read_when_they_are_asked_for(hub: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    hub("scienceqa", *({**SCIENCE, "question": f"q{number}", "image": image()} for number in range(5)))
    found = find_questions("scienceqa", limit=3)
    assert len(found) == 3
    assert [one.text.split("\n")[1] for one in found] == ["q0", "q1", "q2"]
    assert found[1:][0].text == found[1].text
    with pytest.raises(IndexError):
        found[3]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("vqav2", {**ASKED, "answers": []}, "row 1: expected 'image', 'question' and 'answers', one text or more; got"),
        ("vqav2", ASKED, "row 1: expected 'image', 'question'"),
        ("vqav2", {**ASKED, "image": "b.png"}, r"row 1: no image .*b\.png"),
        ("scienceqa", {**SCIENCE, "answer": 2}, "row 1: expected 'question', 'choices', and 'answer' counted from 0"),
        ("scienceqa", "a text", "row 1: expected 'question'.* got str"),
    ],
)
def test_a_row_that_is_no_question_is_named(name: str, row: Any, message: str, local: Put) -> None:
    local(name, row)
    with pytest.raises(ParedError, match=message):
        find_questions(name)


def test_a_row_of_the_hub_that_is_no_question_is_told_at_once(hub: Put) -> None:
    hub("textvqa", {"question": "?", "answers": ["a"], "image": None})
    with pytest.raises(ParedError, match="Hub data set lmms-lab/textvqa, split 'validation', row 1: expected 'image'"):
        find_questions("textvqa")


def test_an_unknown_name_offers_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParedError, match="unknown questions 'vqa2'; did you mean 'vqav2'"):
        require_questions("vqa2")
    with pytest.raises(ParedError, match="No such file or directory"):
        require_questions(str(tmp_path / "missing.jsonl"))
    monkeypatch.setenv("PARED_DATA", str(tmp_path))
    with pytest.raises(ParedError, match=r"questions 'vqav2': PARED_DATA names .* has no vqa/vqav2_validation\.jsonl"):
        require_questions("vqav2")
