"""Whole experts taken out of mixtures: what that costs, which go, and what is left."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiers import some
from tiny_models import MIXTURES, TINY_MODELS
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import pared
from pared import Calibration, ParedError, Recipe
from pared.calibration.statistics.experts import EXPERTS, ExpertLoss
from pared.data.windows import Windows
from pared.engine import CompressedBlocks, PassSpec, compress_blocks, plan_from_shapes, resolve
from pared.engine.families.experts import ExpertWork
from pared.engine.install import keep_experts
from pared.engine.observe import Observer
from pared.schema.manifest import Manifest
from pared.schema.width import channels_of
from pared.structure import find_anatomy
from pared.structure.groups import RefusedError
from pared.structure.store import ResidentBlocks
from pared.widths.experts import by_loss, by_reap
from unit.checkpoint.test_checkpoint import logits
from unit.structure.test_experts import mixtures, model_of

FAMILIES = sorted(MIXTURES)
# One whose router normalises the weights of picked experts, and one with a buffer of the router and a dense block.
FEW = some(("mixtral", "deepseek_v3"), FAMILIES)
EXPERTS_OF = 6  # every tiny mixture


def recipe(calibration: Calibration, keep: float = 0.7, **more: Any) -> Recipe:
    return Recipe(**{"structures": "experts", "keep": keep, "calibration": calibration, **more})


def compressed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, calibration: Calibration, **more: Any
) -> CompressedBlocks:
    return compress_blocks(model, tokenizer, resolve(recipe(calibration, **more)))


def kept_of(result: CompressedBlocks) -> dict[str, list[int]]:
    """Return which experts stay, by mixture."""
    return {site.decision.group: channels_of(site.decision.kept) for site in result.plan.sites}


def by_hand(whole: PreTrainedModel, kept: dict[str, list[int]]) -> PreTrainedModel:
    """Return a model of a configuration with fewer experts, its tensors picked from those of the whole one."""
    config = copy.deepcopy(whole.config)
    (count,) = {len(one) for one in kept.values()}
    setattr(
        config,
        next(n for n in ("num_local_experts", "num_experts", "n_routed_experts") if n in config.to_dict()),
        count,
    )
    made = type(whole)._from_config(config).eval()
    state = whole.state_dict()
    for name, own in made.state_dict().items():
        if own.shape == state[name].shape:
            own.copy_(state[name])
        else:
            (group,) = (group for group in kept if name.startswith(group.rpartition(".")[0]))
            own.copy_(state[name][kept[group]])
    return made


@pytest.mark.parametrize("family", FEW)
def test_it_answers_as_a_model_made_by_hand_of_the_experts_that_stay(
    family: str, tokenizer: PreTrainedTokenizerFast, calibration: Calibration
):
    result = compressed(MIXTURES[family](), tokenizer, calibration)
    kept = kept_of(result)
    assert kept
    assert all(len(one) == 4 for one in kept.values())
    made = by_hand(MIXTURES[family](), kept)
    assert torch.equal(logits(result.model), logits(made))
    assert result.plan.after.model_parameters == sum(p.numel() for p in made.parameters())
    assert {n: p.shape for n, p in result.model.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}
    numbers = [{k: v for k, v in vars(m).items() if type(v) is int} for m in result.model.modules()]
    assert numbers == [{k: v for k, v in vars(m).items() if type(v) is int} for m in made.modules()]


@pytest.mark.parametrize("family", ["gpt_oss", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_a_hidden_size_that_is_the_number_of_experts_by_chance_stays(
    family: str, tokenizer: PreTrainedTokenizerFast, calibration: Calibration
):
    result = compressed(model_of(family, 32), tokenizer, calibration, keep=0.5)
    made = by_hand(model_of(family, 32), kept_of(result))
    assert torch.equal(logits(result.model), logits(made))
    assert (result.model.config.hidden_size, result.model.config.num_local_experts) == (32, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_kept_are_the_model_bit_for_bit(family: str):
    model = MIXTURES[family]()
    expected = logits(model)
    for one in mixtures(model):
        keep_experts(model, one, torch.arange(EXPERTS_OF))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found_of_a_mixture_is_what_its_code_does(family: str):
    found = mixtures(MIXTURES[family]())
    assert [one.block for one in found] == ([1] if family == "deepseek_v3" else [0, 1])
    for one in found:
        assert (one.experts, one.picked, one.rescales) == (EXPERTS_OF, 2, family == "olmoe")
        assert len(one.counts) == 2
        shared = {stack.leaf for stack in one.stacks}
        assert ("e_score_correction_bias" in shared, "bias" in shared) == (family == "deepseek_v3", family == "gpt_oss")


def test_a_router_whose_logits_are_equal_by_rounding_is_proved_all_the_same():
    """In bfloat16 the last expert that is picked and the first that is not often have one logit."""
    model = MIXTURES["mixtral"]()
    expected = mixtures(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[1:] = layer.mlp.gate.weight[0] + 1e-3 * layer.mlp.gate.weight[1:]
    assert mixtures(model.to(torch.bfloat16)) == expected


def observed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    calibration: Calibration,
    forward: bool = False,
    otherwise: Callable[[], None] = lambda: None,
    **more: Any,
) -> tuple[Observer, dict[str, ExpertLoss]]:
    """Return the statistics of every mixture, of a model that may be made another after it is probed."""
    spec = resolve(recipe(calibration, **more))
    anatomy = find_anatomy(model)
    observer = Observer(ResidentBlocks(model, anatomy), tokenizer, spec)
    observer.probe(anatomy)
    observer.read()
    ExpertWork(observer, spec)  # finds and proves them
    found: dict[str, ExpertLoss] = {}

    def visit(block: Any) -> None:
        found.update({name: own[EXPERTS] for name, own in block.statistics.items() if EXPERTS in own})

    otherwise()
    inputs = observer.capture()
    if forward:
        observer.forward(inputs, lambda _: frozenset(), visit, PassSpec("solve", "forward"))
    else:
        observer.backward(inputs, frozenset(), visit)
    return observer, found


def never_pick(model: PreTrainedModel, expert: int) -> None:
    """Have the router of every block never pick an expert."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("router.bias", "e_score_correction_bias")):
            tensor.data[expert] = -100.0


@pytest.mark.parametrize("family", ["gpt_oss", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_an_expert_that_is_never_picked_costs_nothing_and_goes_first(
    family: str, tokenizer: PreTrainedTokenizerFast, calibration: Calibration
):
    for method in ("loss-optimal", "reap"):
        model = MIXTURES[family]()
        never_pick(model, 3)
        expected = logits(model)
        result = compressed(model, tokenizer, calibration, keep=0.84, method=method)
        assert set(map(tuple, kept_of(result).values())) == {(0, 1, 2, 4, 5)}
        assert torch.allclose(logits(result.model), expected, atol=1e-6)
    model = MIXTURES[family]()
    never_pick(model, 3)
    for own in observed(model, tokenizer, calibration)[1].values():
        order = by_loss(own.value)
        assert (order.loss(EXPERTS_OF - 1), int(order.order_E[-1])) == (0.0, 3)
        assert (own.picks[3], own.picks.sum()) == (0, 2 * own.tokens)


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_the_loss_of_one_expert_is_that_of_the_smaller_mixture_to_first_order(
    family: str, tokenizer: PreTrainedTokenizerFast, calibration: Calibration
):
    """What the statistic says is what a mixture without the expert, made by hand, changes the output by."""
    model = MIXTURES[family]()
    observer, found = observed(model, tokenizer, calibration, options={"loss": "labels"})
    windows: Windows = observer._windows
    one = observer.anatomy.mixtures[-1]
    root, experts = model.get_submodule(one.root), model.get_submodule(one.name)
    read: list[Any] = []
    made: list[torch.Tensor] = []
    handles = [
        root.register_forward_pre_hook(lambda _, args: read.append(args[0].detach())),
        experts.register_forward_hook(lambda *args: (args[2].retain_grad(), made.append(args[2]))[0]),
    ]
    tokens = windows.tokens
    scores = model(tokens).logits[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(scores, tokens[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    changes = []
    for gone in range(EXPERTS_OF):
        smaller = copy.deepcopy(model)
        keep_experts(smaller, one, torch.tensor([j for j in range(EXPERTS_OF) if j != gone]))
        for count in one.counts:
            setattr(smaller.get_submodule(count.module), count.attribute, EXPERTS_OF - 1)
        seen: list[torch.Tensor] = []
        smaller.get_submodule(one.name).register_forward_hook(lambda *args, seen=seen: seen.append(args[2]))
        with torch.no_grad():
            smaller.get_submodule(one.root)(read[0].clone())
        changes.append(((seen[0] - made[0].detach()) * made[0].grad).sum(dim=-1).double())
    u_TE = torch.stack(changes, dim=1)
    expected = u_TE.T @ u_TE / len(u_TE)
    assert torch.allclose(found[one.name].value, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["mixtral", pytest.param("olmoe", marks=pytest.mark.slow)])
def test_reap_is_the_mean_of_norms_times_weights(
    family: str, tokenizer: PreTrainedTokenizerFast, calibration: Calibration
):
    model = MIXTURES[family]()
    observer, found = observed(model, tokenizer, calibration, forward=True)
    backward = observed(model, tokenizer, calibration)[1]
    one = observer.anatomy.mixtures[0]
    experts = model.get_submodule(one.name)
    calls: list[Any] = []
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        model(observer._windows.tokens)
        handle.remove()
        sums, picks = torch.zeros(EXPERTS_OF), torch.zeros(EXPERTS_OF)
        for hidden, index, weights in calls:
            for token in range(len(hidden)):
                for place in range(2):
                    expert = int(index[token, place])
                    made = experts(
                        hidden[token : token + 1], index[token : token + 1, place : place + 1], torch.ones(1, 1)
                    )
                    sums[expert] += weights[token, place] * made.norm()
                    picks[expert] += 1
    own = found[one.name]
    assert torch.equal(own.picks.float(), picks)
    assert torch.allclose(own.weighted.float(), sums, rtol=1e-4)
    assert torch.allclose(own.weighted, backward[one.name].weighted)
    assert not own.value.any()
    order = by_reap(own.weighted, own.picks)
    assert order.order_E.tolist() == (sums / picks).argsort(descending=True).tolist()


def test_experts_go_by_what_they_add_and_the_loss_told_is_that_of_all_that_are_gone():
    """One that takes back what those that are gone did costs less than one that alone costs less, and goes first.

    An order by the loss of each alone would leave them as they are numbered.
    """
    root_EE = torch.diag(torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0], dtype=torch.float64))
    root_EE[2] = -2.0 * root_EE[0]  # takes back what 0 does, and more
    root_EE[3] = 1.6 * root_EE[1]  # does what 1 does again
    M_EE = root_EE @ root_EE.T
    found = by_loss(M_EE)
    assert found.order_E.flip(0).tolist() == [0, 2, 1, 4, 3]
    u_TE = torch.randn(500, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    for moments_EE in (M_EE, u_TE.T @ u_TE / len(u_TE)):
        found, experts = by_loss(moments_EE), len(moments_EE)

        def loss(gone: list[int], moments_EE: torch.Tensor = moments_EE) -> float:
            return 0.5 * float(moments_EE[gone][:, gone].sum())

        order = found.order_E.flip(0).tolist()
        for count in range(experts):
            left = {j: loss([*order[:count], j]) for j in order[count:]}
            assert left[order[count]] == pytest.approx(min(left.values()), abs=1e-9)
        for count in range(1, experts + 1):
            gone = [j for j in range(experts) if j not in found.kept(count).tolist()]
            assert found.loss(count) == pytest.approx(loss(gone), abs=1e-9)


@pytest.mark.parametrize("family", FEW)
def test_its_folder_is_a_plain_one_that_loads_in_one_line(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, calibration: Calibration
):
    model = MIXTURES[family]()
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    asked = recipe(calibration, model=str(tmp_path / "dense"), out=str(tmp_path / "out"), evaluation=None)
    pared.run(asked)
    manifest = Manifest.read(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert 4 in (config.get("num_local_experts"), config.get("num_experts"), config.get("n_routed_experts"))
    assert not {"quantization_config", "auto_map"} & config.keys()
    assert not list((tmp_path / "out").glob("*.py"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (manifest.self_check, pared.verify(tmp_path / "out")) == (0.0, 0.0)
    assert all("4 of 6 experts" in line for line in manifest.plan.kinds())
    assert torch.equal(logits(loaded), logits(compressed(model, tokenizer, calibration).model))


@pytest.mark.parametrize(
    ("family", "more", "told"),
    [
        ("llama", {}, "LlamaForCausalLM has no mixtures of experts"),
        ("mixtral", {"keep": 0.2}, "leaves 1 of 6 experts, and each token is given to 2; the least keep is 0.3334"),
        ("mixtral", {"skip": ("*",)}, "does not take skip"),
        ("mixtral", {"refine": True}, "does not take refine"),
        ("mixtral", {"heads": "on"}, "does not take heads"),
        ("mixtral", {"allocation": "loss"}, "every layer keeps as many"),
        ("mixtral", {"method": "svd-llm"}, "svd-llm has no score of experts"),
        ("mixtral", {"method": "reap", "structures": "ranks"}, "reap takes whole experts out, got structures ranks"),
        ("mixtral", {"method": "reap", "heads": "on"}, "does not take heads"),
        ("mixtral", {"options": {"input_shrinkage": 0.1}}, "option input_shrinkage of method loss-opti"),
        ("grouped", {}, "its router picks others of the experts that stay where some are gone"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line(
    family: str, more: dict[str, Any], told: str, tokenizer: PreTrainedTokenizerFast, calibration: Calibration
):
    model = grouped() if family == "grouped" else (MIXTURES | TINY_MODELS)[family]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ParedError, match=told) as caught:
        compressed(model, tokenizer, calibration, **more)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def grouped() -> PreTrainedModel:
    """Return a model whose router picks one of two groups of experts first."""
    model = MIXTURES["deepseek_v3"]()
    config = copy.deepcopy(model.config)
    config.n_group, config.topk_group = 2, 1
    torch.manual_seed(0)
    return type(model)._from_config(config).eval()


def test_a_router_that_is_a_linear_layer_is_found_too():
    """Here by a subclass, as some families have it; the layer is no target and loses rows all the same."""
    model = MIXTURES["mixtral"]()
    for layer in model.model.layers:
        layer.mlp.gate = _LinearRouter(layer.mlp.gate)
    found = mixtures(model)
    assert [[stack.name for stack in one.router] for one in found] == [
        [f"model.layers.{block}.mlp.gate.weight"] for block in range(2)
    ]
    assert all(len(one.counts) == 2 for one in found)


class _LinearRouter(nn.Linear):
    """Picks two experts."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__(router.weight.shape[1], len(router.weight), bias=False)
        self.weight = router.weight

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = nn.functional.linear(hidden, self.weight)
        values, index = scores.softmax(dim=-1).topk(2, dim=-1)
        return scores, values / values.sum(dim=-1, keepdim=True), index


def test_experts_whose_weights_go_in_before_they_run_are_refused():
    """What they make is then no weighted sum, and nothing that is told of one expert would hold."""
    model = MIXTURES["mixtral"]()
    kind = type(model.model.layers[0].mlp.experts)

    class Inside(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden, index, weights**2)

    for layer in model.model.layers:
        layer.mlp.experts.__class__ = Inside
    with pytest.raises(RefusedError, match="is not their weighted sum"):
        mixtures(model)


def test_the_plan_from_shapes_has_the_sizes_of_what_is_made(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, calibration: Calibration
):
    model = MIXTURES["deepseek_v3"]()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    planned = pared.plan(str(tmp_path), structures="experts", keep=0.7)
    made = compressed(model, tokenizer, calibration).plan
    assert planned.sizes() == made.sizes()
    assert [site.name for site in planned.sites] == [site.name for site in made.sites]
    assert "experts alone are taken out" in {weight.reason for weight in planned.uncovered}
    assert 0.66 < made.achieved_keep < 0.67
    with pytest.raises(ParedError, match="what taking experts out costs in time and memory is not predicted"):
        pared.plan(str(tmp_path), method="reap", keep=0.7, cost=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_does_not_leave_fewer_experts_than_a_token_is_given_to(family: str):
    """A plan of one expert had been printed for what a compression refuses."""
    whole = MIXTURES[family]()
    with torch.device("meta"):
        shapes = type(whole)._from_config(whole.config)
    spec = resolve(Recipe(structures="experts", keep=0.2))
    for model in (whole, shapes):
        with pytest.raises(ParedError, match="leaves 1 of 6 experts, and each token is given to 2"):
            plan_from_shapes(model, spec)


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("top_k", "gives a token to 3 experts, not to 2, on the calibration text, unlike in the probe pass"),
        ("call", "are not called with what tokens read, the numbers of the experts picked and their weights on the"),
    ],
)
def test_a_mixture_that_does_something_else_on_the_text_is_refused_in_a_line(
    forward: bool, change: str, told: str, tokenizer: PreTrainedTokenizerFast, calibration: Calibration
):
    """A traceback of an error that is no one of ours had ended the run; of more picks nothing was said."""
    model = MIXTURES["mixtral"]()

    def otherwise() -> None:
        block = model.model.layers[0].mlp
        if change == "top_k":
            block.gate.top_k = 3
        else:
            run = block.experts.forward
            block.experts.forward = lambda hidden, both: run(hidden, *both)
            block.forward = lambda hidden: _in_one(block, hidden)

    with pytest.raises(ParedError, match=told) as caught:
        observed(model, tokenizer, calibration, forward=forward, otherwise=otherwise)
    assert "experts model.layers.0.mlp.experts: " in str(caught.value)
    assert "\n" not in str(caught.value)


def _in_one(block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Run a mixture whose experts are given numbers and weights in one argument."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    _, weights, index = block.gate(flat)
    made: torch.Tensor = block.experts(flat, (index, weights))
    return made.view_as(hidden)
