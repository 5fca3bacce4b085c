"""Models that see: the language model inside is compressed, the tower is left alone, and questions are answered."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS
from tiny_tokenizer import tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from typer.testing import CliRunner

import pared
from pared import ParedError, tune
from pared.checkpoint import load, record, verify
from pared.cli.commands import app
from pared.entrypoints.convert import convert
from pared.entrypoints.export import export_dense
from pared.evaluation.batch_size import BatchSize
from pared.evaluation.questions import is_right, questions_of, written_one_way
from pared.evaluation.vision_sets import find_questions
from pared.evaluation.vqa import answer_questions, processor_of
from pared.models.architecture import is_causal
from pared.modules import LowRankLinear
from pared.schema.manifest import Manifest
from pared.schema.training import TrainingConfig
from pared.structure import find_anatomy
from pared.training.trainable import compressed_layers

IMAGE = "<image>"
TOWER, LANGUAGE = "model.vision_tower.encoder.layers", "model.language_model.layers"


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA with its processor; the tower has more parameters than the language model."""
    folder = tmp_path_factory.mktemp("llava") / "model"
    tokenizer = tiny_tokenizer(64)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "initializer_range": 0.2}
    vision = CLIPVisionConfig(**sizes, intermediate_size=96, num_hidden_layers=5, image_size=16, patch_size=8)
    text = LlamaConfig(**sizes, vocab_size=65, intermediate_size=48, num_hidden_layers=3, num_key_value_heads=2,
                       max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration._from_config(
            LlavaConfig(vision_config=vision, text_config=text, image_token_index=64)
        )
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=8, vision_feature_select_strategy="default",
        image_token=IMAGE, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def small(llava: Path, calibration: pared.Calibration) -> Path:
    """The same, its language model compressed."""
    out = llava.parent / "small"
    pared.run(pared.Recipe(model=str(llava), method="svd-llm", keep=0.6, calibration=calibration, out=str(out),
                           evaluation=pared.Evaluation(text=calibration.text, length=16, windows=2)))  # fmt: skip
    return out


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Five questions about generated images."""
    rows = []
    for index, colour in enumerate(("red", "green", "blue", "white", "black")):
        Image.new("RGB", (20 + index, 24), colour).save(tmp_path / f"{colour}.png")
        rows.append({"image": f"{colour}.png", "question": f"w{index + 3} w{index + 9}", "answers": ["w5", colour]})
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def test_the_language_model_is_found_though_the_tower_is_larger(llava: Path) -> None:
    model = load(llava)
    sizes = [sum(p.numel() for p in model.get_submodule(path).parameters()) for path in (TOWER, LANGUAGE)]
    assert sizes[0] > sizes[1]
    anatomy = find_anatomy(model)
    assert anatomy.blocks_path == LANGUAGE
    assert anatomy.other_stacks == (TOWER,)
    assert len(anatomy.sites) == 3 * 7
    assert find_anatomy(model, TOWER).blocks_path == TOWER
    with pytest.raises(ParedError, match=r"has no list of blocks 'model\.vision_tower'; did you mean"):
        find_anatomy(model, "model.vision_tower")


def test_a_model_that_sees_is_a_language_model_unless_an_encoder_reads_its_text() -> None:
    assert is_causal(["LlavaForConditionalGeneration"])
    assert is_causal(["Qwen2VLForConditionalGeneration"])
    assert not is_causal(["Florence2ForConditionalGeneration"])
    assert not is_causal(["BertForSequenceClassification"])


def test_a_cache_of_keys_does_not_grow_from_batch_to_batch(llava: Path, calibration: pared.Calibration) -> None:
    outputs = []
    for batch in (1, 4):  # every window alone, and none beside windows that came before
        model = load(llava)
        recipe = pared.Recipe(method="svd-llm", keep=0.6, calibration=calibration.model_copy(update={"batch": batch}))
        pared.compress(model, pared.load_tokenizer(llava), recipe)
        outputs.append(model(input_ids=torch.arange(3, 20).unsqueeze(0)).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)


def test_a_folder_whose_parts_transformers_renames_on_saving_is_whole(small: Path, llava: Path) -> None:
    with safe_open(small / "model.safetensors", "pt") as tensors:
        assert all(not name.startswith("model.") for name in tensors.keys())  # noqa: SIM118 - not a mapping
    assert verify(small) <= 1e-6
    manifest = Manifest.read(small)
    assert manifest.perplexity_before != manifest.perplexity_after
    compressed = compressed_layers(load(small))
    assert len(compressed) == 21
    assert all(name.startswith(LANGUAGE) for name in compressed)
    dense, tower = load(llava).get_submodule(TOWER).state_dict(), load(small).get_submodule(TOWER).state_dict()
    assert all(torch.equal(dense[name], tower[name]) for name in dense)


def test_a_tensor_that_is_missing_is_called_what_it_is_in_the_model(small: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors["language_model.model.layers.1.mlp.up_proj.down.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ParedError, match=rf"{LANGUAGE}\.1\.mlp\.up_proj\.down\.weight is missing"):
        verify(copy)


def test_the_processor_goes_with_every_folder(small: Path, llava: Path, tmp_path: Path, text_file: Path) -> None:
    asked = {"model": str(small), "out": str(tmp_path / "tuned"), "data": [f"file:{text_file}"], "length": 16,
             "validation": 2, "tokens": 64, "method": "distill", "evaluation": None}  # fmt: skip
    tune(TrainingConfig.of(asked))
    export_dense(str(small), tmp_path / "dense")
    convert(small, tmp_path / "pivoted", pivoted=True)
    wanted = AutoProcessor.from_pretrained(llava).image_processor.to_dict()
    for folder in (small, tmp_path / "tuned", tmp_path / "dense", tmp_path / "pivoted"):
        assert AutoProcessor.from_pretrained(folder).image_processor.to_dict() == wanted


def test_the_tower_is_compressed_where_that_is_asked_for(llava: Path, tmp_path: Path, text_file: Path) -> None:
    asked: dict[str, Any] = {"model": str(llava), "blocks": TOWER, "out": str(tmp_path / "out"), "evaluation": None}
    pared.run(pared.Recipe.model_validate({**asked, "method": "svd", "keep": 0.6}))
    compressed = compressed_layers(load(tmp_path / "out"))
    assert compressed
    assert all(name.startswith(TOWER) and isinstance(one, LowRankLinear) for name, one in compressed.items())
    calibration = {"text": f"file:{text_file}", "samples": 4, "length": 16}
    with pytest.raises(ParedError, match=f"the blocks of {TOWER} are not run on text"):
        pared.run(pared.Recipe.model_validate({**asked, "method": "svd-llm", "calibration": calibration,
                                               "out": str(tmp_path / "other")}))  # fmt: skip


def test_a_tower_that_text_does_not_reach_is_checked_too(llava: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = {"model": str(llava), "blocks": TOWER, "evaluation": None, "method": "svd", "keep": 0.6, "out": str(out)}
    pared.run(pared.Recipe.model_validate(asked))
    assert verify(out) <= 1e-6
    tensors = load_file(out / "model.safetensors")
    noise = {name: torch.randn_like(value) if name.endswith("up.weight") else value for name, value in tensors.items()}
    save_file(noise, out / "model.safetensors", metadata={"format": "pt"})
    record(out)
    with pytest.raises(ParedError, match=rf"self-check failed: the outputs of layer {re.escape(TOWER)}\.0"):
        verify(out)


def test_a_tower_whose_tensors_have_their_older_names_is_compressed(llava: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(llava, old)
    tensors = load_file(old / "model.safetensors")
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in tensors.items()}
    save_file(renamed, old / "model.safetensors", metadata={"format": "pt"})
    for number, blocks in enumerate((TOWER, LANGUAGE)):
        out = str(tmp_path / str(number))
        pared.run(pared.Recipe(model=str(old), blocks=blocks, method="svd", keep=0.6, evaluation=None, out=out))
        assert verify(out) <= 1e-6
        assert all(name.startswith(blocks) for name in compressed_layers(load(out)))


def test_a_template_that_begins_a_text_does_not_begin_it_twice(
    llava: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = processor_of(str(llava))
    processor.chat_template = (
        "{{ bos_token }} {% for part in messages[0].content %}"
        "{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}"
    )
    seen: list[torch.Tensor] = []
    model = load(llava)
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: (seen.append(given["input_ids"]), generate(**given))[1])
    adding = TemplateProcessing(single="w1 $A", pair="w1 $A w1 $B", special_tokens=[("w1", 1)])
    processor.tokenizer.backend_tokenizer.post_processor = adding
    answer_questions(model, processor, questions_of(questions)[:1])
    assert seen[0][0, :2].tolist() == [1, 64]


def test_a_compressed_model_answers_as_its_dense_product_does(small: Path, questions: Path, tmp_path: Path) -> None:
    export_dense(str(small), tmp_path / "dense")
    processor, asked = processor_of(str(small)), questions_of(questions)
    found = [answer_questions(load(path), processor, asked, batch=2).answers for path in (small, tmp_path / "dense")]
    assert [row["answers"] for row in found[0]] == [row["answers"] for row in found[1]]
    assert all(row["answers"][0] for row in found[0])


def test_padding_does_not_change_an_answer(llava: Path, questions: Path) -> None:
    processor, asked = processor_of(str(llava)), questions_of(questions)
    longer = [asked[0], type(asked[0])(asked[1].image, "w7 " * 20, ("w5",)), *asked[2:]]
    together, alone = (answer_questions(load(llava), processor, longer, batch=size).answers for size in (5, 1))
    assert [row["answers"] for row in together] == [row["answers"] for row in alone]


def test_the_image_counts(llava: Path, questions: Path) -> None:
    processor, asked = processor_of(str(llava)), questions_of(questions)
    same = [type(one)(one.image, "w3 w4", one.answers) for one in asked]
    answers = [row["answers"][0] for row in answer_questions(load(llava), processor, same).answers]
    assert len(set(answers)) > 1


@pytest.mark.parametrize(
    ("answer", "plain"),
    [("A red, ball.", "red ball"), ("two", "2"), ("1,000", "1000"), ("3.5", "3.5"), ("the  Cat's", "cats"),
     ("T-shirt", "t shirt"), ("None", "0")],
)  # fmt: skip
def test_answers_are_written_one_way(answer: str, plain: str) -> None:
    assert written_one_way(answer) == plain


def test_an_answer_is_right_if_an_annotator_gave_it() -> None:
    assert is_right("The dog!", ["cat", "dog"])
    assert not is_right("dogs", ["cat", "dog"])


def test_the_command_counts_and_keeps_every_answer(small: Path, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = ["eval", str(small), "--vqa", str(questions), "--json", str(out)]
    assert CliRunner().invoke(app, command).exit_code == 0
    given = [row["answers"][0] for row in json.loads(out.read_text())["answers"]]
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    rows[1]["answers"] = [given[1]]  # one is right, and the others are if they say the same
    questions.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    ran = CliRunner().invoke(app, [*command, "--limit", "3"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(out.read_text())
    right = [is_right(text, row["answers"]) for text, row in zip(given, rows[:3], strict=False)]
    assert right[1]
    assert f"vqa: exact_match {sum(right) / 3:.4f} " in ran.output
    assert [row["verdicts"][0]["exact_match"] for row in found["answers"]] == right


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "red.png", "question": "w1"}, "row 2: expected 'image', 'question' and 'answers', one text or more; "
         "got ['image', 'question']"),
        ({"image": "red.png", "question": "w1", "answers": []}, "row 2: expected 'image'"),
        ({"image": "red.png", "question": " ", "answers": ["w1"]}, "row 2: expected 'image'"),
        ({"image": "grey.png", "question": "w1", "answers": ["w1"]}, "row 2: no image "),
        ([1], "row 2: expected 'image', 'question' and 'answers', one text or more; got list"),
    ],
)  # fmt: skip
def test_a_row_that_asks_nothing_is_named(questions: Path, row: Any, said: str) -> None:
    first = questions.read_text().splitlines()[0]
    questions.write_text(f"{first}\n{json.dumps(row)}\n", encoding="utf-8")
    with pytest.raises(ParedError, match=re.escape(f"{questions}, {said}")):
        questions_of(questions)


def test_a_blank_line_is_no_question_and_counts_for_no_limit(questions: Path) -> None:
    rows = questions.read_text().splitlines()
    questions.write_text("\n".join([rows[0], "", *rows[1:]]) + "\n", encoding="utf-8")
    assert len(questions_of(questions, 2)) == 2


def test_what_cannot_be_asked_is_refused(llava: Path, questions: Path, tmp_path: Path) -> None:
    (questions.parent / "red.png").write_bytes(b"no image")
    with pytest.raises(ParedError, match=r"image .*red\.png: not readable"):
        answer_questions(load(llava), processor_of(str(llava)), questions_of(questions))
    with pytest.raises(ParedError, match="a limit of 0 rows leaves nothing"):
        questions_of(questions, 0)
    questions.write_text("", encoding="utf-8")
    with pytest.raises(ParedError, match="has no rows"):
        questions_of(questions)
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "blind")
    tiny_tokenizer(64).save_pretrained(tmp_path / "blind")
    with pytest.raises(ParedError, match=r"blind.*(is not a vision-language model|no readable processor)"):
        processor_of(str(tmp_path / "blind"))


def test_answers_do_not_depend_on_the_batch(llava: Path, questions: Path) -> None:
    model, processor, asked = load(llava), processor_of(str(llava)), questions_of(questions)
    alone = answer_questions(model, processor, asked, 1)
    for batch in (2, 5, BatchSize("auto")):
        assert answer_questions(model, processor, asked, batch) == alone


def test_choices_with_and_without_an_image_are_counted_apart(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARED_DATA", str(tmp_path))
    (tmp_path / "vqa").mkdir()
    Image.new("RGB", (20, 24), "red").save(tmp_path / "vqa" / "red.png")
    rows = [{"question": f"w{number}", "choices": ["w3", "w4"], "answer": number % 2,
             "image": "red.png" if number in (0, 3) else None} for number in range(5)]  # fmt: skip
    (tmp_path / "vqa" / "scienceqa_test.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    result = CliRunner().invoke(
        app, ["eval", str(llava), "--vqa", "scienceqa", "--batch-size", "3", "--json", str(tmp_path / "out.json")]
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["task"] == "scienceqa"
    assert found["questions"] == str(tmp_path / "vqa" / "scienceqa_test.jsonl")
    assert {name: one["rows"] for name, one in found["groups"]["image"].items()} == {"with": 2, "without": 3}
    assert set(found["metrics"]) == {"acc"}
    assert "scienceqa by image: with acc" in result.output
    model, processor, asked = load(llava), processor_of(str(llava)), find_questions("scienceqa")
    assert answer_questions(model, processor, asked, 1).answers == answer_questions(model, processor, asked, 5).answers
