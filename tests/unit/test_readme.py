"""The example of the README, on a tiny model; the slow tier runs it as it stands."""

import re
from pathlib import Path

import pytest
from tiny_models import TINY_MODELS
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_example_of_the_readme_runs(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = TINY_MODELS["llama"]()
    model.config.max_position_embeddings = 1024
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "embedded:smollm2-135m" in example
    monkeypatch.chdir(tmp_path)
    exec(example.replace("embedded:smollm2-135m", str(tmp_path / "tiny")), {"__name__": "__main__"})
    assert "perplexity" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained("smaller")
