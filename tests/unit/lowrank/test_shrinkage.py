"""Second moments drawn towards equal energies: identities, the rule, and what a decomposition makes of them."""

from typing import Any

import pytest
import torch
from passes import UNSHRUNK

from pared.calibration.statistics import MeanGram, OutputGradient
from pared.calibration.statistics.features import Energy
from pared.calibration.statistics.gram import GradientGram
from pared.errors import ParedError
from pared.lowrank import METHODS, loss_optimal
from pared.lowrank.shrinkage import LEAST, chosen, shrunk

CPU = torch.device("cpu")
LOSS_OPTIMAL = METHODS["loss-optimal"]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    scale_N = torch.linspace(0.2, 3, features, dtype=torch.float64)
    return (draw(tokens, features, seed=seed) * scale_N @ draw(features, features, seed=99)).float()


def seen(*batches: torch.Tensor) -> MeanGram:
    gram = MeanGram(batches[0].shape[-1], CPU)
    for x_TN in batches:
        gram.update(x_TN)
    return gram


def test_nothing_is_shrunk_by_nothing() -> None:
    S_NN = draw(5, 5)
    assert shrunk(S_NN, 0.0) is S_NN
    assert shrunk(number := torch.tensor(3.0), 0.5) is number


@pytest.mark.parametrize("amount", [0.03, 0.5, 1.0])
def test_the_mean_energy_stays_and_differences_of_energies_shrink(amount: float) -> None:
    S_NN = seen(correlated(50, 6)).value
    before = S_NN.clone()
    found = shrunk(S_NN, amount)
    torch.testing.assert_close(found, (1 - amount) * S_NN + amount * S_NN.diagonal().mean() * torch.eye(6))
    torch.testing.assert_close(found.trace(), S_NN.trace())
    torch.testing.assert_close(shrunk(S_NN.diagonal(), amount), found.diagonal())
    assert torch.equal(S_NN, before)


def gradients(x_TN: torch.Tensor, form: Any = "full") -> OutputGradient:
    found = OutputGradient(x_TN.shape[-1], CPU, form)
    found.update(x_TN, x_TN)
    return found


def test_the_rule_of_gradients_is_that_of_ledoit_and_wolf() -> None:
    """Written out from the paper, token by token."""
    x_TN = correlated(40, 7).double()
    S_NN, width = x_TN.T @ x_TN / 40, 7
    apart = S_NN - S_NN.trace() / width * torch.eye(width)
    variance = sum(float((torch.outer(x_N, x_N) - S_NN).square().sum()) for x_N in x_TN) / 40**2
    expected = min(1.0, variance / float(apart.square().sum()))
    assert gradients(x_TN.float()).shrinkage == pytest.approx(expected, rel=1e-5)
    energy = Energy(width, CPU)
    energy.update(x_TN.float())
    s_N = S_NN.diagonal()
    variance = sum(float((x_N.square() - s_N).square().sum()) for x_N in x_TN) / 40**2
    assert energy.shrinkage == pytest.approx(variance / float((s_N - s_N.mean()).square().sum()), rel=1e-5)


def parts(x_TN: torch.Tensor, count: int) -> MeanGram:
    return seen(*x_TN.chunk(count))


def correlations(x_TN: torch.Tensor) -> torch.Tensor:
    unit_TN = x_TN.double() / x_TN.double().norm(dim=0)
    return unit_TN.T @ unit_TN


def test_the_rule_of_inputs_is_how_far_correlations_differ_between_parts() -> None:
    """Written out, part by part; of parts of one size the mean is that of the whole but for their energies."""
    x_TN = correlated(48, 7)
    whole_NN, of_parts = correlations(x_TN), [correlations(part) for part in x_TN.chunk(4)]
    squares = sum(float(one.square().sum()) for one in of_parts) / 4
    variance = (squares - float(whole_NN.square().sum())) / 3  # of a mean of four
    distance = float((whole_NN - torch.eye(7)).square().sum())
    assert parts(x_TN, 4).shrinkage == pytest.approx(variance / distance, rel=1e-5)


@pytest.mark.parametrize("features", [7, 250])  # within a panel of columns, and beyond one
def test_parts_of_the_text_are_counted_by_their_tokens_in_every_panel(features: int) -> None:
    chunks = [correlated(tokens, features, seed) for seed, tokens in enumerate((30, 5))]
    expected = sum(len(one) ** 2 * float(correlations(one).square().sum()) for one in chunks)
    assert float(seen(*chunks).observed[0]) == pytest.approx(expected, rel=1e-5)
    assert float(seen(*chunks).observed[1]) == 30**2 + 5**2
    assert seen(*chunks)._correlations()[0] == pytest.approx(float(correlations(torch.cat(chunks)).square().sum()))


def test_parts_that_are_alike_leave_inputs_as_they_are_and_others_do_not() -> None:
    x_TN = correlated(200, 6)
    alike, apart = seen(x_TN, x_TN), seen(x_TN, correlated(200, 6, seed=1).flip(1))
    assert alike.shrinkage < 1e-5
    assert apart.shrinkage > 0.1
    assert parts(x_TN, 8).shrinkage > parts(correlated(20_000, 6), 8).shrinkage


def test_inputs_of_large_energy_do_not_decide_alone() -> None:
    """Regression: where a few channels are a thousand times as large, the rule saw nothing but them."""
    x_TN = correlated(64, 8)
    massive_TN = x_TN.clone()
    massive_TN[:, 0] *= 1000
    assert parts(massive_TN, 4).shrinkage == pytest.approx(parts(x_TN, 4).shrinkage, rel=1e-4)
    assert gradients(massive_TN).shrinkage < 0.5 * gradients(x_TN).shrinkage


def test_inputs_that_are_always_zero_and_a_single_part_say_nothing() -> None:
    x_TN = correlated(64, 8)
    with_zeros = torch.cat((x_TN, torch.zeros(64, 3)), 1)
    assert parts(with_zeros, 4).shrinkage == pytest.approx(parts(x_TN, 4).shrinkage, rel=1e-6)
    assert (
        seen(x_TN).shrinkage == MeanGram(8, CPU).shrinkage == seen(torch.zeros(4, 8), torch.zeros(4, 8)).shrinkage == 0
    )


def test_the_rule_comes_closest_to_the_moments_that_were_sampled() -> None:
    true_NN = seen(correlated(200_000, 6)).value

    def distance(amount: float) -> float:
        return sum(float((shrunk(seen(x).value, amount) - true_NN).square().sum()) for x in samples)

    samples = [correlated(24, 6, seed) for seed in range(1, 30)]
    by_rule = sum(gradients(x).shrinkage for x in samples) / len(samples)
    assert distance(by_rule) < min(distance(0.0), distance(by_rule / 3), distance(min(1.0, 3 * by_rule)))


def test_the_rule_tends_to_nothing_as_tokens_become_many() -> None:
    found = [gradients(correlated(tokens, 8)).shrinkage for tokens in (4, 40, 400, 4000)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.2
    assert found[-1] < 0.005
    assert gradients(correlated(1, 8)).shrinkage == 1.0, "one token tells no direction from another"
    assert OutputGradient(8, CPU, "full").shrinkage == 0.0


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_the_rule_does_not_depend_on_the_unit(scale: float) -> None:
    x_TN = correlated(30, 5)
    assert parts(scale * x_TN, 3).shrinkage == pytest.approx(parts(x_TN, 3).shrinkage, rel=1e-5)
    found, scaled = OutputGradient(5, CPU, "diagonal"), OutputGradient(5, CPU, "diagonal")
    found.update(x_TN, x_TN)
    scaled.update(x_TN, scale * x_TN)
    assert scaled.shrinkage == pytest.approx(found.shrinkage, rel=1e-5)


def test_the_rule_is_known_from_parts() -> None:
    x_TN = correlated(60, 5)
    whole, merged = seen(x_TN[:17], x_TN[17:40], x_TN[40:]), seen(x_TN[:17])
    merged.merge(seen(x_TN[17:40], x_TN[40:]))
    assert merged.shrinkage == pytest.approx(whole.shrinkage, rel=1e-6)
    restored = MeanGram(5, CPU)
    restored.load_state_dict(merged.state_dict())
    assert restored.shrinkage == merged.shrinkage
    for statistic, lacking, message in (
        (GradientGram(5, CPU), "fourth", "without fourth moments"),
        (restored, "observed", "without parts of the text"),
    ):
        state = {name: value for name, value in statistic.state_dict().items() if name != lacking}
        with pytest.raises(ParedError, match=message):
            statistic.load_state_dict(state)


def test_an_amount_is_what_was_chosen_or_the_rules_and_none_is_none() -> None:
    asked = {"gram": 0.25, "gradient": "auto", "other": 0.0}
    assert [chosen(asked, name, 0.5) for name in ("gram", "gradient", "other", "unknown")] == [0.25, 0.5, 0.0, 0.0]
    assert chosen(asked, "gradient", 0.0) == LEAST, "what is shrunk is of full rank"


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_without_shrinkage_the_decomposition_is_what_it_was_bit_for_bit(shape: tuple[int, int]) -> None:
    W_ON, A_NN, B_OO = draw(*shape), seen(correlated(50, shape[1])).value, seen(correlated(50, shape[0], 1)).value
    options = UNSHRUNK
    assert set(LOSS_OPTIMAL.shrinkage(LOSS_OPTIMAL.configured(options)).values()) == {0}
    found = LOSS_OPTIMAL.decompose(W_ON, {"mean_gram": A_NN, "output_gradient_full": B_OO}, options)
    before = loss_optimal.decompose(W_ON, A_NN, B_OO)
    assert all(torch.equal(one, other) for one, other in zip(found.factors(3), before.factors(3), strict=True))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_what_is_shrunk_is_not_damped_as_well(shape: tuple[int, int], form: str) -> None:
    """Four tokens, of which no Gram is of full rank; the loss is then exactly that of the shrunk moments."""
    A_NN, B_OO = (shrunk(seen(correlated(4, width, width)).value, 0.1) for width in reversed(shape))
    B_OO = B_OO if form == "full" else B_OO.diagonal().diag()
    statistics = {"mean_gram": A_NN, f"output_gradient_{form}": B_OO if form == "full" else B_OO.diagonal()}
    options = {"input_shrinkage": 0.1, "output_shrinkage": 0.1, "output_weighting": form}
    found = LOSS_OPTIMAL.decompose(W_ON := draw(*shape), statistics, options)
    assert found.damping == 0
    down, up = found.factors(3)
    D_ON = up @ down - W_ON
    assert float(torch.trace(B_OO @ D_ON @ A_NN @ D_ON.T)) == pytest.approx(found.loss(3) ** 2, rel=1e-9)


def test_a_shrinkage_that_is_none_is_refused_in_one_line() -> None:
    for bad in (-0.1, 1.5, "much"):
        with pytest.raises(ParedError, match=f"option input_shrinkage: expected .*0 to 1, or auto.*got {bad!r}"):
            LOSS_OPTIMAL.configured({"input_shrinkage": bad})
    assert LOSS_OPTIMAL.configured({"input_shrinkage": "auto", "output_shrinkage": 1}).output_shrinkage == 1
