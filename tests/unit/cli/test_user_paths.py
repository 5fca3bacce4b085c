"""Names that no file can have, or whose home is nobody's: one error of ours each, from whatever reads them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pared
from pared import ParedError
from pared.data.instructions import find_instructions
from pared.data.labelled import find_examples
from pared.data.texts import find_text, require_text
from pared.io.apart import require_apart
from pared.io.files import path_of
from pared.io.inputs import inputs_of, without_places
from pared.io.output_dir import require_free
from pared.models.source import ModelSource, find_model
from pared.schema.manifest import Manifest

NAMES = {
    "a home of nobody": "~nosuchuser/m",
    "a home of nobody itself": "~nosuchuser",
    "a long name": "x" * 300,
    "a long name in a folder": "a/b/" + "x" * 300,
    "a long path": "/" + "x/" * 3000,
    "a zero byte": "x\0y",
    "a GGUF file": "/tmp/" + "x" * 300 + ".gguf",
    "a GGUF file of nobody": "~nosuchuser/x.gguf",
}
READERS: dict[str, Callable[[str], Any]] = {
    "model": find_model,
    "text": require_text,
    "file": lambda name: find_text(f"file:{name}"),
    "part of a file": lambda name: require_text(f"file:{name}.txt[:80%]"),
    "examples": lambda name: find_examples(f"file:{name}"),
    "instructions": lambda name: find_instructions(f"instruct:{name}.jsonl"),
    "manifest": lambda name: Manifest.read(Path(name)),
    "load": pared.load,
    "verify": pared.verify,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_that_nothing_can_have_is_told(name: str, reader: str) -> None:
    """Regression: RuntimeError of ~nosuchuser/m, OSError of a name of 300 letters."""
    with pytest.raises(ParedError):
        READERS[reader](name)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_that_nothing_can_have_is_no_input(name: str, tmp_path: Path) -> None:
    asked = {"model": name, "data": [f"file:{name}", f"instruct:{name}"]}
    assert inputs_of(asked) == []
    assert without_places(asked, {}).keys() == asked.keys()
    require_apart(tmp_path / "out", [Path(name)])


@pytest.mark.parametrize("name", ["x" * 300, "/" + "x/" * 3000, "x\0y"])
def test_an_output_that_nothing_can_be_called_is_told(name: str) -> None:
    with pytest.raises(ParedError, match=r"^output "):
        require_free(Path(name), overwrite=False)


def test_a_home_is_written_out_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert path_of("~/m") == Path("/home/somebody/m")
    assert path_of("m~") == Path("m~")
    assert path_of("~nosuchuser/m") == Path("~nosuchuser/m")


@pytest.mark.parametrize("content", ["[" * 100_000, "", "[]", "\x00", None])
def test_the_fields_of_a_damaged_configuration_are_none(tmp_path: Path, content: str | None) -> None:
    """Regression: a pipe in place of config.json was read without end."""
    if content is None:
        os.mkfifo(tmp_path / "config.json")
    else:
        (tmp_path / "config.json").write_text(content)
    assert ModelSource("m", str(tmp_path), "local folder").fields() == {}
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        assert ModelSource("m", str(tmp_path), "local folder").fields() == {"model_type": "llama"}
