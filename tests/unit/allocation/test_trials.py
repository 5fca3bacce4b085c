"""Allocators that try what they propose: Swift-SVD's dynamic allocation and ASVD's sensitivity search."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiers import crossed
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast

import pared
from pared import ParedError
from pared.allocation import Budget, Evidence, Unit
from pared.allocation.ranks.sensitivity import CANDIDATES, SensitivityCache, Trial, cut, sensitivity
from pared.allocation.ranks.swift import scaled, swift, swift_ranks
from pared.io.journal import sealed
from pared.schema.plan import Decision, Dense, LowRank
from pared.structure.model import Site


def unit(name: str, block: int = 0, kind: str = "q", out_features: int = 40, in_features: int = 40) -> Unit:
    return Unit((Site(name, block, kind, out_features, in_features, False, name, owner=kind),))


UNITS = [unit(f"{kind}{block}", block, kind) for block in range(6) for kind in ("q", "o")]
SPECTRA = {
    one.name: (5 + index) * torch.exp(-0.1 * torch.arange(40, dtype=torch.float64)) for index, one in enumerate(UNITS)
}
INFLUENCE = {block: (0.9, 0.1, 0.2, 0.05, 0.3, 0.7)[block] for block in range(6)}


class Perplexity:
    """A trial that likes rank where a weight is dear, and counts how often it was asked."""

    def __init__(self, dear: Mapping[str, float]) -> None:
        self.dear, self.asked = dear, list[dict[str, Decision]]()

    def __call__(self, decisions: Mapping[str, Decision]) -> float:
        self.asked.append(dict(decisions))
        return 10 + sum(self.dear[name] / decision.rank for name, decision in decisions.items())


def cost(decisions: Mapping[str, Decision], units: list[Unit], budget: Budget) -> int:
    return sum(
        budget.cost(one, decisions[one.name].rank) if isinstance(decisions[one.name], LowRank) else one.parameters
        for one in units
    )


# Swift


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_swift_ranks_stay_between_floor_and_full_and_within_the_sum(alpha: float):
    losses = [3.0, 10.0, 200.0, 7.0, 1.0]
    ranks = swift_ranks(16, 19, [1.0, 1.2, 1.5, 2.0, 1.1], losses, alpha)
    assert sum(ranks) <= 16 * 5
    assert sum(ranks) == 16 * 5  # nothing is left over while there is room
    assert all(8 <= rank <= 19 for rank in ranks)


def test_swift_alpha_0_ignores_influence_and_alpha_1_ignores_losses():
    losses, beta = [3.0, 10.0, 200.0], [1.0, 1.7, 2.0]
    assert swift_ranks(20, 39, beta, losses, 0.0) == swift_ranks(20, 39, [1.0] * 3, losses, 0.0)
    assert swift_ranks(20, 39, beta, losses, 1.0) == swift_ranks(20, 39, beta, [1.0] * 3, 1.0)
    assert swift_ranks(20, 39, beta, losses, 0.0) != swift_ranks(20, 39, beta, losses, 1.0)


def test_swift_with_the_floor_at_the_uniform_rank_is_uniform():
    assert swift_ranks(20, 39, [1.0, 2.0], [1.0, 100.0], 0.5, floor=1.0) == [20, 20]


def test_swift_ranks_by_hand():
    """k = 10, floor 5, pool 10, scores e + 0 -> 1 and ln(e + e^3 - e) = 3."""
    assert swift_ranks(10, 30, [1.0, 1.0], [0.0, math.e**3 - math.e], 0.0) == [5 + 2, 5 + 8]


def test_a_full_weight_leaves_its_share_to_the_others():
    assert swift_ranks(10, 12, [1.0, 1.0, 1.0], [0.0, 0.0, 1e6], 0.0)[2] == 12
    assert sum(swift_ranks(10, 12, [1.0, 1.0, 1.0], [0.0, 0.0, 1e6], 0.0)) == 30


def test_influence_is_scaled_to_one_and_two():
    assert scaled(INFLUENCE)[0] == 2.0
    assert scaled(INFLUENCE)[3] == 1.0
    assert scaled({0: 0.4, 1: 0.4}) == {0: 1.0, 1: 1.0}


@pytest.mark.parametrize("pivoted", [False, True])
def test_swift_takes_the_best_of_at_most_eleven_and_meets_the_budget(pivoted: bool):
    dear = {one.name: 100.0 if one.block == 0 else 1.0 for one in UNITS}
    trial, budget = Perplexity(dear), Budget(0.6, pivoted)
    decided = swift(UNITS, budget, Evidence(SPECTRA, INFLUENCE, trial))
    assert 1 < len(trial.asked) <= 11
    assert {name: d.rank for name, d in decided.items()} in [
        {name: d.rank for name, d in one.items()} for one in trial.asked
    ]
    scores = [Perplexity(dear)(one) for one in trial.asked]
    assert Perplexity(dear)(decided) == pytest.approx(min(scores))
    assert cost(decided, UNITS, budget) <= 0.6 * sum(one.parameters for one in UNITS)


def test_swift_gives_equal_weights_equal_ranks():
    spectra = {one.name: SPECTRA["q0"] for one in UNITS}
    decided = swift(UNITS, Budget(0.6), Evidence(spectra, dict.fromkeys(range(6), 0.5), lambda _: 1.0))
    ranks = {decision.rank for decision in decided.values()}
    assert max(ranks) - min(ranks) <= 1


# Sensitivity


@pytest.mark.parametrize("keep", [0.45, 0.6, 0.75, 0.85])
def test_the_cut_meets_the_budget_within_one_step(keep: float):
    budget = Budget(keep)
    trial = Perplexity({one.name: 1.0 + index for index, one in enumerate(UNITS)})
    decided = sensitivity(UNITS, budget, Evidence(trial=trial))
    total = sum(one.parameters for one in UNITS)
    assert cost(decided, UNITS, budget) <= keep * total
    assert keep * total - cost(decided, UNITS, budget) <= 0.6 * 1600 + 80  # from dense to the smallest candidate
    assert len(trial.asked) == len(UNITS) * len(CANDIDATES)
    assert all(len(one) == 1 for one in trial.asked)


def test_a_tighter_target_never_stores_more():
    costs = []
    for keep in (0.45, 0.5, 0.6, 0.7, 0.8, 0.9):
        trial = Perplexity({one.name: 1.0 + index for index, one in enumerate(UNITS)})
        costs.append(cost(sensitivity(UNITS, Budget(keep), Evidence(trial=trial)), UNITS, Budget(keep)))
    assert costs == sorted(costs)


def test_what_hurts_most_stays_dense_and_what_hurts_least_gets_least():
    dear = {one.name: 1000.0 if one.kind == "o" else 1.0 for one in UNITS}
    decided = sensitivity(UNITS, Budget(0.75), Evidence(trial=Perplexity(dear)))
    assert all(isinstance(decided[one.name], Dense) for one in UNITS if one.kind == "o")
    assert all(isinstance(decided[one.name], LowRank) for one in UNITS if one.kind == "q")


def test_ties_are_broken_the_same_way_in_any_order():
    trials = [Trial(5.0, one.name, Budget(ratio).rank(one)) for one in UNITS for ratio in CANDIDATES]
    budget, parameters = Budget(0.7), int(0.7 * 12 * 1600)
    assert cut(UNITS, trials, parameters, budget) == cut(UNITS, trials[::-1], parameters, budget)


def test_a_weight_whose_small_rank_is_less_harmful_takes_it():
    """Sensitivity is not always monotone; the smallest rank among the applied trials is taken."""
    one, other = unit("a"), unit("b")
    trials = [Trial(9.0, "a", 18), Trial(1.0, "a", 8), Trial(5.0, "b", 18), Trial(6.0, "b", 8)]
    decided = cut([one, other], trials, 2300, Budget(0.75))
    assert decided["a"] == LowRank(rank=8)
    assert isinstance(decided["b"], Dense)


def test_a_target_below_the_smallest_candidates_says_what_they_reach():
    with pytest.raises(ParedError, match=r"reach keep 0\.4, got 0\.3; keep more"):
        sensitivity(UNITS, Budget(0.3), Evidence(trial=Perplexity(dict.fromkeys(SPECTRA, 1.0))))


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARED_CACHE", str(tmp_path))
    return tmp_path


def test_what_was_measured_is_not_measured_again_unless_the_key_differs(cache_folder: Path):
    trials = [Perplexity(dict.fromkeys(SPECTRA, 1.0)) for _ in range(3)]
    plans = [
        sensitivity(UNITS, Budget(0.7), Evidence(trial=trial, key=key))
        for trial, key in zip(trials, ("one", "one", "other"), strict=True)
    ]
    assert [len(trial.asked) for trial in trials] == [72, 0, 72]
    assert plans[0] == plans[1]


def test_an_interrupted_search_goes_on_where_it_stopped(cache_folder: Path):
    real, calls = Perplexity(dict.fromkeys(SPECTRA, 1.0)), 0

    def stopped(decisions: Mapping[str, Decision]) -> float:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return real(decisions)

    with pytest.raises(KeyboardInterrupt):
        sensitivity(UNITS, Budget(0.7), Evidence(trial=stopped, key="one"))
    again = Perplexity(dict.fromkeys(SPECTRA, 1.0))
    sensitivity(UNITS, Budget(0.7), Evidence(trial=again, key="one"))
    assert len(again.asked) == 72 - 29


def test_a_torn_line_of_the_cache_is_ignored(cache_folder: Path, caplog: pytest.LogCaptureFixture):
    with SensitivityCache("one") as cache:
        cache.put("a", 3, 7.5)
        cache.put("c", 3, math.inf)
    (file,) = cache_folder.rglob("*.jsonl")
    file.write_text(file.read_text() + '{"unit": "b", "rank": 4, "perpl')
    with SensitivityCache("one") as again:
        assert (again.get("a", 3), again.get("b", 4), again.get("c", 3)) == (7.5, None, math.inf)
    assert "line 4 is torn" in caplog.text


def test_trials_of_before_they_were_a_journal_are_taken_up(cache_folder: Path, caplog: pytest.LogCaptureFixture):
    """As every version up to 0.1 wrote them: lines that stand alone, damaged ones among them."""
    with SensitivityCache("one") as cache:
        cache.put("new", 1, 1.0)
    (file,) = cache_folder.rglob("*.jsonl")
    lines = [sealed({"unit": name, "rank": 3, "perplexity": value})[0] for name, value in (("a", 7.5), ("b", math.inf))]
    file.write_bytes(lines[0] + b'{"unit": "c", "rank": 4\n' + lines[1] + b'["b", 4, 8.')
    with SensitivityCache("one") as cache:
        assert (cache.get("a", 3), cache.get("b", 3), cache.get("c", 4)) == (7.5, math.inf, None)
        cache.put("c", 4, 8.5)
    assert "line 2 is not a measurement" in caplog.text
    assert "line 4 is not a measurement" in caplog.text
    with SensitivityCache("one") as cache:
        assert (cache.get("a", 3), cache.get("b", 3), cache.get("c", 4)) == (7.5, math.inf, 8.5)
    assert file.read_bytes().startswith(b'{"pared_sensitivity"')


@pytest.mark.parametrize("trouble", ["busy", "damaged", "a folder"])
def test_trials_that_cannot_be_kept_are_told_and_measured(
    trouble: str, cache_folder: Path, caplog: pytest.LogCaptureFixture
):
    with SensitivityCache("one") as cache:
        cache.put("a", 3, 7.5)
    (file,) = cache_folder.rglob("*.jsonl")
    if trouble == "damaged":
        file.write_bytes(file.read_bytes().replace(b"7.5", b"7.6"))
    elif trouble == "a folder":
        file.unlink()
        file.mkdir()
    with SensitivityCache("one") if trouble == "busy" else nullcontext(), SensitivityCache("one") as cache:
        assert cache.get("a", 3) is None
        cache.put("a", 3, 7.5)
        assert cache.get("a", 3) == 7.5
    assert "the trials of this run are not kept" in caplog.text
    assert str(file) in caplog.text


# Through the pipeline


@pytest.mark.parametrize(
    ("method", "allocation"),
    crossed(["swift-svd", "svd", "basis-sharing", "loss-optimal"], ["swift", "sensitivity"]),
)
def test_a_model_is_as_it_was_after_every_trial(
    method: str, allocation: str, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, cache_folder: Path
):
    model = TINY_MODELS["llama"]()
    recipe = pared.Recipe(method=method, allocation=allocation, keep=0.7, refit="off", calibration=calibration)
    result = pared.compress(model, tokenizer, recipe)
    assert result.plan.achieved_keep <= 0.7
    assert sum(p.numel() for p in model.parameters()) == result.plan.after.model_parameters


def test_an_encoder_has_no_perplexity_to_try_by(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, cache_folder: Path
):
    recipe = pared.Recipe(method="svd-llm", allocation="swift", keep=0.7, calibration=calibration)
    with pytest.raises(ParedError, match="not a causal language model"):
        pared.compress(TINY_MODELS["bert"](), tokenizer, recipe)


def released_cut(trials: list[Trial], parameters: int, budget: Budget) -> tuple[dict[str, int], int]:
    """Return the ranks at the cut that ASVD's released bisection looked at last, and what they store."""
    order = sorted(trials, key=lambda trial: (-trial.perplexity, trial.unit, trial.rank))

    def applied(start: int) -> tuple[dict[str, int], int]:
        ranks: dict[str, int] = {}
        for trial in order[start:]:
            ranks[trial.unit] = min(trial.rank, ranks.get(trial.unit, trial.rank))
        stored = sum(budget.cost(one, ranks[one.name]) if one.name in ranks else one.parameters for one in UNITS)
        return ranks, stored

    low, high, middle = 0, len(order) - 1, 0
    while low < high:
        middle = (low + high) // 2
        if applied(middle)[1] > parameters:
            high = middle
        else:
            low = middle + 1
    return applied(middle)


def test_the_rank_search_ends_where_the_released_one_does_or_a_trial_before_where_that_is_over_budget():
    generator, ends = torch.Generator().manual_seed(0), {"same": 0, "over": 0}
    for keep in [keep / 100 for keep in range(45, 90, 3)]:
        draws = torch.rand(len(UNITS), len(CANDIDATES), generator=generator).tolist()
        budget = Budget(keep)
        parameters = int(keep * sum(one.parameters for one in UNITS))
        trials = [
            Trial(20 + draw, one.name, budget.rank(one, ratio))
            for one, drawn in zip(UNITS, draws, strict=True)
            for ratio, draw in zip(CANDIDATES, drawn, strict=True)
        ]
        released, stored = released_cut(trials, parameters, budget)
        decided = cut(UNITS, trials, parameters, budget)
        ours = {name: decision.rank for name, decision in decided.items() if isinstance(decision, LowRank)}
        if stored <= parameters:
            ends["same"] += 1
            assert ours == released
        else:
            ends["over"] += 1
            assert sum(ours.get(one.name) != released.get(one.name) for one in UNITS) == 1
            assert cost(decided, UNITS, budget) <= parameters
    assert min(ends.values()) > 2
