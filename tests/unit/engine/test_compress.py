import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import UNSHRUNK
from tiers import crossed
from tiny_models import FAMILIES, TINY_MODELS, VOCAB
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

import pared
from pared import ParedError, Recipe
from pared.data.texts import find_text
from pared.data.windows import cut
from pared.engine.install import install, put
from pared.lowrank import METHODS
from pared.modules import LowRankLinear, NarrowConv1D, NarrowLinear, PivotedLinear
from pared.modules.opened import open_by_layout, opened_experts
from pared.schema.width import Width
from pared.structure import bias_of, find_anatomy, weight_of

TOKENS = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
Compress = Callable[..., pared.Compressed]


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


@pytest.fixture
def compress(tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration) -> Compress:
    def with_recipe(model: PreTrainedModel, **fields: object) -> pared.Compressed:
        return pared.compress(
            model, tokenizer, Recipe.model_validate({"method": "svd-llm", "calibration": calibration, **fields})
        )

    return with_recipe


@pytest.mark.parametrize(("family", "method"), crossed(FAMILIES, sorted(METHODS)))
def test_every_planned_site_is_replaced_within_the_budget(
    family: str, method: str, compress: Compress, calibration: pared.Calibration
) -> None:
    model = TINY_MODELS[family]()
    dense = copy.deepcopy(model)
    fields = METHODS[method].config.model_fields
    options = {"loss": "sampled"} if "loss" in fields else {}  # an encoder's text holds no labels
    # An encoder has no perplexity that an allocation could be tried by.
    allocation = "uniform" if (family, METHODS[method].allocation) == ("bert", "swift") else "auto"
    # An expert of fewer tokens than inputs would stay dense, and examples are told apart by batches of one there.
    given = {"calibration": calibration.model_copy(update={"samples": 24, "batch": 1})} if family == "qwen2_moe" else {}
    result = compress(model, method=method, keep=0.6, options=options, allocation=allocation, **given)
    assert result.model is model
    for name, experts in opened_experts(model).items():
        open_by_layout(dense, name, experts.layout)
    kinds = (LowRankLinear, PivotedLinear, NarrowLinear, NarrowConv1D)
    replaced = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    assert replaced == {site.name for site in result.plan.sites if site.decision.kind != "dense"}
    stayed = {site.name for site in result.plan.sites} - replaced
    assert replaced
    if METHODS[method].allocation == "uniform":
        assert all(name.endswith("shared_expert_gate") or ".experts." in name for name in stayed)
    for site in result.plan.sites:
        if site.name not in replaced:
            continue
        module, before = model.get_submodule(site.name), dense.get_submodule(site.name)
        if isinstance(site.decision, Width):
            narrow = site.decision.shape(site.out_features, site.in_features)
            sizes = ("nf", "nx") if isinstance(module, Conv1D) else ("out_features", "in_features")
            assert tuple(getattr(module, size) for size in sizes) == narrow != tuple(weight_of(before).shape)
            assert getattr(module, "rank", None) == site.decision.rank
            continue
        assert (module.out_features, module.in_features) == tuple(weight_of(before).shape)
        assert module.rank == site.decision.rank
        shared = site.decision.kind == "shared"
        assert module.rank < (module.in_features if shared else min(module.out_features, module.in_features))
        bias = bias_of(before)
        assert (module.bias is None) == (bias is None)
        assert bias is None or torch.equal(module.bias, bias)
    assert 0.4 < result.plan.achieved_keep <= 0.6
    assert sum(p.numel() for p in model.parameters()) == result.plan.after.model_parameters
    assert logits(model).isfinite().all()
    assert not torch.equal(logits(model), logits(dense))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_a_site_is_left_alone(family: str, compress: Compress) -> None:
    model = TINY_MODELS[family]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = compress(model, keep=0.6)
    sites = {f"{site.name}.weight" for site in result.plan.sites if site.decision.kind == "low_rank"}
    after = model.state_dict()
    for name in before.keys() & after.keys():
        assert torch.equal(after[name], before[name]), name
    # Weights of opened experts go by other names, those that are left alone too.
    gone = {name for name in before.keys() - after.keys() if not name.endswith(("bias", "up_proj", "down_proj"))}
    assert gone == {site for site in sites if ".experts." not in site}


@pytest.mark.parametrize(("method", "statistic"), [("svd", "none"), ("svd-llm", "gram"), ("svd-llm", "output_gram")])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_reproduces_the_model(family: str, method: str, statistic: str) -> None:
    model = TINY_MODELS[family]()
    before = logits(model)
    for site in find_anatomy(model).sites:
        W = weight_of(model.get_submodule(site.name)).detach()
        x = torch.randn(100, site.in_features, dtype=torch.float64)
        statistics = {"gram": x.T @ x, "output_gram": W.double() @ x.T @ x @ W.double().T}
        decomposition = METHODS[method].decompose(W, {k: v for k, v in statistics.items() if k == statistic})
        install(model, site.name, decomposition.factors(min(W.shape)))
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_conv1d_and_linear_twins_are_compressed_alike(method: str, compress: Compress) -> None:
    conv = TINY_MODELS["gpt2"]()
    twin = copy.deepcopy(conv)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf)
            linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
            parent, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, linear)
    torch.testing.assert_close(logits(conv), logits(twin), atol=1e-5, rtol=1e-5)
    plans = [compress(model, method=method, keep=0.6).plan for model in (conv, twin)]
    assert plans[0] == plans[1]
    torch.testing.assert_close(logits(conv), logits(twin), atol=1e-4, rtol=1e-4)


def test_whitening_loses_less_of_a_layers_outputs_than_plain_svd(
    compress: Compress, calibration: pared.Calibration, tokenizer: PreTrainedTokenizerFast
) -> None:
    errors = {}
    tokens = cut(find_text(calibration.text), tokenizer, calibration.length, calibration.samples).tokens
    for method in METHODS:
        model = TINY_MODELS["llama"]()
        dense = copy.deepcopy(model)
        name, seen = "model.layers.0.mlp.down_proj", []
        dense.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            dense(input_ids=tokens)
            compress(model, method=method, keep=0.5)
            errors[method] = (model.get_submodule(name)(seen[0]) - dense.get_submodule(name)(seen[0])).norm()
    assert errors["svd-llm"] < errors["svd"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_stay_half_precision(dtype: torch.dtype, compress: Compress) -> None:
    model = TINY_MODELS["llama"]().to(dtype)
    compress(model, keep=0.6)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert logits(model).isfinite().all()


def test_a_budget_that_leaves_nothing_to_do_is_refused(compress: Compress) -> None:
    model = TINY_MODELS["llama"]()
    for method, budget in (("svd", {"keep": 1.0}), ("magnitude", {"sparsity": 0.0}), ("magnitude", {"pattern": "4:4"})):
        with pytest.raises(ParedError, match=r"keep 1 keeps everything|makes nothing zero|4:4 keeps everything"):
            compress(model, method=method, **budget)


def test_skipped_sites_keep_their_weights(compress: Compress) -> None:
    model = TINY_MODELS["llama"]()
    compress(model, keep=0.6, skip=["*.1.*", "*o_proj"])
    left = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    assert len(left) == 2 * 6
    assert not [name for name in left if ".1." in name or name.endswith("o_proj")]


def test_a_layer_that_never_runs_stays_dense_and_the_others_pay_for_it(compress: Compress) -> None:
    model = TINY_MODELS["llama"]()
    model.model.layers[1].spare = nn.Linear(32, 32)
    plan = compress(model, keep=0.6).plan
    spare = next(site for site in plan.sites if site.name.endswith("spare"))
    assert spare.decision.kind == "dense"
    assert spare.decision.reason == "no calibration token reached it"
    assert plan.achieved_keep <= 0.6


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_as_before(training: bool, compress: Compress) -> None:
    model = TINY_MODELS["llama"]().train(training)
    compress(model, keep=0.6)
    assert {module.training for module in model.modules()} == {training}


def test_a_refused_model_is_still_in_training_mode(compress: Compress) -> None:
    model = TINY_MODELS["llama"]().train()
    with pytest.raises(ParedError, match="leaves no rank"):
        compress(model, keep=0.01)
    assert model.training


def test_a_compressed_model_is_refused(compress: Compress) -> None:
    model = TINY_MODELS["llama"]()
    compress(model, keep=0.6)
    with pytest.raises(ParedError, match="'LlamaForCausalLM' is compressed already"):
        compress(model, keep=0.6)


def test_a_model_compressed_in_part_says_so_and_is_refused_afterwards(compress: Compress) -> None:
    model = TINY_MODELS["llama"]()
    model.model.layers[1].input_layernorm.weight.data[0] = float("nan")
    with pytest.raises(ParedError, match=r"layers\.1\.self_attn\.q_proj reads NaN.*before it are compressed already"):
        compress(model, keep=0.6)
    with pytest.raises(ParedError, match="is compressed already, at least in part; load the dense model"):
        compress(model, keep=0.6)


def test_a_quantised_model_is_refused(compress: Compress) -> None:
    model = TINY_MODELS["llama"]()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ParedError, match=r"is quantised \(gptq\)"):
        compress(model, keep=0.6)


def test_an_offloaded_model_is_refused_by_its_site(compress: Compress) -> None:
    model = TINY_MODELS["llama"]().to("meta")
    with pytest.raises(ParedError, match=r"layers\.0\.self_attn\.q_proj is on the meta device"):
        compress(model, keep=0.6)


def test_an_unknown_method_is_refused_with_the_nearest(compress: Compress) -> None:
    with pytest.raises(ParedError, match="unknown method 'svdllm'; did you mean 'svd-llm'"):
        compress(TINY_MODELS["llama"](), method="svdllm")


def test_plain_svd_reads_no_text(compress: Compress) -> None:
    result = compress(TINY_MODELS["llama"](), method="svd", calibration={"text": "file:/nowhere.txt"}, keep=0.6)
    assert result.calibration is None


def test_calibration_is_recorded_with_the_digest_of_its_tokens(compress: Compress) -> None:
    first, second = (compress(TINY_MODELS["llama"](), keep=0.6).calibration for _ in range(2))
    assert first == second
    assert first is not None
    assert (first["windows"], first["length"], first["dtype"]) == (7, 16, "torch.float32")
    assert len(str(first["digest"])) == 64


def test_the_same_recipe_gives_the_same_model(compress: Compress) -> None:
    first, second = (compress(TINY_MODELS["qwen2"](), keep=0.6).model for _ in range(2))
    assert torch.equal(logits(first), logits(second))


def test_a_model_saved_after_an_interruption_loads_again(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the map was written at the end only, so the factors of such a folder loaded as random numbers."""
    seen: list[str] = []

    def interrupted(model: Any, names: list[str], modules: Any) -> None:
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.extend(names)
        put(model, names, modules)

    monkeypatch.setattr("pared.engine.ranks.kept_units.put", interrupted)
    model = TINY_MODELS["llama"]()
    with pytest.raises(KeyboardInterrupt):
        pared.compress(model, tokenizer, pared.Recipe(method="svd-llm", keep=0.7, calibration=calibration))
    model.save_pretrained(tmp_path / "half")
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(pared.load(tmp_path / "half")(ids).logits, model(ids).logits)


def test_adapters_and_tied_layers_are_refused(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> None:
    recipe = pared.Recipe(method="svd-llm", keep=0.7, calibration=calibration)
    adapted = TINY_MODELS["llama"]()
    adapted.peft_config = {}  # what PEFT leaves on a model it wraps
    with pytest.raises(ParedError, match="merge them first"):
        pared.compress(adapted, tokenizer, recipe)
    tied = TINY_MODELS["llama"]()
    tied.model.layers[1].mlp.up_proj.weight = tied.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ParedError, match=r"layers\.0\.mlp\.up_proj and .*layers\.1\.mlp\.up_proj are tied"):
        pared.compress(tied, tokenizer, recipe)


def test_the_manifest_tells_the_dtype_that_was_used(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the fastest dtype was measured twice, and the two measurements could differ."""
    chosen = iter([torch.bfloat16, torch.float32])
    monkeypatch.setattr("pared.engine.observe.choose_dtype", lambda *_: next(chosen))
    result = pared.compress(
        TINY_MODELS["llama"](), tokenizer, pared.Recipe(method="svd-llm", keep=0.7, calibration=calibration)
    )
    assert result.calibration is not None
    assert result.calibration["dtype"] == "torch.bfloat16"
    assert next(chosen) == torch.float32  # asked once


def test_an_encoder_has_no_labels_in_its_text_and_says_so(compress: Compress) -> None:
    with pytest.raises(ParedError, match="so a text has no labels: calibrate on labelled examples"):
        compress(TINY_MODELS["bert"](), method="fwsvd", keep=0.6)


def test_output_weighting_none_and_uniform_ranks_is_svd_llm(
    compress: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pared.lowrank.loss_optimal.DAMPING", 0.0)
    ours, theirs = TINY_MODELS["llama"](), TINY_MODELS["llama"]()
    options = {"output_weighting": "none", **UNSHRUNK}
    compress(ours, method="loss-optimal", allocation="uniform", storage="factors", keep=0.8, options=options)
    compress(theirs, method="svd-llm", keep=0.8)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-3)


def test_unknown_weightings_are_refused_before_any_work(compress: Compress) -> None:
    with pytest.raises(ParedError, match="output_weighting: expected one of none, scalar, diagonal, full, got 'half'"):
        compress(TINY_MODELS["llama"](), method="loss-optimal", options={"output_weighting": "half"})
