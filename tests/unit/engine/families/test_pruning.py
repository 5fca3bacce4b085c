"""Pruning in the engine: counts, allocations, folders, refusals."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from passes import walk
from tiny_models import TINY_MODELS, VOCAB
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import pared
from pared import ParedError
from pared.allocation import allocators_for
from pared.calibration import capture
from pared.engine import collect_evidence, compress_blocks, resolve
from pared.engine.windows import calibration_windows
from pared.modules import SparseLinear
from pared.schema.plan import NM, Sparse
from pared.sparsity import METHODS, Unstructured, magnitude, sparsegpt, wanda
from pared.sparsity.registry import energy, gram
from pared.structure import find_anatomy, probe, weight_of

TOKENS = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
Prune = Callable[..., pared.Compressed]


@pytest.fixture
def prune(tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration) -> Prune:
    def with_recipe(family: str, **fields: object) -> pared.Compressed:
        budget = {} if "pattern" in fields else {"sparsity": 0.5}
        recipe = pared.Recipe.model_validate({"calibration": calibration, "method": "wanda", **budget, **fields})
        return pared.compress(TINY_MODELS[family](), tokenizer, recipe)

    return with_recipe


def weights(result: pared.Compressed) -> dict[str, torch.Tensor]:
    return {site.name: result.model.get_submodule(site.name).weight.detach() for site in result.plan.sites}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


# What is pruned.


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_every_family_to_the_exact_count(method: str, family: str, prune: Prune) -> None:
    result = prune(family, method=method, sparsity=0.3)
    for site in result.plan.sites:
        assert isinstance(site.decision, Sparse)
        found = result.model.get_submodule(site.name)
        assert isinstance(found, SparseLinear)
        zeros = int((found.weight == 0).sum())
        assert site.decision.stored == found.stored == found.weight.numel() - zeros
        if method == "wanda":
            assert bool(((found.weight == 0).sum(dim=1) == int(site.in_features * 0.3)).all())
        if method == "magnitude":
            assert zeros == int(found.weight.numel() * 0.3)
    assert abs(1 - result.plan.achieved_keep - 0.3) < 0.02  # rows of 16 to 32 are cut to whole weights
    assert result.plan.shortfall >= 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_first_block_is_pruned_by_the_statistics_of_a_plain_walk(
    family: str, prune: Prune, tokenizer: PreTrainedTokenizerFast
) -> None:
    dense = TINY_MODELS[family]()
    anatomy, calls = probe(dense, find_anatomy(dense))
    recipe = prune(family).recipe
    tokens = calibration_windows(recipe, tokenizer, dense.config, causal=True).tokens
    by_wanda, by_gpt = weights(prune(family)), weights(prune(family, method="sparsegpt"))
    inputs = capture(dense, anatomy, tokens, 3, calls, torch.float32, torch.device("cpu"))
    first = walk(dense, anatomy, inputs, lambda shapes: energy(shapes) | gram(shapes))[0]
    for name, own in first.statistics.items():
        W = weight_of(dense.get_submodule(name)).detach()
        assert torch.equal(by_wanda[name], wanda.prune(W, own["energy"].value, Unstructured(0.5)).weight)
        assert torch.equal(by_gpt[name], sparsegpt.prune(W, own["gram"].value, Unstructured(0.5)).weight)


def test_later_blocks_see_what_was_pruned_before_them(prune: Prune, tokenizer: PreTrainedTokenizerFast) -> None:
    result = prune("llama", sparsity=0.6)
    model = result.model
    anatomy, calls = probe(model, find_anatomy(TINY_MODELS["llama"]()))
    tokens = calibration_windows(result.recipe, tokenizer, model.config, causal=True).tokens
    inputs = capture(model, anatomy, tokens, 3, calls, torch.float32, torch.device("cpu"))
    dense = TINY_MODELS["llama"]()
    name = "model.layers.2.self_attn.q_proj"
    found = [block.statistics for block in walk(model, anatomy, inputs, energy)][2][name]["energy"]
    W = dense.get_submodule(name).weight.detach()
    expected = wanda.prune(W, found.value, Unstructured(0.6)).weight
    assert torch.equal(model.get_submodule(name).weight, expected)


def test_magnitude_needs_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    model = TINY_MODELS["llama"]()
    dense = TINY_MODELS["llama"]()
    recipe = pared.Recipe(method="magnitude", sparsity=0.5, calibration=pared.Calibration(text="file:/nowhere"))
    result = pared.compress(model, tokenizer, recipe)
    assert result.calibration is None
    for name, W in weights(result).items():
        assert torch.equal(W, magnitude.prune(dense.get_submodule(name).weight.detach(), Unstructured(0.5)).weight)


@pytest.mark.parametrize("method", METHODS)
def test_patterns_hold_in_every_group(method: str, prune: Prune) -> None:
    result = prune("llama", method=method, pattern="2:4")
    for name, W in weights(result).items():
        assert int((W.reshape(len(W), -1, 4) != 0).sum(dim=2).max()) <= 2
        assert result.model.get_submodule(name).stored == W.numel() // 2
    assert result.plan.achieved_keep == 0.5


def test_skipped_sites_stay_dense(prune: Prune) -> None:
    result = prune("llama", skip=("*.down_proj",))
    dense = TINY_MODELS["llama"]()
    for name, module in dense.named_modules():
        if name.endswith("down_proj"):
            assert torch.equal(result.model.get_submodule(name).weight, module.weight)


# Allocation.


@pytest.mark.parametrize("allocation", allocators_for("sparse"))
@pytest.mark.parametrize("method", METHODS)
def test_any_allocation_goes_with_any_method_and_meets_the_budget(allocation: str, method: str, prune: Prune) -> None:
    more = {"allocation_options": {"program": "W:(LOG)-(STD)-(NO_OP)-(8)"}} if allocation == "dsa" else {}
    result = prune("llama", method=method, allocation=allocation, sparsity=0.5, **more)
    assert abs(1 - result.plan.achieved_keep - 0.5) < 0.04
    asked = [site.decision.sparsity for site in result.plan.sites if isinstance(site.decision, Sparse)]
    sizes = [site.before for site in result.plan.sites]
    assert sum(s * n for s, n in zip(asked, sizes, strict=True)) / sum(sizes) == pytest.approx(0.5, abs=1e-6)
    assert (len(set(asked)) > 1) == (allocation != "uniform")


@pytest.mark.parametrize("allocation", ["owl", "alphapruning", "loss"])
def test_what_was_looked_at_once_serves_every_sparsity(
    allocation: str, prune: Prune, tokenizer: PreTrainedTokenizerFast
) -> None:
    recipe = prune("llama", allocation=allocation).recipe
    evidence = collect_evidence(TINY_MODELS["llama"](), tokenizer, recipe)
    for sparsity in (0.3, 0.6):
        expected = weights(prune("llama", allocation=allocation, sparsity=sparsity))
        asked = recipe.model_copy(update={"sparsity": sparsity})
        found = weights(compress_blocks(TINY_MODELS["llama"](), tokenizer, resolve(asked), evidence=evidence))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("allocation", ["owl", "alphapruning"])
def test_patterns_are_mixed_over_blocks(allocation: str, prune: Prune) -> None:
    options = {"width": 0.3} if allocation == "owl" else {"epsilon": 0.6}
    result = prune("llama", pattern="4:8", allocation=allocation, allocation_options=options)
    kept = {site.decision.kept if isinstance(site.decision, NM) else 8 for site in result.plan.sites}
    assert len(kept) > 1
    assert result.plan.achieved_keep == pytest.approx(0.5, abs=0.05)


def test_granularity_gives_every_site_its_own_sparsity(prune: Prune) -> None:
    by_block, by_site = (
        prune("llama", allocation="owl", allocation_options={"multiple": 2.0, "granularity": what}).plan
        for what in ("block", "site")
    )
    for plan, several in ((by_block, False), (by_site, True)):
        first = {site.decision.sparsity for site in plan.sites if site.block == 0 and isinstance(site.decision, Sparse)}
        assert (len(first) > 1) == several


# Folders.


@pytest.mark.parametrize("fields", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=["unstructured", "2:4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2"])
def test_a_pruned_folder_answers_the_same_and_is_smaller(
    family: str, fields: dict[str, object], prune: Prune, tmp_path: Path
) -> None:
    result = prune(family, **fields)
    expected = logits(result.model)
    result.model.save_pretrained(tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(model), expected)
    assert not any(module.packed for module in model.modules() if isinstance(module, SparseLinear))
    model.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    TINY_MODELS[family]().save_pretrained(tmp_path / "dense")
    before, after = ((tmp_path / d / "model.safetensors").stat().st_size for d in ("dense", "one"))
    assert after < before


def test_the_plan_counts_the_bytes_of_the_file(prune: Prune, tmp_path: Path) -> None:
    for number, fields in enumerate(({"sparsity": 0.5}, {"pattern": "2:4"}, {"method": "magnitude", "sparsity": 0.3})):
        result = prune("llama", **fields)
        result.model.save_pretrained(tmp_path / str(number))
        size = (tmp_path / str(number) / "model.safetensors").stat().st_size
        assert 0 <= size - result.plan.after.bytes_on_disk < 20_000  # the header


def test_a_state_dict_goes_in_and_out(prune: Prune, tmp_path: Path) -> None:
    result = prune("llama")
    result.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in result.model.parameters():
            parameter.mul_(1.1)
    state = result.model.state_dict()
    assert not any(name.endswith("q_proj.weight") for name in state)
    assert not loaded.load_state_dict(state).missing_keys
    assert torch.equal(logits(loaded), logits(result.model))


def test_what_was_trained_without_its_mask_is_not_saved_as_if_nothing_had_happened(
    prune: Prune, tmp_path: Path
) -> None:
    model = prune("llama").model
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight.add_(1)
    with pytest.raises(ValueError, match=r"not zero where its pattern has zeros.*keep_zeros_"):
        model.save_pretrained(tmp_path)
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    layer.keep_zeros_()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_whole_job_writes_a_checked_folder(
    text_file: Path, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, tmp_path: Path
) -> None:
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    recipe = pared.Recipe(
        model=str(tmp_path / "dense"), method="sparsegpt", sparsity=0.5, calibration=calibration,
        evaluation=pared.Evaluation(text=f"file:{text_file}", length=16, windows=4), out=str(tmp_path / "out"),
    )  # fmt: skip
    manifest = pared.run(recipe).manifest
    assert manifest.self_check <= 1e-6
    assert manifest.perplexity_after is not None
    assert 0 <= manifest.bytes_on_disk - manifest.plan.after.bytes_on_disk < 20_000
    assert pared.verify(tmp_path / "out") <= 1e-6


# Refusals.


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"method": "wanda", "keep": 0.5}, "does not take keep"),
        ({"method": "wanda"}, "name a sparsity"),
        ({"method": "svd-llm", "sparsity": 0.5}, "svd-llm does not take sparsity"),
        ({"method": "wanda", "sparsity": 0.5, "refit": "update"}, "does not take refit"),
        ({"method": "wanda", "pattern": "5:4"}, "pattern 5:4"),
        ({"method": "wanda", "sparsity": 0.5, "allocation": "owk"}, "unknown allocation of zeros 'owk'; .*owl"),
        ({"method": "wanda", "sparsity": 0.5, "allocation": "owl", "allocation_options": {"m": 3}}, "no option 'm'"),
        ({"method": "sparsegpt", "sparsity": 0.5, "options": {"block": 0}}, "option block: expected 1"),
        ({"method": "wanda", "pattern": "3:7"}, "expected a multiple of 7"),
        (
            {"method": "wanda", "sparsity": 0.5, "allocation": "owl", "allocation_options": {"granularity": "head"}},
            "option granularity: expected one of block, site",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    fields: dict[str, object], told: str, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> None:
    model = TINY_MODELS["llama"]()
    before = logits(model)
    with pytest.raises(ParedError, match=told):
        pared.compress(model, tokenizer, pared.Recipe.of({"calibration": calibration.model_dump(), **fields}))
    assert torch.equal(logits(model), before)


def test_two_budgets_are_refused() -> None:
    with pytest.raises(ParedError, match=r"sparsity 0\.5 and pattern 2:4 are two budgets"):
        pared.Recipe.of({"method": "wanda", "sparsity": 0.5, "pattern": "2:4"})
