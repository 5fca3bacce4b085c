"""FWSVD's budget is a rank: the same fraction of the full rank at every site."""

import pytest
import torch
from tiny_models import TINY_MODELS
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import pared
from pared import ParedError
from pared.allocation import Unit
from pared.allocation.ranks.rank_fraction import rank_fraction
from pared.schema.plan import Dense, LowRank
from pared.structure import Site, find_anatomy


def unit(out_features: int, in_features: int, name: str = "site", idle: bool = False) -> Unit:
    return Unit((Site(name, 0, "q", out_features, in_features, True, name, idle),))


def test_bert_base_at_a_third_of_its_ranks_has_66_5_million_parameters() -> None:
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    anatomy = find_anatomy(model)
    units = [Unit((site,)) for site in anatomy.sites]
    decisions = rank_fraction(units, 0.33)
    assert len(decisions) == 12 * 6
    assert set(decisions.values()) == {LowRank(rank=253)}
    dense = sum(unit.parameters for unit in units)
    stored = sum(253 * (unit.out_features + unit.in_features) for unit in units)
    assert dense == pytest.approx(84.9e6, abs=0.1e6)
    assert stored == pytest.approx(42.0e6, abs=0.1e6)
    assert anatomy.model_parameters - dense + stored == pytest.approx(66.5e6, abs=0.1e6)


@pytest.mark.parametrize(("fraction", "rank"), [(0.29, 29), (0.3, 30), (0.305, 30), (1.0, 100), (0.01, 1)])
def test_the_rank_is_the_whole_part_of_the_fraction(fraction: float, rank: int) -> None:
    assert rank_fraction([unit(100, 300)], fraction) == {"site": LowRank(rank=rank)}
    assert rank_fraction([unit(300, 100)], fraction, pivoted=True) == {"site": LowRank(rank=rank, pivoted=True)}


def test_a_rank_that_saves_nothing_is_given_all_the_same() -> None:
    assert rank_fraction([unit(8, 8)], 0.9) == {"site": LowRank(rank=7)}


def test_a_unit_that_never_ran_stays_dense() -> None:
    decisions = rank_fraction([unit(8, 8, "a"), unit(8, 8, "b", idle=True)], 0.5)
    assert isinstance(decisions["b"], Dense)
    assert decisions["a"] == LowRank(rank=4)


def test_fractions_that_make_no_rank_are_refused() -> None:
    for fraction in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ParedError, match=r"rank_fraction .* in \(0, 1\]; got"):
            rank_fraction([unit(8, 8)], fraction)
    with pytest.raises(ParedError, match=r"rank_fraction 0\.1 leaves no rank for site 8 x 9; .* is 0\.125"):
        rank_fraction([unit(8, 9)], 0.1)


def test_a_recipe_of_ranks_survives_its_manifest_and_meets_no_other_budget(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> None:
    recipe = pared.Recipe(method="svd-llm", rank_fraction=0.4, calibration=calibration)
    assert pared.Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    result = pared.compress(TINY_MODELS["llama"](), tokenizer, recipe)
    for site in result.plan.sites:
        assert site.decision.rank == int(0.4 * min(site.out_features, site.in_features))
    assert result.plan.shortfall == 0
    assert result.plan.keep == result.plan.achieved_keep


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rank_fraction": 0.3, "keep": 0.5}, "are two budgets; give one"),
        ({"rank_fraction": 0.3, "allocation": "loss"}, "rank_fraction fixes every rank"),
        ({"rank_fraction": 0.0}, "rank_fraction"),
    ],
)
def test_two_budgets_are_refused(fields: dict[str, object], told: str) -> None:
    with pytest.raises(ParedError, match=told):
        pared.Recipe.of(fields)
