"""Basis Sharing: the identities of its page, the paper's ranks from shapes alone, and what a shared model is."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiers import crossed
from tiny_models import TINY_MODELS, VOCAB
from torch import nn
from transformers import PreTrainedTokenizerFast

import pared
import pared.methods
from pared import ParedError
from pared.allocation import Budget, Evidence, Unit
from pared.allocation.ranks.uniform import uniform
from pared.engine.targets.grouping import Comparison, candidate_units, compare
from pared.lowrank import METHODS
from pared.lowrank.decomposition import Decomposition, Factors
from pared.lowrank.loss_optimal import decompose_weighted
from pared.lowrank.sharing import block_diagonal, error, errors, pooled, refit, split, stacked
from pared.lowrank.whitening import decompose
from pared.schema.plan import LowRank, Shared
from pared.structure import find_anatomy, probe
from pared.structure.model import Anatomy, Site

TOKENS = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
Compress = Callable[..., pared.Compressed]


@pytest.fixture
def compress(tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration) -> Compress:
    def with_recipe(family: str, **fields: object) -> pared.Compressed:
        recipe = pared.Recipe.model_validate({"method": "basis-sharing", "calibration": calibration, **fields})
        return pared.compress(TINY_MODELS[family](), tokenizer, recipe)

    return with_recipe


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def group(outputs: int = 12, inputs: int = 10, members: int = 3, tokens: int = 50):
    weights = [draw(outputs, inputs, seed=number) for number in range(members)]
    X = [draw(tokens, inputs, seed=100 + number) for number in range(members)]
    return weights, [x.T @ x for x in X]


def site(name: str, block: int, kind: str, out_features: int, in_features: int) -> Site:
    return Site(f"layers.{block}.{name}", block, kind, out_features, in_features, False, f"layers.{block}.{name}")


# Mathematics


def test_the_groups_error_is_the_tail_of_its_spectrum_and_falls_to_zero():
    weights, grams = group()
    found = decompose(stacked(weights), sum(grams))
    losses = []
    for rank in range(1, 11):
        up, down = (found.factors(rank).up, found.factors(rank).down)
        D = stacked(weights) - up @ down
        losses.append(float((D @ sum(grams) * D).sum()))
        assert losses[-1] == pytest.approx(float(found.singular_values_R[rank:].square().sum()), rel=1e-8, abs=1e-8)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-9


@pytest.mark.parametrize("outputs", [12, 6, 3], ids=["tall members", "a tall group of wide members", "a wide group"])
@pytest.mark.parametrize("weighting", ["none", "diagonal", "full"])
def test_the_errors_of_a_group_are_those_of_its_factors(outputs: int, weighting: str):
    weights, grams = group(outputs=outputs)
    if weighting == "none":
        found = decompose(stacked(weights), sum(grams))
        own = [decompose(*one) for one in zip(weights, grams, strict=True)]
        roots: list[torch.Tensor | None] = [None] * 3
    else:
        roots = [torch.linalg.cholesky(y.T @ y) for y in (draw(40, outputs, seed=7 + number) for number in range(3))]
        roots = [L.diagonal() for L in roots] if weighting == "diagonal" else roots
        L = torch.cat(roots) if weighting == "diagonal" else block_diagonal(roots)
        found = decompose_weighted(stacked(weights), sum(grams), L)
        own = [decompose_weighted(*one) for one in zip(weights, grams, roots, strict=True)]
    members = split(found.factors(4), [outputs] * 3)
    expected = [error(*one) for one in zip(weights, members, grams, roots, strict=True)]
    assert errors(found, 4, own, grams) == pytest.approx(expected, rel=1e-9)


def test_the_errors_of_a_group_whose_directions_are_weak_are_those_of_its_factors():
    weights, grams = group(members=2)
    weights = [torch.cat([weight[:, :3], weight[:, :3] @ draw(3, 7)], dim=1) for weight in weights]  # of rank 3
    found = decompose(stacked(weights), sum(grams))
    own = [decompose(*one) for one in zip(weights, grams, strict=True)]
    assert found.weak(4)
    assert errors(found, 4, own, grams) == pytest.approx([0.0, 0.0], abs=1e-9)
    assert errors(found, 2, own, grams) == pytest.approx(
        [error(*one) for one in zip(weights, split(found.factors(2), [12, 12]), grams, strict=True)], rel=1e-9
    )


def test_the_papers_form_with_its_inverse_gives_the_same_weights():
    """S = chol(G)^T, S W_g = U s V^T, B = S^-1 U_k s_k, C = V_k^T; the paper's W is (in, out)."""
    weights, grams = group()
    S = torch.linalg.cholesky(sum(grams)).T
    W_g = torch.cat([weight.T for weight in weights], dim=1)
    U, s, Vh = torch.linalg.svd(S @ W_g, full_matrices=False)
    basis, coefficients = torch.linalg.inv(S) @ U[:, :4] * s[:4], Vh[:4]
    ours = decompose(stacked(weights), sum(grams)).factors(4)
    torch.testing.assert_close((basis @ coefficients).T, ours.up @ ours.down, atol=1e-8, rtol=1e-8)
    theirs = [coefficients[:, 12 * number : 12 * number + 12].T for number in range(3)]
    for own, coefficient in zip(split(ours, [12, 12, 12]), theirs, strict=True):
        torch.testing.assert_close(own.up @ own.down, coefficient @ basis.T, atol=1e-8, rtol=1e-8)


def test_a_group_of_one_is_svd_llm():
    weights, grams = group(members=1)
    method = METHODS["basis-sharing"]
    assert method.shares
    alone = METHODS["svd-llm"].decompose(weights[0], {"gram": grams[0]}).factors(5)
    shared = method.solve(weights, [{"gram": grams[0]}], method.config()).factors(5)
    torch.testing.assert_close(shared.up @ shared.down, alone.up @ alone.down, atol=1e-8, rtol=1e-8)


def test_no_perturbation_of_the_same_rank_is_better():
    weights, grams = group()
    W, gram = stacked(weights), sum(grams)
    best = decompose(W, gram).factors(4)
    least = error(W, best, gram)
    for seed in range(20):
        nudged = Factors(best.down + 0.01 * draw(4, 10, seed=seed), best.up + 0.01 * draw(36, 4, seed=seed + 50))
        assert error(W, nudged, gram) >= least


def test_the_update_changes_nothing_on_the_same_inputs_and_never_raises_the_error():
    weights, grams = group()
    factors = split(decompose(stacked(weights), sum(grams)).factors(4), [12, 12, 12])
    for weight, own in zip(weights, factors, strict=True):
        unchanged = refit(weight, own, sum(grams), sum(grams))
        torch.testing.assert_close(unchanged, own.up, atol=1e-5, rtol=1e-5)
        other = group(tokens=40)[1][1] + 3 * torch.eye(10, dtype=torch.float64)
        new = Factors(own.down, refit(weight, own, other, other))
        assert error(weight, new, other) < error(weight, own, other)


def test_a_refit_on_fewer_tokens_than_the_rank_is_finite_and_no_worse():
    weights, grams = group()
    own = decompose(weights[0], grams[0]).factors(6)
    x = draw(3, 10, seed=9)
    up = refit(weights[0], own, x.T @ x, x.T @ x)
    assert bool(up.isfinite().all())
    assert error(weights[0], Factors(own.down, up), x.T @ x) <= error(weights[0], own, x.T @ x)


def test_a_refit_towards_the_dense_models_inputs_is_the_least_squares_solution():
    weight, dense, seen = draw(7, 10), draw(60, 10, seed=1), draw(60, 10, seed=2)
    own = decompose(weight, seen.T @ seen).factors(4)
    up = refit(weight, own, seen.T @ seen, dense.T @ seen)
    expected = torch.linalg.lstsq(seen @ own.down.T, dense @ weight.T).solution.T
    torch.testing.assert_close(up, expected, atol=1e-4, rtol=1e-4)


def test_a_rank_deficient_group_gives_finite_factors():
    weights, grams = group(tokens=2)
    found = decompose(stacked(weights), pooled([{"gram": gram} for gram in grams], "gram"))
    assert all(bool(one.isfinite().all()) for one in found.factors(5))


def test_weights_of_different_widths_cannot_share():
    with pytest.raises(ValueError, match=r"widths \[10, 9\] cannot share a basis"):
        stacked([draw(4, 10), draw(4, 9)])


# The paper's ranks, from shapes alone

TABLE = [  # (in, out), ranks of one and of two blocks at 20, 30, 40, 50 and 60 % removed
    ((4096, 4096), (1638, 1433, 1228, 1024, 819), (2184, 1911, 1638, 1365, 1092)),
    ((4096, 11008), (2388, 2089, 1791, 1492, 1194), (2762, 2417, 2072, 1726, 1381)),
    ((11008, 4096), (2388, 2089, 1791, 1492, 1194), (3757, 3287, 2818, 2348, 1878)),
    ((768, 2304), (460, 403, 345, 288, 230), (526, 460, 394, 329, 263)),
]


@pytest.mark.parametrize(("shape", "alone", "pairs"), TABLE)
def test_ranks_are_those_of_the_papers_table(shape: tuple[int, int], alone: tuple[int], pairs: tuple[int]):
    in_features, out_features = shape
    sites = [site("w", block, "q", out_features, in_features) for block in range(2)]
    for keep, one, two in zip((0.8, 0.7, 0.6, 0.5, 0.4), alone, pairs, strict=True):
        assert Budget(keep).rank(Unit((sites[0],))) == one
        assert Budget(keep).rank(Unit(tuple(sites))) == two


@pytest.mark.parametrize(
    ("shape", "rank"), [((768, 768), 409), ((768, 3072), 546), ((3072, 768), 819)], ids=["c_proj", "c_fc", "mlp.c_proj"]
)
def test_gpt2_ranks_of_pairs_at_20_percent(shape: tuple[int, int], rank: int):
    pair = Unit(tuple(site("w", block, "qkv", shape[1], shape[0]) for block in range(2)))
    assert Budget(0.8).rank(pair) == rank


ARCHITECTURES = {  # kind -> (out, in), and what the paper's table shares
    "llama-7b": (
        {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096), "gate": (11008, 4096),
         "up": (11008, 4096), "down": (4096, 11008)},
        {"q", "k", "v", "gate", "up"},
    ),
    "mistral-7b": (
        {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096), "gate": (14336, 4096),
         "up": (14336, 4096), "down": (4096, 14336)},
        {"q", "gate", "up"},
    ),
    "opt-6.7b": (
        {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096), "fc1": (16384, 4096),
         "fc2": (4096, 16384)},
        {"q", "k", "v", "fc1"},
    ),
}  # fmt: skip


# Which layers lie in one module, in the order they run; those on one line of it read one tensor.
MODULES = {"attention": (("q", "k", "v"), ("o",)), "mlp": (("gate", "up", "fc1"), ("down", "fc2"))}


def architecture(shapes: dict[str, tuple[int, int]], blocks: int) -> Anatomy:
    """Return what the probe pass would find; the names of the sites say nothing."""
    sites = []
    for block in range(blocks):
        for module, groups in MODULES.items():
            present = [[kind for kind in group if kind in shapes] for group in groups]
            for position, kind in enumerate(kind for group in present for kind in group):
                leader = next(group[0] for group in present if kind in group)
                one = site(f"{module}.{kind}", block, kind, *shapes[kind])
                reads = f"layers.{block}.{module}.{leader}"
                sites.append(replace(one, reads=reads, owner=module, position=position))
    return Anatomy("layers", tuple(sites), (), (), 10**10)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_the_papers_table_decides_what_is_shared(name: str):
    shapes, shared = ARCHITECTURES[name]
    units = candidate_units(architecture(shapes, 4), 2, "paper")
    assert {unit.kind for unit in units if len(unit.members) == 2} == shared
    assert {unit.kind for unit in units if len(unit.members) == 1} == set(shapes) - shared
    decisions = uniform(units, Budget(0.8), Evidence())
    mistral_kv = Unit((site("k", 0, "k", 1024, 4096),))
    assert Budget(0.8).rank(mistral_kv) == 655  # the page's warning about grouped queries
    for unit in units:
        m, n = shapes[unit.kind]
        count = len(unit.members)
        assert decisions[unit.name] == LowRank(rank=int(0.8 * count * m * n / (n + count * m)))


def test_gpt2_shares_what_the_table_says():
    anatomy = probe(model := TINY_MODELS["gpt2"](), find_anatomy(model))[0]
    pairs = {unit.name for unit in candidate_units(anatomy, 2, "paper") if len(unit.members) == 2}
    assert pairs == {f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")}


def test_a_smaller_last_group_gets_its_own_rank_and_the_budget_holds():
    anatomy = architecture({"q": (64, 64), "k": (64, 64)}, 5)
    units = [unit for unit in candidate_units(anatomy, 2, "all") if unit.kind == "q"]
    assert [len(unit.members) for unit in units] == [2, 2, 1]
    decisions = uniform(units, Budget(0.5), Evidence())
    assert [decisions[unit.name].rank for unit in units] == [21, 21, 16]
    cost = sum(Budget(0.5).cost(unit, decisions[unit.name].rank) for unit in units)
    assert cost <= 0.5 * 5 * 64 * 64


# Decisions


def test_twins_share_and_strangers_do_not():
    """As grouped-query keys: less wide than their input, so that two fill more directions than one basis has."""
    weights, grams = group(outputs=20, inputs=100, members=2, tokens=400)
    pair = Unit(tuple(site("w", block, "k", 20, 100) for block in range(2)))
    for second, pays in ((weights[0], True), (weights[1], False)):
        own = [weights[0], second]
        found = decompose(stacked(own), sum(grams))
        apart = [decompose(weight, gram) for weight, gram in zip(own, grams, strict=True)]
        compared = compare(pair, found, apart, grams, Budget(0.8), always=False)
        assert compared is not None
        assert compared.pays == pays == (sum(compared.shared) < sum(compared.apart))


def test_a_member_with_large_inputs_does_not_pay_for_what_the_others_lose():
    """Summed errors were compared once: the loud block of a pair decided alone, and sharing cost 1% on WikiText-2."""
    quiet_harmed = Comparison("w", "q", 2, 30, 20, shared=(3.0, 90.0), apart=(1.0, 100.0))
    assert sum(quiet_harmed.shared) < sum(quiet_harmed.apart)
    assert quiet_harmed.ratio == pytest.approx((3.0 + 0.9) / 2)
    assert not quiet_harmed.pays
    assert replace(quiet_harmed, always=True).pays
    assert replace(quiet_harmed, shared=(1.05, 90.0)).pays


@pytest.mark.parametrize(("shared", "apart", "pays"), [((0.0, 1.0), (0.0, 2.0), True), ((0.5, 1.0), (0.0, 2.0), False)])
def test_an_error_of_zero_is_compared(shared: tuple[float, ...], apart: tuple[float, ...], pays: bool):
    assert Comparison("w", "q", 2, 30, 20, shared, apart).pays == pays


# Models


@pytest.mark.parametrize(("family", "storage"), crossed(sorted(TINY_MODELS), ["factors", "pivoted"]))
def test_a_basis_is_one_parameter_and_the_totals_are_those_of_the_plan(family: str, storage: str, compress: Compress):
    result = compress(family, keep=0.7, options={"sharing": "all"}, storage=storage)
    shared = [one for one in result.plan.sites if isinstance(one.decision, Shared)]
    assert shared
    for one in shared:
        module, owner = (result.model.get_submodule(name) for name in (one.name, one.decision.owner))
        assert module.down.weight is owner.down.weight
        assert module.rank == one.decision.rank
    assert sum(p.numel() for p in result.model.parameters()) == result.plan.after.model_parameters
    assert result.plan.achieved_keep <= 0.7
    with torch.no_grad():
        assert bool(result.model(input_ids=TOKENS).logits.isfinite().all())


def test_groups_of_one_block_give_svd_llm(compress: Compress):
    ours = compress("llama", keep=0.7, options={"group_size": 1})
    theirs = compress("llama", keep=0.7, method="svd-llm")
    with torch.no_grad():
        torch.testing.assert_close(
            ours.model(input_ids=TOKENS).logits, theirs.model(input_ids=TOKENS).logits, atol=1e-3, rtol=1e-3
        )
    assert ours.plan == theirs.plan


def test_every_compared_group_is_recorded_with_both_errors(compress: Compress):
    result = compress("llama", keep=0.7)
    assert result.sharing
    for one in result.sharing:
        assert one.members == len(one.shared) == len(one.apart)
        assert one.pays == (sum(a / b for a, b in zip(one.shared, one.apart, strict=True)) < one.members)
        decision = next(site.decision for site in result.plan.sites if site.name == one.name)
        assert isinstance(decision, Shared) == one.pays


@pytest.mark.parametrize("group_size", [2, 3])
def test_members_that_are_compared_by_their_losses_alone_end_as_if_they_were_decomposed(
    compress: Compress, group_size: int, monkeypatch: pytest.MonkeyPatch
):
    asked = {"keep": 0.7, "options": {"group_size": group_size}}
    ours = compress("llama", **asked)
    assert {one.pays for one in ours.sharing} == {True, False}, "both ways are taken"
    method, asked_of = METHODS["basis-sharing"], list[int]()

    def decomposed(*given: object) -> Decomposition:
        asked_of.append(len(given))
        return method.solve(*given)

    monkeypatch.setitem(pared.methods.METHODS._builtin, method.name, replace(method, losses=decomposed))
    theirs = compress("llama", **asked)
    assert len(asked_of) == sum(one.members for one in ours.sharing)
    assert ours.plan == theirs.plan
    for one, other in zip(ours.sharing, theirs.sharing, strict=True):
        assert one.apart == pytest.approx(other.apart)
        assert one.shared == pytest.approx(other.shared)
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_update_is_made_at_small_budgets_and_lowers_the_error_it_is_for(compress: Compress):
    """The released code never calls it."""
    plain = compress("llama", keep=0.5, refit="off")
    updated = compress("llama", keep=0.5)
    assert plain.plan == updated.plan
    changed = [
        site.name
        for site in plain.plan.sites
        if not torch.equal(
            plain.model.get_submodule(site.name).up.weight, updated.model.get_submodule(site.name).up.weight
        )
    ]
    assert len(changed) > len(plain.plan.sites) // 2
    for site in plain.plan.sites:
        bases = [result.model.get_submodule(site.name).down.weight for result in (plain, updated)]
        assert torch.equal(*bases)
    unchanged = compress("llama", keep=0.7)
    again = compress("llama", keep=0.7, refit="off")
    with torch.no_grad():
        assert torch.equal(unchanged.model(input_ids=TOKENS).logits, again.model(input_ids=TOKENS).logits)


def test_a_shared_model_answers_the_same_after_reload(compress: Compress, tmp_path):
    model = compress("llama", keep=0.7, options={"sharing": "all"}).model
    model.save_pretrained(tmp_path / "shared")
    again = pared.load(tmp_path / "shared")
    with torch.no_grad():
        assert torch.equal(again(input_ids=TOKENS).logits, copy.deepcopy(model)(input_ids=TOKENS).logits)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"group_size": 0}, "group_size: expected at least 1"), ({"sharing": "some"}, "sharing: expected one of")],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], told: str, compress: Compress):
    with pytest.raises(ParedError, match=told):
        compress("llama", options=options)


def test_a_shared_basis_of_more_ranks_than_a_member_has_outputs_is_saved_and_loads(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, tmp_path: Path
) -> None:
    """Regression: the map's check of ranks knew no groups, and ended the run at grouped-query k and v."""
    model = TINY_MODELS["mistral"]()
    options = {"group_size": 2, "sharing": "all"}
    recipe = pared.Recipe(method="loss-optimal", keep=0.8, options=options, calibration=calibration)
    result = pared.compress(model, tokenizer, recipe)
    ranks = {site.name: site.decision.rank for site in result.plan.sites if isinstance(site.decision, Shared)}
    assert max(ranks[name] for name in ranks if name.endswith(("k_proj", "v_proj"))) > 16  # outputs of each
    model.save_pretrained(tmp_path / "out")
    tokens = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(pared.load(tmp_path / "out")(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("found", ["probed", "guessed"])
def test_a_skipped_layer_does_not_shift_the_roles_of_those_beside_it(family: str, found: str) -> None:
    """With q left alone in one block, k took its place and shared a basis with another block's q."""
    model = TINY_MODELS[family]()
    look = (lambda one: probe(model, one)[0]) if found == "probed" else (lambda one: one.with_assumed_reads())
    whole = look(find_anatomy(model))
    first = next(site.name for site in whole.sites if site.block == 1)
    left = look(find_anatomy(model).without([first]))
    assert {site.name: site.role for site in left.sites}.items() <= {s.name: s.role for s in whole.sites}.items()
    members = [[site.name for site in unit.members if site.name != first] for unit in candidate_units(whole, 2, "all")]
    assert [[site.name for site in unit.members] for unit in candidate_units(left, 2, "all")] == members


@pytest.mark.parametrize("fault", ["skipped", "refused"])
def test_an_expert_that_is_left_alone_does_not_shift_the_experts_behind_it(fault: str) -> None:
    model = TINY_MODELS["qwen2_moe"]()
    for block in model.model.layers:
        block.experts = nn.ModuleList([nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32)) for _ in range(3)])
        block.register_forward_hook(lambda module, _, out: [expert(out) for expert in module.experts] and None)
    anatomy = find_anatomy(model)
    if fault == "refused":
        torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].experts[0][0])
        anatomy = find_anatomy(model)
    else:
        anatomy = anatomy.without(["model.layers.1.experts.0.0"])
    for unit in candidate_units(probe(model, anatomy)[0], 2, "all"):
        assert len({site.name.partition(".experts.")[2] for site in unit.members}) == 1, unit.members
