"""What rounding is priced at is the second-order loss of the error that is stored."""

import pytest
import torch

from pared.lowrank import METHODS
from pared.quantization.factors import balanced, fitted, turned
from pared.quantization.pricing import price, prices
from pared.quantization.rounding import Grid, rounded

OUT, IN, TOKENS = 12, 20, 200


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X_TN = draw(TOKENS, IN, seed=1) @ draw(IN, IN, seed=2)
G_TO = draw(TOKENS, OUT, seed=3) * torch.logspace(0, -1, OUT, dtype=torch.float64)
GRAM = X_TN.T @ X_TN / TOKENS
GRADIENT = G_TO.T @ G_TO / TOKENS
GRIDS = pytest.mark.parametrize("grid", [Grid(8, 0, torch.float32), Grid(4, 16, torch.float32)], ids=["int8", "int4"])


def explicit(E_ON: torch.Tensor, A_NN: torch.Tensor, B_OO: torch.Tensor) -> float:
    return float(torch.trace(B_OO @ E_ON @ A_NN @ E_ON.T))


def test_the_price_is_the_trace_in_every_form_of_the_gradient() -> None:
    E = draw(OUT, IN)
    assert price(E, GRAM, GRADIENT) == pytest.approx(explicit(E, GRAM, GRADIENT))
    diagonal = GRADIENT.diagonal()
    assert price(E, GRAM, diagonal) == pytest.approx(explicit(E, GRAM, diagonal.diag()))
    assert price(E, GRAM, torch.tensor(2.0)) == pytest.approx(2 * explicit(E, GRAM, torch.eye(OUT).double()))
    assert price(E, None, None) == pytest.approx(float(E.square().sum()))


@GRIDS
def test_the_first_price_is_that_of_what_is_stored_of_the_weight(grid: Grid) -> None:
    W = draw(OUT, IN)
    factors = METHODS["loss-optimal"].decompose(W, {"mean_gram": GRAM, "output_gradient_full": GRADIENT}).factors(6)
    stored = rounded(W, grid, GRAM).weight().double()
    assert float(prices(W, factors, grid, GRAM, GRADIENT)[0]) == pytest.approx(explicit(stored - W, GRAM, GRADIENT))


@GRIDS
@pytest.mark.parametrize("rank", [2, 7])
def test_the_price_of_a_rank_is_near_the_loss_of_its_rounded_factors(grid: Grid, rank: int) -> None:
    found = []
    for seed in range(8):
        W = draw(OUT, IN, seed=10 + seed)
        own = {"mean_gram": GRAM, "output_gradient_full": GRADIENT}
        factors = METHODS["loss-optimal"].decompose(W, own).factors(8)
        priced = float(prices(W, factors, grid, GRAM, GRADIENT)[rank])
        first = balanced(type(factors)(down=factors.down[:rank], up=factors.up[:, :rank]))
        down, up = rounded(first.down, grid, GRAM).weight().double(), rounded(first.up, grid).weight().double()
        found.append(explicit(up @ down - first.up @ first.down, GRAM, GRADIENT) / priced)
    assert 0.5 < sum(found) / len(found) < 2


def test_balanced_and_turned_factors_have_the_same_product() -> None:
    factors = METHODS["svd"].decompose(draw(OUT, IN), {}).factors(5)
    for other in (balanced(factors), turned(factors)):
        assert torch.allclose(other.up @ other.down, factors.up @ factors.down)
    assert torch.allclose(balanced(factors).up.square().mean(0), torch.ones(5).double())
    assert torch.allclose(turned(factors).up.T @ turned(factors).up, torch.eye(5).double())


def test_a_fitted_up_loses_no_more_than_the_one_it_was_fitted_from() -> None:
    factors = balanced(METHODS["svd"].decompose(draw(OUT, IN), {}).factors(5))
    down = rounded(factors.down, Grid(4, 0, torch.float32), GRAM).weight().double()
    up, latent = fitted(factors, down, GRAM)
    assert torch.allclose(latent, down @ GRAM @ down.T)
    whole = factors.up @ factors.down
    assert price(up @ down - whole, GRAM, None) < price(factors.up @ down - whole, GRAM, None)
