"""ONNX graphs in onnxruntime: factors and narrow layers in the graph, the cache as inputs and outputs."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import pared
from pared.serving.onnx import NEEDED, TOLERANCE
from unit.cli.test_commands import left_over, refused
from unit.cli.test_commands import pared as command
from unit.serving.gguf_models import changed_model, model_of, narrowed_model, saved

pytestmark = [pytest.mark.serve, pytest.mark.filterwarnings("ignore")]
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "dense": lambda: model_of("qwen2"),
    "low rank": lambda: changed_model("low_rank"),
    "pivoted": lambda: changed_model("pivoted"),
    "sparse": lambda: changed_model("sparse"),
    "widths and heads by layer": lambda: narrowed_model("llama", [48, 16, 40], [1, 2, 2]),
}


@pytest.fixture(autouse=True)
def _installed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    for name in NEEDED:
        pytest.importorskip(name, reason=f"{name} is not installed; make serve-test installs it")


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_answers_as_the_model_token_by_token(tmp_path: Path, name: str) -> None:
    folder, out = saved(tmp_path / "folder", MODELS[name]()), tmp_path / "graph"
    code, told, err = command("export", folder, "--to", "onnx", "--out", out)
    assert code == 0, err
    assert "run in onnxruntime, largest relative difference" in told
    assert {"model.onnx", "model.onnx.data", "tokenizer.json", "SHA256SUMS"} <= {*left_over(out)}
    assert b"site-packages" not in (out / "model.onnx").read_bytes()
    assert "pared" not in (out / "config.json").read_text()
    if name == "low rank":
        import onnx

        shapes = [list(one.dims) for one in onnx.load(out / "model.onnx", load_external_data=False).graph.initializer]
        assert [8, 32] in shapes or [32, 8] in shapes  # the factors, not their product
        again = pared.export(folder, out, to="onnx", overwrite=True)
        assert again.self_check <= TOLERANCE


def test_what_writes_no_text_is_refused(tmp_path: Path) -> None:
    from tiny_models import TINY_MODELS

    TINY_MODELS["bert"]().save_pretrained(tmp_path / "folder")
    refused(command("export", tmp_path / "folder", "--to", "onnx", "--out", tmp_path / "graph"), "no decoder")
    assert left_over(tmp_path) == ["folder"]
