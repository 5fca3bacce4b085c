"""Labelled examples: found by name, tokenised as their model was trained, and padding that changes nothing."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import backward, walk
from tiny_models import TINY_MODELS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import pared
from pared import ParedError
from pared.calibration import (
    STATISTICS,
    Given,
    Labels,
    NextToken,
    Sampled,
    capture,
    choose_labels,
    gradient_accumulators,
)
from pared.data import cut_examples, find_examples, find_windows, is_labelled
from pared.data.windows import Windows, digest_of
from pared.structure import find_anatomy, probe

CPU = torch.device("cpu")
LENGTHS = (9, 4, 12, 1, 7)
EVERY = (*(name for name, kind in STATISTICS.items() if kind.of not in ("output", "input_pair")), "fisher:2")
FORWARD = frozenset(name for name, kind in STATISTICS.items() if kind.of in ("input", "output"))
Found = dict[str, dict[str, Any]]


def head(kind: Any, family: str = "bert", attention: str = "sdpa") -> PreTrainedModel:
    config = TINY_MODELS[family]().config
    config.num_labels = 3
    torch.manual_seed(0)
    return kind.from_config(config, attn_implementation=attention).eval()


def padded() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens with padding 0, the mask and a label for some tokens."""
    random = torch.Generator().manual_seed(0)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    tokens = torch.randint(1, 64, mask.shape, generator=random).masked_fill(~mask, 0)
    labels = torch.randint(0, 3, mask.shape, generator=random).masked_fill(~mask, -100)
    labels[0, :2] = -100
    return tokens, mask.long(), labels


def collected(
    model: PreTrainedModel, labels: Labels, tokens: torch.Tensor, mask: torch.Tensor | None, batch: int, into: Found
) -> None:
    anatomy, calls = probe(model, find_anatomy(model))
    beside = None if mask is None else {"attention_mask": mask}
    inputs = capture(model, anatomy, tokens, batch, calls, torch.float32, CPU, beside)
    backward(model, anatomy, inputs, tokens, into, labels)


def empty(model: PreTrainedModel, names: Any = EVERY) -> Found:
    return gradient_accumulators(probe(model, find_anatomy(model))[0].sites, names, CPU)


def assert_close(found: Found, expected: Found) -> None:
    for site, statistics in expected.items():
        for name, statistic in statistics.items():
            value, reference = found[site][name].value, statistic.value
            assert float((value - reference).norm()) <= 1e-5 * float(reference.norm()), (site, name)
            assert found[site][name].tokens == statistic.tokens == sum(LENGTHS)
            assert float(reference.norm()) > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("kind", ["sequence", "token", "causal"])
def test_padding_is_in_no_statistic_and_changes_none(kind: str, batch: int, attention: str) -> None:
    """Against the same examples one by one, without padding."""
    tokens, mask, per_token = padded()
    if kind == "causal":
        model = head(AutoModelForCausalLM, "llama", attention)
    elif kind == "sequence":
        model = head(AutoModelForSequenceClassification, attention=attention)
    else:
        model = head(AutoModelForTokenClassification, attention=attention)
    given = torch.arange(len(LENGTHS)) % 3 if kind == "sequence" else per_token
    found, expected = empty(model), empty(model)
    collected(model, NextToken() if kind == "causal" else Given(given), tokens, mask, batch, found)
    for index, length in enumerate(LENGTHS):
        one = given[index : index + 1] if given.ndim == 1 else given[index : index + 1, :length]
        labels = NextToken() if kind == "causal" else Given(one)
        collected(model, labels, tokens[index : index + 1, :length], None, 1, expected)
    assert_close(found, expected)


def test_what_stands_in_the_padding_is_never_read() -> None:
    tokens, mask, per_token = padded()
    model = head(AutoModelForTokenClassification)
    found, expected = empty(model), empty(model)
    collected(model, Given(per_token), tokens, mask, 2, expected)
    collected(model, Given(per_token), tokens.masked_fill(mask == 0, 63), mask, 2, found)
    for site, statistics in expected.items():
        for name, statistic in statistics.items():
            assert torch.equal(found[site][name].value, statistic.value)


def test_labels_are_sampled_where_the_data_has_one_and_never_in_padding() -> None:
    tokens, _, per_token = padded()
    p_RC = torch.full((12, 3), 1 / 3)
    drawn = Sampled(0, per_token)(1, tokens[1], p_RC)
    assert torch.equal(drawn == -100, per_token[1] == -100)
    assert torch.equal(drawn[drawn >= 0], Sampled(0)(1, tokens[1], p_RC)[drawn >= 0])
    model = head(AutoModelForTokenClassification)
    labels = choose_labels(model, "sampled", 0, torch.zeros(5, dtype=torch.long))
    with pytest.raises(ParedError, match="window 0 has 1, the head predicts 12"):
        collected(model, labels, tokens, padded()[1], 2, empty(model, ["fisher"]))


def test_examples_without_a_label_have_no_gradient() -> None:
    tokens, mask, _ = padded()
    model = head(AutoModelForSequenceClassification)
    found = empty(model, ["fisher"])
    collected(model, Given(torch.full((5,), -100)), tokens, mask, 5, found)
    assert not any(statistics["fisher"].value.any() for statistics in found.values())


def test_without_padding_no_mask_is_passed() -> None:
    model = head(AutoModelForSequenceClassification)
    anatomy, calls = probe(model, find_anatomy(model))
    tokens = padded()[0]
    inputs = capture(model, anatomy, tokens, 2, calls, torch.float32, CPU)
    assert [inputs.mask(batch) for batch in range(3)] == [None] * 3
    assert inputs.beside == [{}] * 3
    full = capture(model, anatomy, tokens, 2, calls, torch.float32, CPU, {"attention_mask": torch.ones_like(tokens)})
    assert full.mask(0) is None


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "##s", "##ting", "mat", "on", "."]


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    """A tokenizer of word pieces with BERT's special tokens."""
    core = Tokenizer(models.WordPiece({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def config(*names: str, classes: int = 3) -> PretrainedConfig:
    if not names:
        return PretrainedConfig(num_labels=classes)
    numbers = {name: index for index, name in enumerate(names)}
    return PretrainedConfig(label2id=numbers, id2label={index: name for name, index in numbers.items()})


def written(path: Path, rows: list[object]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return f"file:{path}"


def cut(rows: list[object], path: Path, tokenizer: Any, of: PretrainedConfig, length: int = 32) -> Windows:
    return cut_examples(find_examples(written(path / "rows.jsonl", rows)), tokenizer, of, length, None)


def test_examples_are_padded_on_the_right_to_the_longest(tmp_path: Path, pieces: Any) -> None:
    rows = [{"text": "the cats sat", "label": 1}, {"text": "cat", "label": 0}]
    windows = cut(rows, tmp_path, pieces, config())
    assert windows.tokens.tolist() == [[2, 4, 5, 7, 6, 3], [2, 5, 3, 0, 0, 0]]
    assert windows.mask is not None
    assert windows.mask.tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert windows.labels is not None
    assert windows.labels.tolist() == [1, 0]
    assert windows.segments is None
    assert windows.describe() == {
        "text": f"file:{tmp_path / 'rows.jsonl'}", "origin": str(tmp_path / "rows.jsonl"), "stand_in": False,
        "windows": 2, "length": 6, "digest": windows.digest, "tokens": 9, "labels": 2,
    }  # fmt: skip
    assert list(windows.beside) == ["attention_mask"]
    relabelled = cut([{"text": "the cats sat", "label": 0}, rows[1]], tmp_path, pieces, config())
    assert relabelled.digest != windows.digest
    assert cut(rows, tmp_path, pieces, config(), length=4).tokens.tolist() == [[2, 4, 5, 3], [2, 5, 3, 0]]


def test_examples_of_one_length_need_no_mask(tmp_path: Path, pieces: Any) -> None:
    windows = cut([{"text": "cat", "label": 1}, {"text": "mat", "label": 0}], tmp_path, pieces, config())
    assert windows.mask is None
    assert windows.beside == {}


def test_pairs_of_texts_are_told_apart_by_segments(tmp_path: Path, pieces: Any) -> None:
    windows = cut([{"text": "the cat", "text_pair": "sat", "label": "yes"}], tmp_path, pieces, config("no", "yes"))
    assert windows.tokens.tolist() == [[2, 4, 5, 3, 6, 3]]
    assert windows.segments is not None
    assert windows.segments.tolist() == [[0, 0, 0, 0, 1, 1]]
    model = head(AutoModelForSequenceClassification)
    with_segments, without = empty(model, ["fisher"]), empty(model, ["fisher"])
    anatomy, calls = probe(model, find_anatomy(model))
    for beside, into in ((windows.beside, with_segments), (None, without)):
        inputs = capture(model, anatomy, windows.tokens, 1, calls, torch.float32, CPU, beside)
        backward(model, anatomy, inputs, windows.tokens, into, Given(torch.tensor([1])))
    assert not torch.equal(*(next(iter(found.values()))["fisher"].value for found in (with_segments, without)))


def test_a_word_has_its_label_on_its_first_piece(tmp_path: Path, pieces: Any) -> None:
    rows = [{"tokens": ["the", "cats", "sat"], "labels": ["O", "B", "I"]}, {"tokens": ["catting"], "labels": ["B"]}]
    windows = cut(rows, tmp_path, pieces, config("O", "B", "I"))
    assert windows.labels is not None
    assert windows.labels.tolist() == [[-100, 0, 1, -100, 2, -100], [-100, 1, -100, -100, -100, -100]]
    assert windows.describe()["labels"] == 4
    shorter = cut(rows, tmp_path, pieces, config("O", "B", "I"), length=4).labels
    assert shorter is not None
    assert shorter.tolist() == [[-100, 0, 1, -100], [-100, 1, -100, -100]]


def test_a_seeded_choice_of_examples(tmp_path: Path, pieces: Any) -> None:
    rows: list[object] = [{"text": WORDS[4 + index], "label": index % 3} for index in range(3)]
    examples = find_examples(written(tmp_path / "rows.jsonl", rows))
    first = cut_examples(examples, pieces, config(), 8, 2)
    assert first.tokens[:, 1].tolist() == [4, 5]
    drawn = {cut_examples(examples, pieces, config(), 8, 2, "random-offset", seed).digest for seed in range(8)}
    assert len(drawn) > 1
    again = [cut_examples(examples, pieces, config(), 8, 2, "random-offset", 5).digest for _ in range(2)]
    assert again[0] == again[1]


def test_labels_the_model_has_no_class_for_are_refused(tmp_path: Path, pieces: Any) -> None:
    with pytest.raises(ParedError, match=r"the model has no class 'maybe'; .*Valid: no, yes"):
        cut([{"text": "cat", "label": "maybe"}], tmp_path, pieces, config("no", "yes"))
    with pytest.raises(ParedError, match="label 3, but the model has 3 classes"):
        cut([{"text": "cat", "label": 3}], tmp_path, pieces, config())


def test_a_model_without_names_takes_the_order_of_the_data_set(
    tmp_path: Path, pieces: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARED_DATA", str(tmp_path))
    folder = tmp_path / "glue" / "RTE"
    folder.mkdir(parents=True)
    (folder / "dev.tsv").write_text(
        "index\tsentence1\tsentence2\tlabel\n0\tthe cat\tsat\tnot_entailment\n1\tcat\tmat\tentailment\n"
    )
    examples = find_examples("glue:rte:validation")
    labels = [
        cut_examples(examples, pieces, of, 16, None).labels.tolist()  # type: ignore[union-attr]
        for of in (config(classes=2), config("not_entailment", "entailment"))
    ]
    assert labels == [[1, 0], [0, 1]], "a model's own names win"
    with pytest.raises(ParedError, match=r"no class 'not_entailment'; Valid: LABEL_0, LABEL_1, LABEL_2"):
        cut_examples(examples, pieces, config(classes=3), 16, None)


def test_glue_and_entity_files_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARED_DATA", str(tmp_path))
    cola, sst2, ner = tmp_path / "glue" / "CoLA", tmp_path / "glue" / "SST-2", tmp_path / "ner" / "own"
    for folder in (cola, sst2, ner):
        folder.mkdir(parents=True)
    (cola / "train.tsv").write_text('gj04\t1\t\tThe "cat\u2028sat.\ngj04\t0\t*\tSat cat.\n', encoding="utf-8")
    (sst2 / "train.tsv.gz").write_bytes(gzip.compress(b"sentence\tlabel\na charming cat \t1\n"))
    (ner / "train.txt").write_text("-DOCSTART- -X- -X- O\n\nThe DT x O\ncat NN y B-cat\n\n\nmat\tO\n")
    found = [(row.texts, row.label) for row in find_examples("glue:cola:train").rows]
    assert found == [(('The "cat\u2028sat.',), 1), (("Sat cat.",), 0)]
    assert find_examples("glue:sst2:train").rows[0].texts == ("a charming cat",)
    entities = find_examples("ner:own:train")
    assert [(row.texts, row.label) for row in entities.rows] == [(("The", "cat"), ("O", "B-cat")), (("mat",), ("O",))]
    assert entities.by_word
    (ner / "dev.txt").write_text("cat O\nmat\n")
    (cola / "dev.tsv").write_text("gj04\t1\n")
    for name, told in {
        "glue:ax:train": "no GLUE task 'ax' here",
        "glue:cola:eval": "no split 'eval'; .* Valid: dev, test, train, validation",
        "glue:cola:test": r"which has no glue/CoLA/test_labelled\.tsv; that folder holds dev\.tsv, train\.tsv",
        "glue:mnli:dev": r"no glue/MNLI/dev_matched\.tsv; that folder holds nothing",
        "glue:cola:dev": "row 1: expected at least 4 columns, got 2",
        "ner:own:dev": "line 2: expected a word and its tag, got 'mat'",
        "ner:other:dev": "that folder holds nothing",
        "glue:cola": "unknown labelled examples 'glue:cola'; did you mean 'glue:cola:train'",
        "cola": "unknown labelled examples 'cola'",
    }.items():
        with pytest.raises(ParedError, match=told):
            find_examples(name)
    monkeypatch.delenv("PARED_DATA")
    with pytest.raises(ParedError, match="the folder that PARED_DATA names, and it names none"):
        find_examples("ner:own:train")
    with pytest.raises(ParedError, match=r"Hub data set nyu-mll/glue\[cola\], split 'train': cannot be read \("):
        find_examples("glue:cola:train")


def test_a_label_the_task_does_not_have_is_named_with_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARED_DATA", str(tmp_path))
    for folder, row in (("SST-2", "fine\t7"), ("RTE", "0\ta\tb\tmaybe")):
        (tmp_path / "glue" / folder).mkdir(parents=True)
        (tmp_path / "glue" / folder / "dev.tsv").write_text(f"header\n{row}\n")
    with pytest.raises(ParedError, match=r"dev\.tsv, row 2: expected a label of 0, 1, got '7'"):
        find_examples("glue:sst2:dev")
    with pytest.raises(ParedError, match=r"row 2: expected a label of entailment, not_entailment, got 'maybe'"):
        find_examples("glue:rte:dev")


def test_rows_that_are_torn_in_the_data_set_itself_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PARED_DATA", str(tmp_path))
    (tmp_path / "glue" / "QQP").mkdir(parents=True)
    rows = ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\ta\tb\t1", "4\t5\t6\ttorn"]
    (tmp_path / "glue" / "QQP" / "train.tsv").write_text("\n".join(rows) + "\n")
    assert [row.texts for row in find_examples("glue:qqp:train").rows] == [("a", "b")]
    assert "row 3: 4 columns; left out" in caplog.text


def test_files_that_hold_no_examples_are_refused(tmp_path: Path) -> None:
    for rows, told in (
        ([{"text": "cat"}], r"row 1: expected 'text' .* got \['text'\]"),
        ([{"text": "cat", "label": [1]}], "row 1: expected 'text'"),
        ([{"text": "cat", "label": [1]}], "row 1: expected 'text'"),
        ([{"tokens": ["cat"], "labels": [1, 2]}], "as many 'labels'"),
        (["cat"], "got str"),
        ([], "have no rows"),
        ([{"text": "cat", "label": 1}, {"tokens": ["cat"], "labels": [1]}], "example 2: expected one label"),
    ):
        with pytest.raises(ParedError, match=told):
            find_examples(written(tmp_path / "rows.jsonl", rows))  # type: ignore[arg-type]
    (tmp_path / "bad.jsonl").write_text("{")
    for path, told in (("bad.jsonl", "row 1: not JSON"), ("no.jsonl", "No such file"), ("no.txt", "expected .jsonl")):
        with pytest.raises(ParedError, match=told):
            find_examples(f"file:{tmp_path / path}")


def test_a_tokenizer_must_be_able_to_pad(tmp_path: Path, pieces: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=pieces.backend_tokenizer)
    rows: list[object] = [{"text": "cat", "label": 1}, {"text": "the cat", "label": 1}]
    with pytest.raises(ParedError, match="no padding token"):
        cut(rows, tmp_path, bare, config())
    assert cut(rows[:1], tmp_path, bare, config()).mask is None
    mixed: list[object] = [{"text": "cat", "label": 1}, {"text": "cat", "text_pair": "mat", "label": 1}]
    with pytest.raises(ParedError, match="some are pairs of texts and some are not"):
        cut(mixed, tmp_path, pieces, config())


def test_names_of_labelled_examples_are_told_from_those_of_texts(tmp_path: Path) -> None:
    labelled = written(tmp_path / "labelled.jsonl", [{"text": "cat", "label": 1}])
    words = written(tmp_path / "words.jsonl", [{"tokens": ["cat"], "labels": [1]}])
    text = written(tmp_path / "text.jsonl", [{"text": "cat"}])
    assert [is_labelled(name) for name in ("glue:cola:train", "ner:x:dev", labelled, words)] == [True] * 4
    names = (text, "embedded", "wikitext2:train", "a/b:train:text", "file:/nowhere.jsonl", "file:x.txt")
    assert not any(is_labelled(name) for name in names)


def test_a_file_of_both_kinds_is_a_text_for_a_language_model(tmp_path: Path, pieces: Any) -> None:
    name = written(tmp_path / "rows.jsonl", [{"text": "the cat sat on the mat", "label": 1}] * 3)
    for_encoder, for_causal = (find_windows(name, pieces, config(), causal, 8, 2) for causal in (False, True))
    assert for_encoder.labels is not None
    assert for_encoder.tokens[0].tolist() == [2, 4, 5, 6, 10, 4, 9, 3]
    assert for_causal.labels is None
    assert for_causal.tokens[0].tolist() == [4, 5, 6, 10, 4, 9, 4, 5]
    with pytest.raises(ParedError, match="'glue:cola:train' are labelled examples for a classifier"):
        find_windows("glue:cola:train", pieces, config(), True, 8, 2)


def test_the_digest_of_a_text_is_that_of_its_tokens_alone() -> None:
    tokens = torch.arange(6).view(2, 3)
    assert digest_of(tokens) == digest_of(tokens, None) != digest_of(tokens, tokens)


@pytest.mark.parametrize("batch", [2, 5])
def test_padding_is_in_no_statistic_of_a_walk(batch: int) -> None:
    """Regression: a walk over padded examples counted the padding."""
    model = head(AutoModelForSequenceClassification)
    tokens, mask, _ = padded()

    def collect(tokens: torch.Tensor, mask: torch.Tensor | None, batch: int) -> dict[str, dict[str, Any]]:
        anatomy, calls = probe(model, find_anatomy(model))
        beside = None if mask is None else {"attention_mask": mask}
        inputs = capture(model, anatomy, tokens, batch, calls, torch.float32, CPU, beside)
        steps = walk(model, anatomy, inputs, lambda _: FORWARD, influence=True)
        return {site: dict(own) for step in steps for site, own in step.statistics.items()}

    found = collect(tokens, mask, batch)
    total, *others = [collect(tokens[i : i + 1, :n], None, 1) for i, n in enumerate(LENGTHS)]
    for one in others:
        merged: set[int] = set()
        for site, own in one.items():
            for name, statistic in own.items():
                if id(total[site][name]) not in merged:
                    merged.add(id(total[site][name]))
                    total[site][name].merge(statistic)
    for site, own in total.items():
        for name, statistic in own.items():
            assert found[site][name].tokens == statistic.tokens == sum(LENGTHS)
            torch.testing.assert_close(found[site][name].value, statistic.value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["fwsvd", "svd-llm", "loss-optimal"])
def test_an_encoder_is_compressed_on_its_tasks_examples(
    method: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lines = [{"text": " ".join(["w3 w5 w9"] * (1 + n % 4)), "label": n % 3} for n in range(12)]
    (tmp_path / "task.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    model = head(AutoModelForSequenceClassification)
    calibration = pared.Calibration(text=f"file:{tmp_path}/task.jsonl", samples=12, length=16)
    result = pared.compress(model, tokenizer, pared.Recipe(method=method, keep=0.6, calibration=calibration))
    assert result.calibration is not None
    assert result.calibration["windows"] == 12
    assert result.plan.achieved_keep <= 0.6
    assert bool(model(input_ids=torch.arange(8).unsqueeze(0)).logits.isfinite().all())


@pytest.mark.parametrize(("method", "fields"), [("fwsvd", {}), ("fwsvd", {"fisher_batch": 4}), ("loss-optimal", {})])
def test_fwsvd_of_stsb_weighs_by_the_squared_error(
    method: str,
    fields: dict[str, object],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regression: STS-B, one of the paper's tasks, was refused where gradients are needed."""
    folder = tmp_path / "glue" / "STS-B"
    folder.mkdir(parents=True)
    rows = ["\t".join([*"1234567", f"w{n + 3} w5 w9", f"w{n + 4} w8", f"{n % 6}.{n % 10}"]) for n in range(12)]
    (folder / "train.tsv").write_text("\n".join(["header", *rows]))
    monkeypatch.setenv("PARED_DATA", str(tmp_path))
    config = TINY_MODELS["bert"]().config
    config.num_labels = 1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    dense = model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    calibration = pared.Calibration(text="glue:stsb:train", samples=12, length=32, dtype="float32")
    recipe = pared.Recipe.model_validate({"method": method, "keep": 0.6, "calibration": calibration, "options": fields})
    result = pared.compress(model, tokenizer, recipe)
    assert result.plan.achieved_keep <= 0.6
    assert not result.fallbacks
    assert result.calibration is not None
    assert result.calibration["labels"] == 12
    logits = model(input_ids=torch.arange(8).unsqueeze(0)).logits
    assert logits.shape == (1, 1)
    assert bool(logits.isfinite().all())
    assert not torch.allclose(model.bert.encoder.layer[0].output.dense.weight, dense, atol=1e-3)
