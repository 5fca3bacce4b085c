from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from passes import walk
from tiny_models import FAMILIES, REPEATED, TINY_MODELS, VOCAB
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

import pared
from pared import ParedError, Recipe
from pared.calibration import BlockInputs, BlockStatistics, capture
from pared.data.windows import Windows
from pared.environment import choose_dtype
from pared.structure import Anatomy, find_anatomy, probe

CPU = torch.device("cpu")
WINDOWS, LENGTH, BATCH = 7, 12, 3  # batches of 3, 3 and 1; longer than the sliding windows and the probe


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))


def only_gram(_: object) -> frozenset[str]:
    return frozenset({"gram"})


def both_grams(_: object) -> frozenset[str]:
    return frozenset({"gram", "output_gram"})


def walked(
    model: PreTrainedModel,
    dtype: torch.dtype = torch.float32,
    batch: int = BATCH,
    on_batch: Any = lambda: None,
    needs: Any = both_grams,
) -> tuple[Anatomy, BlockInputs, list[BlockStatistics]]:
    anatomy, calls = probe(model, find_anatomy(model))
    inputs = capture(model, anatomy, tokens(), batch, calls, dtype, CPU)
    return anatomy, inputs, list(walk(model, anatomy, inputs, needs, on_batch))


def statistics_of(steps: list[BlockStatistics], name: str) -> dict[str, Any]:
    return {site: statistics[name] for step in steps for site, statistics in step.statistics.items()}


def really_run(
    model: PreTrainedModel, anatomy: Anatomy
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return what the last block puts out, and the Gram of every site's inputs and of its outputs without bias.

    From a forward pass of the whole model and plain hooks.
    """
    last: list[torch.Tensor] = []
    inputs: dict[str, Any] = defaultdict(float)
    outputs: dict[str, Any] = defaultdict(float)

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = args[0].flatten(0, -2).double()
            y = (output if module.bias is None else output - module.bias).flatten(0, -2).double()
            inputs[name] = inputs[name] + x.T @ x
            outputs[name] = outputs[name] + y.T @ y

        return hook

    handles = [model.get_submodule(site.name).register_forward_hook(watch(site.name)) for site in anatomy.sites]
    keep_output = lambda _, __, output: last.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
    handles.append(anatomy.blocks(model)[-1].register_forward_hook(keep_output))
    with torch.no_grad():
        model(input_ids=tokens())
    for handle in handles:
        handle.remove()
    return last[-1], inputs, outputs


@pytest.mark.parametrize("family", [*FAMILIES, *REPEATED])
def test_the_walk_ends_in_the_hidden_states_of_a_real_forward_pass(family: str) -> None:
    model = (TINY_MODELS | REPEATED)[family]()
    anatomy, inputs, _ = walked(model)
    expected, _, _ = really_run(model, anatomy)
    assert [hidden.shape[0] for hidden in inputs.hidden] == [3, 3, 1]
    torch.testing.assert_close(torch.cat(list(inputs.hidden)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, *REPEATED])
def test_the_grams_are_those_of_plain_hooks(family: str) -> None:
    """Of a block that runs several times: over all its runs."""
    model = (TINY_MODELS | REPEATED)[family]()
    anatomy, inputs, steps = walked(model)
    _, *expected = really_run(model, anatomy)
    order = [call.block for call in inputs.calls[0]]
    runs = {site.name: order.count(site.block) for site in anatomy.sites}
    for name, grams in zip(("gram", "output_gram"), expected, strict=True):
        found = statistics_of(steps, name)
        assert found.keys() == grams.keys() == {site.name for site in anatomy.sites}
        for site, gram in found.items():
            torch.testing.assert_close(gram.value, grams[site], atol=1e-4, rtol=1e-5)
            assert gram.tokens == WINDOWS * LENGTH * runs[site]
            assert gram.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_that_read_one_tensor_share_one_accumulator_of_it(family: str) -> None:
    anatomy, _, steps = walked(TINY_MODELS[family]())
    found, own = statistics_of(steps, "gram"), statistics_of(steps, "output_gram")
    assert len({id(gram) for gram in found.values()}) == len({site.reads for site in anatomy.sites})
    assert len({id(gram) for gram in own.values()}) == len(anatomy.sites)
    for site in anatomy.sites:
        assert found[site.name] is found[site.reads]


def test_a_method_is_asked_what_it_needs_by_the_shapes_that_read_one_tensor() -> None:
    asked: list[list[tuple[int, int]]] = []

    def needs(shapes: list[tuple[int, int]]) -> frozenset[str]:
        asked.append(shapes)
        return frozenset({"output_gram"} if len(shapes) > 1 else {"gram"})

    _, _, steps = walked(TINY_MODELS["llama"](), needs=needs)
    block = [[(32, 32), (16, 32), (16, 32)], [(32, 32)], [(48, 32), (48, 32)], [(32, 48)]]
    assert asked == block * 3
    for site, statistics in steps[1].statistics.items():
        alone = site.endswith(("o_proj", "down_proj"))
        assert statistics.keys() == ({"gram"} if alone else {"output_gram"})


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_capture_nor_walk_runs_the_head(family: str) -> None:
    model = TINY_MODELS[family]()
    head = model.get_output_embeddings() or model.classifier
    runs: list[int] = []
    head.register_forward_pre_hook(lambda *_: runs.append(1))
    walked(model)
    assert runs == [1]  # the probe pass, of eight tokens, goes to the model's end
    with torch.no_grad():
        model(input_ids=tokens())
    assert runs == [1, 1], "the hook watches nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_leaves_the_model_as_it_was(family: str) -> None:
    model = TINY_MODELS[family]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    walked(model)
    walked(model, torch.bfloat16)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks, name
        assert not module._forward_hooks, name
        assert "forward" not in module.__dict__, name


def test_a_forward_that_accelerate_put_on_a_block_is_put_back() -> None:
    model = TINY_MODELS["llama"]()
    block = model.model.layers[1]
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)
    put = block.forward
    walked(model)
    assert block.__dict__["forward"] is put


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_walk_of_a_float32_model_stays_close_to_it(family: str) -> None:
    model = TINY_MODELS[family]()
    anatomy, _, steps = walked(model, torch.bfloat16)
    _, grams, _ = really_run(model, anatomy)
    first = next(site.name for site in anatomy.sites_of(0))
    gram = steps[0].statistics[first]["gram"]
    assert gram.dtype == torch.bfloat16
    assert (gram.value - grams[first]).norm() < 0.05 * grams[first].norm()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gpt_neox"])
def test_a_half_precision_model_can_be_walked_in_float32(family: str, stored: torch.dtype) -> None:
    """Regression: clamping a half-precision mask to the limits of float32 overflowed."""
    model = TINY_MODELS[family]().to(stored)
    _, inputs, _ = walked(model, torch.float32)
    expected, _, _ = really_run(model.float(), find_anatomy(model))
    found = torch.cat(list(inputs.hidden))
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert found.isfinite().all()


@pytest.mark.parametrize("batch", [1, 2, 7, 100])
def test_the_batch_size_does_not_change_the_statistics(batch: int) -> None:
    model = TINY_MODELS["gemma3"]()
    _, inputs, steps = walked(model, batch=batch)
    _, expected_inputs, expected = walked(model)
    torch.testing.assert_close(
        torch.cat(list(inputs.hidden)), torch.cat(list(expected_inputs.hidden)), atol=1e-5, rtol=1e-5
    )
    for step, other in zip(steps, expected, strict=True):
        for name in step.statistics:
            mine, theirs = step.statistics[name]["gram"], other.statistics[name]["gram"]
            torch.testing.assert_close(mine.value, theirs.value, atol=1e-4, rtol=1e-5)


def test_every_batch_of_every_block_is_told() -> None:
    told: list[None] = []
    walked(TINY_MODELS["llama"](), on_batch=lambda: told.append(None))
    assert len(told) == 3 * 3


@pytest.mark.parametrize("family", sorted(TINY_MODELS))
@pytest.mark.parametrize("needs", [only_gram, both_grams])
def test_a_pass_that_ends_at_the_last_read_collects_what_a_whole_one_does(family: str, needs: Any) -> None:
    model = TINY_MODELS[family]()
    anatomy, whole, expected = walked(model, needs=needs)
    calls = probe(model, find_anatomy(model))[1]
    inputs = capture(model, anatomy, tokens(), BATCH, calls, torch.float32, CPU)
    found = list(walk(model, anatomy, inputs, needs, sequential=True))
    for name in needs([]):
        ours, theirs = statistics_of(found, name), statistics_of(expected, name)
        assert ours.keys() == theirs.keys()
        for site, statistic in ours.items():
            assert statistic.tokens == theirs[site].tokens
            torch.testing.assert_close(statistic.value, theirs[site].value)
    torch.testing.assert_close(torch.cat(list(inputs.hidden)), torch.cat(list(whole.hidden)))


def test_the_first_of_two_passes_ends_before_the_last_product() -> None:
    model = TINY_MODELS["llama"]()
    anatomy, calls = probe(model, find_anatomy(model))
    inputs = capture(model, anatomy, tokens(), BATCH, calls, torch.float32, CPU)
    made: list[None] = []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: made.append(None))
    list(walk(model, anatomy, inputs, only_gram, sequential=True))
    assert len(made) == 1 + 3  # of three batches, the first tells which site is last; then all of them


def test_batches_called_alike_hold_their_masks_once() -> None:
    model = TINY_MODELS["mistral"]()
    anatomy, calls = probe(model, find_anatomy(model))
    inputs = capture(model, anatomy, tokens()[:6], BATCH, calls, torch.float32, CPU)
    assert inputs.calls[1][0] is inputs.calls[0][0]


def test_a_block_may_be_replaced_as_soon_as_it_was_walked() -> None:
    model = TINY_MODELS["llama"]()
    anatomy, calls = probe(model, find_anatomy(model))
    inputs = capture(model, anatomy, tokens(), BATCH, calls, torch.float32, CPU)
    expected, _, _ = really_run(model, anatomy)

    def visit(step: BlockStatistics) -> None:
        for parameter in anatomy.blocks(model)[step.index].parameters():
            parameter.data = torch.zeros(0)

    walk(model, anatomy, inputs, only_gram, visit=visit)
    torch.testing.assert_close(torch.cat(list(inputs.hidden)), expected, atol=1e-5, rtol=1e-5)


def compressed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, method: str
) -> None:
    pared.compress(model, tokenizer, Recipe(method=method, keep=0.6, calibration=calibration))


@pytest.mark.parametrize("method", ["svd", "svd-llm"])
@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_a_damaged_weight_is_refused_by_its_site(
    method: str, damage: float, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> None:
    model = TINY_MODELS["llama"]()
    model.model.layers[2].self_attn.o_proj.weight.data[3, 4] = damage
    with pytest.raises(ParedError, match=r"site model\.layers\.2\.self_attn\.o_proj has NaN or infinity in its weight"):
        compressed(model, tokenizer, calibration, method)


def test_a_damaged_norm_is_refused_by_the_site_that_reads_it() -> None:
    model = TINY_MODELS["llama"]()
    model.model.layers[1].input_layernorm.weight.data[0] = float("nan")
    with pytest.raises(ParedError, match=r"site model\.layers\.1\.self_attn\.q_proj reads NaN or infinity"):
        walked(model)


@pytest.mark.parametrize(("needs", "told"), [(only_gram, "down_proj reads"), (both_grams, "up_proj outputs")])
def test_an_activation_that_overflows_is_refused_by_its_site(needs: Any, told: str) -> None:
    model = TINY_MODELS["llama"]()
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e5)
    walked(model, needs=needs)
    with pytest.raises(ParedError, match=rf"site model\.layers\.1\.mlp\.{told} NaN or infinity.*float32"):
        walked(model, torch.float16, needs=needs)


@pytest.mark.parametrize("block", [1, 2])
def test_hidden_states_that_overflow_are_refused_by_their_block(block: int) -> None:
    model = TINY_MODELS["llama"]()
    model.model.layers[block].mlp.down_proj.weight.data.mul_(1e7)
    with pytest.raises(ParedError, match=rf"block model\.layers\.{block} outputs NaN or infinity"):
        walked(model, torch.float16, needs=only_gram)


@pytest.mark.parametrize(
    ("asked", "stored", "expected"),
    [
        ("float32", torch.bfloat16, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float16, torch.float16),
    ],
)
def test_blocks_compute_in_what_was_asked_or_stored(asked: str, stored: torch.dtype, expected: torch.dtype) -> None:
    assert choose_dtype(asked, stored, CPU) == expected


class Routed(nn.Module):
    """Experts by the hidden states' sign and size, in any container; a layer before them."""

    def __init__(self, container: Callable[[list[nn.Module]], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.experts = container([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        read = torch.tanh(self.first(hidden))
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts.children()):
            rows = hidden[..., 0].round().long() == number  # the embedding's first number says which expert
            if rows.any():
                out[rows] = expert(read[rows])
        return hidden + out * torch.tensor([0.0] + [0.1] * 7)


class RoutedModel(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, container: Callable[[list[nn.Module]], nn.Module]) -> None:
        super().__init__(PreTrainedConfig())
        self.embed = nn.Embedding(9, 8)
        with torch.no_grad():
            self.embed.weight[:, 0] = torch.arange(9).remainder(3)
        self.layers = nn.ModuleList([Routed(container), Routed(container)])

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for block in self.layers:
            hidden = block(hidden)
        return hidden


CONTAINERS = [
    nn.ModuleList,
    lambda experts: nn.ModuleDict({f"expert_{'abc'[i]}": one for i, one in enumerate(experts)}),
    lambda experts: nn.Sequential(OrderedDict((f"e{'abc'[i]}", one) for i, one in enumerate(experts))),
]


@pytest.mark.parametrize("container", CONTAINERS, ids=["list", "dictionary", "named"])
@pytest.mark.parametrize("first", [[0, 1], [0], [1], [2]], ids=str)
def test_experts_that_only_a_later_batch_reaches_are_collected(container: Any, first: list[int]) -> None:
    """A batch ended at the last expert that the first one had reached, unless a digit stood in its name."""
    model = RoutedModel(container).eval()
    anatomy, calls = probe(model, find_anatomy(model))
    ids = torch.stack([torch.tensor(first).repeat(12)[:12], torch.arange(12) % 9])
    inputs = capture(model, anatomy, ids, 1, calls, torch.float32, CPU)
    for block in walk(model, anatomy, inputs, only_gram, sequential=True):
        found = [one["gram"].tokens for name, one in block.statistics.items() if "expert" in name]
        expected = torch.bincount(ids.flatten() % 3, minlength=3).tolist()
        assert found == expected


@pytest.mark.parametrize("container", CONTAINERS, ids=["list", "dictionary", "named"])
@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "svd", "keep": 0.6},
        {"method": "svd-llm", "keep": 0.75},
        {"method": "svd-llm", "keep": 0.75, "allocation": "effective-rank"},
        {"method": "magnitude", "sparsity": 0.5},
        {"method": "wanda", "sparsity": 0.5},
    ],
    ids=lambda recipe: "-".join(map(str, recipe.values())),
)
@pytest.mark.parametrize("reached", [True, False])
def test_experts_that_the_probe_does_not_reach_are_compressed(
    container: Any, recipe: dict[str, Any], reached: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    """They stayed dense whatever the text or the method was."""
    model = RoutedModel(container).eval()
    with torch.no_grad():
        model.embed.weight[:, 0] = torch.arange(9) // 8  # of the probe's tokens, 0 to 7, all go to the first expert
    ids = (torch.arange(16) % (9 if reached else 8)).repeat(4, 1)
    windows = Windows(ids, "digest", "text", "origin", stand_in=True)
    calibration = pared.Calibration(samples=4, length=16, batch=2, dtype="float32")
    plan = pared.compress(model, tokenizer, Recipe(calibration=calibration, **recipe), windows=windows).plan
    dense = {s.name: s.decision.reason for s in plan.sites if s.decision.kind == "dense"}
    if recipe["method"] in ("svd", "magnitude"):
        assert not dense
    else:
        experts = [[s.name for s in plan.sites if s.block == block and "experts" in s.name] for block in (0, 1)]
        left = [name for names in experts for name in names[2 if reached else 1 :]]
        assert dense == dict.fromkeys(left, "no calibration token reached it")
