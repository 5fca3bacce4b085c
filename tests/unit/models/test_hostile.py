"""Damaged and hostile files: one error of ours each, never a traceback, never a hang."""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import pared
from pared import ParedError, Recipe
from pared.allocation.dsa.named import named as program_named
from pared.checkpoint import read_config
from pared.checkpoint.format import ParedConfig
from pared.cli.commands import app
from pared.data.files import read_rows
from pared.io.guarded import UNPACKED_UNASKED, parse_json, parse_yaml
from pared.io.journal import Journal
from pared.schema.manifest import Manifest
from pared.search.journal import SearchJournal

Q = "model.layers.0.self_attn.q_proj"
HUGE = 2**63


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """A folder of two factors and a sparse one, each of a whole job."""
    place = tmp_path_factory.mktemp("hostile")
    TINY_MODELS["llama"]().save_pretrained(place / "dense")
    tokenizer.save_pretrained(place / "dense")
    made = {}
    for name, fields in {
        "factors": {"method": "svd", "keep": 0.6},
        "sparse": {"method": "magnitude", "pattern": "2:4"},
    }.items():
        recipe = Recipe.of({"model": str(place / "dense"), "out": str(place / name), "evaluation": None, **fields})
        made[name] = pared.run(recipe).folder
    return made


@pytest.fixture
def folder(wholes: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(wholes["factors"], tmp_path / "copy"))


def edited(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file; what the change returns takes its place, unless that is nothing."""
    fields = json.loads(path.read_text())
    told = change(fields)
    path.write_text(json.dumps(fields if told is None else told))


def all_refuse(folder: Path, also: str = "") -> None:
    """Every reader of a folder refuses it in one line."""
    for read in (pared.load, pared.verify):
        with pytest.raises(ParedError, match=also) as error:
            read(folder)
        assert len(str(error.value)) < 2000
    for words in (["verify", str(folder)], ["info", str(folder)], ["plan", str(folder)]):
        result = CliRunner().invoke(app, words)
        assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)


ODD_VALUES: dict[str, Any] = {
    "string": "12", "float": 12.0, "true": True, "null": None, "list": [12], "negative": -1, "zero": 0, "huge": HUGE,
    "billions": 10**9, "digits": 10**50,
}  # fmt: skip


LOW_RANK = {"kind": "low_rank", "in_features": 32, "out_features": 48, "rank": 8, "bias": False}
PACKED = {"kind": "sparse", "in_features": 32, "out_features": 48, "bias": False, "stored": 768, "kept": 2, "group": 4}


@pytest.mark.parametrize("value", ODD_VALUES)
@pytest.mark.parametrize("entry", [LOW_RANK, {**LOW_RANK, "kind": "pivoted"}, PACKED], ids=lambda entry: entry["kind"])
def test_a_map_entry_of_another_type_or_range_is_refused(entry: dict[str, Any], value: str) -> None:
    assert ParedConfig(modules={Q: entry})
    for key in entry:
        if (key, value) != ("bias", "true"):
            with pytest.raises(ValueError, match="map entry") as error:
                ParedConfig(modules={Q: {**entry, key: ODD_VALUES[value]}})
            assert len(str(error.value)) < 1000


@pytest.mark.parametrize(("key", "value"), [("rank", "huge"), ("in_features", "billions"), ("bias", "string")])
def test_a_folder_with_such_an_entry_is_refused_by_every_reader(key: str, value: str, folder: Path) -> None:
    def change(config: Any) -> None:
        config["quantization_config"]["modules"][Q][key] = ODD_VALUES[value]

    edited(folder / "config.json", change)
    all_refuse(folder, "map entry")


@pytest.mark.parametrize("value", [-1, 0, 1.0, True, "1", None, [1], HUGE, 2])
@pytest.mark.parametrize("file", ["config.json", "pared.json"])
def test_another_format_version_is_refused(file: str, value: Any, folder: Path) -> None:
    def change(fields: Any) -> None:
        (fields["quantization_config"] if file == "config.json" else fields)["format_version"] = value

    edited(folder / file, change)
    with pytest.raises(ParedError, match=r"format.version"):
        pared.verify(folder)
    if file == "config.json":
        with pytest.raises(ParedError, match=r"format.version"):
            pared.load(folder)


CONFIGURATIONS: dict[str, Callable[[Any], Any]] = {
    "layers": lambda c: c.update(num_hidden_layers=10**7),
    "heads": lambda c: c.update(num_attention_heads=10**9),
    "vocabulary": lambda c: c.update(vocab_size=10**10),
    "width": lambda c: c.update(hidden_size=2**40),
    "inner": lambda c: c.update(intermediate_size=HUGE),
    "negative": lambda c: c.update(vocab_size=-5),
    "text": lambda c: c.update(hidden_size="many"),
    "nothing": lambda _: [],
    "a number": lambda _: 7,
    "architectures": lambda c: c.update(architectures={"a": 1}),
    "architecture": lambda c: c.update(architectures="LlamaForCausalLM"),
    "no type": lambda c: c.pop("model_type") and None,
    "a type": lambda c: c.update(model_type=["llama"]),
    "quantization": lambda c: c.update(quantization_config="pared"),
    "method": lambda c: c["quantization_config"].update(quant_method=["pared"]),
    "modules": lambda c: c["quantization_config"].update(modules=[1, 2]),
    "shared": lambda c: c["quantization_config"].update(shared={"a": ["b"]}),
    "entry": lambda c: c["quantization_config"]["modules"].update({Q: None}),
    "names": lambda c: c["quantization_config"]["modules"].update({"x" * 100_000: {}}),
    "auto_map": lambda c: c.update(auto_map=[1]),
    "dtype": lambda c: c.update(dtype="float7"),
}


STILL_READ = ("auto_map",)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_absurd_configuration_is_told(name: str, folder: Path) -> None:
    edited(folder / "config.json", CONFIGURATIONS[name])
    for words in (["verify", str(folder)], ["info", str(folder)], ["plan", str(folder)], ["bench", str(folder)]):
        result = CliRunner().invoke(app, words)
        assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
    if name in STILL_READ:
        pared.load(folder)
    for read in (pared.verify,) if name in STILL_READ else (pared.load, pared.verify):
        with pytest.raises(ParedError) as error:
            read(folder)
        assert len(str(error.value)) < 2000


TEXTS = {
    "empty": "", "cut": '{"model_type": ', "deep": "[" * 100_000, "object": '{"a":' * 3000 + "1" + "}" * 3000,
    "digits": '{"vocab_size": ' + "9" * 6000 + "}", "bytes": "\udcff\udcfe", "zero": "\0", "list": "[1, 2]",
    "surrogate": '"\\ud800"', "nan": '{"vocab_size": NaN}', "string": '"config"',
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "file", ["config.json", "pared.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_a_file_of_anything_but_what_it_should_hold_is_told(file: str, text: str, folder: Path) -> None:
    (folder / file).write_bytes(TEXTS[text].encode("utf-8", "surrogateescape"))
    for words in (["verify", str(folder)], ["info", str(folder)], ["plan", str(folder)]):
        result = CliRunner().invoke(app, words)
        assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
    if file.startswith("tokenizer") and text != "nan":
        with pytest.raises(ParedError):
            pared.load_tokenizer(folder)


@pytest.mark.parametrize("file", ["config.json", "pared.json", "model.safetensors", "tokenizer.json", "extra.json"])
def test_a_pipe_in_place_of_a_file_never_hangs(file: str, folder: Path) -> None:
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    all_refuse(folder, "regular file|without config")
    with pytest.raises(ParedError, match=r"regular file|without config"):
        pared.load_tokenizer(folder)


def test_a_pipe_in_place_of_what_a_user_names_never_hangs(tmp_path: Path) -> None:
    for name in ("recipe.yaml", "rows.jsonl", "text.txt", "program.json", "rows.jsonl.gz"):
        os.mkfifo(tmp_path / name)
    for read in (
        lambda: Recipe.load(tmp_path / "recipe.yaml"),
        lambda: list(read_rows(tmp_path / "rows.jsonl")),
        lambda: list(read_rows(tmp_path / "rows.jsonl.gz")),
        lambda: program_named(str(tmp_path / "program.json")),
    ):
        with pytest.raises(ParedError, match="regular file"):
            read()


def test_whole_numbers_in_place_of_weights_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = f"{Q}.up.weight"
    tensors[name] = tensors[name].to(torch.int64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for read in (pared.load, pared.verify):
        with pytest.raises(ParedError):
            read(folder)


def test_bombs_of_aliases_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(ParedError, match="aliases"):
        parse_yaml("\n".join(lines), "recipe")
    with pytest.raises(ParedError, match="an alias is nested in what it names"):
        parse_yaml("a: &a [*a]", "recipe")
    assert parse_yaml("a: &a [1]\nb: *a", "recipe") == {"a": [1], "b": [1]}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("keep: 0.8\nkeep: 0.7", "'keep' stands there twice"),
        ("[" * 3000, "nested too deeply|not readable"),
        ("keep: " + "9" * 6000, "6,000 digits"),
        ("&a " * 3, "not readable as YAML"),
        ("? [a]\n: 1", "not readable as YAML"),
        ("2024-13-45", "not readable as YAML"),
        ("!!binary xxx", "not readable as YAML"),
    ],
)
def test_odd_yaml_is_told_in_one_line(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ParedError, match=told) as error:
        Recipe.load(path)
    assert "\n" not in str(error.value)


def test_a_bomb_of_zeros_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * (UNPACKED_UNASKED + 2**21)))
    with pytest.raises(ParedError, match="no text is packed as densely"):
        list(read_rows(path))


def test_several_members_of_an_archive_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n') + gzip.compress(b'{"a": 2}\n') + b"\0" * 8)
    assert [row for _, row in read_rows(path)] == [{"a": 1}, {"a": 2}]
    path.write_bytes(gzip.compress(b'{"a": 1}\n')[:-4])
    with pytest.raises(ParedError, match="ends too early"):
        list(read_rows(path))


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["fingerprint"].update(tokens=[0] * 10**6),
        lambda f: f["fingerprint"].update(tokens=[-1]),
        lambda f: f["fingerprint"].update(tokens=[HUGE]),
        lambda f: f["fingerprint"].update(positions=[-3] * 64),
        lambda f: f["fingerprint"].update(outputs=["nan"] * 64),
        lambda f: f["fingerprint"].update(layers={"model.nowhere": [1.0]}),
        lambda f: f["fingerprint"].update(layers={"model": [1.0] * 8}),
        lambda f: f["fingerprint"].update(layers={Q: [1.0]}),
        lambda f: f["plan"].update(sites=[]),
        lambda f: f["plan"]["sites"][0].update(name=5),
        lambda f: [site.update(out_features=0) for site in f["plan"]["sites"]],
        lambda f: f["plan"]["sites"][0].update(in_features=False),
        lambda f: f["plan"]["sites"][0].update(block=-1),
        lambda f: f["plan"].update(bytes_per_parameter=0),
        lambda f: f["plan"].update(model_parameters=0),
        lambda f: f.update(recipe=[]),
        lambda f: f.update(preset={"": None}),
        lambda f: f.update(model={}),
        lambda f: f["model"].update(name=5),
        lambda f: f.update(evaluation={"text": "embedded"}, perplexity_after=3.0),
        lambda f: f.update(preset={"name": "demo", "source": "", "deviations": {"keep": 0.8}}),
        lambda f: f["plan"].update(model_parameters=10**60),
    ],
)
def test_a_manifest_of_odd_values_is_told(change: Callable[[Any], Any], folder: Path) -> None:
    edited(folder / "pared.json", lambda fields: (change(fields), fields.pop("checksum"), None)[-1])
    for words in (["verify", str(folder)], ["info", str(folder)]):
        result = CliRunner().invoke(app, words)
        assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
    with pytest.raises(ParedError):
        pared.verify(folder)


# Found by chance: small changes at random places, and random values at all of them.

ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
OFTEN = settings(
    max_examples=int(os.environ.get("PARED_FUZZ", "100")),
    deadline=None,
    derandomize="PARED_FUZZ"
    not in os.environ,  # the same code gets the same examples; PARED_FUZZ=1000 looks for new ones
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside plain data."""
    inside = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [path, *(place for key, inner in inside[:6] for place in places(inner, (*path, key)))]


def with_other(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_other(value[path[0]], path[1:], new)
    return copy


def never_crashes(read: Callable[[], Any]) -> None:
    told = ""
    try:
        read()
    except ParedError as error:
        told = str(error)
    assert "\n" not in told
    assert len(told) < 5000


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.json", "pared.json"])
@OFTEN
@given(data=st.data())
def test_a_folder_with_any_value_changed_is_read_or_told(
    file: str, wholes: dict[str, Path], data: st.DataObject
) -> None:
    source = wholes[data.draw(st.sampled_from(sorted(wholes)))]
    folder = source.with_name("changed")
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(source, folder)
    fields = json.loads((folder / file).read_text())
    fields.pop("checksum", None)
    place = data.draw(st.sampled_from(places(fields)))
    (folder / file).write_text(json.dumps(with_other(fields, place, data.draw(ANY))))
    never_crashes(lambda: pared.verify(folder))
    if file == "config.json":
        never_crashes(lambda: pared.load(folder))
    for words in (["info", str(folder)], ["plan", str(folder)]):
        result = CliRunner().invoke(app, words)
        assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)


@pytest.mark.slow
@OFTEN
@given(modules=ANY | st.dictionaries(st.text(max_size=8), ANY, max_size=3), shared=ANY, version=ANY)
def test_any_map_is_read_or_told(modules: Any, shared: Any, version: Any) -> None:
    for fields in ({"format_version": version}, {}):
        told = ""
        try:
            ParedConfig(modules=modules, shared=shared, **fields)
        except ValueError as error:
            told = str(error)
        assert len(told) < 5000


@pytest.mark.slow
@OFTEN
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_in_a_users_file_are_read_or_told(content: bytes, tmp_path: Path) -> None:
    for name in ("f.yaml", "f.jsonl", "f.jsonl.gz", "f.json"):
        (tmp_path / name).write_bytes(content)
    never_crashes(lambda: Recipe.load(tmp_path / "f.yaml"))
    never_crashes(lambda: list(read_rows(tmp_path / "f.jsonl")))
    never_crashes(lambda: list(read_rows(tmp_path / "f.jsonl.gz")))
    never_crashes(lambda: program_named(str(tmp_path / "f.json")))
    never_crashes(lambda: parse_json(content, "file"))
    never_crashes(lambda: Journal(tmp_path / "f.jsonl", {"pared_search": 1}).close())


@pytest.mark.slow
@OFTEN
@given(line=st.fixed_dictionaries({}, optional={"name": ANY | st.just("a"), "program": ANY, "values": ANY, "why": ANY}))
def test_any_line_of_a_journal_is_read_or_told(line: Any, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(f'{{"pared_search": 1}}\n{json.dumps(line)}\n')

    def read() -> None:
        with SearchJournal(path, {}) as journal:
            journal.get("a", str(line["program"]))

    never_crashes(read)


@pytest.mark.slow
@OFTEN
@given(fields=st.dictionaries(st.sampled_from([*Recipe.model_fields, "else"]), ANY, max_size=4))
def test_any_recipe_is_read_or_told(fields: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(fields))
    never_crashes(lambda: Recipe.load(path))


@pytest.mark.slow
@OFTEN
@given(fields=st.dictionaries(st.sampled_from(["program", "score_tokens", "settings", "method", "sparsity"]), ANY))
def test_any_program_file_is_read_or_told(fields: Any, tmp_path: Path) -> None:
    path = tmp_path / "FOUND.json"
    path.write_text(json.dumps(fields))
    never_crashes(lambda: program_named(str(path)))


def test_the_readers_are_the_ones_that_are_used(folder: Path) -> None:
    assert Manifest.read(folder).format_version == 1
    assert read_config(str(folder)).model_type == "llama"


def test_a_shard_that_the_index_lists_and_is_missing_is_named(tmp_path: Path) -> None:
    """Regression: in memory the user read of a FileNotFoundError in modeling_utils.py."""
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    next((tmp_path / "model").glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(ParedError, match=r"model-00002-of-\d+\.safetensors, which its index lists, is missing"):
        pared.load(tmp_path / "model")
