"""A model that is read and written block by block is compressed to the very bits of one in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiers import crossed, some
from tiny_models import MIXTURES, REPEATED, TINY_MODELS
from transformers import PreTrainedTokenizerFast

from pared.calibration.spool import ActivationMemory
from pared.checkpoint.open_streamed import open_streamed
from pared.checkpoint.save import mark, save
from pared.checkpoint.shards import save_streamed
from pared.data.windows import Windows
from pared.engine.compress import compress_blocks
from pared.engine.spec import resolve
from pared.errors import ParedError
from pared.evaluation.perplexity import perplexity
from pared.models.source import ModelSource, find_model
from pared.schema.recipe import Calibration, Recipe

METHODS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd", "keep": 0.6},
    "svd-llm": {"method": "svd-llm", "keep": 0.6},
    "svd-llm, sequential": {"method": "svd-llm", "keep": 0.6, "statistics": "sequential"},
    "svd-llm, sequential, dense path": {
        "method": "svd-llm", "keep": 0.6, "statistics": "sequential", "dense_path": 0.3
    },
    "svd-llm, refit": {"method": "svd-llm", "keep": 0.6, "refit": "sequential"},
    "svd-llm, refit to dense blocks": {"method": "svd-llm", "keep": 0.6, "refit": "sequential-dense-block"},
    "svd-llm, pivoted": {"method": "svd-llm", "keep": 0.8, "storage": "pivoted"},
    "svd-llm-v2": {"method": "svd-llm-v2", "keep": 0.6},
    "asvd": {"method": "asvd", "keep": 0.6},
    "fwsvd": {"method": "fwsvd", "keep": 0.6},
    "swift-svd": {"method": "swift-svd", "keep": 0.6},
    "basis-sharing": {"method": "basis-sharing", "keep": 0.8, "options": {"group_size": 2}},
    "basis-sharing, all, update": {
        "method": "basis-sharing", "keep": 0.5, "options": {"group_size": 2, "sharing": "all"}
    },
    "loss-optimal": {"method": "loss-optimal", "keep": 0.8},
    "loss-optimal, sequential": {"method": "loss-optimal", "keep": 0.6},
    "widths": {"method": "loss-optimal", "keep": 0.7, "structures": "widths", "multiple_of": 4},
    "heads": {"method": "loss-optimal", "keep": 0.6, "structures": "widths", "multiple_of": 4, "heads": "on"},
    "llm-pruner": {"method": "llm-pruner", "keep": 0.7, "multiple_of": 4},
    "mixed, sequential": {"method": "loss-optimal", "keep": 0.6, "structures": "mixed", "multiple_of": 4},
    "loss-optimal, full": {"method": "loss-optimal", "keep": 0.8, "options": {"output_weighting": "full"}},
    "loss-optimal, full, sequential": {
        "method": "loss-optimal", "keep": 0.6, "options": {"output_weighting": "full"}
    },
    "magnitude": {"method": "magnitude", "sparsity": 0.5},
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "wanda 2:4": {"method": "wanda", "pattern": "2:4"},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
    "wanda, owl": {"method": "wanda", "sparsity": 0.5, "allocation": "owl"},
    "wanda, alphapruning": {"method": "wanda", "sparsity": 0.5, "allocation": "alphapruning"},
    "magnitude, loss": {"method": "magnitude", "sparsity": 0.5, "allocation": "loss"},
}  # fmt: skip
FEW = [
    "svd-llm, sequential, dense path",
    "basis-sharing, all, update",
    "loss-optimal, full",
    "mixed, sequential",
    "sparsegpt",
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    found = {}
    for family, build in (TINY_MODELS | REPEATED | MIXTURES).items():
        folder = tmp_path_factory.mktemp(family)
        build().save_pretrained(folder)
        found[family] = find_model(str(folder))
    return found


def _require_equal_bits(
    source: ModelSource,
    fields: dict[str, Any],
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerFast,
    place: Path,
    limit: int | None = None,
) -> None:
    spec = resolve(Recipe(calibration=calibration, out=str(place / "out"), **fields))
    whole = source.load()

    def measure(windows: Windows) -> float:
        return perplexity(whole, tokenizer, windows).value

    made = compress_blocks(whole, tokenizer, spec, trial=measure)
    mark(whole)
    save(whole, None, place / "whole", source)

    (place / "work").mkdir()
    store = open_streamed(source, folder=place / "work")
    with ActivationMemory(limit, place / "out") as memory:

        def measure_streamed(windows: Windows) -> float:
            return perplexity(store.model, tokenizer, windows, store=store, memory=memory).value

        found = compress_blocks(store.model, tokenizer, spec, store=store, memory=memory, trial=measure_streamed)
        assert bool(memory.spilled) == (limit is not None and spec.calibrated)
    assert all(parameter.is_meta for parameter in store.model.get_submodule(store.path).parameters())
    mark(store.model)
    save_streamed(store, None, place / "streamed", source)

    expected, tensors = load_file(place / "whole" / "model.safetensors"), dict[str, torch.Tensor]()
    for file in (place / "streamed").glob("*.safetensors"):
        tensors |= load_file(file)
    assert tensors.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(expected[name], tensors[name])] == []
    assert found.plan == made.plan
    assert (found.damping, found.fallbacks, found.sharing) == (made.damping, made.fallbacks, made.sharing)
    assert found.calibration == made.calibration
    config = (place / "whole" / "config.json").read_text()
    assert (place / "streamed" / "config.json").read_text() == config


# Every pass that a compression has is in one of these or of the few above.
QUICK = [
    "svd-llm, pivoted",
    "svd-llm, refit to dense blocks",
    "fwsvd",
    "loss-optimal, sequential",
    "heads",
    "wanda, owl",
]


@pytest.mark.parametrize("method", some(QUICK, METHODS))
def test_every_method_gives_the_same_bits(
    method: str,
    sources: dict[str, ModelSource],
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    _require_equal_bits(sources["llama"], METHODS[method], calibration, tokenizer, tmp_path)


@pytest.mark.parametrize("method", FEW)
def test_hidden_states_on_the_disk_give_the_same_bits(
    method: str,
    sources: dict[str, ModelSource],
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    _require_equal_bits(sources["llama"], METHODS[method], calibration, tokenizer, tmp_path, limit=7000)


@pytest.mark.parametrize(("family", "method"), crossed(["qwen2_moe", "gpt2", "albert_groups"], list(FEW)))
def test_other_architectures_give_the_same_bits_in_another_dtype(
    method: str,
    family: str,
    sources: dict[str, ModelSource],
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    calibration = calibration.model_copy(update={"dtype": "bfloat16"})
    _require_equal_bits(sources[family], METHODS[method], calibration, tokenizer, tmp_path)


@pytest.mark.parametrize("family", ["deepseek_v3", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_mixtures_lose_the_same_experts(
    family: str,
    sources: dict[str, ModelSource],
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    fields = {"structures": "experts", "keep": 0.7}
    _require_equal_bits(sources[family], fields, calibration, tokenizer, tmp_path, limit=7000)


def test_a_block_that_holds_no_numbers_is_told_when_it_is_read(
    calibration: Calibration, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = TINY_MODELS["llama"]()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "work").mkdir()
    store = open_streamed(find_model(str(tmp_path / "model")), folder=tmp_path / "work")
    spec = resolve(Recipe(calibration=calibration, method="svd", keep=0.5))
    with pytest.raises(ParedError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or infinity in 1 of 1,536"):
        compress_blocks(store.model, tokenizer, spec, store=store)
