"""A block that runs several times in a pass is one set of weights with all their inputs: ALBERT, looped stacks."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from passes import UNSHRUNK, walk
from tiny_models import REPEATED, TINY_MODELS, VOCAB
from torch import nn
from transformers import AlbertForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import pared
from pared import ParedError
from pared.calibration import BlockStatistics, capture
from pared.data.windows import Windows
from pared.engine.families import pruning
from pared.engine.families.low_rank import LowRankWork
from pared.engine.observe import Observer
from pared.lowrank import Factors
from pared.lowrank.sharing import refit
from pared.modules import LowRankLinear
from pared.structure import find_anatomy, probe

WINDOWS, LENGTH = 7, 16
Tensors = Mapping[str, torch.Tensor]
LOWRANK = ["fwsvd", "asvd", "svd-llm", "svd-llm-v2", "basis-sharing", "loss-optimal"]


@pytest.fixture
def albert() -> PreTrainedModel:
    config = REPEATED["albert"]().config
    torch.manual_seed(0)
    return AlbertForMaskedLM._from_config(config).eval()


@pytest.fixture
def windows() -> Windows:
    tokens = torch.randint(3, VOCAB, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(2))
    return Windows(tokens, "digest", "text", "origin", stand_in=True)


@pytest.fixture
def compress(calibration: pared.Calibration, tokenizer: Any, windows: Windows) -> Callable[..., Any]:
    def run(model: PreTrainedModel, **recipe: Any) -> Any:
        budget = {} if {"sparsity", "pattern"} & recipe.keys() else {"keep": 0.6}
        asked = pared.Recipe(**budget, calibration=calibration, **recipe)
        return pared.compress(model, tokenizer, asked, windows=windows)

    return run


def reads(model: PreTrainedModel, windows: Windows, names: Iterable[str] = ()) -> dict[str, torch.Tensor]:
    """Return what layers (all inside the blocks) read over all runs, by plain hooks: ``(rows, in)`` float64."""
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    handles = []
    for name in names or [site.name for site in find_anatomy(model).sites]:
        keep = lambda _, args, name=name: seen[name].append(args[0].detach().flatten(0, -2).double())  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    with torch.no_grad():
        model(input_ids=windows.tokens)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def errors(
    model: PreTrainedModel, dense: Mapping[str, torch.Tensor], x: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    found = {}
    for name, W_ON in dense.items():
        new = model.get_submodule(name).weight.detach().double()
        found[name] = float(((W_ON - new) @ x[name].T).norm() / (W_ON @ x[name].T).norm())
    return found


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {s.name: model.get_submodule(s.name).weight.detach().double() for s in find_anatomy(model).sites}


def test_svd_llm_is_the_optimum_for_the_inputs_of_all_runs(
    albert: PreTrainedModel, windows: Windows, compress: Callable[..., Any]
) -> None:
    """Calibrated on the first run alone the error was twice the optimum, and the self-check saw nothing."""
    x, dense = reads(albert, windows), weights(albert)
    compress(albert, method="svd-llm")
    found = errors(albert, dense, x)
    for name, W_ON in dense.items():
        Y_RO = x[name] @ W_ON.T
        s = torch.linalg.svdvals(Y_RO)
        rank = albert.get_submodule(name).rank
        optimum = float(s[rank:].norm() / s.norm())
        assert found[name] == pytest.approx(optimum, rel=1e-3)


@pytest.mark.parametrize("more", [{}, {"statistics": "sequential"}, {"refit": "update"}, {"refit": "sequential"}])
@pytest.mark.parametrize("method", LOWRANK)
def test_every_method_takes_repeated_blocks(
    albert: PreTrainedModel, windows: Windows, compress: Callable[..., Any], method: str, more: dict[str, Any]
) -> None:
    x, dense = reads(albert, windows), weights(albert)
    if method == "fwsvd":
        more = {**more, "options": {"loss": "sampled"}}
    plan = compress(albert, method=method, **more).plan
    assert plan.achieved_keep <= 0.6
    # Every run is served: plain svd is at 0.5, and one calibrated on the first run alone at 0.7 to 1 in the later ones.
    for name, error in errors(albert, dense, x).items():
        if isinstance(albert.get_submodule(name), LowRankLinear):
            assert error < 0.75, name


@pytest.mark.parametrize("allocation", ["uniform", "owl", "er", "alphapruning", "loss"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_every_pruner_takes_repeated_blocks(
    albert: PreTrainedModel, compress: Callable[..., Any], method: str, allocation: str
) -> None:
    plan = compress(albert, method=method, sparsity=0.5, allocation=allocation).plan
    assert plan.achieved_keep == pytest.approx(0.5, abs=0.03)


def test_wanda_weighs_by_the_inputs_of_all_runs(
    albert: PreTrainedModel, windows: Windows, compress: Callable[..., Any]
) -> None:
    x, dense = reads(albert, windows), weights(albert)
    compress(albert, method="wanda", sparsity=0.5)
    for name, W_ON in dense.items():
        scores_ON = W_ON.abs() * x[name].square().sum(0).sqrt()
        kept_ON = torch.zeros_like(scores_ON, dtype=torch.bool)
        kept_ON.scatter_(1, scores_ON.topk(W_ON.shape[1] // 2, dim=1).indices, True)
        same = (albert.get_submodule(name).weight != 0) == kept_ON
        assert same.double().mean() > 0.995, name  # but for ties to rounding


def test_a_refit_is_least_squares_over_the_runs_of_the_compressed_model(
    windows: Windows, compress: Callable[..., Any]
) -> None:
    def fresh() -> PreTrainedModel:
        torch.manual_seed(0)
        return AlbertForMaskedLM._from_config(REPEATED["albert"]().config).eval()

    plain, fitted = fresh(), fresh()
    dense = weights(plain)
    compress(plain, method="svd-llm", refit="off")
    compress(fitted, method="svd-llm", refit="update", dense_path=0)
    seen = reads(plain, windows, dense)
    for name, W_ON in dense.items():
        x = seen[name]
        module = plain.get_submodule(name)
        factors = Factors(module.down.weight.detach(), module.up.weight.detach())
        expected = refit(W_ON, factors, x.T @ x, x.T @ x)
        torch.testing.assert_close(fitted.get_submodule(name).up.weight.double(), expected, atol=1e-3, rtol=1e-3)


def test_the_influence_of_a_block_is_the_mean_over_its_runs(albert: PreTrainedModel, windows: Windows) -> None:
    anatomy, calls = probe(albert, find_anatomy(albert))
    inputs = capture(albert, anatomy, windows.tokens, 3, calls, torch.float32, torch.device("cpu"))
    (walked,) = walk(albert, anatomy, inputs, lambda _: frozenset(), influence=True)
    cosines: list[torch.Tensor] = []
    block = anatomy.blocks(albert)[0]
    block.register_forward_hook(
        lambda _, args, output: cosines.append(torch.cosine_similarity(args[0], output, dim=-1).mean())
    )
    with torch.no_grad():
        for part in torch.split(windows.tokens, 3):
            albert(input_ids=part)
    assert walked.influence == pytest.approx(1 - float(torch.stack(cosines).mean()), abs=1e-5)


class Looped(PreTrainedModel):
    """Blocks run in any order, and a head."""

    config_class = PreTrainedConfig

    def __init__(self, order: tuple[int, ...], inject: bool = False) -> None:
        super().__init__(PreTrainedConfig(vocab_size=VOCAB))
        self.order, self.inject = order, inject
        self.embed, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB)
        blocks = [nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)) for _ in range(1 + max(order))]
        self.layers = nn.ModuleList(blocks)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, **_: object) -> CausalLMOutput:
        embedded = hidden = self.embed(input_ids)
        for index in self.order:
            hidden = self.layers[index](hidden) + (embedded if self.inject else 0)
        return CausalLMOutput(logits=self.head(hidden))


CALIBRATING: list[dict[str, Any]] = [
    *({"method": method} for method in LOWRANK),
    *({"method": method, "sparsity": 0.5} for method in ("wanda", "sparsegpt")),
    {"method": "magnitude", "sparsity": 0.5, "allocation": "owl"},
    {"method": "svd", "refit": "update"},
]


@pytest.mark.parametrize("recipe", CALIBRATING, ids=lambda recipe: "-".join(map(str, recipe.values())))
@pytest.mark.parametrize("order", [(0, 1, 2, 0, 1, 2), (0, 1, 0, 1), (0, 1, 2, 0)])
def test_interleaved_blocks_are_refused_by_what_calibrates(
    compress: Callable[..., Any], recipe: dict[str, Any], order: tuple[int, ...]
) -> None:
    model = Looped(order).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ParedError, match=r"ran in the order \[0, 1, .*, not each one or more times in a row"):
        compress(model, **recipe)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("recipe", [{"method": "svd"}, {"method": "magnitude", "sparsity": 0.5}])
@pytest.mark.parametrize("inject", [False, True])
def test_interleaved_blocks_are_compressed_without_text(
    compress: Callable[..., Any], recipe: dict[str, Any], inject: bool
) -> None:
    model = Looped((0, 1, 0, 1), inject).eval()
    assert all(site.decision.kind != "dense" for site in compress(model, **recipe).plan.sites)


def test_what_comes_between_the_runs_of_a_block_is_refused(compress: Callable[..., Any]) -> None:
    with pytest.raises(ParedError, match=r"block layers\.0 does not read the output of the block before it"):
        compress(Looped((0, 0, 1), inject=True).eval(), method="svd-llm")


def test_a_loop_of_consecutive_runs_is_the_optimum_for_all_of_them(
    windows: Windows, compress: Callable[..., Any]
) -> None:
    model = Looped((0, 0, 0, 1, 1)).eval()
    x, dense = reads(model, windows), weights(model)
    compress(model, method="svd-llm")
    found = errors(model, dense, x)
    for name, W_ON in dense.items():
        s = torch.linalg.svdvals(x[name] @ W_ON.T)
        assert found[name] == pytest.approx(float(s[model.get_submodule(name).rank :].norm() / s.norm()), rel=1e-3)


@pytest.mark.parametrize("method", ["svd", "svd-llm"])
def test_one_block_listed_twice_is_refused(compress: Callable[..., Any], method: str) -> None:
    model = Looped((0, 1, 2)).eval()
    model.layers[2] = model.layers[0]
    with pytest.raises(ParedError, match=r"blocks layers\.0 and layers\.2 are one module"):
        compress(model, method=method)


def test_a_depth_that_depends_on_the_text_is_refused(compress: Callable[..., Any], windows: Windows) -> None:
    model = Looped((0, 0, 1)).eval()
    forward = model.forward

    def by_text(input_ids: torch.Tensor, **more: object) -> CausalLMOutput:
        model.order = (0, 0, 1) if input_ids.shape[1] == 8 else (0, 1)
        return forward(input_ids, **more)

    model.forward = by_text
    with pytest.raises(ParedError, match="how often the blocks of layers run depends on"):
        compress(model, method="svd-llm")


class LoopedList(nn.ModuleList):
    """A list that holds two blocks and iterates over each of them twice."""

    def __iter__(self) -> Any:
        return iter([self[0], self[0], self[1], self[1]])


@pytest.mark.parametrize("recipe", [{"method": "svd"}, {"method": "svd-llm"}, {"method": "wanda", "sparsity": 0.5}])
def test_a_list_that_iterates_in_a_loop_holds_every_block_once(
    compress: Callable[..., Any], recipe: dict[str, Any]
) -> None:
    model = TINY_MODELS["mistral"]()
    model.model.layers = LoopedList(list(model.model.layers))
    model.config.num_hidden_layers = 4
    anatomy, calls = probe(model, find_anatomy(model))
    assert [call.block for call in calls] == [0, 0, 1, 1]
    assert len(anatomy.sites) == 14
    assert len(compress(model, **recipe).plan.sites) == 14


@pytest.fixture
def felt(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a compression collects of gradients, which tests of the backward pass compare with autograd's."""
    found: dict[str, Any] = {}
    backward = Observer.backward

    def spy(self: Observer, inputs: Any, names: Any, visit: Callable[[BlockStatistics], None], *more: Any,
            **options: Any) -> None:  # fmt: skip
        def visit_and_keep(block: BlockStatistics) -> None:
            found.update(block.statistics)
            visit(block)

        backward(self, inputs, names, visit_and_keep, *more, **options)

    monkeypatch.setattr(Observer, "backward", spy)
    return found


def test_a_block_that_runs_several_times_costs_the_sum_over_its_runs_once(
    windows: Windows, compress: Callable[..., Any], felt: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both factors of the cost were sums over the runs, so that it was too high by the number of runs."""
    model = Looped((0, 0, 0, 1)).eval()
    x, dense = reads(model, windows), weights(model)
    spectra: dict[str, torch.Tensor] = {}
    allocate = LowRankWork._allocate

    def spy(self: LowRankWork, *order: Any) -> Any:
        spectra.update(self._solved.kept.spectra)
        return allocate(self, *order)

    monkeypatch.setattr(LowRankWork, "_allocate", spy)
    options = {"output_weighting": "diagonal", **UNSHRUNK}
    compress(model, method="loss-optimal", options=options, statistics="once")
    for name, W_ON in dense.items():
        runs = len(x[name]) // windows.tokens.numel()
        mean_A, sum_B = x[name].T @ x[name] / len(x[name]), felt[name]["output_gradient_diagonal"].value * runs
        cost = 0.5 * float((sum_B[:, None] * W_ON * (W_ON @ mean_A)).sum())
        assert float(spectra[name].square().sum()) / 2 == pytest.approx(cost, rel=2e-3)  # damped by 1e-4 on both sides


def test_the_loss_of_zeros_in_a_block_that_runs_several_times_is_summed_over_its_runs_once(
    windows: Windows, compress: Callable[..., Any], felt: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Looped((0, 0, 0, 1)).eval()
    x, dense = reads(model, windows), weights(model)
    found: dict[str, torch.Tensor] = {}
    losses = pruning.SparseWork._losses

    def spy(self: Any, name: str, seen: Any) -> torch.Tensor:
        found[name] = losses(self, name, seen)
        return found[name]

    monkeypatch.setattr(pruning.SparseWork, "_losses", spy)
    monkeypatch.setattr(pruning, "backward_data_fraction", lambda _: 1.0)
    compress(model, method="magnitude", sparsity=0.5, allocation="loss")
    for name, W_ON in dense.items():
        sum_B = felt[name]["output_gradient_diagonal"].value * (len(x[name]) // windows.tokens.numel())
        expected = 0.5 * W_ON.square() * x[name].square().mean(dim=0) * sum_B[:, None]
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=0)
