"""Allocation by spectrum: the identities of the papers, budgets, and brute force."""

import itertools
import math

import pytest
import torch

from pared.allocation import Budget, Evidence, Unit, allocator_of, allocators_for
from pared.allocation.options import DsaRanks
from pared.allocation.rank_budget import tail_energy
from pared.allocation.ranks.effective_rank import entropy_rank
from pared.allocation.ranks.svd_llm_v2 import removal_ratios
from pared.engine.allocate import make_plan
from pared.errors import ParedError
from pared.schema.plan import Dense, LowRank, Plan
from pared.structure.model import Anatomy, Site

BY_SPECTRUM = sorted(name for name, one in allocators_for("low_rank").items() if one.requires == {"cost"} and one.ranks)


def site(name: str, out_features: int, in_features: int, kind: str = "fc", block: int = 0, idle: bool = False) -> Site:
    return Site(name, block, "", out_features, in_features, False, name, idle, owner=kind)


def spectrum(size: int, decay: float, scale: float = 10.0) -> torch.Tensor:
    return scale * torch.exp(-decay * torch.arange(size, dtype=torch.float64))


def plan(sites: list[Site], allocation: str, keep: float, spectra: dict[str, torch.Tensor]) -> Plan:
    anatomy = Anatomy("layers", tuple(sites), (), (), 10**6)
    return make_plan(anatomy, allocator_of(allocation, "low_rank"), Budget(keep), 4, evidence=Evidence(spectra))


def total_loss(plan: Plan, spectra: dict[str, torch.Tensor]) -> float:
    return sum(
        float(tail_energy(spectra[s.name])[s.decision.rank]) for s in plan.sites if isinstance(s.decision, LowRank)
    )


SITES = [site(f"b{b}.{k}", m, n, k, b) for b in range(3) for k, m, n in
         (("q", 24, 24), ("k", 8, 24), ("v", 8, 24), ("gate", 40, 24), ("down", 24, 40))]  # fmt: skip
SPECTRA = {s.name: spectrum(min(s.out_features, s.in_features), 0.05 + 0.02 * i) for i, s in enumerate(SITES)}


@pytest.mark.parametrize("allocation", BY_SPECTRUM)
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8, 0.95])
def test_the_budget_is_met_within_one_step_and_never_exceeded(allocation: str, keep: float):
    decided = plan(SITES, allocation, keep, SPECTRA)
    budget = math.floor(keep * decided.before.covered_parameters)
    assert decided.after.covered_parameters <= budget
    assert decided.shortfall == 0
    if allocation == "loss" or keep < 0.9:  # the others may run into sites that cannot take more
        assert budget - decided.after.covered_parameters < 64  # one rank of the largest site


@pytest.mark.parametrize("allocation", BY_SPECTRUM)
def test_equal_sites_get_equal_ranks(allocation: str):
    sites = [site(f"s{i}", 30, 20, "fc", i) for i in range(6)]
    decided = plan(sites, allocation, 0.6, {s.name: spectrum(20, 0.1) for s in sites})
    ranks = [s.decision.rank for s in decided.sites if isinstance(s.decision, LowRank)]
    assert len(ranks) == 6
    assert max(ranks) - min(ranks) <= 1


@pytest.mark.parametrize("allocation", BY_SPECTRUM)
def test_idle_sites_and_sites_that_cannot_shrink_stay_dense_and_the_others_pay(allocation: str):
    sites = [site("idle", 20, 20, idle=True), site("row", 1, 20), *(site(f"s{i}", 30, 20) for i in range(4))]
    decided = plan(sites, allocation, 0.6, {s.name: spectrum(min(s.out_features, 20), 0.1) for s in sites})
    assert [isinstance(s.decision, Dense) for s in decided.sites[:2]] == [True, True]
    assert decided.achieved_keep <= 0.6


@pytest.mark.parametrize("allocation", BY_SPECTRUM)
def test_a_budget_below_one_rank_each_is_refused(allocation: str):
    with pytest.raises(ParedError, match="does not buy one rank for each of 15 weights"):
        plan(SITES, allocation, 0.01, SPECTRA)


def test_loss_equals_brute_force_on_three_matrices():
    sites = [site("a", 5, 6), site("b", 6, 4), site("c", 4, 5)]
    spectra = {"a": spectrum(5, 0.3), "b": spectrum(4, 0.8), "c": spectrum(4, 0.5, 4.0)}
    options = []
    for s in sites:
        dense = s.out_features * s.in_features
        step = s.out_features + s.in_features
        ranks = [
            (k * step, float(tail_energy(spectra[s.name])[k])) for k in range(1, Budget(0.5).most_rank(Unit((s,))) + 1)
        ]
        options.append([*ranks, (dense, 0.0)])
    reached = 0
    for keep in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        budget = math.floor(keep * sum(s.out_features * s.in_features for s in sites) + 1e-6)
        best = min(
            sum(loss for _, loss in chosen)
            for chosen in itertools.product(*options)
            if sum(cost for cost, _ in chosen) <= budget
        )
        ours = total_loss(plan(sites, "loss", keep, spectra), spectra)
        assert ours >= best - 1e-9
        reached += ours == pytest.approx(best, abs=1e-9)
        relaxed = min(  # the hull: no Lagrangian answer may be worse than the next candidate down
            sum(loss for _, loss in chosen)
            for chosen in itertools.product(*options)
            if sum(cost for cost, _ in chosen) <= budget - 11
        ) if budget - 11 >= sum(option[0][0] for option in options) else math.inf  # fmt: skip
        assert ours <= relaxed + 1e-9
    assert reached >= 4


def test_raising_the_budget_never_raises_the_loss():
    losses = [total_loss(plan(SITES, "loss", keep, SPECTRA), SPECTRA) for keep in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)]
    assert losses == sorted(losses, reverse=True)


def test_loss_is_never_worse_than_any_other_allocation():
    for keep in (0.4, 0.6, 0.8):
        least = total_loss(plan(SITES, "loss", keep, SPECTRA), SPECTRA)
        for other in ("uniform", "effective-rank", "svd-llm-v2"):
            assert least <= total_loss(plan(SITES, other, keep, SPECTRA), SPECTRA) + 1e-9


def test_a_site_that_is_worth_it_stays_dense():
    sites = [site("flat", 20, 20), site("steep", 40, 40)]
    spectra = {"flat": torch.full((20,), 100.0), "steep": spectrum(40, 1.0, 1e-3)}
    decided = plan(sites, "loss", 0.5, spectra)
    assert isinstance(decided.sites[0].decision, Dense)
    assert isinstance(decided.sites[1].decision, LowRank)


def test_scaling_every_loss_leaves_the_ranks_alone():
    scaled = {name: 1e-6 * s for name, s in SPECTRA.items()}
    assert plan(SITES, "loss", 0.6, SPECTRA).sites == plan(SITES, "loss", 0.6, scaled).sites


def test_effective_rank_of_known_spectra():
    assert entropy_rank(torch.ones(8)) == pytest.approx(8)
    assert entropy_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert 1 < entropy_rank(spectrum(8, 0.5)) < 8


def test_d_rank_moves_parameters_from_q_and_k_to_v():
    read = [("a.q", "a.q"), ("a.k", "a.q"), ("a.v", "a.q"), ("a.o", "a.o")]
    sites = [Site(name, 0, "", 64, 64, False, reads, position=turn) for turn, (name, reads) in enumerate(read)]
    spectra = {s.name: spectrum(64, 0.05) for s in sites}
    ranks = {s.name[2:]: s.decision.rank for s in plan(sites, "effective-rank", 0.4, spectra).sites
             if isinstance(s.decision, LowRank)}  # fmt: skip
    assert ranks["q"] == pytest.approx(0.7 * ranks["o"], abs=1)
    assert ranks["k"] == pytest.approx(0.7 * ranks["o"], abs=1)
    assert ranks["v"] > ranks["o"]


@pytest.mark.parametrize("output", [(64, 192), (192, 24)], ids=["all three joined", "of another width"])
def test_d_rank_takes_no_three_projections_for_attention_whose_output_does_not_read_the_heads(output: tuple[int, int]):
    projections = [Site(f"a.{n}", 0, "", 64, 64, False, "a.0", position=n) for n in range(3)]
    sites = [*projections, Site("a.3", 0, "", *output, False, "a.3", position=3)]
    spectra = {s.name: spectrum(min(s.out_features, s.in_features), 0.05) for s in sites}
    ranks = [s.decision.rank for s in plan(sites, "effective-rank", 0.4, spectra).sites[:3]
             if isinstance(s.decision, LowRank)]  # fmt: skip
    assert len(ranks) == 3
    assert max(ranks) - min(ranks) <= 1


@pytest.mark.parametrize("output", ["b.o", None], ids=["in another module", "skipped"])
def test_d_rank_knows_attention_whose_output_is_not_beside_it(output: str | None):
    sites = [Site(f"a.{n}", 0, "", 64, 64, False, "a.0", position=n) for n in range(3)]
    if output:
        sites.append(Site(output, 0, "", 64, 64, False, output))
    spectra = {s.name: spectrum(64, 0.05) for s in sites}
    q, k, v = [s.decision.rank for s in plan(sites, "effective-rank", 0.4, spectra).sites[:3]
               if isinstance(s.decision, LowRank)]  # fmt: skip
    assert q == k < v


def test_v2_removal_has_the_mean_that_was_asked_for_and_spares_large_losses():
    losses = [5.0, 20.0, 80.0, 1000.0]
    ratios = removal_ratios(losses, 0.2)
    assert sum(ratios) / 4 == pytest.approx(0.2)
    assert ratios == sorted(ratios, reverse=True)
    assert removal_ratios([7.0] * 3, 0.3) == pytest.approx([0.3] * 3)
    tiny = removal_ratios([1e-9, 1e-7], 0.2)  # below one the logarithm of the formula changes its sign
    assert 0 < tiny[1] < tiny[0] < 1


def test_a_program_moves_parameters_between_blocks_by_their_spectra():
    shares, dsa = {}, allocator_of("dsa", "low_rank")
    for sign in ("PRUNE", "KEEP"):
        program = f"W:(ABSLOG)-(VAR)-(NO_OP)-(10)-({sign})"
        anatomy = Anatomy("layers", tuple(SITES), (), (), 10**6)
        config = DsaRanks(program=program)
        decided = make_plan(anatomy, dsa, Budget(0.5), 4, evidence=Evidence(SPECTRA), config=config)
        assert 0 <= math.floor(0.5 * decided.before.covered_parameters) - decided.after.covered_parameters < 64
        shares[sign] = [
            sum(s.after for s in decided.sites if s.block == b) / sum(s.before for s in decided.sites if s.block == b)
            for b in range(3)
        ]
    assert shares["PRUNE"] == sorted(shares["PRUNE"], reverse=True)  # the later, the steeper
    assert shares["KEEP"] == sorted(shares["KEEP"])
    assert shares["KEEP"][2] - shares["KEEP"][0] == pytest.approx(0.2, abs=0.05)
    assert plan(SITES, "dsa", 0.5, SPECTRA).shortfall == 0  # the default program
    config = DsaRanks(program="W:(NORM)-(VAR)-(ABS)-(8)")
    with pytest.raises(ParedError, match="allocation dsa: the importance is the same for all 3 blocks"):
        make_plan(anatomy, dsa, Budget(0.5), 4, evidence=Evidence(SPECTRA), config=config)
