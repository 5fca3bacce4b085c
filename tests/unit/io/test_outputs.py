"""Nothing of a user's is lost, and nothing private is published: what an output may be, and what is told in it."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

import pared
from pared import Calibration, ParedError, Recipe
from pared.checkpoint import record
from pared.entrypoints.export import export_dense
from pared.io.apart import require_apart
from pared.io.digests import folder_digest
from pared.io.inputs import found_again, inputs_of, remember, told_apart, without_places
from pared.io.output_dir import require_free, staged
from pared.io.output_file import require_free_file
from pared.io.record import foreign, recorded, write_sums
from pared.schema.manifest import Manifest
from unit.cli.test_commands import pared as command


@pytest.fixture(scope="module")
def place(place: Path) -> Path:
    """A dense model, a text, and what was made of them."""
    recipe = Recipe(
        model=str(place / "llama"), method="svd-llm", keep=0.6, out=str(place / "made"),
        calibration=Calibration(text=f"file:{place}/words.txt", samples=4, length=16, dtype="float32"),
        evaluation=pared.Evaluation(text=f"file:{place}/words.txt", length=16, windows=2),
    )  # fmt: skip
    pared.run(recipe)
    export_dense(str(place / "made"), place / "plain")
    return place


@pytest.fixture
def made(place: Path, tmp_path: Path) -> Path:
    return shutil.copytree(place / "made", tmp_path / "made")


@pytest.fixture
def plain(place: Path, tmp_path: Path) -> Path:
    return shutil.copytree(place / "plain", tmp_path / "plain")


# An output and what is read.


def evaluate_current(model: Path) -> Path:
    return model


def by_a_link(model: Path) -> Path:
    (model.parent / "link").symlink_to(model)
    return model.parent / "link"


def by_a_linked_parent(model: Path) -> Path:
    (model.parent / "elsewhere").symlink_to(model.parent)
    return model.parent / "elsewhere" / model.name


def by_a_detour(model: Path) -> Path:
    return model / ".." / model.name


SPELLINGS: list[Callable[[Path], Path]] = [evaluate_current, by_a_link, by_a_linked_parent, by_a_detour]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("where", ["itself", "parent", "inside", "deep inside"])
def test_an_output_that_is_holds_or_lies_inside_the_model_is_refused(
    tmp_path: Path, spelling: Callable[[Path], Path], where: str
) -> None:
    """Regression: --overwrite deleted the model it reads where the output was its parent."""
    model = tmp_path / "runs" / "model"
    model.mkdir(parents=True)
    out = {"itself": model, "parent": model.parent, "inside": model / "out", "deep inside": model / "a/b"}[where]
    told = {"itself": "is .*, which is read", "parent": "holds"}.get(where, "lies inside")
    given = spelling(model)
    with pytest.raises(ParedError, match=told):
        require_apart(out, [given])
    if where != "parent":  # and the output by the other path
        with pytest.raises(ParedError, match=told):
            require_apart(given if where == "itself" else given / out.relative_to(model), [model])


def test_a_file_under_another_name_in_the_output_is_seen(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "words.txt").write_text("w3")
    os.link(tmp_path / "words.txt", tmp_path / "out" / "copy.txt")
    with pytest.raises(ParedError, match=r"holds .*words\.txt, which is read, as copy\.txt"):
        require_free(tmp_path / "out", overwrite=True, inputs=[tmp_path / "words.txt"])
    require_free(tmp_path / "beside", overwrite=True, inputs=[tmp_path / "words.txt", tmp_path / "missing"])


def test_an_output_that_cannot_be_looked_through_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a folder without permission counted as one that holds no input."""
    (tmp_path / "out" / "closed").mkdir(parents=True)
    (tmp_path / "words.txt").write_text("w3")

    def closed(self: Path) -> Iterator[Path]:
        if self.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return (self / name for name in os.listdir(self))

    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(ParedError, match=r"Permission denied \(.*closed\)"):
        require_free(tmp_path / "out", overwrite=True, inputs=[tmp_path / "words.txt"])


@pytest.mark.parametrize("where", ["zero\0byte", "x" * 300, "words.txt/out", "model/out", "link"])
def test_an_output_file_and_an_output_folder_are_refused_in_the_same_words(tmp_path: Path, where: str) -> None:
    """Regression: the checks stood in two places, and only one said what the system named."""
    (tmp_path / "words.txt").write_text("w3")
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    out, told = tmp_path / where, list[str]()
    for check in (require_free, partial(require_free_file, replaceable=lambda _: True)):
        with pytest.raises(ParedError) as refusal:
            check(out, overwrite=True, inputs=[tmp_path / "model"])
        told.append(str(refusal.value).replace("name a folder", "name a file"))
    assert told[0] == told[1]


def test_an_output_that_is_taken_is_refused_without_a_look_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the whole tree of a large folder was walked, once for every input, to refuse it anyway."""
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "words.txt").write_text("w3")
    monkeypatch.setattr("pared.io.output_dir.require_holds_none", lambda *_: pytest.fail("it was walked"))
    with pytest.raises(ParedError, match="is there already"):
        require_free(tmp_path / "out", overwrite=False, inputs=[tmp_path / "words.txt"])


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("compress", ["compress", "{model}", "--method", "svd", "--keep", "0.6", "--eval", "none"]),
        ("export", ["export", "{model}"]),
        ("convert", ["convert", "{model}"]),
        ("convert --dense", ["convert", "{model}", "--dense"]),
        ("tune", ["tune", "{model}", "--data", "file:{words}"]),
    ],
)
@pytest.mark.parametrize("where", ["{model}/inside", "{model}", "{above}"])
def test_every_command_refuses_an_output_at_its_model_before_any_work(
    place: Path, tmp_path: Path, name: str, asked: list[str], where: str
) -> None:
    above = tmp_path / "above"
    model = shutil.copytree(place / ("llama" if name == "compress" else "made"), above / "model")
    names = {"model": model, "words": place / "words.txt", "above": above}
    before = sorted(above.rglob("*"))
    line = [part.format(**names) for part in (*asked, "--out", where)]
    code, _, err = command(*line, "--overwrite")
    assert code == 2, err
    assert "which is read" in err.replace("\n", " ")
    assert sorted(above.rglob("*")) == before


def test_a_search_inside_its_model_is_refused(place: Path) -> None:
    out = place / "llama" / "s"
    code, _, err = command("search", place / "llama", "--method", "wanda", "--sparsity", "0.5", "--out", out)
    assert code == 2
    assert "lies inside" in err.replace("\n", " ")
    assert not (place / "llama" / "s").exists()


# Only what pared wrote is replaced.


def test_a_folder_that_pared_wrote_is_replaced_and_lists_its_files(made: Path, plain: Path) -> None:
    for folder in (made, plain):
        assert foreign(folder) is None
        require_free(folder, overwrite=True)
    assert set(recorded(made) or {}) == {path.name for path in made.iterdir()} - {"pared.json"}
    lines = (plain / "SHA256SUMS").read_text().splitlines()
    assert {line.split("  ")[1] for line in lines} == {path.name for path in plain.iterdir()} - {"SHA256SUMS"}


def more_file(folder: Path) -> str:
    (folder / "notes.txt").write_text("mine")
    return "notes.txt"


def more_hidden(folder: Path) -> str:
    (folder / ".git").mkdir()
    return ".git"


def more_model(folder: Path) -> str:
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "config.json").write_text("{}")
    return "checkpoint-500"


def link(folder: Path) -> str:
    shutil.move(folder / "README.md", folder.parent / "README.md") if (folder / "README.md").exists() else None
    (folder / "README.md").symlink_to(folder.parent / "README.md")
    return "README.md"


def edited(folder: Path) -> str:
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    return "config.json"


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return "pipe"


@pytest.mark.parametrize("theirs", [more_file, more_hidden, more_model, link, edited, pipe])
@pytest.mark.parametrize("kind", ["made", "plain"])
def test_a_folder_with_anything_of_a_users_is_not_replaced(
    request: pytest.FixtureRequest, kind: str, theirs: Callable[[Path], str]
) -> None:
    """Regression: one config.json made a folder fair game, whatever else lay in it."""
    folder: Path = request.getfixturevalue(kind)
    name = theirs(folder)
    with pytest.raises(ParedError, match=rf"is not replaced, as not all in it is pared's: {name} \("):
        require_free(folder, overwrite=True)


def test_a_plain_model_of_somebody_else_is_not_replaced(place: Path) -> None:
    with pytest.raises(ParedError, match="no list of files that pared wrote"):
        require_free(place / "llama", overwrite=True)


def test_a_folder_of_anything_with_a_list_of_its_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("precious")
    write_sums(tmp_path / "thesis")
    with pytest.raises(ParedError, match="no list of files that pared wrote"):
        require_free(tmp_path / "thesis", overwrite=True)


def cut_short(content: str) -> str:
    return content[: len(content) // 2]


def emptied(_: str) -> str:
    return ""


def without_its_digests(content: str) -> str:
    return re.sub(r"[0-9a-f]{64}", "gone", content)


@pytest.mark.parametrize("damage", [cut_short, emptied, without_its_digests, lambda _: "{}", lambda _: "[]"])
@pytest.mark.parametrize(("kind", "name"), [("made", "pared.json"), ("plain", "SHA256SUMS")])
def test_a_folder_whose_list_is_damaged_is_not_replaced(
    request: pytest.FixtureRequest, kind: str, name: str, damage: Callable[[str], str]
) -> None:
    """Regression: behind a truncated manifest a retrained model and an edited card were taken for pared's own."""
    folder: Path = request.getfixturevalue(kind)
    (folder / name).write_text(damage((folder / name).read_text()))
    with pytest.raises(ParedError, match=rf"is not replaced.*({name} \(damaged|no list of files)"):
        require_free(folder, overwrite=True)


def test_a_folder_whose_manifest_was_edited_is_not_replaced(made: Path) -> None:
    told = json.loads((made / "pared.json").read_text())
    told["model"]["name"] = "mine"
    (made / "pared.json").write_text(json.dumps(told))
    with pytest.raises(ParedError, match=r"pared\.json \(damaged, or changed"):
        require_free(made, overwrite=True)


def test_a_file_that_came_while_the_new_folder_was_written_is_kept(made: Path) -> None:
    with pytest.raises(ParedError, match=r"notes\.txt"), staged(made, overwrite=True):
        more_file(made)
    assert (made / "notes.txt").read_text() == "mine"
    assert pared.verify(made) <= 1e-6


def test_a_folder_of_before_files_were_listed_is_replaced_by_the_names_in_it(made: Path) -> None:
    forget(made)
    require_free(made, overwrite=True)
    more_file(made)
    with pytest.raises(ParedError, match=r"notes\.txt"):
        require_free(made, overwrite=True)


@pytest.mark.parametrize("name", ["n" * 240, "ü" * 120, "😀" * 60, "a/" + "n" * 250 + "/b"])
def test_names_beside_which_no_hidden_one_fits_are_refused_before_any_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(ParedError, match=r"a name of 2[45]\d bytes"):
        require_free(tmp_path / name, overwrite=False)
    require_free(tmp_path / ("n" * 200), overwrite=False)


def test_a_path_that_is_too_long_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ParedError, match=r"a path of 4,\d\d\d bytes"):
        require_free(tmp_path.joinpath(*["d" * 100] * 40), overwrite=False)


# SHA-256 of every file.


def forget(folder: Path) -> None:
    """Make a folder one of before files were listed."""
    told = json.loads((folder / "pared.json").read_text())
    for name in ("files", "checksum", "inputs"):
        del told[name]
    (folder / "pared.json").write_text(json.dumps(told))


def test_a_bit_in_any_file_does_not_verify(made: Path) -> None:
    """Regression: a bit in an embedding row that the fingerprint does not read verified as good."""
    for name in sorted(path.name for path in made.iterdir()):
        content = bytearray((made / name).read_bytes())
        content[-2 if name.endswith(".safetensors") else len(content) // 2] ^= 1
        whole = (made / name).read_bytes()
        (made / name).write_bytes(bytes(content))
        with pytest.raises(ParedError):
            pared.verify(made)
        (made / name).write_bytes(whole)
    assert pared.verify(made) <= 1e-6


def linked(folder: Path) -> Path:
    """Make a folder one of a download cache: every file is a link to one elsewhere."""
    blobs = folder.parent / "blobs"
    folder.rename(blobs)
    folder.mkdir()
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(Path("..") / "blobs" / path.name)
    return folder


@pytest.mark.parametrize("asked", [["export"], ["convert", "--dense"], ["convert"], ["tune", "--data", "file:{words}"]])
def test_what_is_damaged_is_not_made_into_what_is_listed_as_whole(
    place: Path, made: Path, tmp_path: Path, asked: list[str]
) -> None:
    """Regression: a row that was damaged was exported, or trained on, and listed with the SHA-256 it had then."""
    in_embeddings(made, 7.0)
    options = [word.format(words=place / "words.txt") for word in asked[1:]]
    code, _, err = command(asked[0], made, *options, "--out", tmp_path / "out")
    assert code == 2, err
    assert "model.safetensors is not what was written" in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_a_folder_of_links_that_is_recorded_is_still_checked(made: Path) -> None:
    """Regression: pared verify --record left out every file that is a link, and the weights were not checked."""
    before = recorded(made)
    folder = linked(made)
    (folder / "more").symlink_to(folder.parent / "elsewhere")
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "tokens.txt").write_text("w3")
    (folder.parent / "elsewhere" / "circle").symlink_to(folder.parent / "elsewhere")
    (folder / "nowhere").symlink_to(folder / "missing")
    assert recorded(folder) == before
    assert record(folder).files == {**(before or {}), "more/tokens.txt": hashlib.sha256(b"w3").hexdigest()}
    assert pared.verify(folder) <= 1e-6
    in_embeddings(folder.parent / "blobs", 7.0)
    with pytest.raises(ParedError, match=r"model\.safetensors is not what was written"):
        pared.verify(folder)
    with pytest.raises(ParedError, match=r"README\.md|a link that pared did not write"):
        require_free(folder, overwrite=True)


def test_a_missing_file_does_not_verify(made: Path) -> None:
    (made / "tokenizer_config.json").unlink()
    with pytest.raises(ParedError, match=r"tokenizer_config\.json is missing"):
        pared.verify(made)


def in_embeddings(folder: Path, value: float) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][63, 5] = value
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_found_at_load(made: Path, value: float) -> None:
    """Regression: in a row that no token of the fingerprint reads they verified as good."""
    in_embeddings(made, value)
    with pytest.raises(ParedError, match=r"model\.embed_tokens\.weight holds NaN or infinity in 1 of 2,048 values"):
        pared.load(made)
    forget(made)
    with pytest.raises(ParedError, match=r"model\.embed_tokens\.weight holds NaN or infinity"):
        pared.verify(made)


def test_a_dense_model_with_a_damaged_embedding_is_refused_before_it_is_compressed(place: Path, tmp_path: Path) -> None:
    dense = shutil.copytree(place / "llama", tmp_path / "llama")
    in_embeddings(dense, float("inf"))
    recipe = Recipe(model=str(dense), method="svd", keep=0.6, out=str(tmp_path / "out"), evaluation=None)
    with pytest.raises(ParedError, match=r"llama': model\.embed_tokens\.weight holds NaN or infinity"):
        pared.run(recipe)
    assert not (tmp_path / "out").exists()


def test_load_compares_files_on_request(made: Path) -> None:
    pared.load(made, check=True)
    in_embeddings(made, 7.0)
    pared.load(made)
    with pytest.raises(ParedError, match=r"model\.safetensors is not what was written"):
        pared.load(made, check=True)


@pytest.mark.parametrize("call", [pared.verify, partial(pared.load, check=True)])
def test_changed_code_ran_before_it_was_compared(made: Path, tmp_path: Path, call: Callable[..., object]) -> None:
    """Regression: the configuration, and code it names, was read before any SHA-256 was compared."""
    ran = tmp_path / "ran"
    (made / "theirs.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig\n\n\n"
        "class Theirs(LlamaConfig):\n    model_type = 'theirs'\n"
    )
    fields = json.loads((made / "config.json").read_text())
    fields.update(model_type="theirs", auto_map={"AutoConfig": "theirs.Theirs"})
    (made / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ParedError, match=r"config\.json is not what was written"):
        call(made, trust_remote_code=True)
    assert not ran.exists()


def test_a_check_that_cannot_be_made_passed(made: Path, place: Path) -> None:
    """Regression: check=True of a folder without a list, or of a name of the Hub, only logged that."""
    forget(made)
    with pytest.raises(ParedError, match=r"neither pared\.json nor SHA256SUMS lists any there"):
        pared.load(made, check=True)
    with pytest.raises(ParedError, match="neither"):
        pared.load(place / "llama", check=True)


def test_a_model_of_the_hub_is_checked_too(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub" / "models--someone--llama"
    shutil.copytree(made, cache / "snapshots" / ("a" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pared.load("someone/llama", check=True)
    in_embeddings(cache / "snapshots" / ("a" * 40), 7.0)
    with pytest.raises(ParedError, match=r"model\.safetensors is not what was written"):
        pared.load("someone/llama", check=True)
    with pytest.raises(ParedError, match="model 'someone/else': cannot be fetched"):
        pared.load("someone/else", check=True)


def test_what_is_told_of_a_plain_folder_names_its_own_list(plain: Path) -> None:
    """Regression: a plain folder was told of a pared.json that it has not, and to be taken over by its manifest."""
    (plain / "config.json").write_text((plain / "config.json").read_text() + " ")
    with pytest.raises(ParedError, match=r"that in SHA256SUMS with .*remove SHA256SUMS") as error:
        pared.load(plain, check=True)
    assert "pared.json" not in str(error.value)
    assert "--record" not in str(error.value)
    (plain / "config.json").unlink()
    with pytest.raises(ParedError):
        pared.load(plain, check=True)


@pytest.mark.parametrize("content", [b"", b"\n", b"not a list\n", b"\xff\xfe", b"0123  config.json\n"])
def test_a_list_that_is_damaged_is_not_taken_for_none(plain: Path, content: bytes) -> None:
    """Regression: load(check=True) passed where SHA256SUMS was damaged."""
    (plain / "SHA256SUMS").write_bytes(content)
    with pytest.raises(ParedError, match="SHA256SUMS"):
        pared.load(plain, check=True)


def test_a_folder_without_a_list_loads_and_verifies_with_a_note(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    forget(made)
    assert pared.verify(made) <= 1e-6
    assert "lists no SHA-256 of its files" in caplog.text
    pared.load(made)


def test_a_card_that_was_edited_can_be_taken_over(made: Path) -> None:
    (made / "README.md").write_text("---\nlicense: mit\n---\n")
    assert command("verify", made)[0] == 2
    assert command("verify", made, "--record")[0] == 0
    assert command("verify", made)[0] == 0
    assert record(made).files == recorded(made)


def test_a_list_that_points_outside_is_refused(made: Path) -> None:
    told = Manifest.read(made)
    told.model_copy(update={"files": {**told.files, "../secret": "0" * 64}}).write(made)
    with pytest.raises(ParedError, match="does not lie in the folder"):
        pared.verify(made)


# What is published.


def test_no_private_path_is_published(place: Path) -> None:
    """Regression: README.md and pared.json told where things lay on the author's disk."""
    for folder in ("made", "plain"):
        for path in (place / folder).rglob("*"):
            assert str(place).encode() not in path.read_bytes(), path
            assert os.fsencode(Path.home()) not in path.read_bytes(), path
    manifest = Manifest.read(place / "made")
    assert manifest.recipe.model == "llama"
    assert manifest.recipe.out == "made"
    assert manifest.recipe.calibration.text == "file:words.txt"
    assert set(manifest.inputs) == {"llama", "words.txt"}
    assert manifest.inputs["words.txt"][:16] in (place / "made" / "README.md").read_text()


def test_a_published_name_is_found_again_on_the_same_machine(place: Path) -> None:
    manifest = Manifest.read(place / "made")
    assert found_again("llama", manifest.inputs) == str(place / "llama")
    assert found_again("file:words.txt", manifest.inputs) == f"file:{place}/words.txt"
    assert found_again("file:words.txt", {"words.txt": "0" * 64}) == "file:words.txt"
    assert found_again("embedded", manifest.inputs) == "embedded"


def test_a_file_that_changed_is_not_found_again(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one")
    published = told_apart([tmp_path / "x.txt"])
    remember(published)
    digests = {name: digest for name, (_, digest) in published.items()}
    assert found_again("file:x.txt", digests) == f"file:{tmp_path}/x.txt"
    (tmp_path / "x.txt").write_text("two")
    assert found_again("file:x.txt", digests) == "file:x.txt"


def test_places_are_told_by_last_names_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/x.txt", "b/x.txt", "own/FOUND.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path / "a")
    asked = {
        "model": "owner/name",
        "calibration": {"text": f"file:{tmp_path}/a/x.txt"},
        "evaluation": {"text": f"file:{tmp_path}/b/x.txt"},
        "allocation_options": {"program": "../own/FOUND.json"},
        "data": ["instruct:./x.txt", "embedded"],
        "skip": ["*.layers.0.*"],
        "out": str(tmp_path / "out"),
    }
    read = inputs_of(asked)
    assert {os.path.relpath(path, tmp_path) for path in read} == {"a/x.txt", "b/x.txt", "own/FOUND.json"}
    told: Any = without_places(asked, told_apart(read))
    assert str(tmp_path) not in json.dumps(told)
    assert told["model"] == "owner/name"
    assert told["skip"] == ["*.layers.0.*"]
    assert told["allocation_options"] == {"program": "FOUND.json"}
    assert told["data"] == ["instruct:x.txt", "embedded"]
    texts = {told["calibration"]["text"], told["evaluation"]["text"]}
    assert len(texts) == 2
    assert all(text.startswith("file:x") for text in texts)


def test_what_is_only_called_like_an_input_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: beside a second folder `model` the key `model` was renamed too, and the job died at its end."""
    for name in ("a/model", "model", "a/svd", "svd", "a/text", "text"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(name))
    monkeypatch.chdir(tmp_path)
    published = told_apart([Path(name) for name in ("a/model", "model", "a/svd", "svd", "a/text", "text")])
    second = {name: f"{name}-{folder_digest(Path(name))[:8]}" for name in ("model", "svd", "text")}
    assert set(second.values()) < set(published)
    told = without_places(
        {
            "model": {"name": "model", "origin": "model"},
            "recipe": {"model": "svd", "method": "svd", "storage": "text", "teacher": "a/svd"},
            "evaluation": {"text": "text", "file": "file:text", "list": ["model", "./model", f"{tmp_path}/model"]},
            "parent": {"name": "text", "digest": "0"},
            f"{tmp_path}/a/text": "svd:text",
        },
        published,
    )
    assert told == {
        "model": {"name": second["model"], "origin": "model"},
        "recipe": {"model": second["svd"], "method": "svd", "storage": "text", "teacher": "svd"},
        "evaluation": {
            "text": "text", "file": f"file:{second['text']}", "list": ["model", second["model"], second["model"]],
        },
        "parent": {"name": second["text"], "digest": "0"},
        "text": "svd:text",
    }  # fmt: skip


def test_a_job_of_a_folder_named_like_a_field_ends(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "llama", tmp_path / "model")
    shutil.copytree(place / "llama", tmp_path / "other" / "model")
    (tmp_path / "other" / "model" / "generation_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    manifest = pared.run(Recipe(model="model", method="svd", keep=0.6, out="svd", evaluation=None)).manifest
    two = told_apart([Path("other/model"), Path("model")])
    fields = without_places(manifest.model_dump(mode="json"), two)
    assert Manifest.model_validate(fields).recipe.model.startswith("model-")


@pytest.mark.parametrize("value", ["/think", "</s>", "~", "a/b", "4:2", "http://example.org/x", ""])
def test_what_is_no_place_stays_as_it_is(value: str) -> None:
    assert without_places({"value": value}, {}) == {"value": value}
