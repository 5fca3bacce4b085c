"""Large eigenproblems, partly in float32, leave out no more than in float64, or are computed in float64."""

import pytest
import torch

from pared.lowrank import eigen
from pared.lowrank.decomposition import from_output_gram
from pared.lowrank.eigen import eigh

WIDTH, CHANNELS = 320, 30


def gram(kind: str, width: int = WIDTH) -> torch.Tensor:
    """A Gram of condition 1e12: a falling spectrum, with a few channels up to 1e5 times as strong as the others."""
    random = torch.Generator().manual_seed(0)
    Q_NN = torch.linalg.qr(torch.randn(width, width, generator=random, dtype=torch.float64)).Q
    e_N = torch.arange(1, width + 1, dtype=torch.float64) ** -1.5
    if kind == "steep":
        e_N = torch.logspace(0, -12, width, dtype=torch.float64)
    C_NN = (Q_NN * e_N) @ Q_NN.T
    if kind == "outliers":
        scale_N = torch.ones(width, dtype=torch.float64)
        scale_N[torch.randperm(width, generator=random)[:CHANNELS]] = torch.logspace(
            1, 5, CHANNELS, dtype=torch.float64
        )
        C_NN = scale_N[:, None] * C_NN * scale_N
    return (C_NN + C_NN.T) / 2


def left_out(C_NN: torch.Tensor, U_NN: torch.Tensor, rank: int) -> float:
    """What the first directions leave out, with no rounding of a difference of large numbers."""
    U_NK = U_NN[:, len(U_NN) - rank :]
    rest_NN = C_NN - U_NK @ (U_NK.T @ C_NN)
    return float((rest_NN - (rest_NN @ U_NK) @ U_NK.T).trace())


@pytest.mark.parametrize("kind", ["outliers", "falling"])
def test_every_rank_leaves_out_what_it_does_in_float64(kind: str) -> None:
    C_NN = gram(kind)
    found = eigen._mixed(C_NN)
    assert found is not None
    exact_N, exact_NN = torch.linalg.eigh(C_NN)
    if kind == "outliers":
        assert exact_N[-1] / exact_N[0] > 1e11
    e_N, U_NN = found
    for rank in (1, 8, 20, 31, 32, 33, 48, 64, 100, 128, 160):
        least = left_out(C_NN, exact_NN, rank)
        assert left_out(C_NN, U_NN, rank) == pytest.approx(least, rel=1e-6)
        assert float(e_N[:-rank].sum()) == pytest.approx(least, rel=1e-6)
    assert torch.equal(e_N, e_N.sort().values)
    assert (U_NN.T @ U_NN - torch.eye(WIDTH)).abs().max() < 1e-5


def test_float32_alone_would_not_do() -> None:
    C_NN = gram("outliers")
    alone_NN = torch.linalg.eigh(C_NN.float()).eigenvectors.double()
    exact_NN = torch.linalg.eigh(C_NN).eigenvectors
    assert left_out(C_NN, alone_NN, 128) > 1.01 * left_out(C_NN, exact_NN, 128)


@pytest.mark.parametrize("kind", ["steep", "zero", "negative"])
def test_what_float32_cannot_tell_is_computed_in_float64(kind: str) -> None:
    C_NN = gram("steep")
    if kind == "zero":
        C_NN = torch.zeros_like(C_NN)
    if kind == "negative":
        C_NN = -gram("falling")
    found, exact = eigh(C_NN, width=0), torch.linalg.eigh(C_NN)
    assert all(torch.equal(one, other) for one, other in zip(found, exact, strict=True))


def test_small_problems_are_computed_in_float64_to_the_same_bits() -> None:
    C_NN = gram("outliers")
    decomposition = from_output_gram(torch.eye(WIDTH, dtype=torch.float64), C_NN)
    assert torch.equal(decomposition.U_OR, torch.linalg.eigh(C_NN).eigenvectors.flip(1))
