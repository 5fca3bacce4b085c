"""The command line, run in this process on a tiny model folder."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS
from tiny_tokenizer import tiny_tokenizer
from typer.testing import CliRunner

from pared.cli import console
from pared.cli.commands import app
from pared.cli.compress import print_manifest
from pared.entrypoints.run import run
from pared.errors import ParedError
from pared.schema.evaluate import EvaluationConfig
from pared.schema.manifest import Manifest
from pared.schema.recipe import Recipe
from pared.tables import Table

WORDS = 64


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "tiny"
    TINY_MODELS["llama"]().save_pretrained(folder)
    tiny_tokenizer(WORDS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    random = torch.Generator().manual_seed(0)
    path.write_text(" ".join(f"w{i}" for i in torch.randint(0, WORDS - 4, (3000,), generator=random).tolist()))
    return path


def pared(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def compress(model: Path, text: Path, out: Path, *more: object) -> tuple[int, str, str]:
    data = ("--data", f"file:{text}", "--samples", 8, "--length", 32, "--eval", f"file:{text}", "--eval-length", 32)
    method = () if {"--method", "--recipe", "--preset"} & set(more) else ("--method", "svd-llm")
    return pared("compress", model, *data, "--eval-windows", 4, "--out", out, *method, *more)


def refused(result: tuple[int, str, str], *told: str) -> None:
    """Exit code 2, one line on stderr that names the things."""
    code, _, err = result
    complaint = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(complaint) == 1, err
    assert "Traceback" not in err
    for word in told:
        assert word in complaint[0], complaint[0]


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def compressed(dense: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "small"
    code, told, err = compress(dense, text, out, "--json", out.parent / "result.json")
    assert code == 0, err
    sizes = ("target parameters", "whole-model parameters", "bytes on disk")
    for word in (*sizes, "perplexity", "seconds", "peak memory", "svd-llm"):
        assert word in told
    return out


def test_compress_writes_a_whole_folder_and_nothing_beside_it(compressed: Path) -> None:
    assert left_over(compressed.parent) == ["result.json", "small"]
    files = set(left_over(compressed))
    assert {
        "config.json",
        "model.safetensors",
        "modeling_pared.py",
        "pared.json",
        "README.md",
        "tokenizer.json",
    } <= files
    result = json.loads((compressed.parent / "result.json").read_text())
    assert result["self_check"] <= 1e-6
    assert result["perplexity_before"] > 0
    assert result["perplexity_after"] > 0
    assert result["bytes_on_disk"] < result["bytes_before"] + 20_000  # safetensors' header


def test_model_card_has_a_yaml_header_the_recipe_and_how_to_load(compressed: Path) -> None:
    card = (compressed / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for word in ("method: svd-llm", "keep: 0.8", "import pared", "trust_remote_code=True", "| perplexity (100%"):
        assert word in card


def test_commands_read_what_compress_wrote(compressed: Path, text: Path, tmp_path: Path) -> None:
    code, told, _ = pared("verify", compressed)
    assert code == 0
    assert "ok" in told
    code, told, _ = pared("info", compressed)
    assert code == 0
    assert "rank" in told
    evaluation = ("--perplexity", f"file:{text}", "--length", 32, "--windows", 4)
    code, _, _ = pared("eval", compressed, *evaluation, "--json", tmp_path / "eval.json")
    assert code == 0
    recorded = json.loads((compressed / "pared.json").read_text())["perplexity_after"]
    assert json.loads((tmp_path / "eval.json").read_text())["perplexity"] == pytest.approx(recorded, rel=1e-6)


def test_export_dense_gives_the_same_perplexity_without_pared(compressed: Path, text: Path, tmp_path: Path) -> None:
    code, _, err = pared("export", compressed, "--to", "dense", "--out", tmp_path / "plain")
    assert code == 0, err
    assert not (tmp_path / "plain" / "modeling_pared.py").exists()
    evaluation = ("--perplexity", f"file:{text}", "--length", 32, "--windows", 4)
    pared("eval", tmp_path / "plain", *evaluation, "--json", tmp_path / "eval.json")
    recorded = json.loads((compressed / "pared.json").read_text())["perplexity_after"]
    assert json.loads((tmp_path / "eval.json").read_text())["perplexity"] == pytest.approx(recorded, rel=1e-4)


def test_a_plan_has_a_row_for_every_kind_of_layer_and_for_every_layer_if_asked(dense: Path) -> None:
    """Regression: a row for every layer of a model of hundreds."""
    _, kinds, _ = pared("plan", dense, "--method", "svd-llm", "--keep", 0.8)
    _, full, _ = pared("plan", dense, "--method", "svd-llm", "--keep", 0.8, "--full")
    names = [line for line in full.splitlines() if "layers." in line]
    assert names
    assert "layers." not in kinds
    counted = [line.split("│")[2] for line in kinds.splitlines() if line.startswith("│") and " rank " in line]
    assert sum(map(int, counted)) == len([line for line in names if " rank " in line])
    assert kinds.splitlines()[:8] == full.splitlines()[:8]  # the sizes


def test_the_list_of_methods_is_not_broken_inside_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: six columns on eighty, calibratio and n."""
    monkeypatch.setenv("COLUMNS", "80")
    _, told, _ = pared("methods")
    rows = [line for line in told.splitlines() if line.startswith("│")]
    assert all(len(line) <= 80 for line in rows)
    words = {word for line in rows for word in line.split()}
    assert {"calibration", "fisher_power=0.5", "svd-llm-v2", "2403.07378),"} <= words


def test_plan_equals_what_compress_decides(dense: Path, compressed: Path, tmp_path: Path) -> None:
    command = ("plan", dense, "--full", "--method", "svd-llm", "--keep", 0.8)
    code, told, _ = pared(*command, "--json", tmp_path / "plan.json")
    assert code == 0
    assert "model.layers.0.self_attn.q_proj" in told
    assert (
        json.loads((tmp_path / "plan.json").read_text()) == json.loads((compressed / "pared.json").read_text())["plan"]
    )


def test_recipe_file_and_options_make_the_same_folder(
    dense: Path, text: Path, compressed: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    part = f"text: file:{text}\n  length: 32\n"
    recipe.write_text(
        f"model: {dense}\nmethod: svd-llm\nkeep: 0.5\ncalibration:\n  {part}  samples: 8\n"
        f"evaluation:\n  {part}  windows: 4\nout: {tmp_path / 'out'}\n"
    )
    code, _, err = pared("compress", "--recipe", recipe, "--keep", 0.8)
    assert code == 0, err
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", compressed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_bad_options_are_refused_with_what_is_valid(dense: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(compress(dense, text, out, "--method", "svd-lm"), "svd-lm", "did you mean 'svd-llm'?")
    refused(compress(dense, text, out, "--keep", 0), "keep", "(0, 1]", "0.0")
    refused(compress(dense, text, out, "--keep", 80), "keep", "(0, 1]", "80")
    refused(compress(dense, text, out, "--keep", 0.0001), "model.layers.0", "least")
    refused(compress(dense, text, out, "--data", "wikitxt2:train"), "wikitxt2:train", "did you mean 'wikitext2:train'?")
    refused(compress(dense, text, out, "--data", "file:no/such.txt"), "no/such.txt")
    refused(compress(dense, text, out, "--length", 100_000), "tokens", "100000")
    refused(compress(dense, text, out, "--skip", "*.z_proj"), "*.z_proj", "matches none")
    refused(compress(dense, text, out, "--sampling", "backwards"), "sampling", "backwards")
    refused(compress(dense, text, out, "--allocation", "unifrom"), "did you mean 'uniform'?")
    assert left_over(tmp_path) == []


def test_unknown_recipe_key_is_quoted_with_the_nearest_valid_one(dense: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {dense}\ncalibration:\n  sample: 8\n")
    refused(pared("compress", "--recipe", recipe), "calibration.sample", "did you mean 'samples'?")


def test_what_is_not_a_dense_model_is_refused(dense: Path, text: Path, compressed: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(compress(tmp_path / "empty", text, tmp_path / "out"), "config.json")
    refused(compress(tmp_path / "absent", text, tmp_path / "out"), "no such folder")
    refused(compress(compressed, text, tmp_path / "out"), "already compressed", "export")
    assert left_over(tmp_path) == ["empty"]


def test_nan_in_a_weight_names_the_site(dense: Path, text: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(dense, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    refused(compress(broken, text, tmp_path / "out"), "model.layers.1.mlp.up_proj", "NaN")
    assert left_over(tmp_path) == ["broken"]


def test_truncated_checkpoint_is_refused(dense: Path, compressed: Path, text: Path, tmp_path: Path) -> None:
    for whole in (dense, compressed):
        broken = tmp_path / whole.name
        shutil.copytree(whole, broken)
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    refused(compress(tmp_path / dense.name, text, tmp_path / "out"), "truncated")
    refused(pared("verify", tmp_path / compressed.name), "model.safetensors", "truncated")


def test_newer_format_is_refused(compressed: Path, text: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    shutil.copytree(compressed, newer)
    config = json.loads((newer / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (newer / "config.json").write_text(json.dumps(config))
    for command in (("verify", newer), ("eval", newer, "--perplexity", f"file:{text}", "--length", 32)):
        refused(pared(*command), "99", "update pared")


def test_existing_folder_is_kept_unless_overwrite_is_said(dense: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    refused(compress(dense, text, out), str(out), "--overwrite")
    refused(compress(dense, text, out, "--overwrite"), str(out), "no list of files that pared wrote")
    refused(pared("demo", "--out", out), str(out))
    assert compress(dense, text, tmp_path / "made")[0] == 0
    shutil.copytree(tmp_path / "made", out, dirs_exist_ok=True)
    refused(compress(dense, text, out, "--overwrite"), str(out), "mine.txt (a file that pared did not write)")
    assert (out / "mine.txt").read_text() == "precious"
    (out / "mine.txt").unlink()
    shutil.rmtree(tmp_path / "made")
    code, _, err = compress(dense, text, out, "--overwrite")
    assert code == 0, err
    assert left_over(tmp_path) == ["out"]
    assert (out / "pared.json").exists()


def test_full_disk_is_refused_before_any_work(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(compress(dense, text, tmp_path / "out"), "not enough disk", "1,000")
    assert left_over(tmp_path) == []


def test_ctrl_c_leaves_no_partial_folder(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("pared.checkpoint.self_check.compare", interrupt)  # the weights are on disk by then
    code, _, err = compress(dense, text, tmp_path / "out")
    assert code == 130
    assert "interrupted; no partial output is left, and --resume continues" in " ".join(err.split())
    assert left_over(tmp_path) == [".out.compress"]


def test_skipped_sites_stay_dense_and_are_reported(dense: Path, text: Path, tmp_path: Path) -> None:
    code, _, err = compress(dense, text, tmp_path / "out", "--skip", "*.layers.0.*")
    assert code == 0, err
    assert "not targeted: 7 weights" in err
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert "model.layers.1.self_attn.q_proj.up.weight" in names


def test_methods_and_version_are_listed() -> None:
    code, told, _ = pared("methods")
    assert code == 0
    assert "svd-llm" in told
    code, told, _ = pared("--version")
    assert code == 0
    assert told.startswith("pared ")


def test_the_model_itself_is_never_the_output(dense: Path, text: Path) -> None:
    """Regression: --overwrite with the input as the output deleted the dense model."""
    before = left_over(dense)
    refused(compress(dense, text, dense, "--overwrite"), "which is read")
    assert left_over(dense) == before


def test_devices_and_dtypes_that_are_not_there_are_refused_before_any_work(
    dense: Path, text: Path, compressed: Path, tmp_path: Path
) -> None:
    """Regression: devices ended in a traceback after the work, unknown dtypes were taken for float32."""
    for device in ("foo", "meta", "cuda:99"):
        refused(compress(dense, text, tmp_path / "out", "--device", device), device, "use cpu")
    refused(pared("eval", dense, "--perplexity", f"file:{text}", "--length", 32, "--device", "foo"), "foo")
    refused(pared("export", compressed, "--out", tmp_path / "out", "--dtype", "fp16x"), "fp16x", "float16")
    assert left_over(tmp_path) == []


def test_windows_longer_than_the_model_has_positions_are_refused(dense: Path, text: Path, tmp_path: Path) -> None:
    """Regression: GPT-2 and BERT ended in an IndexError at the default length."""
    refused(compress(dense, text, tmp_path / "out", "--length", 500), "500", "128 positions")
    refused(compress(dense, text, tmp_path / "out", "--eval-length", 500), "500", "128 positions")


def test_a_tokenizer_of_another_model_is_refused(dense: Path, tmp_path: Path) -> None:
    model = tmp_path / "other"
    shutil.copytree(dense, model)
    tiny_tokenizer(2 * WORDS).save_pretrained(model)
    words = tmp_path / "words.txt"
    words.write_text("w100 " * 200)
    refused(compress(model, words, tmp_path / "out"), "token 100", "knows 64", "another")


def test_nan_in_an_activation_names_where_it_arises(dense: Path, text: Path, tmp_path: Path) -> None:
    """Regression: perplexity, measured first, could only say that the loss is nan."""
    broken = tmp_path / "broken"
    shutil.copytree(dense, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    refused(compress(broken, text, tmp_path / "out"), "model.layers.1.post_attention_layernorm", "NaN")
    refused(compress(broken, text, tmp_path / "out", "--method", "svd"), "model.layers.1.post_attention_layernorm")


def test_perplexity_of_an_encoder_is_refused(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    TINY_MODELS["bert"]().save_pretrained(folder)
    tiny_tokenizer(WORDS).save_pretrained(folder)
    refused(pared("eval", folder, "--perplexity", f"file:{text}", "--length", 32), "not a causal language model")


def test_damaged_manifests_are_refused(compressed: Path, tmp_path: Path) -> None:
    manifest = json.loads((compressed / "pared.json").read_text())
    empty = {"tokens": [], "positions": [], "outputs": []}
    wrong = {
        "not JSON": ("{", "pared.json"),
        "newer": (json.dumps({**manifest, "format_version": 99}), "update pared"),
        "empty fingerprint": (
            json.dumps({**manifest, "fingerprint": empty}),
            "fingerprint",
        ),
    }
    for name, (content, told) in wrong.items():
        folder = tmp_path / name
        shutil.copytree(compressed, folder)
        (folder / "pared.json").write_text(content)
        for command in ("verify", "info"):
            refused(pared(command, folder), told)


def test_a_json_file_that_cannot_be_written_is_refused_before_the_work(dense: Path, text: Path, tmp_path: Path) -> None:
    refused(compress(dense, text, tmp_path / "out", "--json", tmp_path / "no" / "result.json"), "result.json")
    assert left_over(tmp_path) == []


def test_a_ruined_model_is_called_that(compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: a perplexity of 10^8 was reported without a word."""
    manifest = Manifest.read(compressed)
    print_manifest(manifest, "folder")
    assert "ruined" not in capsys.readouterr().out
    print_manifest(manifest.model_copy(update={"perplexity_after": 1e8}), "folder")
    assert "the model is ruined" in capsys.readouterr().out


def test_saved_files_can_be_read_by_others(compressed: Path) -> None:
    """Regression: safetensors wrote weights that only their owner could read."""
    assert {path.stat().st_mode & 0o777 for path in compressed.rglob("*") if path.is_file()} == {0o644}


def test_the_card_tells_how_much_smaller_the_whole_model_is(dense: Path, text: Path, tmp_path: Path) -> None:
    """Regression: with sites skipped the title told the share of the other sites as that of the block weights."""
    code, _, err = compress(dense, text, tmp_path / "out", "--skip", "*down_proj", "--keep", "0.5")
    assert code == 0, err
    sizes = Manifest.read(tmp_path / "out").plan
    smaller = 1 - sizes.after.model_parameters / sizes.before.model_parameters
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{smaller:.0%} smaller\n" in card
    assert "skipped by the recipe" in card


@pytest.mark.parametrize("name", ["[/b]", "[red]", "pared[ray]", "[/x] and [bold]more"])
def test_square_brackets_of_users_are_printed_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: they were read as rich markup: a traceback for a closing tag, and nothing for an opening one."""
    refused(pared("compress", name, "--out", "k"), repr(name))
    console.ConsoleProgress().note(f"a note on {name}")
    with console.ConsoleProgress().stage(f"stage {name}", 1, "step") as advance:
        advance(name)
    console.print_result(Table(f"title {name}", (f"column {name}",), [(name,)], (f"line {name}",)))
    told, noted = capsys.readouterr()
    assert f"a note on {name}" in noted
    assert f"stage {name}: 1/1 step" in noted
    assert f"line {name}" in told
    assert told.count(name) == 4


def test_square_brackets_in_a_bar_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the same of a terminal's bars, whose columns have a switch of their own."""
    shown = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=shown, force_terminal=True, width=200, markup=False))
    with console.ConsoleProgress().stage("stage [/x]", 1, "step") as advance:
        advance("best [/y]")
    assert "stage [/x]" in shown.getvalue()
    assert "best [/y]" in shown.getvalue()


@pytest.mark.parametrize(
    ("words", "flags", "call", "fields"),
    [
        (("eval", "m"), "measure: --perplexity, --examples", lambda: EvaluationConfig(), "measure: perplexity, exam"),
        (
            ("eval", "m", "--tasks", "arc_easy", "--stride", 3),
            "--tasks reads no --stride",
            lambda: EvaluationConfig(tasks="arc_easy", stride=3),  # type: ignore[arg-type]
            "tasks reads no stride",
        ),
        (("compress", "m"), "give --out DIR", lambda: run(Recipe(model="m")), "give out=DIR"),
    ],
)
def test_python_is_told_of_fields_and_the_command_line_of_options(
    words: tuple[object, ...], flags: str, call: Callable[[], object], fields: str
) -> None:
    """Regression: Python was told to give options of the command line."""
    refused(pared(*words), flags)
    with pytest.raises(ParedError, match=fields):
        call()
