"""A draft proposes, its parent decides: the text stays the parent's, and what was proposed and accepted is counted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY_MODELS
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from pared import ParedError
from pared.checkpoint import mark, save
from pared.cli.commands import app
from pared.evaluation.speed import Drafted, DraftRun, drafted
from pared.evaluation.speed.drafted import _parting
from unit.checkpoint.test_shared import Q, put_low_rank

PROMPTS = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def parent() -> PreTrainedModel:
    model = TINY_MODELS["llama"]().eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 1)  # logits far apart
    return model


def low_rank_of(parent: PreTrainedModel) -> PreTrainedModel:
    """Return the same model with queries of rank 2."""
    draft = TINY_MODELS["llama"]()
    draft.load_state_dict(parent.state_dict())
    put_low_rank(draft, list(Q), 2)
    return draft.eval()


def test_the_parent_as_its_own_draft_accepts_all(parent: PreTrainedModel) -> None:
    result = drafted(parent, parent, PROMPTS, new=13, draft_tokens=5)
    assert result.acceptance == 1
    assert result.equal_prompts == 2
    assert result.cost == 1
    for run in result.runs:  # 5 + 1, 5 + 1, and no room for more than one
        assert (run.passes, run.proposed, run.accepted) == (3, 10, 10)
    assert result.tokens_per_pass == pytest.approx(13 / 3)
    assert result.ideal == pytest.approx(13 / (3 + 10))


def test_a_draft_changes_no_token_and_both_models_are_left_as_they_were(parent: PreTrainedModel) -> None:
    draft = low_rank_of(parent)
    before = parent.generation_config, draft.generation_config
    watched: list[int] = []
    result = drafted(parent, draft, PROMPTS, new=12, draft_tokens=3, on_run=lambda: watched.append(1))
    assert (result.equal_prompts, len(watched)) == (2, 2)
    assert 0 <= result.acceptance < 1
    assert result.cost < 1
    assert all(run.accepted + run.passes == 12 and run.proposed >= run.accepted for run in result.runs)
    assert (parent.generation_config, draft.generation_config) == before
    assert not parent._forward_pre_hooks


def test_a_parent_that_answers_several_tokens_otherwise_is_refused(parent: PreTrainedModel) -> None:
    def spoil(_: Any, __: Any, given: dict[str, Any], output: Any) -> Any:
        if 1 < given["input_ids"].shape[1] <= 4:  # a pass over what was proposed
            output.logits = -output.logits
        return output

    with (
        parent.register_forward_hook(spoil, with_kwargs=True),
        pytest.raises(ParedError, match=r"prompt 0: with the draft the model writes \d+ as token .*no rounding"),
    ):
        drafted(parent, parent, PROMPTS, new=12, draft_tokens=3)


def test_tokens_that_are_equally_likely_part_by_rounding(parent: PreTrainedModel) -> None:
    with torch.no_grad():
        parent.lm_head.weight[7] = parent.lm_head.weight[9]
    assert _parting(parent, PROMPTS[:1], [7, 8], [9, 8], 0) == (0, 0.0)
    assert _parting(parent, PROMPTS[:1], [7, 8], [7, 8], 0) == (2, 0.0)


def test_figures_are_those_of_all_prompts_together() -> None:
    result = Drafted(new=10, draft_tokens=4, cost=0.25, runs=(
        DraftRun(2.0, 1.0, passes=4, proposed=8, accepted=6, equal_tokens=10, gap=0.0),
        DraftRun(2.0, 4.0, passes=6, proposed=16, accepted=4, equal_tokens=3, gap=1e-6),
    ))  # fmt: skip
    assert result.acceptance == 10 / 24
    assert result.tokens_per_pass == 2
    assert result.ratios == (2.0, 0.5)
    assert result.ideal == 20 / (10 + 0.25 * 24)
    assert result.equal_prompts == 1
    assert result.tokens_per_second() == (5.0, 6.25)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a draft, its parent, a stranger of another vocabulary, and a text."""
    from tiny_tokenizer import tiny_tokenizer

    place = tmp_path_factory.mktemp("drafts")
    dense, low = TINY_MODELS["llama"](), TINY_MODELS["llama"]()
    put_low_rank(low, list(Q), 4)
    mark(low)
    other = tiny_tokenizer()
    other.add_tokens(["stranger"])
    for model, own, name in ((dense, tokenizer, "dense"), (low, tokenizer, "low"), (dense, other, "stranger")):
        save(model, own, place / name)
    (place / "text.txt").write_text("one two three four five six seven eight " * 20)
    return place


def test_the_command_prints_and_writes(place: Path, tmp_path: Path) -> None:
    arguments = ["bench", "--draft", str(place / "low"), "--against", str(place / "dense"), "--case", "decode:1x4+6",
                 "--repeats", "2", "--text", f"file:{place / 'text.txt'}", "--json", str(tmp_path / "draft.json")]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "2 of 2 prompts" in result.output
    written = json.loads((tmp_path / "draft.json").read_text())
    (case,) = written["drafted"]
    assert case["equal_prompts"] == len(case["runs"]) == 2
    assert 0 <= case["acceptance"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "low is a draft of no model; name its parent with --against MODEL"),
        (["--against", "dense", "--case", "prefill:1x4"], "expected decode:1xLENGTH+NEW"),
        (["--against", "dense", "--case", "decode:2x4+3"], "a draft proposes tokens of one text at a time"),
        (["--against", "dense", "--draft-tokens", "0"], "0 tokens of a draft: expected at least 1"),
        (["--against", "dense", "--text", "nothing"], "nothing"),
        (["--against", "stranger", "--case", "decode:1x4+3"], "different vocabularies"),
    ],
)
def test_what_is_no_draft_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(place)
    result = CliRunner().invoke(app, ["bench", "./low", "--draft", *(f"./{one}" if one in ("dense", "stranger") else one
                                                                    for one in arguments)])  # fmt: skip
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
