"""``pared export --to onnx`` without what it needs; what it makes is tested by ``make serve-test``."""

from pathlib import Path

import pytest

import pared.serving.onnx
from unit.cli.test_commands import left_over, refused
from unit.cli.test_commands import pared as command
from unit.serving.gguf_models import saved


def test_a_package_that_is_missing_is_told_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pared.serving.onnx, "NEEDED", ("no_such_exporter",))
    folder = saved(tmp_path / "dense", "llama")
    (folder / "model.safetensors").write_bytes(b"")
    refused(command("export", folder, "--to", "onnx", "--out", tmp_path / "graph"), "pip install no_such_exporter")
    refused(command("export", folder, "--to", "onnx", "--out", tmp_path / "graph", "--dtype", "bfloat16"),
            "float32 always")  # fmt: skip
    assert left_over(tmp_path) == ["dense"]
