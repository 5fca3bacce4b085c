"""The scores of FLAP, Wanda-sp and LLM-Pruner: identities, and a direct computation on a small MLP, in float64."""

import pytest
import torch
from torch.nn.functional import silu

from pared.widths import GroupLayers, Maker, flap, llm_pruner, wanda_sp
from pared.widths.registry import METHODS as DECLARED

METHODS = {name: one for name, one in DECLARED.items() if one.widths is not None}  # another takes experts out
OUT, CHANNELS, INPUTS = 5, 12, 7


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Mlp:
    """A gated MLP ``y = (silu(x gateᵀ) ⊙ x upᵀ) downᵀ`` on some inputs, and the loss ``Σ y²``."""

    def __init__(self) -> None:
        self.gate_GN, self.up_GN, self.down_OG = (
            draw(*shape, seed=seed).requires_grad_()
            for seed, shape in enumerate([(CHANNELS, INPUTS), (CHANNELS, INPUTS), (OUT, CHANNELS)])
        )
        self.x_TN = draw(40, INPUTS, seed=3) + 0.5

    @property
    def weights(self) -> list[torch.Tensor]:
        return [self.gate_GN, self.up_GN, self.down_OG]

    def hidden(self) -> torch.Tensor:
        return silu(self.x_TN @ self.gate_GN.T) * (self.x_TN @ self.up_GN.T)

    def outputs(self) -> torch.Tensor:
        return self.hidden() @ self.down_OG.T

    def layers(self) -> GroupLayers:
        """Return what every method is given of it."""
        hidden_TG = self.hidden().detach()
        gradients = torch.autograd.grad(self.outputs().square().sum(), self.weights)
        statistics = {"mean": hidden_TG.mean(dim=0), "variance": hidden_TG.var(dim=0, correction=0),
                      "energy": hidden_TG.square().mean(dim=0), "weight_gradient": gradients[2].flatten(),
                      "mean_gram": hidden_TG.T @ hidden_TG / len(hidden_TG)}  # fmt: skip
        rows_GR = torch.arange(CHANNELS)[:, None]
        makers = [Maker(weight.detach(), {"weight_gradient": one.flatten()}, rows_GR)
                  for weight, one in zip(self.weights[:2], gradients, strict=False)]  # fmt: skip
        return GroupLayers(self.down_OG.detach(), statistics, makers=lambda: makers)


def scores_of(name: str, layers: GroupLayers) -> torch.Tensor:
    """Return the score of every channel by a method, in their own order."""
    method = METHODS[name]
    found = method.widths(layers, method.config())
    scores_G = torch.empty(len(found.order_G), dtype=torch.float64)
    scores_G[found.order_G] = found.costs_N.square().view(-1, layers.inputs).sum(dim=1)
    return scores_G


def test_flap_scores_are_fluctuations_times_the_weight_that_reads_them():
    mlp = Mlp()
    hidden_TG = mlp.hidden().detach()
    fluctuation_G = (hidden_TG - hidden_TG.mean(dim=0)).square().mean(dim=0)
    expected = fluctuation_G * mlp.down_OG.detach().square().sum(dim=0)
    assert torch.allclose(scores_of("flap", mlp.layers()), expected)


def test_wanda_scores_are_the_mean_weight_times_the_norm_of_inputs():
    mlp = Mlp()
    norms_G = mlp.hidden().detach().square().mean(dim=0).sqrt()
    expected = (mlp.down_OG.detach().abs() * norms_G).mean(dim=0)
    assert torch.allclose(scores_of("wanda-sp", mlp.layers()), expected)


def test_llm_pruner_scores_are_first_order_changes_of_all_weights_that_go():
    mlp = Mlp()
    mlp.outputs().square().sum().backward()
    gate, up, down = ((weight * weight.grad).detach().abs() for weight in mlp.weights)
    expected = gate.sum(dim=1) + up.sum(dim=1) + down.sum(dim=0)
    assert torch.allclose(scores_of("llm-pruner", mlp.layers()), expected)


def test_modegpt_orders_by_leverage_scores_and_makes_up_for_what_goes():
    mlp = Mlp()
    method, layers = METHODS["modegpt"], mlp.layers()
    C_GG = layers.statistics["mean_gram"].clone()
    C_GG.diagonal().add_(1e-4 * C_GG.diagonal().mean())
    ridge_GG = C_GG.diagonal().mean() * 0.5 * torch.eye(CHANNELS, dtype=torch.float64)
    scores_G = (C_GG @ torch.linalg.inv(C_GG + ridge_GG)).diagonal()
    found = method.widths(layers, method.configured({"ridge": 0.5}))
    assert torch.equal(found.order_G, scores_G.argsort(descending=True))
    kept = found.kept(7)
    expected = layers.W_ON @ C_GG[:, kept] @ torch.linalg.inv(C_GG[kept][:, kept])
    assert torch.allclose(found.weight(7), expected)
    D_ON = -layers.W_ON.clone()
    D_ON[:, kept] += expected
    assert 2 * found.loss(7) == pytest.approx(float(torch.trace(D_ON @ C_GG @ D_ON.T)))


def test_taking_out_a_channel_alone_costs_flap_what_it_scores():
    """Its output, with the mean in the place of the channel, errs by the score."""
    mlp = Mlp()
    method, layers = METHODS["flap"], mlp.layers()
    found = method.widths(layers, method.config())
    width = CHANNELS - 1
    y_TO = mlp.hidden().detach()[:, found.kept(width)] @ found.weight(width).T + found.shift(width)
    error = (y_TO - mlp.outputs().detach()).square().sum(dim=1).mean()
    assert float(error) == pytest.approx(2 * found.loss(width))


@pytest.mark.parametrize("width", [1, 5, 11])
def test_flap_bias_makes_the_mean_output_exact(width: int):
    mlp = Mlp()
    method = METHODS["flap"]
    found = method.widths(mlp.layers(), method.config())
    y_TO = mlp.hidden().detach()[:, found.kept(width)] @ found.weight(width).T + found.shift(width)
    assert torch.allclose(y_TO.mean(dim=0), mlp.outputs().detach().mean(dim=0))


@pytest.mark.parametrize("name", METHODS)
def test_a_channel_of_zero_weight_goes_first_and_costs_nothing(name: str):
    mlp = Mlp()
    with torch.no_grad():
        mlp.down_OG[:, 5] = 0
        mlp.gate_GN[5] = mlp.up_GN[5] = 0
    method, layers = METHODS[name], mlp.layers()
    found = method.widths(layers, method.config())
    assert found.order_G[-1] == 5
    assert found.loss(CHANNELS - 1) == 0
    assert torch.equal(found.weight(CHANNELS - 1), layers.W_ON[:, found.kept(CHANNELS - 1)])
    shift = found.shift(CHANNELS - 1)
    assert shift is None or not shift.any()


@pytest.mark.parametrize("name", METHODS)
def test_with_all_channels_kept_nothing_changes(name: str):
    method, layers = METHODS[name], Mlp().layers()
    found = method.widths(layers, method.config())
    assert torch.equal(found.kept(CHANNELS), torch.arange(CHANNELS))
    assert torch.equal(found.weight(CHANNELS), layers.W_ON)
    assert found.loss(CHANNELS) == 0
    shift = found.shift(CHANNELS)
    assert shift is None or not shift.any()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "modegpt"])  # whose costs are those of a set
def test_a_channel_of_several_inputs_has_the_sum_of_their_scores(name: str):
    """As heads have: three inputs each, and rows of a maker that are told by number."""
    alone = Mlp().layers()
    apart_G = scores_of(name, alone)
    rows_GR = torch.arange(CHANNELS).view(-1, 3)
    makers = [Maker(one.W_ON, one.statistics, rows_GR) for one in alone.makers()]
    together = GroupLayers(alone.W_ON, alone.statistics, 3, makers=lambda: makers)
    assert torch.allclose(scores_of(name, together), apart_G.view(-1, 3).sum(dim=1))
    method = METHODS[name]
    found = method.widths(together, method.config())
    kept = [3 * channel + i for channel in found.kept(2).tolist() for i in range(3)]
    assert torch.equal(found.weight(2), alone.W_ON[:, kept])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_statistics_that_are_not_finite_are_refused(bad: float):
    layers = Mlp().layers()
    W_ON, good = layers.W_ON, layers.statistics
    wrong = torch.full_like(good["mean"], bad)
    with pytest.raises(ValueError, match="a mean or a variance of what it reads is not finite"):
        flap.order_channels(W_ON, good["variance"], wrong)
    with pytest.raises(ValueError, match="the energy of what it reads is negative or not finite"):
        wanda_sp.order_channels(W_ON, wrong)
    with pytest.raises(ValueError, match="a gradient of the loss through its weights is not finite"):
        llm_pruner.order_channels(W_ON, good["weight_gradient"] * bad, [])
