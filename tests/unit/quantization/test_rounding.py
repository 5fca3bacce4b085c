"""Rounding to few bits: on the grid, to the nearest, and with feedback never worse in the norm of the Gram."""

import pytest
import torch

from pared.quantization.rounding import Grid, errors, nearest, rounded

GRIDS = pytest.mark.parametrize(
    "grid",
    [Grid(8, 0, torch.float32), Grid(4, 64, torch.bfloat16), Grid(4, 16, torch.float32), Grid(4, 0, torch.float32)],
    ids=lambda grid: f"int{grid.bits} in {grid.group}",
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(width: int, tokens: int, seed: int = 1) -> torch.Tensor:
    x = draw(tokens, width, seed=seed) @ draw(width, width, seed=seed + 1) * torch.logspace(1, -1, width)
    return (x.T @ x).double()


@GRIDS
def test_a_weight_on_the_grid_stays_what_it_is(grid: Grid) -> None:
    integers = torch.randint(-8 if grid.bits == 4 else -127, 7, (12, 128), generator=torch.Generator().manual_seed(0))
    integers[:, ::16] = -8 if grid.bits == 4 else -127  # every group reaches its far end
    W = integers.float() * 0.5
    for gram in (None, gram_of(128, 300)):
        assert torch.equal(rounded(W, grid, gram).weight().float(), W)


@GRIDS
@pytest.mark.parametrize("width", [33, 128, 200])
def test_numbers_and_scales_are_those_of_the_grid(grid: Grid, width: int) -> None:
    found = rounded(draw(10, width), grid, gram_of(width, 400))
    assert found.integers_ON.dtype == torch.int8
    assert found.scales_OG.dtype == grid.dtype
    assert found.scales_OG.shape == (10, -(-width // grid.group) if grid.group else 1)
    least, most = (-8, 7) if grid.bits == 4 else (-127, 127)
    assert least <= int(found.integers_ON.min())
    assert int(found.integers_ON.max()) <= most


@GRIDS
def test_to_the_nearest_no_other_number_is_nearer(grid: Grid) -> None:
    W = draw(6, 96)
    found = nearest(W, grid)
    scale = found.scales_OG.float().abs().repeat_interleave(grid.group or 96, 1)[:, :96]
    least, most = (-8, 7) if grid.bits == 4 else (-127, 127)
    inside = (found.integers_ON > least) & (found.integers_ON < most)
    off = (found.integers_ON.float() * found.scales_OG.float().repeat_interleave(grid.group or 96, 1)[:, :96] - W).abs()
    assert bool((off <= scale * 0.5001)[inside].all())


@GRIDS
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tokens", [20, 500], ids=["rank-deficient", "full"])
def test_with_feedback_no_output_is_worse_than_to_the_nearest(grid: Grid, seed: int, tokens: int) -> None:
    W, gram = draw(9, 70, seed=seed), gram_of(70, tokens, seed=10 * seed)
    fed_back = errors(rounded(W, grid, gram).weight(), W, gram)
    near = errors(nearest(W, grid, gram.diagonal().float()).weight(), W, gram)
    assert bool((fed_back <= near).all())


def test_with_feedback_correlated_inputs_lose_far_less() -> None:
    grid, W, gram = Grid(4, 64, torch.float32), draw(32, 128), gram_of(128, 1000)
    fed_back = errors(rounded(W, grid, gram).weight(), W, gram).sum()
    assert float(fed_back) < 0.5 * float(errors(rounded(W, grid).weight(), W, gram).sum())


def test_a_gram_of_zeros_says_nothing() -> None:
    grid, W = Grid(4, 64, torch.float32), draw(4, 64)
    assert torch.equal(rounded(W, grid, torch.zeros(64, 64)).weight(), rounded(W, grid).weight())


def test_a_weight_of_zeros_stays_zero() -> None:
    for bits in (4, 8):
        found = rounded(torch.zeros(3, 10), Grid(bits, 0, torch.bfloat16), gram_of(10, 30))
        assert not bool(found.weight().any())
        assert bool(found.scales_OG.isfinite().all())


@pytest.mark.parametrize(
    ("W", "gram", "said"),
    [
        (torch.full((2, 4), torch.nan), None, "NaN"),
        (torch.ones(2, 4), torch.eye(5), r"Gram of shape \(5, 5\)"),
        (torch.full((2, 4), 3e38), None, "leaves the range"),
    ],
)
def test_what_cannot_be_rounded_is_refused(W: torch.Tensor, gram: torch.Tensor | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rounded(W, Grid(8, 0, torch.float16), gram)
