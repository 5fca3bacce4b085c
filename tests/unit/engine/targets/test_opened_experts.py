"""Mixtures whose experts are targets: compressed one by one, saved, loaded, exported, streamed and resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiers import quick_first
from tiny_models import MIXTURES
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import pared
from pared import Calibration, ParedError, Recipe
from pared.checkpoint.format import ParedConfig
from pared.checkpoint.verify import take_fingerprint
from pared.engine import compress_blocks, plan_from_shapes, resolve
from pared.engine.compress import CompressedBlocks
from pared.entrypoints import export_onnx
from pared.modules.opened import experts_map
from pared.schema.manifest import Manifest
from pared.schema.plan import Dense
from pared.serving.vllm.layout import UnsupportedError, require_no_experts
from unit.checkpoint.test_checkpoint import LOAD, logits, run_python
from unit.engine.state.test_resume import KilledError, opened

FAMILIES = sorted(MIXTURES)
METHODS: dict[str, dict[str, Any]] = {
    "loss-optimal": {"method": "loss-optimal", "keep": 0.7, "structures": "ranks", "statistics": "once"},
    "mixed": {"method": "loss-optimal", "keep": 0.7, "structures": "mixed", "multiple_of": 4},
    "widths": {"method": "loss-optimal", "keep": 0.7, "structures": "widths", "multiple_of": 4, "statistics": "once"},
    "svd-llm": {"method": "svd-llm", "keep": 0.6},
    "few bits": {"method": "svd-llm", "keep": 0.7, "quantize": "int8"},
    "bytes": {"method": "loss-optimal", "keep_bytes": 0.4},
    "basis-sharing": {"method": "basis-sharing", "keep": 0.8, "options": {"group_size": 2}},
    "magnitude": {"method": "magnitude", "sparsity": 0.5},
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
}  # fmt: skip
FAST = [
    ("mixtral", "svd-llm"),
    ("qwen3_moe", "loss-optimal"),
    ("olmoe", "wanda"),
    ("deepseek_v3", "few bits"),
]
SLOW = [(family, method) for family in FAMILIES for method in METHODS]


@pytest.fixture(scope="module")
def enough(calibration: Calibration) -> Calibration:
    """Windows of which most experts are given more tokens than they have inputs."""
    return calibration.model_copy(update={"samples": 24})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    found = {}
    for family in FAMILIES:
        found[family] = tmp_path_factory.mktemp(family)
        MIXTURES[family]().save_pretrained(found[family])
        tokenizer.save_pretrained(found[family])
    return found


def require_close(model: PreTrainedModel, expected: torch.Tensor) -> None:
    assert float((logits(model) - expected).norm()) <= 1e-5 * float(expected.norm())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()}


# What is compressed, and the folder of it.


@pytest.mark.parametrize(("family", "method"), FAST)
def test_compressed_experts_answer_from_their_folder_what_they_did_in_memory(
    family: str, method: str, tokenizer: PreTrainedTokenizerFast, enough: Calibration, tmp_path: Path
) -> None:
    model = MIXTURES[family]()
    result = pared.compress(model, tokenizer, Recipe(evaluation=None, calibration=enough, **METHODS[method]))
    changed = [site.kind for site in result.plan.sites if not (isinstance(site.decision, Dense) and
                                                               site.decision.quantized is None)]  # fmt: skip
    assert {"expert in", "expert out"} <= set(changed)
    assert {len(one.shape) for one in result.plan.uncovered} <= {2}, "routers alone are no targets"
    assert len(experts_map(model)) == (1 if family == "deepseek_v3" else 2)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert not any(tensor.ndim == 3 for tensor in tensors_of(tmp_path).values())
    assert torch.equal(logits(pared.load(tmp_path)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)), expected)


@pytest.mark.parametrize(("family", "method"), quick_first([("gpt_oss", "widths")], SLOW))
def test_streamed_experts_are_the_same_bytes_and_an_export_has_them_in_one_tensor(
    family: str, method: str, folders: dict[str, Path], enough: Calibration, tmp_path: Path
) -> None:
    fields = {"model": str(folders[family]), "evaluation": None, "calibration": enough, **METHODS[method]}
    pared.run(Recipe(out=str(tmp_path / "whole"), stream="off", **fields))
    pared.run(Recipe(out=str(tmp_path / "streamed"), stream="on", **fields))
    one, other = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "streamed")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert pared.verify(tmp_path / "whole") == pared.verify(tmp_path / "streamed", stream="on") == 0.0
    assert Manifest.read(tmp_path / "whole").plan == Manifest.read(tmp_path / "streamed").plan
    pared.export(tmp_path / "whole", tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert any(parameter.ndim == 3 for parameter in plain.parameters())
    require_close(plain, logits(pared.load(tmp_path / "whole")))


@pytest.mark.slow
def test_a_machine_without_pared_loads_compressed_experts(
    tokenizer: PreTrainedTokenizerFast, enough: Calibration, tmp_path: Path
) -> None:
    model = MIXTURES["mixtral"]()
    pared.compress(model, tokenizer, Recipe(evaluation=None, calibration=enough, **METHODS["svd-llm"]))
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    run_python(LOAD, tmp_path, tmp_path / "folder", blocked="dict(pared=None)", imports="",
               arguments=", trust_remote_code=True")  # fmt: skip
    assert torch.equal(torch.load(tmp_path / "out.first"), logits(model))
    assert torch.equal(torch.load(tmp_path / "out.second"), logits(model))


@pytest.fixture(scope="module")
def experts_alone(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which nothing but experts is changed."""
    out = tmp_path_factory.mktemp("alone") / "out"
    return pared.run(Recipe(model=str(folders["mixtral"]), out=str(out), method="svd", keep=0.6, evaluation=None,
                            skip=("*self_attn*",))).folder  # fmt: skip


def test_without_pared_a_folder_of_compressed_experts_is_refused(experts_alone: Path) -> None:
    """Only experts are changed, so that nothing but their place can say so."""
    config = pared.load(experts_alone).config.quantization_config
    assert isinstance(config, ParedConfig)
    assert config.guard == "model.layers.0.mlp.experts.gate_up_proj"
    empty = [name for name, tensor in tensors_of(experts_alone).items() if not tensor.numel()]
    assert len(empty) == 2
    assert any(name.endswith("experts.gate_up_proj") for name in empty)


@pytest.mark.parametrize("broken", [{"between": "other"}, {"transposed": 1}, {"first": "down_proj"}, {"call": ""}])
def test_a_map_with_a_malformed_layout_is_refused_by_the_name_of_the_experts(
    broken: dict[str, object], experts_alone: Path
) -> None:
    config = pared.load(experts_alone).config.quantization_config
    entries = {name: {**entry, **broken} for name, entry in config.experts.items()}
    with pytest.raises(ValueError, match=r"experts of model\.layers\.0"):
        ParedConfig(modules=config.modules, experts=entries)


def test_engines_refuse_opened_experts_by_name(
    experts_alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_onnx, "require_exporter", lambda: None)
    with pytest.raises(ParedError, match=r"experts of model\.layers\.0\.mlp\.experts are compressed one by one"):
        pared.export(experts_alone, tmp_path / "graph", to="onnx")
    with pytest.raises(ParedError, match="MixtralForCausalLM"):
        pared.export(experts_alone, tmp_path / "model.gguf", to="gguf")
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.experts: its experts are compressed one by one"):
        require_no_experts(pared.load(experts_alone).config.quantization_config.experts)


def test_experts_that_the_fingerprint_does_not_reach_are_compared_in_an_export(
    experts_alone: Path, tmp_path: Path
) -> None:
    """Regression: an export failed, as its one tensor of all experts has no layer of the name."""
    fingerprint = take_fingerprint(pared.load(experts_alone))
    assert any(".experts." in name for name in fingerprint.layers)
    assert pared.export(experts_alone, tmp_path / "dense").self_check < 1e-5


# Which experts are compressed.


def test_a_plan_of_shapes_has_the_experts_and_the_budget_reaches_them() -> None:
    model = MIXTURES["mixtral"]()
    before = dict(model.named_parameters())
    plan = plan_from_shapes(model, resolve(Recipe(method="svd-llm", keep=0.6)))
    kinds = [site.kind for site in plan.sites]
    assert (kinds.count("expert in"), kinds.count("expert out")) == (12, 12)
    assert not plan.missed
    assert all(before[name] is one for name, one in model.named_parameters())
    whole = plan_from_shapes(model, resolve(Recipe(structures="experts", keep=0.7)))
    assert all(site.decision.unit == "expert" for site in whole.sites)


def test_experts_that_are_skipped_stay_closed(tokenizer: PreTrainedTokenizerFast, calibration: Calibration) -> None:
    model = MIXTURES["mixtral"]()
    spec = resolve(Recipe(method="wanda", sparsity=0.5, calibration=calibration, skip=("*experts.*",)))
    result = compress_blocks(model, tokenizer, spec)
    assert not experts_map(model)
    assert {len(one.shape) for one in result.plan.uncovered} == {2, 3}
    with pytest.raises(ParedError, match="matches none"):
        plan_from_shapes(MIXTURES["mixtral"](), resolve(Recipe(skip=("*expert.*",))))


def hungry() -> PreTrainedModel:
    """Return a mixture whose expert 3 is given no token, and whose expert 2 is given few."""
    model = MIXTURES["gpt_oss"]()
    for layer, bias in zip(model.model.layers, (-2.1, -1.2), strict=True):
        layer.mlp.router.bias.data[3] = -100.0
        layer.mlp.router.bias.data[2] = bias
    return model


@pytest.mark.parametrize("method", ["svd-llm", "widths", "sparsegpt"])
def test_an_expert_that_is_given_fewer_tokens_than_it_has_inputs_stays_dense_and_the_plan_says_why(
    method: str, tokenizer: PreTrainedTokenizerFast, enough: Calibration
) -> None:
    model = hungry()
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    result = compress_blocks(model, tokenizer, resolve(Recipe(calibration=enough, **METHODS[method])))
    reasons = {site.name: site.decision.reason for site in result.plan.sites if isinstance(site.decision, Dense)}
    for block in range(2):
        experts = f"model.layers.{block}.mlp.experts"
        assert {reasons[f"{experts}.3.{leaf}"] for leaf in ("first", "second")} == {"no calibration token reached it"}
        (why,) = {reasons[f"{experts}.2.{leaf}"] for leaf in ("first", "second")}
        assert why.startswith("its expert was given fewer calibration tokens than it has inputs: ")
        assert torch.equal(model.get_parameter(f"{experts}.2.second.weight"), before[f"{experts}.down_proj"][2].T)
    if method != "sparsegpt":  # the zeros of an expert that stays dense are not put elsewhere
        assert result.plan.achieved_keep == pytest.approx(METHODS[method]["keep"], abs=0.03)


@pytest.mark.parametrize("granularity", ["site", "block"])
@pytest.mark.parametrize("allocation", ["global", "owl", "dsa", "loss"])
def test_an_expert_that_stays_dense_has_no_part_in_the_zeros_of_the_others(
    allocation: str, granularity: str, tokenizer: PreTrainedTokenizerFast, enough: Calibration
) -> None:
    """Regression: its scores, of few tokens and small, were given zeros that nothing got: 0.42 in place of 0.5."""
    recipe = Recipe(
        calibration=enough, **METHODS["sparsegpt"], allocation=allocation, allocation_options={"granularity": "site"}
    )
    plan = compress_blocks(hungry(), tokenizer, resolve(recipe)).plan
    dense = {site.name.split(".")[-2] for site in plan.sites if isinstance(site.decision, Dense)}
    assert dense == {"2", "3"}
    covered = [site for site in plan.sites if not isinstance(site.decision, Dense)]
    kept = sum(site.after for site in covered) / sum(site.before for site in covered)
    assert kept == pytest.approx(0.5, abs=0.01)


def test_a_method_that_reads_no_gram_takes_an_expert_of_few_tokens(
    tokenizer: PreTrainedTokenizerFast, enough: Calibration
) -> None:
    result = compress_blocks(hungry(), tokenizer, resolve(Recipe(calibration=enough, **METHODS["wanda"])))
    assert {site.name.split(".")[-2] for site in result.plan.sites if isinstance(site.decision, Dense)} == {"3"}


def test_a_text_too_short_for_any_expert_is_refused_with_what_to_do(
    tokenizer: PreTrainedTokenizerFast, calibration: Calibration
) -> None:
    few = calibration.model_copy(update={"samples": 2})
    with pytest.raises(ParedError, match=r"as its expert was given fewer .* calibrate on more text \(samples\)"):
        compress_blocks(hungry(), tokenizer, resolve(Recipe(calibration=few, **METHODS["loss-optimal"])))


# Runs that end early, and models that stay as they were.


def test_a_killed_compression_of_experts_resumes_to_the_same_bits(
    tokenizer: PreTrainedTokenizerFast, enough: Calibration, tmp_path: Path
) -> None:
    spec = resolve(Recipe(calibration=enough, **METHODS["loss-optimal"]))

    def compressed(lines: int) -> CompressedBlocks:
        with opened(tmp_path / "out", lines) as state:
            return compress_blocks(MIXTURES["olmoe"](), tokenizer, spec, state=state)

    with pytest.raises(KilledError):
        compressed(2)
    resumed, whole = compressed(0), compress_blocks(MIXTURES["olmoe"](), tokenizer, spec)
    assert resumed.plan == whole.plan
    found, expected = resumed.model.state_dict(), whole.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], one) for name, one in expected.items())


def test_an_exploration_decides_experts_and_leaves_the_model_as_it_was(
    tokenizer: PreTrainedTokenizerFast, enough: Calibration
) -> None:
    model = MIXTURES["mixtral"]()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    recipe = Recipe(calibration=enough, evaluation=None, multiple_of=4)
    found = pared.explore(model, tokenizer, recipe, structures=("ranks", "widths"), keep=(0.7,), measure=0)
    assert [one.structure for one in found.points] == ["ranks", "widths"]  # attentions have no widths to give up
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
