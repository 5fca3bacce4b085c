"""Two-phase compression, and the options of a method."""

import importlib
from dataclasses import replace

import pytest
import torch
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast

import pared
from pared import ParedError, Recipe
from pared.allocation import ALLOCATORS, Budget, Unit, allocator_of, allocators_for
from pared.engine.allocate import make_plan
from pared.engine.solve import Solver
from pared.engine.spec import resolve_low_rank
from pared.modules import LowRankLinear
from pared.schema.options import Options
from pared.schema.plan import LowRank

TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))


OF_RANKS = {name for name, one in allocators_for("low_rank").items() if one.ranks}


@pytest.mark.parametrize("allocation", sorted(OF_RANKS - {"rank-fraction", "sensitivity", "dsa"}))
@pytest.mark.parametrize("method", ["svd", "asvd", "svd-llm", "svd-llm-v2"])
def test_any_allocation_goes_with_any_method(
    method: str, allocation: str, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> None:
    model = TINY_MODELS["llama"]()
    recipe = Recipe(method=method, allocation=allocation, keep=0.6, calibration=calibration)
    result = pared.compress(model, tokenizer, recipe)
    assert result.plan.achieved_keep <= 0.6
    assert result.plan.shortfall == 0
    for site in result.plan.sites:
        module = model.get_submodule(site.name)
        assert isinstance(module, LowRankLinear) == isinstance(site.decision, LowRank)
        if isinstance(site.decision, LowRank):
            assert module.rank == site.decision.rank
    with torch.no_grad():
        assert bool(model(TOKENS).logits.isfinite().all())


def test_two_phases_give_what_one_gives_at_the_same_ranks(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> None:

    class Late(Options):
        pass

    uniform = allocator_of("uniform", "low_rank")
    ALLOCATORS.register("late", replace(uniform, name="late", config=Late, requires=frozenset({"cost"})))
    logits = []
    try:
        for name in ("uniform", "late"):
            model = TINY_MODELS["gpt2"]()
            recipe = Recipe(method="svd-llm", keep=0.6, allocation=name, calibration=calibration)
            pared.compress(model, tokenizer, recipe)
            with torch.no_grad():
                logits.append(model(TOKENS).logits)
    finally:
        ALLOCATORS.unregister("late")
    assert torch.allclose(logits[0], logits[1], atol=1e-4)


def test_a_method_brings_its_papers_allocation_unless_another_is_asked_for(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> None:
    def ranks(**fields: object) -> list[int]:
        recipe = Recipe.model_validate({"keep": 0.6, "calibration": calibration, **fields})
        plan = pared.compress(TINY_MODELS["llama"](), tokenizer, recipe).plan
        return [site.decision.rank for site in plan.sites if isinstance(site.decision, LowRank)]

    assert ranks(method="svd-llm-v2") == ranks(method="svd-llm", allocation="svd-llm-v2")
    assert ranks(method="svd-llm-v2", allocation="uniform") == ranks(method="svd-llm")
    assert ranks(method="svd-llm-v2") != ranks(method="svd-llm")


def test_options_reach_the_method_and_unknown_ones_are_refused(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> None:
    def weight(**fields: object) -> torch.Tensor:
        model = TINY_MODELS["llama"]()
        pared.compress(model, tokenizer, Recipe.model_validate({"keep": 0.6, "calibration": calibration, **fields}))
        return model.model.layers[0].mlp.up_proj.weight.detach()

    plain, alpha_0 = weight(method="svd"), weight(method="asvd", options={"alpha": 0})
    assert torch.allclose(plain, alpha_0, atol=1e-5)
    assert not torch.allclose(plain, weight(method="asvd"), atol=1e-3)
    with pytest.raises(ParedError, match="no option 'alhpa'; did you mean 'alpha'"):
        weight(method="asvd", options={"alhpa": 0.5})
    with pytest.raises(ParedError, match="expected float, got 'half'"):
        weight(method="asvd", options={"alpha": "half"})
    with pytest.raises(ParedError, match="svd has no option 'alpha'; it has none"):
        weight(method="svd", options={"alpha": 0.5})


def test_a_pivoted_decision_is_installed_pivoted() -> None:
    """Regression: the plan counted pivoted parameters and the engine installed two factors."""
    from pared.modules import PivotedLinear
    from pared.structure import find_anatomy

    model = TINY_MODELS["llama"]()
    anatomy = find_anatomy(model)
    plan = pared.Plan.model_validate(
        make_plan(anatomy, allocator_of("uniform", "low_rank"), Budget(0.6), 4).model_dump()
    )
    pivoted = [
        site.model_copy(update={"decision": LowRank(rank=site.decision.rank, pivoted=True)})
        for site in plan.sites
        if isinstance(site.decision, LowRank)
    ]
    plan = plan.model_copy(update={"sites": tuple(pivoted)})
    before = sum(p.numel() for p in model.parameters())
    assert plan.model_parameters == before
    units = [Unit((site,)) for site in anatomy.sites]
    with Solver(model, resolve_low_rank(Recipe(method="svd", keep=0.6)), units, plan) as solver:
        for unit in units:
            solver.accept(solver.take(unit, {}))
    assert all(isinstance(model.get_submodule(site.name), PivotedLinear) for site in plan.sites)
    assert sum(p.numel() for p in model.parameters()) == plan.after.model_parameters


@pytest.mark.parametrize(
    ("recipe", "module", "factored"),
    [
        # q, k, v read one input, o, gate and up, down: four Grams in each of three blocks, seven weights.
        ({"method": "svd-llm", "keep": 0.8, "storage": "factors"}, "pared.lowrank.whitening._cholesky", 12),
        ({"method": "sparsegpt", "sparsity": 0.5}, "torch.linalg.cholesky_ex", 12),
    ],
)
def test_what_several_weights_read_is_factored_once(
    recipe: dict[str, object],
    module: str,
    factored: int,
    tokenizer: PreTrainedTokenizerFast,
    calibration: pared.Calibration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    place, name = module.rsplit(".", 1)
    known = getattr(importlib.import_module(place), name)
    monkeypatch.setattr(module, lambda *args, **kwargs: calls.append(1) or known(*args, **kwargs))
    result = pared.compress(TINY_MODELS["llama"](), tokenizer, Recipe(**recipe, calibration=calibration))
    assert len(calls) == factored
    assert len(result.plan.sites) == 21
