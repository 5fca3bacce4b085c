"""The check of what was just written: it loads whatever an architecture's own code looks at, and tells what is ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS, VOCAB
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
)
from transformers import initialization as init

import pared
from pared import ParedError, Recipe
from pared.entrypoints import publish as job

METHODS: dict[str, dict[str, Any]] = {
    "factors": {"method": "svd", "keep": 0.6, "storage": "factors"},
    "pivoted": {"method": "svd", "keep": 0.6, "storage": "pivoted"},
    "anywhere": {"method": "magnitude", "sparsity": 0.5},
    "2:4": {"method": "magnitude", "pattern": "2:4"},
    "wanda": {"method": "wanda", "sparsity": 0.5},
}


class LooksConfig(LlamaConfig):
    model_type = "looks_at_children"


class LooksForCausalLM(LlamaForCausalLM):
    """Its initialisation reads, and fills, what hangs below the module that it is called with."""

    config_class = LooksConfig

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "q_proj"):
            out, features = module.q_proj.weight.shape
            assert (out, features) == (32, 32)
            assert module.k_proj.weight.size(1) == features
            assert module.v_proj.weight.device == module.o_proj.weight.device
            module.scale = float(module.o_proj.weight.float().std()) + module.q_proj.weight.numel()
            init.normal_(module.q_proj.weight, std=1.0 / features)
        if hasattr(module, "gate_proj"):
            init.zeros_(module.gate_proj.weight)
            init.copy_(module.up_proj.weight, torch.zeros_like(module.up_proj.weight))
            nn.init.xavier_uniform_(module.down_proj.weight)


def looking() -> LooksForCausalLM:
    sizes: Any = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    model = LooksForCausalLM(LooksConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def rwkv() -> RwkvForCausalLM:
    config = RwkvConfig(vocab_size=VOCAB, hidden_size=32, attention_hidden_size=32, intermediate_size=48,
                        num_hidden_layers=2, context_length=64)  # fmt: skip
    return RwkvForCausalLM(config).eval()


@pytest.fixture(scope="module", params=[rwkv, looking], ids=["rwkv", "made up"])
def source(request: pytest.FixtureRequest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    AutoConfig.register("looks_at_children", LooksConfig, exist_ok=True)
    AutoModelForCausalLM.register(LooksConfig, LooksForCausalLM, exist_ok=True)
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    request.param().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_an_architecture_that_looks_at_its_childrens_weights_loads(
    method: str, source: Path, calibration: pared.Calibration, tmp_path: Path
) -> None:
    recipe = Recipe(model=str(source), out=str(tmp_path / "out"), evaluation=None, calibration=calibration,
                    **METHODS[method])  # fmt: skip
    assert pared.run(recipe).manifest.self_check == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again.save_pretrained(tmp_path / "again")
    assert pared.load(tmp_path / "again") is not None


@pytest.fixture
def recipe(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Recipe:
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return Recipe(model=str(tmp_path / "dense"), out=str(tmp_path / "out"), method="svd", keep=0.6, evaluation=None)


def damaging(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Change the tensors of a folder right after it is written, as a fault of ours would."""
    save = job.save

    def save_and_damage(model: Any, tokenizer: Any, folder: Path, *rest: Any) -> None:
        save(model, tokenizer, folder, *rest)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(job, "save", save_and_damage)


def scale_up(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.up.weight"] *= 30


def forget_a_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def put_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.up.weight"][0] = float("nan")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (scale_up, r"the outputs of the loaded model differ.*every tensor is loaded as it is stored"),
        (forget_a_norm, r"the new folder: 1 weights are missing.*model\.norm\.weight"),
        (put_nan, r"model\.layers\.1\.mlp\.up_proj\.up\.weight holds NaN"),
    ],
    ids=["outputs", "missing", "nan"],
)
def test_a_failed_check_tells_what_is_wrong_with_our_output(
    change: Any, told: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaging(monkeypatch, change)
    with pytest.raises(ParedError, match=told) as error:
        pared.run(recipe)
    message = str(error.value)
    assert "is as it was, and nothing was written" in message
    assert "report this line" in message
    assert "fetch it again" not in message
    assert "staging" not in message
    assert not Path(str(recipe.out)).exists()


def test_a_class_that_cannot_be_loaded_is_told_by_the_line_that_fails(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise IndexError("tuple index out of range")

    def save_and_break(*arguments: Any) -> None:
        save(*arguments)
        monkeypatch.setattr(LlamaForCausalLM, "tie_weights", fails)

    save = job.save
    monkeypatch.setattr(job, "save", save_and_break)
    with pytest.raises(ParedError, match=r"IndexError: tuple index out of range, in test_self_check\.py, line"):
        pared.run(recipe)


def test_a_model_that_cannot_run_with_a_cache_is_checked_without(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: Granite's hybrid without attention ended with a traceback, as its cache has no length."""
    forward = LlamaForCausalLM.forward

    def needs_no_cache(self: LlamaForCausalLM, *args: Any, use_cache: bool | None = None, **more: Any) -> Any:
        if use_cache is not False:
            raise ValueError("`get_seq_length` can only be called on attention layers")
        return forward(self, *args, use_cache=use_cache, **more)

    monkeypatch.setattr(LlamaForCausalLM, "forward", needs_no_cache)
    pared.compress(TINY_MODELS["llama"](), tokenizer, method="svd", keep=0.6, evaluation=None).save(tmp_path / "out")
    assert pared.verify(tmp_path / "out") == 0
