"""The page on Python, run from top to bottom on a tiny model."""

import re
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"


def test_every_example_of_the_page_runs(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = TINY_MODELS["llama"]()
    model.config.max_position_embeddings = 512
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(examples) >= 7
    monkeypatch.setattr(topics, "topics", {f"{number:02}": "w1 w2 w3 w4 w5 w6 w7 " * 150 for number in range(12)})
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for example in examples:
        exec(example.replace("embedded:smollm2-135m", str(tmp_path / "tiny")), names)
    told = capsys.readouterr().out
    assert "self-check: reloaded" in told
    assert "2 texts passed in Python" in told
    assert {path.name for path in tmp_path.iterdir()} == {
        "tiny",
        "smaller",
        "better",
        "pivoted",
        "plain",
        "grams",
        "rounded",
        "elastic",
        "half",
    }
