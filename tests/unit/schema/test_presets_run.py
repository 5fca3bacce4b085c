"""Every protocol runs to its end on a tiny model: data and sizes are tiny, everything else is the protocol's own."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast

import pared
from pared import tune
from pared.checkpoint import verify
from pared.schema.presets import DEMO, load_preset, preset_names
from pared.schema.training import TrainingConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft asks for it
]
SMALL = {"prunes": 5, "new": 2}  # a tiny model has no room for 32 new bases a layer
RECIPES = [name for name in preset_names() if load_preset(name).command == "compress" and name != DEMO]
TUNINGS = [name for name in preset_names() if load_preset(name).command == "tune"]


@pytest.fixture(scope="module")
def place(place: Path, tokenizer: PreTrainedTokenizerFast, text_file: Path) -> Path:
    """A folder with dense models, data of every kind, and the compressed folders that are trained."""
    TINY_MODELS["bert"]().save_pretrained(place / "bert")
    tokenizer.save_pretrained(place / "bert")
    asked = [{"instruction": f"w{i % 50}", "input": "", "output": f"w{(i + 1) % 50}"} for i in range(80)]
    (place / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    labelled = [{"text": f"w{i % 50} w{i % 7}", "label": i % 3} for i in range(48)]
    (place / "labelled.jsonl").write_text("\n".join(map(json.dumps, labelled)), encoding="utf-8")
    (place / "words.txt").write_text(text_file.read_text(encoding="utf-8"), encoding="utf-8")
    for name in ("basis-sharing-paper", "svd-llm-paper", "fwsvd-paper"):
        compressed(place, name)
    return place


def compressed(place: Path, name: str) -> Path:
    out = place / name
    if not out.exists():
        text = f"file:{place}/words.txt"
        tiny: dict[str, Any] = {
            "model": str(place / "llama"),
            "calibration": {"text": text, "length": 16, "samples": 6},
            "evaluation": None,
        }
        if name == "fwsvd-paper":
            tiny |= {"model": str(place / "bert"), "calibration": {"text": f"file:{place}/labelled.jsonl"}}
        pared.run(pared.Recipe.of({"preset": name, "out": str(out), **tiny}))
    return out


@pytest.mark.parametrize("name", RECIPES)
def test_a_protocol_of_compression_runs(place: Path, name: str) -> None:
    out = compressed(place, name)
    assert verify(out) <= 1e-6
    manifest = pared.schema.manifest.Manifest.read(out)
    assert manifest.preset is not None
    assert set(manifest.preset["deviations"]) <= {
        "calibration.text",
        "calibration.length",
        "calibration.samples",
        "evaluation",
    }


TINY: dict[str, dict[str, Any]] = {
    "basis-sharing-lora": {"model": "basis-sharing-paper", "data": ["file:{}/words.txt"], "length": 16, "epochs": 0.2},
    "basis-sharing-full": {"model": "basis-sharing-paper", "data": ["file:{}/words.txt"], "length": 16, "epochs": 1.0},
    "svd-llm-lora": {"model": "svd-llm-paper", "data": ["instruct:{}/asked.jsonl"], "length": 64, "validation": 8},
    "basel-math": {"model": "llama", "data": ["instruct:{}/asked.jsonl"], "length": 64, "options": SMALL},
    "basel-code": {"model": "llama", "data": ["instruct:{}/asked.jsonl"], "length": 64, "options": SMALL},
    "basel-lm": {"model": "llama", "data": ["file:{}/words.txt"], "length": 16, "options": SMALL},
    "fwsvd-glue": {"model": "fwsvd-paper", "data": ["file:{}/labelled.jsonl"]},
}


@pytest.mark.parametrize("name", TUNINGS)
def test_a_protocol_of_training_runs(place: Path, tmp_path: Path, name: str) -> None:
    tiny = TINY[name]
    asked = {**tiny, "model": str(place / tiny["model"]), "data": [one.format(place) for one in tiny["data"]]}
    made = tune(TrainingConfig.of({"preset": name, "out": str(tmp_path / "out"), "evaluation": None, **asked}))
    assert verify(tmp_path / "out") <= 1e-6
    (training,) = made.manifest.training
    assert training.preset is not None
    changed = {field.partition(".")[0] for field in training.preset["deviations"]}
    assert changed <= {"data", "length", "epochs", "validation", "options"}
    assert all(stage["steps"] >= 1 for stage in training.stages)
