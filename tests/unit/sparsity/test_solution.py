"""One solution answers every pattern as pruning anew does, bit for bit."""

import pytest
import torch

from pared import error_feedback
from pared.sparsity import (
    METHODS,
    NM,
    OrderedWeights,
    Pattern,
    RankedWeights,
    Unstructured,
    magnitude,
    sparsegpt,
    wanda,
)

PATTERNS: list[Pattern] = [
    Unstructured(0.0),
    Unstructured(0.3),
    Unstructured(0.5),
    Unstructured(0.9),
    NM(2, 4),
    NM(1, 8),
]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight() -> torch.Tensor:
    """A weight in which many entries are equal, so that ties are broken."""
    return (draw(12, 32) * 2).round() / 2


def energy() -> torch.Tensor:
    """Input energies, two of inputs that were always zero."""
    energy_N = draw(32, seed=1).square()
    energy_N[3] = energy_N[17] = 0
    return energy_N


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_solution_prunes_as_its_method_does_whatever_was_asked_before(pattern: Pattern) -> None:
    X_TN = draw(64, 32, seed=2)
    statistics = {"energy": X_TN.square().sum(0), "gram": X_TN.T @ X_TN}
    for method in METHODS.values():
        solution = method.solve([weight()], [statistics], method.config())
        for other in PATTERNS:
            solution.realize(other)
        found, expected = solution.realize(pattern), method.prune(weight(), pattern, statistics)
        assert torch.equal(found.weight, expected.weight)
        assert torch.equal(found.mask, expected.mask)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ordered_weights_are_pruned_as_ranked_ones(pattern: Pattern, dtype: torch.dtype) -> None:
    for ranked in (magnitude.solve(weight().to(dtype)), wanda.solve(weight().to(dtype), energy())):
        found, expected = ranked.ordered().realize(pattern), ranked.realize(pattern)
        assert torch.equal(found.weight, expected.weight)
        assert torch.equal(found.mask, expected.mask)


def test_an_order_takes_two_bytes_a_weight_unless_more_compete() -> None:
    assert wanda.solve(weight(), energy()).ordered().order_ON.dtype == torch.int16
    many = RankedWeights(torch.ones(1, 2**15), draw(1, 2**15).double(), "row").ordered()
    assert many.order_ON.dtype == torch.int32
    assert isinstance(many, OrderedWeights)
    assert torch.equal(many.order_ON.flatten().sort().values, torch.arange(2**15))


def test_weights_that_compete_by_share_have_no_order_and_no_pattern() -> None:
    ranked = wanda.solve(weight(), energy(), variant=True)
    assert int((~ranked.realize(Unstructured(0.5)).mask).sum()) == 12 * 32 // 2
    with pytest.raises(ValueError, match="no order"):
        ranked.ordered()
    with pytest.raises(ValueError, match="pattern 2:4: the variant"):
        ranked.realize(NM(2, 4))


def test_the_cost_of_a_solution_is_what_its_method_compares() -> None:
    W_ON, energy_N = weight(), energy()
    assert torch.equal(magnitude.solve(W_ON).cost, W_ON.double().abs())
    assert torch.equal(wanda.solve(W_ON, energy_N).cost, wanda.scores(W_ON, energy_N))
    X_TN = draw(64, 32, seed=2)
    solution = sparsegpt.solve(W_ON, X_TN.T @ X_TN)
    gram_NN = (X_TN.T @ X_TN).double()
    U_N = error_feedback.inverse_factor(gram_NN / gram_NN.diagonal().mean()).diagonal()
    torch.testing.assert_close(solution.cost, (W_ON / U_N).square())
