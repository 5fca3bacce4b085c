"""A compression that is ended at any block goes on in another process to the same bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiers import some
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast

from pared import Calibration, ParedError, Recipe
from pared.checkpoint.open_streamed import open_streamed
from pared.engine.compress import compress_blocks
from pared.engine.result import CompressedBlocks
from pared.engine.spec import resolve
from pared.engine.state.run_state import CompressionRun
from pared.evaluation import perplexity
from pared.io.run_dir import RunDirectory, run_folder
from pared.models.source import find_model

GROUPS = {"group_size": 2, "sharing": "all"}
REFINE = {"batch": 2, "lr": 1e-3}
CASES: dict[str, dict[str, Any]] = {
    "no data": {"method": "svd", "keep": 0.7},
    "ranks known": {"method": "svd-llm", "keep": 0.7},
    "ranks from data": {"method": "svd-llm", "keep": 0.7, "allocation": "effective-rank"},
    "trials": {"method": "swift-svd", "keep": 0.7, "allocation": "swift"},
    "pivoted": {"method": "svd-llm", "keep": 0.7, "storage": "pivoted"},
    "sequential, refit": {"method": "svd-llm", "keep": 0.7, "statistics": "sequential", "refit": "sequential"},
    "refit of the dense block": {"method": "svd-llm", "keep": 0.7, "refit": "sequential-dense-block"},
    "dense path": {"method": "svd-llm", "keep": 0.7, "statistics": "sequential", "dense_path": 0.5},
    "groups, update": {"method": "basis-sharing", "keep": 0.5, "options": GROUPS, "refit": "update"},
    "groups, sequential": {"method": "basis-sharing", "keep": 0.5, "options": GROUPS, "statistics": "sequential"},
    "gradients": {"method": "loss-optimal", "keep": 0.7},
    "widths": {"method": "loss-optimal", "keep": 0.7, "structures": "widths", "multiple_of": 4},
    "heads": {"method": "loss-optimal", "keep": 0.6, "structures": "widths", "multiple_of": 4, "heads": "on"},
    "a bias for channels": {"method": "flap", "keep": 0.7, "multiple_of": 4},
    "mixed, sequential": {"method": "loss-optimal", "keep": 0.6, "structures": "mixed", "multiple_of": 4},
    "gradients, sequential": {"method": "loss-optimal", "keep": 0.7, "statistics": "sequential"},
    "refined": {"method": "svd-llm", "keep": 0.7, "statistics": "sequential", "refine": REFINE},
    "groups, refined": {"method": "basis-sharing", "keep": 0.5, "options": GROUPS, "refine": REFINE},
    "pruned, refined": {"method": "wanda", "sparsity": 0.5, "refine": REFINE, "skip": ["*.o_proj"]},
    "pruned": {"method": "wanda", "sparsity": 0.5, "allocation": "owl"},
    "pruned, compensated": {"method": "sparsegpt", "sparsity": 0.5},
    "pruned, N:M": {"method": "sparsegpt", "pattern": "2:4"},
    "pruned without data": {"method": "magnitude", "sparsity": 0.5},
}
FEW = ["sequential, refit", "groups, update", "gradients", "pruned", "groups, refined", "pruned, refined"]


class KilledError(BaseException):
    """In place of a signal: nothing catches it."""


class Dying(CompressionRun):
    """A run whose process ends right after so many lines are on the disk."""

    left = 0

    def record(self, *arguments: Any, **more: Any) -> None:
        super().record(*arguments, **more)
        self.left -= 1
        if not self.left:
            raise KilledError


@contextmanager
def opened(out: Path, lines: int = 0) -> Iterator[CompressionRun]:
    with RunDirectory.open(out, "compress", {"seed": 0}) as directory:
        run = Dying(directory)
        run.left = lines
        yield run


Made = tuple[dict[str, torch.Tensor], CompressedBlocks]


def compressed(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, state: CompressionRun | None = None, source: Path | None = None
) -> Made:
    """Compress a model in memory, or one that is read block by block from a folder and written to that of the state."""
    store = None if source is None or state is None else open_streamed(find_model(str(source)), folder=state.folder)
    model = TINY_MODELS["llama"]() if store is None else store.model
    result = compress_blocks(
        model,
        tokenizer,
        resolve(recipe),
        trial=lambda windows: perplexity(model, tokenizer, windows, store=store).value,
        store=store,
        state=state,
    )
    if store is None:
        return model.state_dict(), result
    for index in range(len(store)):
        store.load(index)
    return {name: tensor.clone() for name, tensor in store.model.state_dict().items()}, result


def require_equal(one: Made, other: Made) -> None:
    assert one[0].keys() == other[0].keys()
    assert [name for name, tensor in one[0].items() if not torch.equal(tensor, other[0][name])] == []
    for field in ("plan", "damping", "fallbacks", "sharing", "refined", "calibration"):
        assert getattr(one[1], field) == getattr(other[1], field), field


def ended_after(
    lines: int, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, out: Path, source: Path | None = None
) -> bool:
    """Whether a compression was still at work after so many lines."""
    try:
        with opened(out, lines) as state:
            compressed(recipe, tokenizer, state, source)
    except KilledError:
        return True
    return False


def ends_alike(
    case: str,
    tokenizer: PreTrainedTokenizerFast,
    calibration: Calibration,
    out: Path,
    every: int,
    source: Path | None = None,
) -> int:
    """End a compression after lines here and there, go on, and compare; return the ends."""
    recipe, ends = Recipe(calibration=calibration, **CASES[case]), 0
    whole = compressed(recipe, tokenizer)
    assert recipe.refine is None or any(one.epochs for one in whole[1].refined)
    for lines in range(1, 100, every):
        place = out / str(lines)
        if not ended_after(lines, recipe, tokenizer, place, source):
            break
        ends += 1
        with opened(place) as state:
            require_equal(compressed(recipe, tokenizer, state, source), whole)
    return ends


@pytest.mark.parametrize("case", some(FEW, CASES))
def test_a_compression_that_is_ended_goes_on_to_the_same_bits(
    case: str, tokenizer: PreTrainedTokenizerFast, calibration: Calibration, tmp_path: Path
) -> None:
    assert ends_alike(case, tokenizer, calibration, tmp_path, every=2) >= 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    TINY_MODELS["llama"]().save_pretrained(path)
    return path


@pytest.mark.parametrize("case", some(FEW[-2:], CASES))
def test_a_compression_block_by_block_that_is_ended_goes_on_to_the_same_bits(
    case: str, tokenizer: PreTrainedTokenizerFast, calibration: Calibration, tmp_path: Path, folder: Path
) -> None:
    assert ends_alike(case, tokenizer, calibration, tmp_path, every=2, source=folder) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_compression_that_is_ended_anywhere_goes_on_to_the_same_bits(
    case: str, tokenizer: PreTrainedTokenizerFast, calibration: Calibration, tmp_path: Path
) -> None:
    assert ends_alike(case, tokenizer, calibration, tmp_path, every=1) >= 3


def test_a_compression_that_is_ended_at_every_block_goes_on_to_the_same_bits(
    tokenizer: PreTrainedTokenizerFast, calibration: Calibration, tmp_path: Path
) -> None:
    recipe, ends = Recipe(calibration=calibration, **CASES["sequential, refit"]), 0
    while ended_after(1, recipe, tokenizer, tmp_path / "out"):
        ends += 1
    assert ends == 9
    with opened(tmp_path / "out") as state:
        require_equal(compressed(recipe, tokenizer, state), compressed(recipe, tokenizer))


def test_a_damaged_or_missing_file_of_a_block_is_told(
    tokenizer: PreTrainedTokenizerFast, calibration: Calibration, tmp_path: Path
) -> None:
    recipe = Recipe(calibration=calibration, **CASES["pruned, compensated"])
    ended_after(2, recipe, tokenizer, tmp_path / "out")
    (file,) = run_folder(tmp_path / "out", "compress").glob("*-block-00001.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ParedError, match=rf"{file} is damaged"), opened(tmp_path / "out") as state:
        compressed(recipe, tokenizer, state)
    file.unlink()
    with pytest.raises(ParedError, match=rf"{file} is missing"), opened(tmp_path / "out"):
        pass


def test_files_that_no_process_needs_again_go_as_the_refit_goes_on(
    tokenizer: PreTrainedTokenizerFast, calibration: Calibration, tmp_path: Path
) -> None:
    recipe = Recipe(calibration=calibration, **CASES["sequential, refit"])
    ended_after(8, recipe, tokenizer, tmp_path / "out")
    names = {path.name for path in run_folder(tmp_path / "out", "compress").glob("*-block-*.safetensors")}
    numbers = sorted(name.partition("-block-")[0] + name[-17:-12] for name in names)
    assert numbers == ["pass-300002", "pass-400000", "pass-400001"]
