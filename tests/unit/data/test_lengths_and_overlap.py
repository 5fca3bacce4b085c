"""Lengths nobody asked for give way, and what is measured on is either held out or said to be learned from."""

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import TINY_MODELS
from tiny_tokenizer import tiny_tokenizer

import pared
from pared import ParedError
from pared.data.lengths import Length, positions_of
from pared.data.overlap import overlap
from pared.data.texts import Text, find_text, held_out, learned_part
from pared.data.windows import Windows, cut
from pared.engine.windows import calibration_windows
from pared.entrypoints.compression.result import Outcome
from pared.report import comparison

TOKENIZER = tiny_tokenizer(64)


def test_a_folder_without_tokenizer_files_is_named_and_not_the_text(tmp_path: Path) -> None:
    """Regression: a long text "has 0 tokens ... use a longer text", where the model had no tokenizer files."""
    TINY_MODELS["qwen3"]().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a long text " * 500)
    with pytest.raises(ParedError, match=r"makes no tokens of .* lacks its files"):
        pared.run(pared.Recipe(model=str(tmp_path / "model"), method="svd-llm", out=str(tmp_path / "out"),
                               calibration=pared.Calibration(text=f"file:{tmp_path}/text.txt", length=16)))  # fmt: skip


def words(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return "\n".join(" ".join(f"w{draw.randrange(3, 64)}" for _ in range(10)) for _ in range(count // 10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of 128 positions, and texts."""
    place = tmp_path_factory.mktemp("inputs")
    TINY_MODELS["llama"]().save_pretrained(place / "model")
    TOKENIZER.save_pretrained(place / "model")
    (place / "text.txt").write_text(words(3000))
    (place / "copy.txt").write_text(words(3000))
    (place / "other.txt").write_text(words(3000, seed=1))
    (place / "short.txt").write_text(words(60))
    os.symlink(place / "text.txt", place / "link.txt")
    return place


def run(folder: Path, out: Path, **fields: Any) -> Outcome:
    recipe = {"model": str(folder / "model"), "out": str(out), "method": "svd-llm", "keep": 0.6, **fields}
    recipe["calibration"] = {"text": f"file:{folder}/text.txt", "dtype": "float32", **fields.get("calibration", {})}
    return pared.run(pared.Recipe.of(recipe))


class TestHeldOutPart:
    def test_a_file_is_evaluated_on_its_end_which_is_not_calibrated_on(self, folder: Path, tmp_path: Path) -> None:
        found = run(folder, tmp_path / "out").manifest
        assert found.calibration is not None
        assert found.evaluation is not None
        assert found.perplexity_after is not None
        assert (found.calibration["whole"], found.evaluation["learned_from"]) == (found.evaluation["whole"], 0.0)
        assert found.calibration["characters"][-1][1] <= found.evaluation["characters"][0][0]
        assert found.evaluation["text"].endswith("text.txt[80%:]")
        assert [row.what for row in comparison(found)].count("perplexity") == 1
        # A file that is measured elsewhere, or not at all, is calibrated on to its end.
        for evaluation in (None, pared.Evaluation(text=f"file:{folder}/other.txt")):
            calibration = pared.Calibration(text=f"file:{folder}/text.txt")
            recipe = pared.Recipe(calibration=calibration, evaluation=evaluation)
            whole = calibration_windows(recipe, TOKENIZER, TINY_MODELS["llama"]().config, True)
            assert whole.tokens.numel() > 0.9 * 3000

    def test_compress_in_memory_calibrates_on_the_same_tokens(self, folder: Path, tmp_path: Path) -> None:
        calibration = pared.Calibration(text=f"file:{folder}/text.txt", dtype="float32")
        asked = pared.Recipe(method="svd-llm", keep=0.6, calibration=calibration)
        in_memory = pared.compress(TINY_MODELS["llama"](), TOKENIZER, asked)
        assert in_memory.calibration is not None
        told = run(folder, tmp_path / "out").manifest.calibration
        assert told is not None
        assert told["digest"] == in_memory.calibration["digest"]

    def test_the_parts_are_whole_documents_and_can_be_named(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"text": f"w{number} " * 9}) + "\n" for number in range(10, 30)))
        name = f"file:{path}"
        first, last = find_text(learned_part(name, held_out(name))), find_text(str(held_out(name)))
        assert (*first.documents, *last.documents) == find_text(name).documents
        assert len(first.documents) == 16
        assert find_text(name).joined[last.start :] == last.joined
        assert first.whole == last.whole == find_text(name).whole
        assert find_text(f"{name}[50%:]").documents == find_text(name).documents[10:]
        assert (held_out(f"{name}[50%:]"), learned_part(f"{name}[50%:]", None)) == (None, f"{name}[50%:]")

    def test_a_file_whose_name_ends_like_a_part_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "odd.txt").write_text("w3 w4")
        with pytest.raises(ParedError, match="No such file"):
            find_text(f"file:{tmp_path}/even.txt[80%:]")
        assert find_text(f"file:{tmp_path}/odd.txt[50%:]").joined == "w4"

    def test_a_file_too_short_for_two_parts_is_calibrated_on_whole(
        self, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "one.txt").write_text(" ".join(["w5"] * 20))
        found = run(folder, tmp_path / "out", calibration={"text": f"file:{tmp_path}/one.txt", "length": 20}).manifest
        assert found.calibration is not None
        assert (found.calibration["windows"], found.calibration["length"]) == (1, 20)
        assert found.perplexity_after is None
        assert "too short to keep a part apart" in caplog.text


class TestOverlap:
    @pytest.mark.parametrize("name", ["text.txt", "link.txt", "copy.txt", "./text.txt"])
    def test_evaluating_on_what_was_calibrated_on_is_said_everywhere(
        self, name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folder)
        found = run(folder, tmp_path / "out", calibration={"samples": 4, "length": 64},
                    evaluation={"text": f"file:{name}", "length": 64, "windows": 8})  # fmt: skip
        told = json.loads((tmp_path / "out" / "pared.json").read_text())
        assert told["evaluation"]["learned_from"] == pytest.approx(0.5, abs=0.01)
        assert "perplexity (50% on calibration text)" in [row.what for row in comparison(found.manifest)]
        card = (tmp_path / "out" / "README.md").read_text()
        assert "perplexity (50% on calibration text)" in card
        assert "**50% of this text was calibrated or trained on**" in card

    def test_another_text_is_said_nothing_of(self, folder: Path, tmp_path: Path) -> None:
        found = run(folder, tmp_path / "out", evaluation={"text": f"file:{folder}/other.txt", "windows": 3}).manifest
        assert found.evaluation is not None
        assert found.evaluation["learned_from"] == 0.0
        assert "calibrated or trained on" not in (tmp_path / "out" / "README.md").read_text()

    def test_the_same_split_under_one_name_is_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "lm").mkdir()
        (tmp_path / "lm/ptb.test.txt").write_text(words(2000))
        monkeypatch.setenv("PARED_DATA", str(tmp_path))
        split, file = find_text("ptb:test"), find_text(f"file:{tmp_path}/lm/ptb.test.txt")
        read = cut(split, TOKENIZER, 50, 20)
        assert overlap(cut(split, TOKENIZER, 50, 20), [read.describe()]) == pytest.approx(1)
        assert overlap(cut(split, TOKENIZER, 50, None), [read.describe()]) == pytest.approx(0.5, abs=0.01)
        assert (
            overlap(cut(file, TOKENIZER, 50, 20), [read.describe()], [read.tokens]) > 0.9
        )  # other characters, same words

    def test_random_offsets_and_rows_of_a_training_are_found(self) -> None:
        text = Text("made", (words(4000),), "this test")
        read = cut(text, TOKENIZER, 40, 30, "random-offset", 5)
        seen = torch.zeros(len(text.joined), dtype=torch.bool)
        for start, stop in read.spans:
            seen[start:stop] = True
        measured = cut(text, TOKENIZER, 40, None)
        expected = sum(int(seen[a:b].sum()) for a, b in measured.spans) / sum(b - a for a, b in measured.spans)
        assert overlap(measured, [read.describe()]) == pytest.approx(expected)
        assert overlap(measured, [], list(measured.tokens[:50])) == pytest.approx(0.5, abs=0.01)

    def test_what_a_text_repeats_by_itself_is_no_overlap(self) -> None:
        refrain = Text("refrain", (" ".join(["w5 w6 w7"] * 400),), "this test")
        first, last = refrain.split(0.8) or (refrain, refrain)
        read = cut(first, TOKENIZER, 60, None)
        assert overlap(cut(last, TOKENIZER, 60, None), [read.describe()], [read.tokens]) == 0.0

    def test_a_folder_measured_again_tells_what_it_was_calibrated_on(self, folder: Path, tmp_path: Path) -> None:
        from pared.entrypoints.evaluation.evaluating import learned_share
        from pared.models import find_model

        run(folder, tmp_path / "out", evaluation=None, calibration={"samples": 10, "length": 30})
        source = find_model(str(tmp_path / "out"))
        text = find_text(f"file:{folder}/copy.txt")
        assert learned_share(source, cut(text, TOKENIZER, 30, 20)) == pytest.approx(0.5, abs=0.01)
        assert learned_share(find_model(str(folder / "model")), cut(text, TOKENIZER, 30, 20)) == 0.0


def config_of(kind: str, **fields: Any) -> transformers.PretrainedConfig:
    return getattr(transformers, kind)(**fields)


class TestLengths:
    @pytest.mark.parametrize(
        ("config", "positions"),
        [
            (config_of("GPT2Config"), 1024),
            (config_of("BertConfig"), 512),
            (config_of("RobertaConfig", max_position_embeddings=514, pad_token_id=1), 512),
            (config_of("LlamaConfig", max_position_embeddings=128), 128),
            (config_of("BloomConfig"), None),
        ],
    )
    def test_the_positions_a_model_can_really_take(
        self, config: transformers.PretrainedConfig, positions: int | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert positions_of(config) == positions
        assert Length(4096, is_default=True).within(config).tokens == (positions or 4096)
        assert Length(64).within(config).tokens == 64
        if positions is None:
            return
        assert f"{positions} tokens, the most this model takes, in place of 4096" in caplog.text
        with pytest.raises(ParedError, match=f"windows of 4096 tokens, but this model has {positions} positions"):
            Length(4096).within(config)

    def test_roberta_runs_on_the_positions_that_are_left(self) -> None:
        config = config_of("RobertaConfig", vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=16, max_position_embeddings=34, pad_token_id=1)  # fmt: skip
        model = transformers.RobertaModel(config).eval()
        most = positions_of(config)
        assert most == 32
        with torch.no_grad():
            assert model(torch.full((1, most), 5)).last_hidden_state.shape == (1, most, 16)

    def test_defaults_are_shortened_to_the_model_and_recorded(self, folder: Path, tmp_path: Path) -> None:
        found = run(folder, tmp_path / "out").manifest
        assert found.calibration is not None
        assert found.evaluation is not None
        assert (found.calibration["length"], found.evaluation["length"]) == (128, 128)
        # A recipe read back from the folder asks for what was used, and not for what the model cannot take.
        assert (found.recipe.calibration.length, found.recipe.evaluation.length) == (128, 128)  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"calibration": {"length": 4096}}, "windows of 4096 tokens, but this model has 128 positions"),
            ({"evaluation": {"length": 4096}}, "evaluation windows of 4096 tokens, but this model has 128 positions"),
        ],
    )
    def test_what_was_asked_for_is_refused(
        self, fields: dict[str, Any], message: str, folder: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ParedError, match=message) as error:
            run(folder, tmp_path / "out", **fields)
        assert "kept apart" not in str(error.value)
        assert not (tmp_path / "out").exists()

    def test_a_default_is_shortened_to_a_short_text_too(self, folder: Path, tmp_path: Path) -> None:
        found = run(folder, tmp_path / "out", calibration={"text": f"file:{folder}/short.txt"}).manifest
        assert found.calibration is not None
        assert found.evaluation is not None
        assert found.calibration["length"] + found.evaluation["length"] == 60
        with pytest.raises(ParedError, match="has 60 tokens, fewer than one window of 100"):
            run(folder, tmp_path / "two", calibration={"text": f"file:{folder}/short.txt", "length": 100})

    @pytest.mark.parametrize("kind", ["bert", "gpt2"])
    def test_every_model_takes_the_defaults_in_memory(self, kind: str, folder: Path) -> None:
        calibration = pared.Calibration(text=f"file:{folder}/text.txt", dtype="float32")
        result = pared.compress(TINY_MODELS[kind](), TOKENIZER, pared.Recipe(method="svd-llm", calibration=calibration))
        assert result.calibration is not None
        assert result.calibration["length"] == positions_of(result.model.config)

    def test_perplexity_takes_what_the_model_has(self, folder: Path) -> None:
        model, text = TINY_MODELS["llama"](), f"file:{folder}/text.txt"
        assert pared.perplexity(model, TOKENIZER, text, windows=2).windows["length"] == 128
        with pytest.raises(ParedError, match="of 1024 tokens, but this model has 128 positions"):
            pared.perplexity(model, TOKENIZER, text, length=1024)

    def test_training_takes_what_the_model_has(self, folder: Path) -> None:
        from pared.schema.training import TrainingConfig
        from pared.training.dataset import find_rows

        config = TINY_MODELS["llama"]().config
        rows = find_rows(TrainingConfig(data=(f"file:{folder}/text.txt",)), TOKENIZER, config, True)
        assert {len(row["input_ids"]) for row in rows.train} == {128}
        with pytest.raises(ParedError, match="rows to train on of 512 tokens, but this model has 128"):
            find_rows(TrainingConfig(data=(f"file:{folder}/text.txt",), length=512), TOKENIZER, config, True)

    def test_a_search_takes_what_the_model_has(self, folder: Path) -> None:
        from pared.entrypoints.search import _windows
        from pared.schema.search import SearchConfig

        recipe = pared.Recipe(
            method="wanda", sparsity=0.5, calibration=pared.Calibration(text=f"file:{folder}/text.txt")
        )
        model = TINY_MODELS["llama"]()
        windows, full = _windows(model, TOKENIZER, recipe, SearchConfig(windows=2))
        assert windows.tokens.shape[1] == full.tokens.shape[1] == 128
        with pytest.raises(ParedError, match="windows of 1024 tokens, but this model has 128"):
            _windows(model, TOKENIZER, recipe, SearchConfig(windows=2, length=1024))


def test_a_classifier_is_not_trained_on_plain_text(folder: Path) -> None:
    from pared.schema.training import TrainingConfig
    from pared.training.dataset import find_rows

    config = TINY_MODELS["bert"]().config
    with pytest.raises(ParedError, match=r"is plain text, and .* is not a language model .* name labelled examples"):
        find_rows(TrainingConfig(data=(f"file:{folder}/text.txt",), length=16), TOKENIZER, config, False)


def test_windows_of_a_part_know_their_place_in_the_whole() -> None:
    text = Text("made", (words(500),), "this test")
    parts = text.split(0.8)
    assert parts is not None
    last: Windows = cut(parts[1], TOKENIZER, 10, None)
    for (start, stop), tokens in zip(last.spans, last.tokens, strict=True):
        assert TOKENIZER(text.joined[start:stop], add_special_tokens=False)["input_ids"] == tokens.tolist()


class TestTasks:
    @pytest.fixture
    def task(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        (tmp_path / "math").mkdir()
        rows = "".join(json.dumps({"question": "w5 " * 12, "answer": "w6 #### 7"}) + "\n" for _ in range(20))
        (tmp_path / "math/gsm8k_test.jsonl").write_text(rows)
        (tmp_path / "math/gsm8k_train.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
        monkeypatch.setenv("PARED_DATA", str(tmp_path))
        return "gsm8k"

    def test_a_task_shows_and_writes_what_the_model_has_room_for(
        self, task: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        from pared.evaluation import TASKS, evaluate_task

        assert TASKS[task].shots > 1
        found = evaluate_task(TINY_MODELS["llama"](), TOKENIZER, task, limit=2)
        assert found.shots < TASKS[task].shots
        assert "which is all this model has positions for, in place of" in caplog.text

    def test_more_shots_than_fit_are_refused_if_they_were_asked_for(self, task: str) -> None:
        from pared.evaluation import evaluate_task

        with pytest.raises(ParedError, match="positions of this model: use fewer shots"):
            evaluate_task(TINY_MODELS["llama"](), TOKENIZER, task, limit=2, shots=16)


def test_examples_to_fine_tune_on_are_as_long_as_the_model_takes() -> None:
    from pared.entrypoints.evaluation.fine_tune_encoder import FineTuning, within

    config = config_of("BertConfig", max_position_embeddings=64)
    assert within(FineTuning(), config).length == 64
    assert within(FineTuning(), config_of("BertConfig")).length == 128
    with pytest.raises(ParedError, match="labelled examples of 128 tokens, but this model has 64 positions"):
        within(FineTuning(length=128), config)


LINES = "\n".join(["w5 w6 w7 w8"] * 200)


@pytest.mark.parametrize(
    "content",
    [
        LINES + "\n\n",
        "w3 w4\n\n" + LINES,
        "w3 w4\n\n" + " ".join(["w5"] * 900),
        "w3 w4\n" + " ".join(["w5"] * 900),
        LINES + "\n\nw9 w9\n",
        "\n\n\n" + LINES + "\n\n\n\n",
    ],
)
@pytest.mark.parametrize("rows", [False, True])
def test_a_blank_line_far_from_the_share_is_no_place_to_cut(content: str, rows: bool) -> None:
    """Regression: the one blank line of a file was where it was cut, and all behind it or before it was one part."""
    text = Text("made", tuple(content.split("\n\n")) if rows else (content,), "this test")
    parts = text.split(0.8)
    assert parts is not None
    first, last = parts
    assert 0.75 < len(first.joined.strip()) / len(content.strip()) < 0.85
    assert text.joined[: len(first.joined)] == first.joined
    assert text.joined[last.start :] == last.joined
    assert not text.joined[len(first.joined) : last.start].strip()


def test_the_coarsest_boundary_near_the_share_is_cut_at() -> None:
    paragraphs = ["w3 w4\nw5 w6 " * 9 + "w7"] * 40
    parts = Text("made", ("\n\n".join(paragraphs),), "this test").split(0.8)
    assert parts is not None
    assert [part.joined for part in parts] == ["\n\n".join(paragraphs[:32]), "\n\n".join(paragraphs[32:])]


@pytest.mark.parametrize("content", ["w3", " \n\n w3 \n\n ", ""])
def test_a_text_of_one_word_has_no_two_parts(content: str) -> None:
    assert Text("made", (content,), "this test").split(0.8) is None


def test_the_end_that_is_measured_on_is_not_trained_on_however_its_place_is_spelt(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: names were compared as they were spelt, and a relative path was trained on to its end."""
    monkeypatch.chdir(folder)
    evaluated = f"file:{folder}/text.txt[80%:]"
    for name in ("file:text.txt", "file:./text.txt", "file:model/../text.txt", "file:link.txt", "file:copy.txt"):
        assert learned_part(name, evaluated) == f"{name}[:80%]"
    assert learned_part("file:text.txt", f"file:{folder}/other.txt[80%:]") == "file:text.txt"
    assert learned_part("file:text.txt", f"file:{folder}/text.txt[50%:]") == "file:text.txt"
    assert learned_part("file:text.txt", "wikitext2:test") == "file:text.txt"
