"""A plan does not depend on how much text there was: what allocators read is per token."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import UNSHRUNK
from tiers import quick_first
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast

import pared
from pared import ParedError, compress
from pared.allocation import Budget, Evidence, Unit, allocator_of, allocators_for
from pared.allocation.dsa import DEFAULT_OF_RANKS, DEFAULT_OF_ZEROS, evaluate_program, named, packaged_of
from pared.allocation.ranks.svd_llm_v2 import svd_llm_v2
from pared.calibration import Fisher, Gram, Sampled, per_token
from pared.data.windows import Windows
from pared.engine.windows import calibration_windows
from pared.lowrank import METHODS
from pared.schema.plan import Plan
from pared.sparsity import METHODS as PRUNERS
from pared.structure.model import Site

CPU = torch.device("cpu")
SITES = [
    Site(name=f"{i}.q", block=i, kind="q", out_features=40, in_features=40, has_bias=False, reads=f"{i}.q", idle=False)
    for i in range(3)
]
TRIED = {"swift", "sensitivity"}  # decide by perplexities of the spectra's own factors; swift once is enough


def planned(tokenizer: PreTrainedTokenizerFast, times: int, **fields: object) -> Plan:
    recipe = pared.Recipe.model_validate(fields)
    model = TINY_MODELS["mistral"]()
    once = calibration_windows(recipe, tokenizer, model.config, True)
    windows: Windows = replace(once, tokens=torch.cat([once.tokens] * times))
    return compress(model, tokenizer, recipe, windows=windows).plan


@pytest.fixture
def calibration(calibration: pared.Calibration) -> pared.Calibration:
    return calibration.model_copy(update={"samples": 6, "batch": 3})


@pytest.mark.parametrize(
    ("pruner", "allocation"),
    [
        *(("wanda", name) for name in allocators_for("sparse")),
        *((name, "dsa") for name in PRUNERS),
        ("sparsegpt", "owl"),
    ],
)
def test_doubling_the_text_leaves_sparsities_as_they_are(
    pruner: str, allocation: str, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> None:
    once, twice = (
        planned(tokenizer, times, method=pruner, sparsity=0.6, allocation=allocation, calibration=calibration)
        for times in (1, 2)
    )
    for a, b in zip(once.sites, twice.sites, strict=True):
        assert getattr(a.decision, "sparsity", None) == pytest.approx(getattr(b.decision, "sparsity", None), abs=1e-6)


@pytest.mark.parametrize(
    ("method", "allocation"),
    quick_first(
        [(name, "auto") for name in METHODS],
        [("svd-llm", name) for name in allocators_for("low_rank") if name not in (*TRIED, "global")]
        + [("fwsvd", "dsa"), ("asvd", "svd-llm-v2"), ("svd-llm", "swift")],
    ),
)
def test_doubling_the_text_leaves_ranks_as_they_are(
    method: str, allocation: str, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> None:
    budget: dict[str, Any] = {"keep": 0.75, "allocation": allocation}
    if allocation == "rank-fraction":
        budget = {"rank_fraction": 0.4}
    if method == "loss-optimal":  # a text that is there twice looks like one that says more
        budget["options"] = UNSHRUNK
    once, twice = (planned(tokenizer, times, method=method, calibration=calibration, **budget) for times in (1, 2))
    assert [site.decision for site in once.sites] == [site.decision for site in twice.sites]


@pytest.mark.parametrize("weighting", ["diagonal", "scalar"])
def test_a_quarter_of_a_text_given_twice_is_the_quarter_of_it(
    weighting: str, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> None:
    asked = {"method": "loss-optimal", "keep": 0.75, "options": {"output_weighting": weighting, **UNSHRUNK}}
    once, twice = (planned(tokenizer, times, calibration=calibration, **asked) for times in (1, 2))
    assert [site.decision for site in once.sites] == [site.decision for site in twice.sites]


def test_sums_are_divided_by_the_tokens_and_means_are_not() -> None:
    x = torch.randn(3, 7, 5)
    gram, fisher = Gram(5, CPU), Fisher(5, CPU)
    gram.update(x)
    fisher.update(x, torch.randn(3, 7, 2))
    assert torch.equal(per_token("gram", gram), gram.value / 21)
    assert torch.equal(per_token("gram", gram, 42), gram.value / 42)
    assert torch.equal(per_token("fisher:1", fisher), fisher.value / 21)
    assert torch.equal(per_token("output_gradient_full", gram, 42), gram.value)


def test_an_expert_counts_for_the_tokens_that_reach_it() -> None:
    """Nats a token of the text: what a third of the tokens read costs a third."""
    gram = Gram(4, CPU)
    gram.update(torch.ones(10, 4))
    assert torch.equal(per_token("mean_gram", gram, 20), gram.value / 2)


def test_a_window_that_comes_twice_is_given_the_labels_it_had() -> None:
    labels, p_RC = Sampled(seed=0), torch.full((12, 30), 1 / 30)
    first, other = torch.arange(12), torch.arange(12).flip(0)
    drawn = [labels(window, tokens_T, p_RC) for window, tokens_T in enumerate((first, other, first))]
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1], Sampled(seed=0)(1, other, p_RC))  # the number of the window, as ever


def test_v2_takes_its_logarithms_on_the_papers_tokens() -> None:
    """Regression: ranks depended on the number of calibration tokens, as the logarithm of a sum is no logarithm of a
    mean."""
    units = [Unit((one,)) for one in SITES]
    spectra = {unit.name: torch.linspace(1, 0, 40) * 10.0 ** (index - 2) for index, unit in enumerate(units)}
    found = svd_llm_v2(units, Budget(0.5), Evidence(spectra))
    ranks = [found[unit.name].rank for unit in units]  # type: ignore[union-attr]
    losses = [float((256 * 2048 * spectra[unit.name].double()[10:].square().sum()).sqrt().log()) for unit in units]
    inverse = [1 / loss for loss in losses]
    expected = [40 * 40 * (1 - 0.5 * one * 3 / sum(inverse)) / 80 for one in inverse]
    assert ranks == pytest.approx(expected, abs=1.5)


# Programs.


def scores(scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(400, generator=generator).abs() * 0.02 * (b + 1) * scale for b in range(5)]


def allocate(scores: list[torch.Tensor], sparsity: float, **options: object) -> torch.Tensor:
    """Return the sparsities that allocation dsa gives units of these scores."""
    units = [Unit((replace(SITES[0], name=str(number)),)) for number in range(len(scores))]
    known = Evidence(scores={unit.name: one for unit, one in zip(units, scores, strict=True)})  # type: ignore
    allocator = allocator_of("dsa", "sparse")
    found = allocator.allocate(units, Budget(1 - sparsity, sparsity=sparsity), known, allocator.configured(options))
    assert list(found) == [unit.name for unit in units]
    return torch.tensor([one.sparsity for one in found.values()], dtype=torch.float64)  # type: ignore


def test_a_program_reads_scores_of_the_tokens_of_its_search() -> None:
    program = packaged_of("found-wanda-0.7")
    assert named("found-wanda-0.7").tokens == program.tokens == 128 * 512
    found = allocate(scores(), 0.6, program="found-wanda-0.7")
    summed = [one * 256.0 for one in scores()]  # what a sum over 65,536 tokens gave
    expected = evaluate_program(program.program, summed, 0.6).sparsities_L
    assert expected is not None
    torch.testing.assert_close(found, expected)
    other = allocate(scores(), 0.6, program="found-wanda-0.7", score_tokens=1)
    assert float((other - found).abs().max()) > 0.01


def test_a_search_that_summed_over_its_own_text_is_read_as_it_was(tmp_path: Path) -> None:
    old = {"program": "W:(TANH)-(STD)-(ABS)-(8)", "method": "wanda", "sparsity": 0.7,
           "settings": {"calibration samples": 16, "calibration length": 512}}  # fmt: skip
    path = tmp_path / "FOUND.json"
    for content, tokens in (
        (old, 16 * 512),
        ({**old, "score_tokens": 2048}, 2048),
        ({"program": old["program"]}, 7),
        ({"program": old["program"], "method": "svd", "keep": 0.8, "settings": old["settings"]}, 1),
        ({"program": old["program"], "method": "svd-llm", "keep": 0.8, "settings": old["settings"]}, 16 * 512),
    ):
        path.write_text(json.dumps(content))
        assert named(str(path), 7).tokens == tokens
    for wrong in (0, -1, 1.5, True, "x", None):
        path.write_text(json.dumps({**old, "score_tokens": wrong}))
        with pytest.raises(ParedError, match="score_tokens"):
            named(str(path))


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_the_default_program_is_defined_for_any_finite_scores_and_knows_no_scale(scale: float) -> None:
    assert allocator_of("dsa", "sparse").config.defaults()["program"] == DEFAULT_OF_ZEROS
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(400, generator=generator).abs().double() ** (b + 1) for b in range(4)]
    blocks[1][:100] = 0
    blocks += [torch.zeros(400).double(), torch.full((400,), 1e30).double()]
    found, scaled = (allocate([b * by for b in blocks], 0.6) for by in (1.0, scale))
    if scale == 1.0:
        assert float(found.mean()) == pytest.approx(0.6)
        assert float(found.max() - found.min()) == pytest.approx(0.3)
    assert bool(scaled.isfinite().all())


def test_where_the_default_program_tells_nothing_all_get_the_same(caplog: pytest.LogCaptureFixture) -> None:
    for scores in ([torch.zeros(9)] * 3, [torch.ones(1)] * 3, [torch.arange(9.0)] * 3):
        found = allocate(scores, 0.6)
        assert torch.allclose(found, torch.full((3,), 0.6).double())
    assert "every unit gets the same sparsity" in caplog.text
    with pytest.raises(ParedError, match="the same for all 3 blocks"):
        allocate([torch.ones(9)] * 3, 0.6, program="dsa-poster-first")


@pytest.mark.parametrize("zero", [True, False])
def test_the_default_program_of_ranks_is_defined_for_all_spectra(zero: bool) -> None:
    units = [Unit((one,)) for one in SITES]
    spectra = {unit.name: torch.rand(40).sort(descending=True).values for unit in units}
    spectra[SITES[0].name] = torch.zeros(40) if zero else spectra[SITES[0].name]
    allocator = allocator_of("dsa", "low_rank")
    assert allocator.config.defaults()["program"] == DEFAULT_OF_RANKS
    found = allocator.allocate(units, Budget(0.6), Evidence(spectra))
    assert sum(80 * one.rank for one in found.values()) <= 0.6 * 4800  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text",
    [
        "W:(NORMALIZE)-(MEAN)-(ABS)-(8)",
        "W:(NORM)-(MEAN)-(TAN)-(8)-(KEEP)",
        "W:(NORMALIZE)-(VAR)-(LOG)-(8)",
        "W:(NORMALIZE)-(STD)-(LOG,ABS)-(8)",
        "W:(NORMALIZE)-(MEAN)-(ABS,SQRT)-(8)",
        "W:(LOG,NORMALIZE)-(MEAN)-(SIN,ATAN)-(8)",
        "W:(MMS,NORM)-(MEAN)-(ABS)-(8)",
        "W:(NORMALIZE,NORMALIZE)-(MEAN)-(EXP,LOG)-(8)",
        "W:(NORMALIZE,LOGSOFTMAX)-(VAR)-(LOG)-(15)-(KEEP)",
        "W:(SOFTMAX)-(L1_NORM)-(TAN)-(8)",
    ],
)
def test_a_program_of_nothing_but_rounding_is_rejected(text: str) -> None:
    """Regression: importances of 1e-16 were spread over the whole width, differently in every run."""
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(1500, generator=generator).abs() * (b + 1) for b in range(6)]
    verdict = evaluate_program(named(text).program, blocks, 0.6)
    assert not verdict.valid
    assert (
        "cancellation" in verdict.reasons[0] or "the same for all" in verdict.reasons[0] or "LOG" in verdict.reasons[0]
    )


@pytest.mark.parametrize(
    "text",
    ["W:(NORMALIZE)-(L1_NORM)-(SIN)-(8)", "W:(NORMALIZE,POW)-(STD)-(NO_OP)-(8)", "W:(MMS)-(MEAN)-(LOG)-(8)",
     "W:(NORMALIZE,EXP)-(MEAN)-(NO_OP)-(8)", "W:(SOFTMAX)-(ENTROPY)-(NO_OP)-(8)", "W:(NORM,ABS)-(ENTROPY)-(EXP)-(8)"],
)  # fmt: skip
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_centred_scores_that_say_something_are_not_taken_for_rounding(text: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(1500, generator=generator).abs() ** (1 + b / 4) * scale for b in range(6)]
    assert evaluate_program(named(text).program, blocks, 0.6).valid
