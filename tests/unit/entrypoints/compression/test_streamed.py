"""``pared compress --stream``: the folder of a model that was never in memory as a whole, from name to manifest."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import pared
from pared import memory
from pared.calibration import MeanGram
from pared.calibration.cache import SavedStatistic
from pared.calibration.statistics.gram import GradientGram
from pared.cli.commands import app
from pared.engine import observe, solve
from pared.entrypoints.compression import streamed as streaming
from pared.errors import ParedError
from pared.memory import Available
from pared.progress import Silent
from pared.report.table import comparison


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    TINY_MODELS["llama"]().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(dense: Path, text_file: Path, calibration: pared.Calibration, tmp_path: Path) -> pared.Recipe:
    evaluation = pared.Evaluation(text=f"file:{text_file}", length=16, windows=3)
    return pared.Recipe(
        model=str(dense), out=str(tmp_path / "out"), method="svd-llm", keep=0.6, calibration=calibration,
        evaluation=evaluation, stream="on",
    )  # fmt: skip


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


class _Told(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


METHODS: list[dict[str, Any]] = [
    {"method": "svd-llm", "keep": 0.6, "statistics": "sequential"},
    {"method": "loss-optimal", "keep": 0.8},
    {"method": "loss-optimal", "keep": 0.8, "statistics": "sequential"},
    {"method": "basis-sharing", "keep": 0.8, "options": {"group_size": 2}},
    {"method": "swift-svd", "keep": 0.8},
    {"method": "wanda", "sparsity": 0.5},
    {"method": "svd-llm", "keep": 0.6, "refine": {"batch": 2, "lr": 1e-3}},
    {"method": "svd", "keep": 0.5},
]


@pytest.mark.parametrize("fields", METHODS, ids=lambda fields: fields["method"])
def test_the_folder_is_that_of_a_model_in_memory(fields: dict[str, Any], recipe: pared.Recipe, tmp_path: Path) -> None:
    asked = recipe.model_dump(exclude={"keep"}) | fields
    whole = pared.run(pared.Recipe(**(asked | {"stream": "off", "out": str(tmp_path / "whole")})))
    found = pared.run(pared.Recipe(**(asked | {"activation_memory": "3KB"})))
    expected, tensors = _tensors(tmp_path / "whole"), _tensors(tmp_path / "out")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert found.manifest.plan == whole.manifest.plan
    assert found.manifest.settled == whole.manifest.settled
    assert found.manifest.calibration == whole.manifest.calibration
    assert found.manifest.perplexity_before == whole.manifest.perplexity_before
    assert found.manifest.perplexity_after == pytest.approx(whole.manifest.perplexity_after, rel=1e-5)
    assert found.manifest.self_check < 1e-5
    assert pared.verify(tmp_path / "out", stream="on") < 1e-5
    assert pared.verify(tmp_path / "out", stream="off") < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]  # nothing is left beside


def test_gradients_of_all_blocks_are_not_held_in_memory(recipe: pared.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    held, run_blocks = [], observe.run_blocks

    def looking(store: Any, *arguments: Any, **more: Any) -> None:
        found = [one for one in gc.get_objects() if type(one) is SavedStatistic]
        held.append(len({one.file for one in found}))
        run_blocks(store, *arguments, **more)

    monkeypatch.setattr(observe, "run_blocks", looking)
    pared.run(recipe.model_copy(update={"method": "loss-optimal", "statistics": "sequential", "keep": 0.8}))
    assert held[-1] == 3  # of every block there is a file


def test_the_grams_of_a_block_are_not_in_memory_while_one_is_solved(
    recipe: pared.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a block of a model of 0.5 billion parameters took 0.3 GB beside the square that solving works in."""
    held, decompose = list[int](), solve.decompose

    def looking(*arguments: Any, **more: Any) -> Any:
        held.append(sum(type(one) in (GradientGram, MeanGram) for one in gc.get_objects()))
        return decompose(*arguments, **more)

    monkeypatch.setattr(solve, "decompose", looking)
    asked = {"method": "loss-optimal", "options": {"output_weighting": "full"}, "statistics": "once", "keep": 0.8}
    before = sum(type(one) in (GradientGram, MeanGram) for one in gc.get_objects())
    pared.run(recipe.model_copy(update={**asked, "activation_memory": "1MB"}))
    assert held == [before] * 21
    held.clear()
    monkeypatch.setattr("pared.engine.compress.pays", lambda _: False)  # those of the next block would be there too
    pared.run(recipe.model_copy(update={**asked, "stream": "off", "out": f"{recipe.out}-whole"}))
    assert held[:7] == [before + left for left in (10, 9, 8, 5, 4, 3, 0)]  # of seven of outputs and four of inputs


def test_the_peak_of_memory_is_told_beside_its_bound(recipe: pared.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "resident_memory_bytes", lambda: 2**40)
    found = pared.run(recipe).manifest
    assert 2**30 < found.memory_bound_bytes - 2**40 < 2**30 + 2**20
    (row,) = (row for row in comparison(found) if row.what == "peak memory")
    assert row.share == f"of {found.memory_bound_bytes / 2**20:,.0f}"


def test_hidden_states_take_what_all_else_leaves(recipe: pared.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of what is left was theirs, although the Grams of a block needed it."""
    _with_memory(monkeypatch, 2**30)
    assert streaming.activation_limit(recipe, True) == 2**28
    assert streaming.activation_limit(recipe, True, beside=7 * 2**27) == 2**27
    assert streaming.activation_limit(recipe, True, beside=2**31) == streaming.LEAST
    assert streaming.activation_limit(recipe, False) is None


def test_the_command_line_streams(recipe: pared.Recipe, tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.model_dump(mode="json", exclude={"stream"})))
    given = ["--stream", "on", "--activation-memory", "1 KiB"]
    result = CliRunner().invoke(app, ["compress", "--recipe", str(file), *given])
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "out" / "pared.json").read_text())["recipe"]
    assert (told["stream"], told["activation_memory"]) == ("on", "1 KiB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "out"), "--stream", "on"]).exit_code == 0


def test_what_is_no_size_is_told(recipe: pared.Recipe) -> None:
    with pytest.raises(ParedError, match=r"activation_memory: expected a size such as 2GiB or 500MB, got 'much'"):
        pared.compress(recipe.model, recipe=recipe, activation_memory="much")


def _with_memory(monkeypatch: pytest.MonkeyPatch, bytes_: int) -> None:
    for module in (memory, streaming):
        monkeypatch.setattr(module, "available_memory", lambda: Available(bytes_, "a test"))


def _bytes_needed(monkeypatch: pytest.MonkeyPatch, recipe: pared.Recipe, streamed: bool) -> int:
    """Return what a compression is said to need."""
    found: list[int] = []
    original = streaming.needs_of

    def noting(*given: Any, **more: Any) -> Any:
        needs = original(*given, **more)
        if more["streamed"] == streamed:
            found.append(needs.memory_bytes)
        return needs

    with monkeypatch.context() as patched:
        patched.setattr(streaming, "needs_of", noting)
        pared.run(recipe.model_copy(update={"stream": "off", "out": f"{recipe.out}-{streamed}"}))
    return found[0]


def test_what_does_not_fit_in_memory_is_streamed(recipe: pared.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe.model_copy(update={"stream": "auto", "activation_memory": "1KB"})
    whole, blocks = (_bytes_needed(monkeypatch, recipe, streamed) for streamed in (False, True))
    assert blocks < whole
    _with_memory(monkeypatch, whole)
    told = _Told()
    pared.run(recipe.model_copy(update={"out": f"{recipe.out}-fits"}), progress=told)
    assert not any("block by block" in note for note in told.notes)
    assert len(list(Path(f"{recipe.out}-fits").glob("*.safetensors"))) == 1
    _with_memory(monkeypatch, whole - 1)
    pared.run(recipe, progress=told)
    assert any(note.startswith("the model is read block by block: about 2") for note in told.notes)
    assert len(list(Path(str(recipe.out)).glob("*.safetensors"))) == 4


def test_what_does_not_fit_block_by_block_either_is_refused(
    recipe: pared.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_memory(monkeypatch, 1000)
    with pytest.raises(ParedError, match=r"not enough memory, even block by block: about .*1000 B left by a test; "):
        pared.run(recipe.model_copy(update={"stream": "auto"}))
    assert not Path(str(recipe.out)).exists()
    told = _Told()
    pared.run(recipe, progress=told)  # whoever asks for it may try
    assert any(note.startswith("this may not fit in memory: about ") for note in told.notes)


def test_a_disk_without_room_is_told_before_anything_is_read(
    recipe: pared.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pared.engine.cost.needs.free_space", lambda _: 1000)
    monkeypatch.setattr(streaming, "open_streamed", lambda *_: pytest.fail("read"))
    with pytest.raises(ParedError, match=r"not enough disk for .*out: .* bytes needed \(.*1,000 free; nothing"):
        pared.run(recipe)


def test_a_result_that_is_streamed_is_saved_from_python(
    recipe: pared.Recipe, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARED_CACHE", str(tmp_path / "cache"))
    result = pared.compress(dense, recipe=recipe.model_copy(update={"out": None}))
    assert result.streamed is not None
    with torch.no_grad(), result.streamed.store.running():
        logits = result.model(input_ids=torch.arange(6).unsqueeze(0)).logits
    for place in ("one", "two"):
        result.save(tmp_path / place)
        assert torch.equal(pared.load(tmp_path / place)(input_ids=torch.arange(6).unsqueeze(0)).logits, logits)
    del result
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ".safetensors"]
