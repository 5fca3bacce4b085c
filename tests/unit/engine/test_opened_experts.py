"""Mixtures whose experts are targets: compressed, saved, loaded, exported and read block by block."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import MIXTURES
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import pared
from pared import Calibration, ParedError, Recipe
from pared.engine import compress_blocks, plan_from_shapes, resolve
from pared.modules.opened import layouts_of
from pared.schema.manifest import Manifest
from pared.schema.plan import Dense
from unit.checkpoint.test_checkpoint import logits

FAMILIES = sorted(MIXTURES)
METHODS: dict[str, dict[str, Any]] = {
    "loss-optimal": {"method": "loss-optimal", "keep": 0.6, "structures": "ranks"},
    "mixed": {"method": "loss-optimal", "keep": 0.6, "structures": "mixed", "multiple_of": 4},
    "widths": {"method": "loss-optimal", "keep": 0.7, "structures": "widths", "multiple_of": 4},
    "svd-llm": {"method": "svd-llm", "keep": 0.6},
    "basis-sharing": {"method": "basis-sharing", "keep": 0.8, "options": {"group_size": 2}},
    "magnitude": {"method": "magnitude", "sparsity": 0.5},
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
}  # fmt: skip
FAST = {("mixtral", "svd-llm"), ("gpt_oss", "mixed"), ("deepseek_v3", "wanda")}
CASES = [
    pytest.param(family, method, marks=[] if (family, method) in FAST else pytest.mark.slow)
    for family in FAMILIES
    for method in METHODS
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    found = {}
    for family in FAMILIES:
        found[family] = tmp_path_factory.mktemp(family)
        MIXTURES[family]().save_pretrained(found[family])
        tokenizer.save_pretrained(found[family])
    return found


@pytest.mark.parametrize(("family", "method"), CASES)
def test_experts_are_compressed_and_answer_the_same_from_their_folder_streamed_and_exported(
    family: str, method: str, folders: dict[str, Path], calibration: Calibration, tmp_path: Path
):
    fields = {"model": str(folders[family]), "evaluation": None, "calibration": calibration, **METHODS[method]}
    pared.run(Recipe(out=str(tmp_path / "whole"), stream="off", **fields))
    pared.run(Recipe(out=str(tmp_path / "streamed"), stream="on", **fields))
    one, other = ({name: tensor for file in sorted((tmp_path / place).glob("*.safetensors"))
                   for name, tensor in load_file(file).items()} for place in ("whole", "streamed"))  # fmt: skip
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not any(tensor.ndim == 3 for tensor in one.values())
    assert pared.verify(tmp_path / "whole") == pared.verify(tmp_path / "streamed") == 0.0
    assert {len(one.shape) for one in Manifest.read(tmp_path / "whole").plan.uncovered} <= {2}  # routers
    model = pared.load(tmp_path / "whole")
    assert len(layouts_of(model)) == (1 if family == "deepseek_v3" else 2)
    pared.export(tmp_path / "whole", tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert any(parameter.ndim == 3 for parameter in plain.parameters())
    expected = logits(model)
    assert float((logits(plain) - expected).norm()) <= 1e-5 * float(expected.norm())


def test_a_plan_of_shapes_has_the_experts_and_the_budget_reaches_them():
    model = MIXTURES["mixtral"]()
    before = dict(model.named_parameters())
    plan = plan_from_shapes(model, resolve(Recipe(method="svd-llm", keep=0.6)))
    kinds = [site.kind for site in plan.sites]
    assert (kinds.count("expert in"), kinds.count("expert out")) == (12, 12)
    assert plan.missed is None or not plan.missed
    assert all(before[name] is one for name, one in model.named_parameters())
    whole = plan_from_shapes(model, resolve(Recipe(structures="experts", keep=0.7)))
    assert all(site.decision.unit == "expert" for site in whole.sites)


def test_experts_that_are_skipped_stay_closed(tokenizer: PreTrainedTokenizerFast, calibration: Calibration):
    model = MIXTURES["mixtral"]()
    spec = resolve(Recipe(method="wanda", sparsity=0.5, calibration=calibration, skip=("*experts.*",)))
    result = compress_blocks(model, tokenizer, spec)
    assert not layouts_of(model)
    assert {len(one.shape) for one in result.plan.uncovered} == {2, 3}
    with pytest.raises(ParedError, match="matches none"):
        plan_from_shapes(MIXTURES["mixtral"](), resolve(Recipe(skip=("*expert.*",))))


def test_an_expert_that_no_token_is_given_to_stays_dense_and_the_others_pay(
    tokenizer: PreTrainedTokenizerFast, calibration: Calibration
):
    model = MIXTURES["gpt_oss"]()
    for layer in model.model.layers:
        layer.mlp.router.bias.data[3] = -100.0
    result = compress_blocks(model, tokenizer, resolve(Recipe(method="svd-llm", keep=0.6, calibration=calibration)))
    dense = {site.name for site in result.plan.sites if isinstance(site.decision, Dense)}
    assert dense == {f"model.layers.{block}.mlp.experts.3.{leaf}" for block in range(2) for leaf in ("first", "second")}
    assert result.plan.achieved_keep == pytest.approx(0.6, abs=0.05)


def test_without_pared_a_folder_of_compressed_experts_is_refused(
    folders: dict[str, Path], calibration: Calibration, tmp_path: Path
):
    """Only experts are changed, so that nothing but their place can say so."""
    from pared.checkpoint.format import ParedConfig

    pared.run(Recipe(model=str(folders["mixtral"]), out=str(tmp_path / "out"), method="svd", keep=0.6,
                     evaluation=None, skip=("*self_attn*",)))  # fmt: skip
    tensors = {
        name: one.shape for file in (tmp_path / "out").glob("*.safetensors") for name, one in load_file(file).items()
    }
    config = pared.load(tmp_path / "out").config.quantization_config
    assert isinstance(config, ParedConfig)
    assert config.guard == "model.layers.0.mlp.experts.gate_up_proj"
    empty = [name for name, shape in tensors.items() if 0 in shape]
    assert len(empty) == 2
    assert any(name.endswith("experts.gate_up_proj") for name in empty)
    for broken in ({"first": "nothing"}, {"between": "other"}, {"transposed": 1}, {"first": "down_proj"}):
        entries = {name: {**entry, **broken} for name, entry in config.experts.items()}
        if broken == {"first": "nothing"}:
            ParedConfig(modules=config.modules, experts=entries)  # which parameters there are, the model says
            continue
        with pytest.raises(ValueError, match=r"experts of model\.layers\.0"):
            ParedConfig(modules=config.modules, experts=entries)
