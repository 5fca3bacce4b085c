"""Encoders are given a head for a task, trained, and scored on what they were not trained on."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS
from transformers import BertModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import pared
from pared import ParedError
from pared.cli.commands import app
from pared.data.labelled import find_examples
from pared.entrypoints.evaluation import fine_tune_encoder as encoders
from pared.entrypoints.evaluation.fine_tune_encoder import (
    FineTuning,
    examples_of,
    fine_tuned_score,
    steps_of,
    with_head,
)
from pared.training.trainable import compressed_layers

FAST = FineTuning(epochs=6, learning_rate=3e-3, batch=16)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks that can be learned: the class, the score and the tag of a word follow from its number."""
    root, draw = tmp_path_factory.mktemp("data"), random.Random(0)

    def words(count: int) -> list[int]:
        return [draw.randrange(3, 15) for _ in range(count)]

    for folder in ("glue/SST-2", "glue/STS-B", "glue/MRPC", "glue/MNLI", "ner/own"):
        (root / folder).mkdir(parents=True)
    for split, count in (("train", 200), ("dev", 60)):
        rows = [words(4) for _ in range(count)]
        text = [" ".join(f"w{word}" for word in row) for row in rows]
        sst = [f"{one}\t{int(row[0] > 8)}" for one, row in zip(text, rows, strict=True)]
        (root / "glue/SST-2" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *sst]))
        head = "\t".join(["index", "genre", "file", "year", "old", "s1", "s2", "sentence1", "sentence2", "score"])
        sts = ["\t".join([*"1234567", one, "w5", f"{row[0] / 3:.2f}"]) for one, row in zip(text, rows, strict=True)]
        (root / "glue/STS-B" / f"{split}.tsv").write_text("\n".join([head, *sts]))
    for split, count in (("train", 120), ("test", 40)):
        blocks = ["\n".join(f"w{word}\t{'B-x' if word > 8 else 'O'}" for word in words(5)) for _ in range(count)]
        (root / "ner/own" / f"{split}.txt").write_text("\n\n".join(blocks))
    head = "\t".join(map(str, range(8))) + "\tsentence1\tsentence2\tgold_label"
    entailed = ["\t".join([*"12345678", "w3", "w4", name]) for name in ("neutral", "entailment", "contradiction")]
    (root / "glue/MNLI" / "train.tsv").write_text("\n".join([head, *entailed]))
    return root


@pytest.fixture(autouse=True)
def _where(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARED_DATA", str(data))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny encoder without a head."""
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    base: BertModel = TINY_MODELS["bert"]().bert
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(encoder: Path, text_file: Path) -> Path:
    """The same, compressed."""
    out = encoder.parent / "small"
    pared.run(pared.Recipe(model=str(encoder), method="svd-llm", keep=0.7, out=str(out), evaluation=None,
                           calibration=pared.Calibration(text=f"file:{text_file}", samples=8, length=16)))  # fmt: skip
    return out


@pytest.mark.parametrize("kind", ["encoder", "small"])
def test_a_task_is_learned_by_dense_and_compressed_encoders(kind: str, encoder: Path, small: Path) -> None:
    folder = str({"encoder": encoder, "small": small}[kind])
    before = fine_tuned_score(folder, examples_of("glue:sst2"), FineTuning(epochs=0.01, learning_rate=1e-9))
    after = fine_tuned_score(folder, examples_of("glue:sst2"), FAST)
    assert after.metrics["accuracy"] > max(0.8, before.metrics["accuracy"])
    assert set(after.metrics) == {"accuracy", "matthews", "f1"}
    assert after.examples == 60


def test_scores_are_learned_as_a_regression(encoder: Path) -> None:
    found = fine_tuned_score(str(encoder), examples_of("glue:stsb"), FAST)
    assert found.metrics["pearson"] > 0.7
    assert found.metrics["spearman"] > 0.7


def test_entities_are_learned(encoder: Path) -> None:
    found = fine_tuned_score(str(encoder), examples_of("ner:own"), FAST)
    assert found.metrics["f1"] > 0.8


def test_the_head_has_the_classes_of_the_examples(encoder: Path, small: Path) -> None:
    heads = {name: with_head(str(encoder), find_examples(f"{name}:train")).config.id2label
             for name in ("glue:sst2", "glue:stsb", "glue:mnli", "ner:own")}  # fmt: skip
    assert heads == {
        "glue:sst2": {0: "LABEL_0", 1: "LABEL_1"},
        "glue:stsb": {0: "LABEL_0"},
        "glue:mnli": {0: "entailment", 1: "neutral", 2: "contradiction"},  # the order of the data set itself
        "ner:own": {0: "B-x", 1: "O"},
    }
    model = with_head(str(small), find_examples("glue:sst2:train"))
    assert type(model).__name__ == "BertForSequenceClassification"
    assert len(compressed_layers(model)) == len(compressed_layers(pared.load(small))) > 0
    loaded = dict(pared.load(small).named_parameters())
    assert all(torch.equal(value, model.get_parameter(f"bert.{name}")) for name, value in loaded.items())


def test_a_head_of_another_task_is_dropped(encoder: Path, tmp_path: Path) -> None:
    first = with_head(str(encoder), find_examples("glue:sst2:train"), seed=1)
    first.config.problem_type = "single_label_classification"
    first.save_pretrained(tmp_path / "sst2")
    pared.load_tokenizer(encoder).save_pretrained(tmp_path / "sst2")
    again = with_head(str(tmp_path / "sst2"), find_examples("glue:sst2:train"), seed=2)
    assert not torch.equal(again.classifier.weight, first.classifier.weight)
    assert torch.equal(again.bert.embeddings.word_embeddings.weight, first.bert.embeddings.word_embeddings.weight)
    assert with_head(str(tmp_path / "sst2"), find_examples("glue:mnli:train")).classifier.out_features == 3
    scores = fine_tuned_score(str(tmp_path / "sst2"), examples_of("glue:stsb"), FineTuning(epochs=0.1))
    assert set(scores.metrics) == {"pearson", "spearman"}


def test_an_encoder_with_weights_missing_is_refused(encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(encoder, tmp_path / "holed")
    tensors = load_file(tmp_path / "holed" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layer.0." not in name}
    save_file(kept, tmp_path / "holed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ParedError, match=r"encoder are missing from the checkpoint, the first is 'bert\.enc"):
        with_head(str(tmp_path / "holed"), find_examples("glue:sst2:train"))


def test_predictions_that_are_no_numbers_are_no_score(encoder: Path) -> None:
    with pytest.raises(ParedError, match=r"outputs NaN or infinity for example \d+ of 'glue:stsb:dev'"):
        fine_tuned_score(str(encoder), examples_of("glue:stsb"), FineTuning(epochs=1, learning_rate=1e9))


def test_what_is_wrong_with_the_test_part_is_found_before_training(encoder: Path, data: Path) -> None:
    (data / "ner" / "late").mkdir(exist_ok=True)
    (data / "ner/late/train.txt").write_text("w3 B-x\nw4 O\n")
    (data / "ner/late/test.txt").write_text("w3 B-y\n")
    told: list[int] = []
    with pytest.raises(ParedError, match="the model has no class 'B-y'"):
        fine_tuned_score(str(encoder), examples_of("ner:late"), on_step=lambda: told.append(1))
    assert not told


def test_examples_are_no_longer_than_the_model_has_positions(encoder: Path, data: Path) -> None:
    (data / "glue" / "RTE").mkdir(exist_ok=True)
    rows = "index\tsentence1\tsentence2\tlabel\n" + "".join(f"{i}\t{'w5 ' * 200}\tw6\t{'not_' * (i % 2)}entailment\n"
                                                             for i in range(8))  # fmt: skip
    for split in ("train", "dev"):
        (data / "glue/RTE" / f"{split}.tsv").write_text(rows)
    found = fine_tuned_score(str(encoder), examples_of("glue:rte"), FineTuning(epochs=0.1))
    assert found.examples == 8
    with pytest.raises(ParedError, match="labelled examples of 300 tokens, but this model has"):
        fine_tuned_score(str(encoder), examples_of("glue:rte"), FineTuning(epochs=0.1, length=300))


def test_the_same_seed_gives_the_same_score(encoder: Path) -> None:
    asked = FineTuning(epochs=1, learning_rate=1e-3)
    torch.manual_seed(5)
    first = fine_tuned_score(str(encoder), examples_of("glue:sst2"), asked)
    torch.manual_seed(6)
    assert fine_tuned_score(str(encoder), examples_of("glue:sst2"), asked) == first


def test_steps_are_told_one_by_one(encoder: Path) -> None:
    told: list[int] = []
    asked = FineTuning(epochs=2, batch=16, examples=50)
    fine_tuned_score(str(encoder), examples_of("glue:sst2"), asked, on_step=lambda: told.append(1))
    assert len(told) == steps_of(200, asked) == 8


def test_the_command_scores_every_task(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = ["eval", str(small), "--fine-tune", "glue:sst2,ner:own", "--epochs", "1", "--limit", "32"]
    ran = CliRunner().invoke(app, [*command, "--json", str(out)])
    assert ran.exit_code == 0, ran.output
    assert "glue:sst2: accuracy " in ran.output
    assert "ner:own: f1 " in ran.output
    assert [task["task"] for task in json.loads(out.read_text())["tasks"]] == ["glue:sst2", "ner:own"]


def test_a_killed_fine_tuning_goes_on_after_the_tasks_it_has_done(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, kept = tmp_path / "found.json", tmp_path / ".found.json.unfinished"
    command = ["eval", str(small), "--fine-tune", "glue:sst2,ner:own", "--epochs", "1", "--limit", "32", "--json"]
    assert CliRunner().invoke(app, [*command, str(tmp_path / "whole.json")]).exit_code == 0
    trained: list[str] = []

    def killed_at_the_second(*arguments: Any, **more: Any) -> Any:
        trained.append("")
        if len(trained) == 2:
            raise KeyboardInterrupt
        return fine_tuned_score(*arguments, **more)

    monkeypatch.setattr(encoders, "fine_tuned_score", killed_at_the_second)
    assert CliRunner().invoke(app, [*command, str(out)]).exit_code != 0
    assert not out.exists()
    refused = CliRunner().invoke(app, [*command, str(out)])
    assert refused.exit_code == 2
    assert "--resume continues it, --restart removes it" in " ".join(refused.output.split())
    again = CliRunner().invoke(app, [*command, str(out), "--resume"])
    assert "resuming after glue:sst2" in again.output
    assert len(trained) == 3
    assert json.loads(out.read_text()) == json.loads((tmp_path / "whole.json").read_text())
    kept.write_text('{"settings": ')
    broken = CliRunner().invoke(app, [*command, str(out)])
    assert broken.exit_code == 2
    assert "the first line is not that of an evaluation" in " ".join(broken.output.split())
    assert len(trained) == 3
    anew = CliRunner().invoke(app, [*command, str(out), "--restart"])
    assert anew.exit_code == 0, anew.output
    assert len(trained) == 5


def test_what_cannot_be_learned_is_refused_before_anything_is_trained(
    encoder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    refusals = {
        "glue:qqp": "has no glue/QQP/train.tsv",
        "glue:ax": "no GLUE task 'ax'",
        "sst2": "expected glue:",
        "glue:sst2:train": "unknown task 'glue:sst2:train'",
    }
    for task, said in refusals.items():
        ran = CliRunner().invoke(app, ["eval", str(encoder), "--fine-tune", f"glue:sst2,{task}"])
        assert ran.exit_code == 2
        assert said in ran.output.replace("\n", "")
        assert "accuracy" not in ran.output
    with pytest.raises(ParedError, match="expected epochs above 0, got 0"):
        FineTuning(epochs=0)
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(ParedError, match="is a language model; fine-tuning for GLUE and entities is for encoders"):
        fine_tuned_score(str(tmp_path / "lm"), examples_of("glue:sst2"))
    assert examples_of("glue:sst2").test.name == "glue:sst2:dev"


def test_a_score_is_no_class(encoder: Path, data: Path) -> None:
    rows = data / "scores.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"w{i}", "label": i / 2}) for i in range(3, 9)))
    folder = TINY_MODELS["bert"]()
    folder.save_pretrained(data / "classes")
    pared.load_tokenizer(encoder).save_pretrained(data / "classes")
    ran = CliRunner().invoke(app, ["eval", str(data / "classes"), "--examples", f"file:{rows}"])
    assert ran.exit_code == 2
    assert "label 1.5 is a score, and the model predicts 3 classes" in ran.output.replace("\n", " ")
