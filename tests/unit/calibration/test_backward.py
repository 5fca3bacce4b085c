"""The backward pass gives what plain autograd gives on the whole model, and leaves no trace of itself."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from passes import backward, walk
from tiny_models import FAMILIES, REPEATED, TINY_MODELS, VOCAB
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D

from pared import ParedError
from pared.calibration import (
    STATISTICS,
    Fisher,
    Given,
    Labels,
    NextToken,
    OutputGradient,
    Sampled,
    Scores,
    capture,
    choose_labels,
    gradient_accumulators,
    statistic_kind,
)
from pared.calibration.labels import SECTION
from pared.structure import Anatomy, find_anatomy, probe

CPU = torch.device("cpu")
WINDOWS, LENGTH, BATCH = 5, 12, 2  # batches of 2, 2 and 1
Found = dict[str, dict[str, Any]]
EVERY = (
    *(name for name, kind in STATISTICS.items() if kind.of not in ("output", "input_pair")),
    "fisher:2",
    "fisher:3",
)


def tokens(windows: int = WINDOWS, vocabulary: int = VOCAB) -> torch.Tensor:
    return torch.randint(0, vocabulary, (windows, LENGTH), generator=torch.Generator().manual_seed(0))


def labels_of(model: PreTrainedModel, loss: str) -> Labels:
    given = None if model.can_generate() else torch.arange(WINDOWS) % 3
    return choose_labels(model, loss, seed=3, given=given)  # type: ignore[arg-type]


def collected(
    model: PreTrainedModel,
    labels: Labels,
    names: Any = EVERY,
    ids: torch.Tensor | None = None,
    batch: int = BATCH,
    dtype: torch.dtype = torch.float32,
    on_batch: Callable[[], None] = lambda: None,
) -> Found:
    ids = tokens() if ids is None else ids
    anatomy, calls = probe(model, find_anatomy(model))
    inputs = capture(model, anatomy, ids, batch, calls, dtype, CPU)
    before = [hidden.clone() for hidden in inputs.hidden]
    wants = gradient_accumulators(anatomy.sites, names, CPU)
    backward(model, anatomy, inputs, ids, wants, labels, on_batch)
    assert all(torch.equal(a, b) for a, b in zip(inputs.hidden, before, strict=True)), "a walk needs them yet"
    return wants


def autograd(
    model: PreTrainedModel, anatomy: Anatomy, labels: Labels
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return per site: the Fisher by example, that of batches of two, and the mean Gram of the output gradients.

    From the whole model on one window at a time, plain hooks and ``weight.grad``.
    """
    weight_gradients: dict[str, list[torch.Tensor]] = defaultdict(list)
    grams: dict[str, Any] = defaultdict(float)
    watched = [(site.name, model.get_submodule(site.name)) for site in anatomy.sites]

    def watch(name: str) -> Callable[..., None]:
        def receive(g: torch.Tensor) -> None:
            g_TO = g.flatten(0, -2).double()
            grams[name] = grams[name] + g_TO.T @ g_TO / (WINDOWS * LENGTH)

        return lambda _, __, output: output.register_hook(receive) and None

    handles = [module.register_forward_hook(watch(name)) for name, module in watched]
    for window, tokens_T in enumerate(tokens()):
        model.zero_grad()
        logits = model(input_ids=tokens_T.unsqueeze(0)).logits.flatten(0, -2)
        y = labels(window, tokens_T, logits.detach().softmax(-1))
        cross_entropy(logits, y, reduction="sum", ignore_index=-100).backward()
        for name, module in watched:
            gradient = module.weight.grad.double()
            weight_gradients[name].append(gradient.T if isinstance(module, Conv1D) else gradient)
    model.zero_grad()
    for handle in handles:
        handle.remove()
    by_example = {name: sum(g.square().sum(0) for g in found) for name, found in weight_gradients.items()}
    batched = {
        name: sum(sum(found[i : i + BATCH]).square().sum(0) for i in range(0, WINDOWS, BATCH))  # type: ignore[union-attr]
        for name, found in weight_gradients.items()
    }
    return by_example, batched, grams  # type: ignore[return-value]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == torch.float64
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("loss", ["labels", "sampled"])
@pytest.mark.parametrize("family", [*FAMILIES, *REPEATED])
def test_statistics_are_those_of_autograd_on_the_whole_model(family: str, loss: str) -> None:
    """The gradient Grams are means over all runs of a block."""
    model = (TINY_MODELS | REPEATED)[family]()
    found = collected(model, labels_of(model, loss))
    anatomy, calls = probe(model, find_anatomy(model))
    order = [call.block for call in calls]
    runs = {site.name: order.count(site.block) for site in anatomy.sites}
    by_example, batched, grams = autograd(model, anatomy, labels_of(model, loss))
    assert found.keys() == by_example.keys() == {site.name for site in anatomy.sites}
    for site, statistics in found.items():
        gram = grams[site] / runs[site]
        assert relative(statistics["fisher"].value, by_example[site]) < 1e-4
        assert relative(statistics["fisher:2"].value, batched[site]) < 1e-4
        assert relative(statistics["output_gradient_full"].value, gram) < 1e-4
        assert relative(statistics["output_gradient_diagonal"].value, gram.diagonal()) < 1e-4
        assert relative(statistics["output_gradient_scalar"].value, gram.diagonal().mean()) < 1e-4
        assert {statistic.tokens for statistic in statistics.values()} == {WINDOWS * LENGTH * runs[site]}


def test_a_token_classification_head_takes_a_label_for_every_token() -> None:
    config = TINY_MODELS["bert"]().config
    model = transformers.BertForTokenClassification._from_config(config).eval()
    given = Given(torch.randint(0, 3, (WINDOWS, LENGTH)))
    given.labels[1, 4:] = -100
    by_example, _, grams = autograd(model, find_anatomy(model), given)
    for site, statistics in collected(model, given).items():
        assert relative(statistics["fisher"].value, by_example[site]) < 1e-4
        assert relative(statistics["output_gradient_full"].value, grams[site]) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_of_inputs_collected_on_the_way_are_those_of_a_walk(family: str) -> None:
    model = TINY_MODELS[family]()
    names = frozenset(name for name, kind in STATISTICS.items() if kind.of == "input")
    found = collected(model, labels_of(model, "sampled"), names | {"output_gradient_scalar"})
    anatomy, calls = probe(model, find_anatomy(model))
    inputs = capture(model, anatomy, tokens(), BATCH, calls, torch.float32, CPU)
    for step in walk(model, anatomy, inputs, lambda _: names):
        for site, statistics in step.statistics.items():
            for name, statistic in statistics.items():
                assert relative(found[site][name].value, statistic.value) < 1e-5
                assert found[site][name].tokens == WINDOWS * LENGTH
    for site in anatomy.sites:
        assert all(found[site.name][name] is found[site.reads][name] for name in names)


def test_labels_are_sampled_as_often_as_predicted() -> None:
    p_C = torch.tensor([0.0, 0.5, 0.125, 0.0, 0.3, 0.075, 0.0])
    counts = sum(Sampled(4)(window, tokens()[0], p_C.expand(500, 7)).bincount(minlength=7) for window in range(200))
    deviation_C = (p_C * (1 - p_C) * 100_000).sqrt()
    assert ((counts - 100_000 * p_C).abs() <= 4 * deviation_C).all()


def test_a_label_predicted_to_be_impossible_is_never_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.zeros(shape))
    p_RC = torch.tensor([[0.0, 0.0, 0.4, 0.6]])
    assert Sampled(0)(0, tokens()[0], p_RC).tolist() == [2]


@pytest.mark.parametrize("classes", [7, SECTION, 3 * SECTION + 5])
def test_a_large_vocabulary_is_sampled_as_by_one_cumulative_sum(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    p_RC = torch.randint(0, 3, (400, classes), generator=generator).float()  # sums of whole numbers are exact
    p_RC[:, 0] += 1
    uniform_R1 = torch.rand(400, 1, generator=torch.Generator().manual_seed(1_000_003 * 5 + 2))
    cumulative_RC = p_RC.cumsum(dim=-1)
    expected = torch.searchsorted(cumulative_RC, uniform_R1 * cumulative_RC[:, -1:], right=True).squeeze(1)
    assert torch.equal(Sampled(5)(2, tokens()[0], p_RC), expected)


def test_the_loss_of_the_next_token_is_the_models_own() -> None:
    model = TINY_MODELS["llama"]()
    ids = tokens(1)
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    y = NextToken()(0, ids[0], output.logits[0].softmax(-1))
    torch.testing.assert_close(cross_entropy(output.logits[0], y, ignore_index=-100), output.loss)


def test_blocks_may_return_a_tuple() -> None:
    class Tupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(CLASSES, CLASSES)

        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
            return self.linear(hidden), None

    class Unpacking(SoftmaxRegression):
        def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
            hidden = self.embedding(input_ids)
            for block in self.blocks:
                hidden, _ = block(hidden)
            return CausalLMOutput(logits=hidden)

    model = Unpacking(torch.zeros(CLASSES, CLASSES), torch.zeros(CLASSES), torch.randn(CLASSES, CLASSES))
    model.blocks = nn.ModuleList([Tupled(), Tupled()])
    found = collected(model, Sampled(0), ["fisher"], tokens(WINDOWS, CLASSES))
    assert all(bool((statistics["fisher"].value > 0).all()) for statistics in found.values())


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_the_batch_size_changes_neither_the_statistics_nor_the_sampled_labels(batch: int) -> None:
    model = TINY_MODELS["gemma3"]()
    mine, theirs = (collected(model, Sampled(0), batch=size) for size in (batch, BATCH))
    for site, statistics in mine.items():
        for name, statistic in statistics.items():
            assert relative(statistic.value, theirs[site][name].value) < 1e-4


def test_the_seed_decides_the_sampled_labels() -> None:
    model = TINY_MODELS["llama"]()
    energies = []
    for seed in (0, 0, 1):
        torch.rand(seed + 1)  # the global generator plays no part
        found = collected(model, Sampled(seed), ["output_gradient_diagonal"])
        energies.append(torch.cat([statistics["output_gradient_diagonal"].value for statistics in found.values()]))
    assert torch.equal(energies[0], energies[1])
    assert not torch.equal(energies[0], energies[2])


def test_sampling_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    collected(TINY_MODELS["llama"](), Sampled(0), ["fisher"])
    state = torch.get_rng_state()
    torch.set_rng_state(before)
    TINY_MODELS["llama"]()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_bfloat16_blocks_stay_close_to_float32(family: str, stored: torch.dtype) -> None:
    model = TINY_MODELS[family]().to(stored)
    found = collected(model, labels_of(model, "labels"), dtype=torch.bfloat16)
    assert all(parameter.dtype == stored for parameter in model.parameters())
    expected = collected(model.float(), labels_of(model, "labels"))
    for site, statistics in found.items():
        for name, statistic in statistics.items():
            assert relative(statistic.value, expected[site][name].value) < 0.15, (site, name)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_as_it_was(family: str, dtype: torch.dtype, training: bool) -> None:
    model = TINY_MODELS[family]()
    model.train(training)
    parameters = dict(model.named_parameters())
    for index, parameter in enumerate(parameters.values()):
        parameter.requires_grad_(index % 2 == 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    collected(model, labels_of(model, "sampled"), dtype=dtype)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for index, parameter in enumerate(parameters.values()):
        assert parameter.grad is None
        assert parameter.requires_grad == (index % 2 == 0)
    for name, module in model.named_modules():
        assert module.training is training
        assert not module._forward_pre_hooks, name
        assert not module._forward_hooks, name
        assert "forward" not in module.__dict__, name


def test_frozen_weights_and_a_surrounding_no_grad_change_nothing() -> None:
    model = TINY_MODELS["llama"]()
    expected = collected(model, Sampled(0), ["fisher"])
    model.requires_grad_(False)
    with torch.no_grad():
        found = collected(model, Sampled(0), ["fisher"])
    assert all(torch.equal(found[site]["fisher"].value, expected[site]["fisher"].value) for site in expected)


def test_dropout_is_off_also_in_a_model_in_training_mode() -> None:
    model = TINY_MODELS["gpt2"]()  # GPT-2's default dropout is 0.1
    anatomy, calls = probe(model, find_anatomy(model))
    inputs = capture(model, anatomy, tokens(), BATCH, calls, torch.float32, CPU)
    values = []
    for training in (False, True):
        wants = gradient_accumulators(anatomy.sites, ["fisher"], CPU)
        backward(model.train(training), anatomy, inputs, tokens(), wants, Sampled(0))
        values.append(torch.cat([statistics["fisher"].value for statistics in wants.values()]))
    assert torch.equal(*values)


def test_one_block_at_a_time_holds_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block is run twice: once without a graph, and once with, when its gradient is due."""
    model = TINY_MODELS["llama"]()
    anatomy, calls = probe(model, find_anatomy(model))
    inputs = capture(model, anatomy, tokens(), 100, calls, torch.float32, CPU)
    ran: list[tuple[int, bool]] = []
    asked: list[bool] = []
    for index, block in enumerate(anatomy.blocks(model)):
        block.register_forward_hook(lambda _, __, ___, index=index: ran.append((index, torch.is_grad_enabled())))
        block.register_forward_hook(lambda block, _, __: asked.extend(p.requires_grad for p in block.parameters()))
    backward(model, anatomy, inputs, tokens(), gradient_accumulators(anatomy.sites, ["fisher"], CPU), Sampled(0))
    stubs = [(index, True) for index in range(3)] * WINDOWS
    assert ran == [(0, False), (1, False), (2, False), *stubs, (2, True), (1, True), (0, True)]
    assert not any(asked), "a graph for the weights would keep every activation"


def test_every_block_of_every_batch_is_told() -> None:
    told: list[None] = []
    collected(TINY_MODELS["llama"](), Sampled(0), ["fisher"], on_batch=lambda: told.append(None))
    assert len(told) == 3 * 3


def test_the_forms_of_the_output_gradient_agree_and_are_per_token() -> None:
    g = torch.randint(-5, 6, (3, 8, 6)).float()
    full, diagonal, scalar = (OutputGradient(6, CPU, form) for form in ("full", "diagonal", "scalar"))  # type: ignore[arg-type]
    for statistic in (full, diagonal, scalar):
        assert not statistic.value.any(), "nothing was seen yet"
        statistic.update(torch.empty(3, 8, 1), g)
    g_TO = g.flatten(0, 1).double()
    torch.testing.assert_close(full.value, g_TO.T @ g_TO / 24)
    torch.testing.assert_close(diagonal.value, full.value.diagonal())
    torch.testing.assert_close(scalar.value, full.value.diagonal().mean())
    assert scalar.value.ndim == 0


def test_fisher_of_a_linear_regression_is_the_squared_residual_times_the_input() -> None:
    """``L = ½ (y - x w)²`` has the gradient ``-(y - x w) x``."""
    x_BN, w_N, y_B = torch.randn(40, 5), torch.randn(5), torch.randn(40)
    residual_B = y_B - x_BN @ w_N
    fisher = Fisher(5, CPU)
    fisher.update(x_BN[:, None], -residual_B[:, None, None])
    assert relative(fisher.value, (residual_B[:, None] * x_BN).square().sum(0).double()) < 1e-6


@pytest.mark.parametrize("batch", [1, 3])
def test_fisher_of_half_precision_values_loses_nothing(batch: int) -> None:
    x, g = torch.randn(3, 256, 16).bfloat16(), torch.randn(3, 256, 24).bfloat16()
    fisher = Fisher(16, CPU, batch)
    fisher.update(x, g)
    gradients = torch.einsum("bto,bti->boi", g.double(), x.double())
    expected = (gradients if batch == 1 else gradients.sum(0, keepdim=True)).square().sum((0, 1))
    assert relative(fisher.value, expected) < 1e-5


@pytest.mark.parametrize("sizes", [[7], [1] * 7, [2, 5], [4, 3], [3, 3, 1]])
def test_fisher_groups_run_across_calibration_batches_and_the_last_is_smaller(sizes: list[int]) -> None:
    x, g = torch.randn(7, 9, 6), torch.randn(7, 9, 4)
    gradients = torch.einsum("bto,bti->boi", g.double(), x.double())
    expected = sum(group.sum(0).square().sum(0) for group in gradients.split(3))
    fisher = Fisher(6, CPU, batch=3)
    for part_x, part_g in zip(x.split(sizes), g.split(sizes), strict=True):
        fisher.update(part_x, part_g)
    assert relative(fisher.value, expected) < 1e-6  # type: ignore[arg-type]
    assert fisher.tokens == 63


def test_a_closed_group_holds_no_gradient_between_batches() -> None:
    fisher = Fisher(6, CPU, batch=2)
    fisher.update(torch.randn(4, 9, 6), torch.randn(4, 9, 4))
    assert fisher._open_ON is None


class SoftmaxRegression(PreTrainedModel):
    """``logits = W x + b`` as a model: an embedding of fixed inputs, one block, and no head."""

    config_class = PretrainedConfig

    def __init__(self, weight_CC: torch.Tensor, bias_C: torch.Tensor, x_VC: torch.Tensor) -> None:
        super().__init__(PretrainedConfig())
        self.embedding = nn.Embedding.from_pretrained(x_VC)
        linear = nn.Linear(*weight_CC.shape)
        linear.weight.data, linear.bias.data = weight_CC.clone(), bias_C.clone()
        self.blocks = nn.ModuleList([nn.Sequential(linear)])

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor) -> CausalLMOutput:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return CausalLMOutput(logits=hidden)


CLASSES = 12
MANY = 4000


def toy() -> SoftmaxRegression:
    """A toy whose predictions do not depend on its input, where K-FAC's factorisation is exact."""
    bias_C, x_VC = torch.randn(CLASSES), torch.randn(CLASSES, CLASSES)
    return SoftmaxRegression(torch.zeros(CLASSES, CLASSES), bias_C, x_VC)


def test_fisher_of_a_softmax_regression_is_the_squared_error_of_the_prediction_times_the_input() -> None:
    """``L = -log softmax(W x + b)_y`` of every token has the gradient ``(p - onehot(y)) xᵀ``, summed over a window."""
    model = toy()
    model.blocks[0][0].weight.data.normal_(std=0.3)
    ids, given = tokens(WINDOWS, CLASSES), torch.randint(0, CLASSES, (WINDOWS, LENGTH))
    given[1, 4:] = -100
    found = collected(model, Given(given), ["fisher"], ids)["blocks.0.0"]["fisher"].value
    x_BTN = model.embedding(ids).double()
    error_BTC = model.double()(ids).logits.softmax(-1) - nn.functional.one_hot(given.clamp(min=0), CLASSES)
    error_BTC[given == -100] = 0
    expected = torch.einsum("btc,btn->bcn", error_BTC, x_BTN).square().sum((0, 1))
    assert relative(found, expected.detach()) < 1e-5


def test_the_gradient_of_sampled_labels_is_zero_on_average() -> None:
    class Mean:
        """The mean gradient, in the shape of a statistic."""

        of = "output_grad"
        by_example = False
        tokens = 0
        value = torch.zeros(CLASSES)

        def update(self, _: torch.Tensor, g: torch.Tensor) -> None:
            self.value = self.value + g.sum((0, 1))
            self.tokens += g.shape[0] * g.shape[1]

        def finite(self) -> bool:
            return True

    model = toy()
    model.blocks[0][0].weight.data.normal_(std=0.3)
    ids = tokens(MANY, CLASSES)
    anatomy, calls = probe(model, find_anatomy(model))
    inputs = capture(model, anatomy, ids, 500, calls, torch.float32, CPU)
    mean, energy = Mean(), OutputGradient(CLASSES, CPU, "diagonal")
    backward(model, anatomy, inputs, ids, {"blocks.0.0": {"mean": mean, "energy": energy}}, Sampled(0))  # type: ignore[dict-item]
    deviation = (energy.value / mean.tokens).sqrt()  # of the mean of so many independent draws
    assert mean.tokens == MANY * LENGTH
    assert ((mean.value / mean.tokens).abs() < 4 * deviation).all()


def test_the_predicted_loss_is_the_measured_kl_to_second_order() -> None:
    """``½ tr(B D A Dᵀ)`` against KL(p before || p after) a token; K-FAC is exact on this toy."""
    model = toy()
    ids = tokens(MANY, CLASSES)
    B_CC = collected(model, Sampled(0), ["output_gradient_full"], ids, 500)["blocks.0.0"]["output_gradient_full"].value
    x_TC = model.embedding(ids).flatten(0, 1).double()
    A_CC = x_TC.T @ x_TC / len(x_TC)
    p = model.blocks[0][0].bias.detach().double().softmax(0)
    assert relative(B_CC, p.diag() - torch.outer(p, p)) < 0.03
    errors = []
    direction = torch.randn(CLASSES, CLASSES, dtype=torch.float64)
    for size in (0.3, 0.03, 0.003):
        D_CC = size * direction
        predicted = 0.5 * torch.trace(B_CC @ D_CC @ A_CC @ D_CC.T)
        after_TC = log_softmax(p.log() + x_TC @ D_CC.T, dim=-1)
        measured = (p * (p.log() - after_TC)).sum(-1).mean()
        errors.append(abs(float(predicted / measured) - 1))
    assert errors[0] > 2 * errors[2], "a large change is not second order"
    assert errors[2] < 0.03


def test_an_infinite_gradient_is_refused_by_its_site() -> None:
    """In half precision; the hidden states going forward are finite."""
    model = TINY_MODELS["llama"]()
    model.model.norm.weight.data.mul_(3e5)
    model.lm_head.weight.data.mul_(3e5)
    with pytest.raises(ParedError, match=r"site model\.layers\.2\.mlp\.down_proj: .* the gradient .* NaN or infinite"):
        collected(model, NextToken(), ["output_gradient_diagonal"], dtype=torch.float16)


def test_hidden_states_and_logits_that_are_not_finite_are_refused_where_they_are() -> None:
    model = TINY_MODELS["llama"]()
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(ParedError, match="the head outputs NaN or infinity"):
        collected(model, Sampled(0))
    model.model.layers[1].mlp.down_proj.weight.data[0] = math.inf
    with pytest.raises(ParedError, match=r"block model\.layers\.1 outputs NaN or infinity"):
        collected(model, Sampled(0))
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_losses_that_do_not_fit_the_model_are_refused() -> None:
    bert, llama = TINY_MODELS["bert"](), TINY_MODELS["llama"]()
    with pytest.raises(ParedError, match="BertForSequenceClassification is not a causal language model"):
        choose_labels(bert, "labels", 0)
    with pytest.raises(ParedError, match="window 3 has none; 3 were given"):
        collected(bert, Given(torch.zeros(3, dtype=torch.long)))
    with pytest.raises(ParedError, match="window 0 has 12, the head predicts 1"):
        collected(bert, Given(tokens()))
    with pytest.raises(ParedError, match="window 2 has label 3, the head has 3 classes"):
        collected(bert, Given(torch.arange(WINDOWS) + 1))
    with pytest.raises(ParedError, match="LlamaModel outputs no logits"):
        collected(llama.model, Sampled(0))
    bert.config.problem_type = "regression"
    with pytest.raises(ParedError, match="gradients of a regression head of 3 outputs are not supported"):
        choose_labels(bert, "sampled", 0)
    one = transformers.BertForSequenceClassification(
        transformers.BertConfig(**{**bert.config.to_dict(), "num_labels": 1})
    )
    with pytest.raises(ParedError, match="one logit, a regression"):
        collected(one.eval(), Sampled(0))
    with pytest.raises(ParedError, match="predicts a score, and the text holds none"):
        choose_labels(one, "labels", 0)
    bert.config.problem_type = None
    with pytest.raises(ParedError, match="scores need a head that outputs one number"):
        collected(bert, Scores(torch.zeros(WINDOWS)))
    with pytest.raises(ParedError, match="window 3 has none; 3 were given"):
        collected(one.eval(), Scores(torch.zeros(3)))


def scored() -> PreTrainedModel:
    """An encoder that predicts one score."""
    config = transformers.BertConfig(**{**TINY_MODELS["bert"]().config.to_dict(), "num_labels": 1})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config).eval()


def test_fisher_of_a_score_is_that_of_the_squared_error() -> None:
    """Regression: FWSVD of STS-B, a task of its paper, was refused. Against torch's own mean squared error."""
    model, y_B = scored(), torch.linspace(0, 5, WINDOWS)
    found = collected(model, choose_labels(model, "labels", 0, y_B), ["fisher"])
    expected = {name: torch.zeros(own["fisher"].value.shape).double() for name, own in found.items()}
    for tokens_T, y in zip(tokens(), y_B, strict=True):
        model.zero_grad()
        loss = model(input_ids=tokens_T[None], labels=y[None]).loss  # transformers takes MSE for one label
        loss.backward()
        for name in expected:
            gradient = model.get_submodule(name).weight.grad
            assert gradient is not None
            expected[name] += gradient.double().square().sum(dim=0)
    for name, own in found.items():
        torch.testing.assert_close(own["fisher"].value, expected[name], rtol=1e-3, atol=1e-9)


def test_sampled_scores_have_the_fisher_of_the_gaussian() -> None:
    """``E[(2 (z - y))²] = 2`` at the head, whatever it predicts, and the seed decides."""
    z_11, scores = torch.tensor([[3.0]]), choose_labels(scored(), "sampled", 4)
    assert isinstance(scores, Scores)
    drawn = torch.stack([2 * (z_11[:, 0] - scores(window, tokens()[0], z_11)) for window in range(4000)])
    assert float(drawn.square().mean()) == pytest.approx(2, rel=0.1)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.1)
    assert torch.equal(scores(7, tokens()[0], z_11), Scores(seed=4)(7, tokens()[0], z_11))


class Router(nn.Module):
    """A block whose first expert reads every second token, and whose second expert runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.routed, self.twice = nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        chosen = torch.zeros_like(hidden).flatten(0, 1)
        chosen[::2] = self.routed(hidden.flatten(0, 1)[::2])
        return self.twice(self.twice(hidden + chosen.view_as(hidden)))


def routed(site: str, statistic: str, batch: int) -> Any:
    model = toy()
    model.blocks = nn.ModuleList([Router()])
    ids = tokens(WINDOWS, CLASSES)
    anatomy, calls = probe(model, find_anatomy(model))
    inputs = capture(model, anatomy, ids, batch, calls, torch.float32, CPU)
    accumulator = statistic_kind(statistic).accumulator(CLASSES, CPU)
    backward(model, anatomy, inputs, ids, {site: {statistic: accumulator}}, Sampled(0))
    return accumulator


def test_examples_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(ParedError, match=r"site blocks\.0\.routed reads 12 rows of 2 windows of 12 tokens"):
        routed("blocks.0.routed", "fisher", batch=2)
    assert routed("blocks.0.routed", "fisher", batch=1).tokens == WINDOWS * LENGTH // 2
    assert routed("blocks.0.twice", "output_gradient_full", batch=2).tokens == 2 * WINDOWS * LENGTH


def test_the_gradient_of_an_example_is_the_sum_over_the_runs_of_a_layer() -> None:
    found = []
    for batch in (1, 2):
        torch.manual_seed(0)
        found.append(routed("blocks.0.twice", "fisher", batch))
    torch.manual_seed(0)
    model, ids = toy(), tokens(WINDOWS, CLASSES)
    model.blocks = nn.ModuleList([Router()])
    weight, expected = model.blocks[0].twice.weight, torch.zeros(CLASSES, dtype=torch.float64)
    for window, tokens_T in enumerate(ids):
        logits = model(input_ids=tokens_T.unsqueeze(0)).logits.flatten(0, -2)
        y = Sampled(0)(window, tokens_T, logits.detach().softmax(-1))
        (gradient,) = torch.autograd.grad(cross_entropy(logits, y, reduction="sum"), weight)
        expected += gradient.double().square().sum(0)
    for one in found:
        assert relative(one.value, expected) < 1e-4


def test_an_input_changed_in_place_after_it_was_read_is_refused() -> None:
    class Rash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(CLASSES, CLASSES)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            x = hidden * 2
            y = self.linear(x)
            return y + x.mul_(3)

    model = toy()
    model.blocks = nn.ModuleList([Rash()])
    with pytest.raises(ParedError, match=r"site blocks\.0\.linear: its input is changed in place"):
        collected(model, Sampled(0), ["fisher"], tokens(WINDOWS, CLASSES))


def test_a_block_may_change_its_input_in_place() -> None:
    """The next pass over the block starts from the input that was kept."""

    class Adding(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.linear, self.inplace = nn.Linear(CLASSES, CLASSES), inplace

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            y = self.linear(hidden.clone())
            return hidden.add_(y) if self.inplace else hidden + y

    values = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = toy()
        model.blocks = nn.ModuleList([Adding(inplace), Adding(False)])
        found = collected(model, Sampled(0), ["fisher"], tokens(WINDOWS, CLASSES))
        values.append(torch.cat([statistics["fisher"].value for statistics in found.values()]))
    assert torch.equal(*values)


@pytest.mark.parametrize("loss", ["labels", "sampled"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen2_moe"])
def test_a_large_head_goes_over_parts_of_the_tokens(family: str, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a window of 512 tokens of a vocabulary of 151,936 took 1.3 GB of logits and their gradient."""
    model, rows = TINY_MODELS[family](), list[int]()
    labels = labels_of(model, loss)
    whole = collected(model, labels, ["output_gradient_full"])
    monkeypatch.setattr("pared.calibration.head.LOGITS", 5 * VOCAB + 1)
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: rows.append(logits.shape[-2]))
    found = collected(model, labels, ["output_gradient_full"])
    parts = [5] * (LENGTH // 5) + [LENGTH % 5] * bool(LENGTH % 5)
    assert rows[-WINDOWS * len(parts) :] == parts * WINDOWS
    for site, own in whole.items():
        assert relative(found[site]["output_gradient_full"].value, own["output_gradient_full"].value) < 1e-5


def test_labels_of_a_part_of_the_tokens_are_those_of_the_whole_window() -> None:
    ids, p_RC = tokens()[0], torch.rand(LENGTH, VOCAB, generator=torch.Generator().manual_seed(1))
    given = torch.arange(WINDOWS * LENGTH).reshape(WINDOWS, LENGTH) % VOCAB
    sources: list[Labels] = [Sampled(3), Sampled(3, given.masked_fill(given % 3 == 0, -100)), NextToken(), Given(given)]
    for labels in sources:
        some = range(2, 7)
        assert torch.equal(labels(0, ids, p_RC[2:7], some), labels(0, ids, p_RC)[2:7])
    with pytest.raises(ParedError, match=f"has {LENGTH}, the head predicts {LENGTH + 1}"):
        Given(given)(0, torch.cat([ids, ids[:1]]), p_RC[:4], range(4))
