"""Several labels of a token, and gradients that are clipped: what a backward pass makes of either."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import backward
from tiny_models import REPEATED, TINY_MODELS, VOCAB
from transformers import PreTrainedModel

from pared import ParedError, Recipe
from pared.calibration import (
    BlockStatistics,
    Labels,
    OutputGradient,
    Sampled,
    capture,
    choose_labels,
    gradient_accumulators,
)
from pared.calibration.cache import require_fits
from pared.calibration.head import clipped
from pared.calibration.statistics.accumulators import expert_accumulators
from pared.calibration.statistics.experts import ExpertLoss
from pared.engine.blocks import run_blocks_backward
from pared.engine.cost.passes import _again
from pared.engine.cost.traced import Trace
from pared.engine.spec import resolve
from pared.engine.statistics.collect import collect
from pared.operations import Operation
from pared.structure import find_anatomy, probe
from pared.structure.store import ResidentBlocks
from unit.calibration.test_backward import relative
from unit.structure.test_experts import mixtures, model_of

CPU = torch.device("cpu")
TOKENS = torch.randint(0, VOCAB, (5, 12), generator=torch.Generator().manual_seed(0))
NAMES = ("output_gradient_full", "output_gradient_diagonal", "output_gradient_scalar", "mean_gram")


def draws(model: PreTrainedModel, count: int) -> list[Labels]:
    return [choose_labels(model, "sampled", 3, draw=draw) for draw in range(count)]


def collected(
    model: PreTrainedModel, labels: Sequence[Labels], clip: float = 0.0, batch: int = 2, mask: Any = None
) -> dict[str, dict[str, Any]]:
    anatomy, calls = probe(model, find_anatomy(model))
    inputs = capture(
        model, anatomy, TOKENS, batch, calls, torch.float32, CPU, {"attention_mask": mask} if mask is not None else None
    )
    wants = gradient_accumulators(anatomy.sites, NAMES, CPU)
    backward(model, anatomy, inputs, TOKENS, wants, labels, clip=clip)
    return wants


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "qwen2_moe", *REPEATED])
def test_moments_over_several_labels_are_the_mean_over_passes_with_one(family: str) -> None:
    model = (TINY_MODELS | REPEATED)[family]()
    together = collected(model, draws(model, 3))
    apart = [collected(model, [one]) for one in draws(model, 3)]
    for site, statistics in together.items():
        for name, found in statistics.items():
            expected = sum(one[site][name].value for one in apart) / 3
            assert relative(found.value, expected) < 1e-5
            assert found.tokens == apart[0][site][name].tokens


def test_padding_is_in_no_draw() -> None:
    model, mask = TINY_MODELS["llama"](), torch.ones_like(TOKENS)
    mask[1, 7:] = mask[4, 3:] = 0
    together = collected(model, draws(model, 2), mask=mask)
    apart = [collected(model, [one], mask=mask) for one in draws(model, 2)]
    for site, statistics in together.items():
        for name, found in statistics.items():
            assert relative(found.value, sum(one[site][name].value for one in apart) / 2) < 1e-5
            assert found.tokens == int(mask.sum())


def test_draws_differ_and_the_first_is_what_one_label_is() -> None:
    p_RC = torch.full((12, VOCAB), 1 / VOCAB)
    found = [Sampled(3, draw=draw)(0, TOKENS[0], p_RC) for draw in range(4)]
    assert torch.equal(found[0], Sampled(3)(0, TOKENS[0], p_RC))
    assert len({tuple(one.tolist()) for one in found}) == 4


@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_how_well_moments_are_known_is_told_by_tokens_not_by_draws(form: Any) -> None:
    """Ledoit and Wolf's rule written out, token by token; what a token adds is the mean over its draws."""
    generator = torch.Generator().manual_seed(1)
    g_TDO = torch.randn(40, 3, 6, generator=generator).double() * torch.arange(1, 7)
    added = g_TDO.mT @ g_TDO / 3
    added = added if form == "full" else added.diagonal(dim1=1, dim2=2)
    mean = added.mean(dim=0)
    equal = mean.diagonal().mean() * torch.eye(6) if form == "full" else mean.mean()
    variance = float((added - mean).square().sum()) / 40**2
    found = OutputGradient(6, CPU, form)
    for part in (g_TDO[:15], g_TDO[15:]):
        found.update(part, part.float().flatten(1).unsqueeze(0))
    torch.testing.assert_close(found.value, mean, rtol=1e-5, atol=0)
    assert found.shrinkage == pytest.approx(variance / float((mean - equal).square().sum()), rel=1e-4)


def test_labels_that_are_drawn_again_say_nothing_new() -> None:
    g_TO = torch.randn(30, 4, generator=torch.Generator().manual_seed(2))
    once, again = OutputGradient(4, CPU, "full"), OutputGradient(4, CPU, "full")
    once.update(g_TO, g_TO)
    again.update(g_TO, torch.cat([g_TO, g_TO, g_TO], dim=-1))
    assert relative(again.value, once.value) < 1e-6
    assert again.shrinkage == pytest.approx(once.shrinkage, rel=1e-5)


def test_what_experts_cost_is_the_mean_over_draws() -> None:
    model = model_of("olmoe", 4)
    anatomy, calls = probe(model, find_anatomy(model))
    anatomy = replace(anatomy, mixtures=tuple(mixtures(model)))

    def moments(labels: Sequence[Labels]) -> list[ExpertLoss]:
        inputs = capture(model, anatomy, TOKENS, 2, calls, torch.float32, CPU)
        seen: list[ExpertLoss] = []
        run_blocks_backward(
            ResidentBlocks(model, anatomy),
            anatomy,
            inputs,
            TOKENS,
            labels,
            lambda index: expert_accumulators(anatomy.mixtures_of(index), CPU),
            lambda block: seen.extend(one["experts"] for one in block.statistics.values()),
        )
        return seen

    together, apart = moments(draws(model, 2)), [moments([one]) for one in draws(model, 2)]
    for found, one, other in zip(together, *apart, strict=True):
        assert relative(found.value, (one.value + other.value) / 2) < 1e-5
        assert found.tokens == one.tokens  # experts run once for all draws, and count a token once
        assert torch.equal(found.picks, one.picks)
        assert relative(found.weighted, one.weighted) < 1e-6


def test_several_labels_of_a_text_that_has_one_are_refused() -> None:
    options = {"loss": "labels", "labels_per_token": 4}
    with pytest.raises(ParedError, match="labels_per_token of method loss-optimal: got 4 with loss labels"):
        resolve(Recipe(keep=0.8, options=options))
    with pytest.raises(ParedError, match="labels_per_token"):
        resolve(Recipe(keep=0.8, structures="experts", options=options))
    assert resolve(Recipe(keep=0.8, options={"labels_per_token": 4})).labels_per_token == 4


@pytest.mark.parametrize("options", [{"labels_per_token": 4}, {"gradient_clip": 3.0}, {"loss": "labels"}])
def test_options_of_gradients_are_refused_where_there_are_none(options: dict[str, Any]) -> None:
    ((option, given),) = options.items()
    with pytest.raises(ParedError, match=f"option {option} of method loss-optimal applies to gradients, got {given},"):
        resolve(Recipe(keep=0.8, options={"output_weighting": "none", **options}))
    resolve(Recipe(keep=0.8, options=options))


def test_gradients_of_weights_are_not_collected_of_several_draws(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    recipe = Recipe(keep=0.8, options={"labels_per_token": 2})
    with pytest.raises(ParedError, match=r"statistic fisher is of the gradient of a weight.*got labels_per_token 2"):
        collect(model, None, recipe, frozenset({"fisher"}), tmp_path)  # type: ignore[arg-type]


def test_no_gradient_is_longer_than_the_limit_and_others_stay_as_they_are() -> None:
    g_1TH = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(3))
    g_1TH[0, 2] *= 1000
    g_1TH[0, 5] = 0
    length_T = g_1TH[0].norm(dim=-1)
    limit = 2 * length_T[length_T > 0].median()
    found = clipped(g_1TH, 2.0)
    kept = length_T <= limit
    assert not bool(kept[2])
    torch.testing.assert_close(found[0, kept], g_1TH[0, kept])
    torch.testing.assert_close(found[0].norm(dim=-1), length_T.clamp(max=limit))
    torch.testing.assert_close(found[0, 2] / found[0, 2].norm(), g_1TH[0, 2] / g_1TH[0, 2].norm())
    assert clipped(g_1TH, 0.0) is g_1TH
    nothing = torch.zeros(1, 3, 4)
    assert torch.equal(clipped(nothing, 1.0), nothing)


def test_what_is_clipped_does_not_depend_on_the_batch_and_is_less() -> None:
    model = TINY_MODELS["llama"]()
    one, many = (collected(model, draws(model, 1), clip=1.0, batch=batch) for batch in (1, 5))
    free = collected(model, draws(model, 1))
    for site, statistics in one.items():
        assert relative(statistics[NAMES[0]].value, many[site][NAMES[0]].value) < 1e-4
        assert float(statistics[NAMES[2]].value) < float(free[site][NAMES[2]].value)


def test_a_head_of_one_row_a_window_is_not_clipped() -> None:
    model = TINY_MODELS["bert"]()
    found, free = (collected(model, draws(model, 1), clip=clip) for clip in (1.0, 0.0))
    for site, statistics in found.items():
        assert relative(statistics[NAMES[1]].value, free[site][NAMES[1]].value) < 1e-6


@pytest.mark.parametrize("name", ["labels_per_token", "gradient_clip"])
def test_saved_statistics_of_other_draws_are_refused(name: str) -> None:
    """Regression: what only one side told was not compared, so that statistics of four labels served for one."""
    usual = {"blocks": 1, "loss": "sampled", "labels_per_token": 1, "gradient_clip": 0.0}
    other, before = usual | {name: 4}, {"blocks": 1, "loss": "sampled"}  # what earlier versions wrote
    for saved, needed in ((other, usual), (usual, other), (before, other)):
        with pytest.raises(ParedError, match=name):
            require_fits([BlockStatistics(0, {}, source=saved)], needed)
    for saved in (usual, before):
        require_fits([BlockStatistics(0, {}, source=saved)], usual)


def test_another_gradient_costs_no_more_than_its_way_back() -> None:
    forward = (Operation("product", (8, 4, 6), "float32", times=2.0), Operation("stream", (48,), "float32"))
    back = (replace(forward[0], times=6.0), forward[1])  # equal products are told once, with how often
    assert [(one.kind, one.times) for one in _again(Trace(forward, back))] == [("product", 4.0), ("stream", 1.0)]
