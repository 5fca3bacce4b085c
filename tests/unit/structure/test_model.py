from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType

import pytest
import torch
from passes import plan_of
from tiny_models import FAMILIES, TINY_MODELS
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from pared import Calibration, ParedError, Recipe, compress
from pared.calibration import capture
from pared.structure.linear import weight_of
from pared.structure.model import Anatomy, find_anatomy
from pared.structure.probe import probe

# family -> linear layers of one block, by what shares an input; a block has nothing else
GATED = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
READS = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "gemma3": GATED,
    "gpt2": [{"attn.c_attn"}, {"attn.c_proj"}, {"mlp.c_fc"}, {"mlp.c_proj"}],
    "opt": [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}],
    "gpt_neox": [{"query_key_value"}, {"attention.dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}],
    "phi3": [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}],
    "bert": [{"query", "key", "value"}, {"attention.output.dense"}, {"intermediate.dense"}, {"1.output.dense"}],
    "qwen2_moe": [
        {"q_proj", "k_proj", "v_proj"},
        {"o_proj"},
        {"shared_expert.gate_proj", "up_proj", "shared_expert_gate"},
        {"down_proj"},
    ],
}


def probed(model: PreTrainedModel) -> Anatomy:
    return probe(model, find_anatomy(model))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_linear_layers_inside_the_blocks_are_sites(family: str) -> None:
    model = TINY_MODELS[family]()
    anatomy = find_anatomy(model)
    inside = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name.startswith(f"{anatomy.blocks_path}.")
    }
    assert {site.name for site in anatomy.sites} == inside
    assert (
        len(anatomy.sites) == len(set(anatomy.sites)) == model.config.num_hidden_layers * sum(map(len, READS[family]))
    )
    outside = ("embed", "wte", "wpe", "lm_head", "embed_out", "norm", "ln_", "pooler", "classifier")
    assert not [site.name for site in anatomy.sites if any(word in site.name for word in outside)]


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_that_read_one_tensor_are_known_as_a_group(family: str) -> None:
    anatomy = probed(TINY_MODELS[family]())
    sites = anatomy.sites_of(1)
    groups: dict[str, set[str]] = {}
    for site in sites:
        groups.setdefault(site.reads, set()).add(site.name)
    expected = [
        {site.name for site in sites if any(site.name.endswith(leaf) for leaf in leaves)} for leaves in READS[family]
    ]
    assert sorted(map(sorted, groups.values())) == sorted(map(sorted, expected))
    assert not any(site.idle for site in anatomy.sites)


def test_parallel_residual_does_not_make_two_norms_one_input() -> None:
    sites = {site.name.rpartition(".")[2]: site for site in probed(TINY_MODELS["gpt_neox"]()).sites_of(0)}
    assert sites["query_key_value"].reads != sites["dense_h_to_4h"].reads


def test_conv1d_is_seen_as_out_by_in() -> None:
    model = TINY_MODELS["gpt2"]()
    site = next(site for site in find_anatomy(model).sites if site.name.endswith("c_attn"))
    assert (site.out_features, site.in_features) == (96, 32)
    conv = model.get_submodule(site.name)
    x = torch.randn(5, 32)
    torch.testing.assert_close(x @ weight_of(conv).T + conv.bias, conv(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_bias_and_shape_of_every_site_are_those_of_its_module(family: str) -> None:
    model = TINY_MODELS[family]()
    for site in find_anatomy(model).sites:
        module = model.get_submodule(site.name)
        assert site.has_bias == (module.bias is not None)
        assert (site.out_features, site.in_features) == tuple(weight_of(module).shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_inside_the_blocks_is_a_site_or_reported(family: str) -> None:
    model = TINY_MODELS[family]()
    anatomy = find_anatomy(model)
    blocks = model.get_submodule(anatomy.blocks_path)
    matrices = sum(parameter.numel() for parameter in blocks.parameters() if parameter.ndim >= 2)
    covered = sum(site.out_features * site.in_features for site in anatomy.sites)
    assert covered + sum(weight.parameters for weight in anatomy.uncovered) == matrices


def test_experts_are_reported_with_their_share() -> None:
    model = TINY_MODELS["qwen2_moe"]()
    plan = plan_of(model, Recipe(method="svd", keep=0.7, skip=["*.experts.*"]))
    experts = [weight for weight in plan.uncovered if ".experts." in weight.name]
    assert [weight.shape for weight in experts] == [(4, 48, 32), (4, 32, 24)] * 2
    assert all("expert" in weight.reason for weight in experts)
    inside = sum(p.numel() for p in model.model.layers.parameters() if p.ndim >= 2)
    uncovered = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name or "mlp.gate.w" in name)
    assert plan.uncovered_share == pytest.approx(uncovered / inside)


def test_tied_weights_are_counted_once() -> None:
    model = TINY_MODELS["qwen3"]()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert find_anatomy(model).model_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_on_the_meta_device_has_the_same_plan(family: str) -> None:
    model = TINY_MODELS[family]()
    with torch.device("meta"):
        skeleton = type(model)._from_config(model.config)
    assert all(p.is_meta for p in skeleton.parameters())
    recipe = Recipe(method="svd", keep=0.6)
    assert plan_of(skeleton, recipe, 4) == plan_of(model, recipe, 4)


def test_model_without_blocks_is_refused_by_name() -> None:
    with pytest.raises(ParedError, match="Sequential: no list of blocks"):
        find_anatomy(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def test_blocks_without_a_linear_layer_are_refused_and_say_what_is_there() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.ones(2, 3, 4))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Experts(), Experts()])

    with pytest.raises(ParedError, match=r"no linear layer inside the 2 blocks of layers.*gate_up_proj \(2, 3, 4\)"):
        find_anatomy(Model())


def test_lists_of_norms_are_not_taken_for_blocks() -> None:
    with pytest.raises(ParedError, match="no list of blocks"):
        find_anatomy(nn.ModuleDict({"norms": nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])}))


def test_the_largest_list_is_walked_and_the_others_are_named() -> None:
    model = nn.ModuleDict(
        {
            "vision": nn.ModuleList([nn.Linear(4, 4)]),
            "text": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8, 8), "inner": nn.ModuleList([nn.Linear(8, 8)])})]),
        }
    )
    anatomy = find_anatomy(model)
    assert anatomy.blocks_path == "text"
    assert anatomy.other_stacks == ("vision",)
    assert [site.name for site in anatomy.sites] == ["text.0.fc", "text.0.inner.0"]


def test_skipped_sites_are_left_out_and_reported() -> None:
    anatomy = find_anatomy(TINY_MODELS["llama"]())
    left = anatomy.without(["*.0.*", "*down_proj"])
    assert not [site for site in left.sites if site.block == 0 or site.name.endswith("down_proj")]
    assert {site.name for site in left.sites} | {weight.name for weight in left.uncovered} == {
        site.name for site in anatomy.sites
    }
    assert {weight.reason for weight in left.uncovered} == {"skipped by the recipe"}


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ParedError, match=r"'\*c_attn' matches none of the 21 sites"):
        find_anatomy(TINY_MODELS["llama"]()).without(["*q_proj", "*c_attn"])


def test_skipping_everything_is_an_error() -> None:
    with pytest.raises(ParedError, match="no site to compress"):
        find_anatomy(TINY_MODELS["llama"]()).without(["*"])


def test_the_probe_leaves_no_hook_behind() -> None:
    model = TINY_MODELS["llama"]()
    probed(model)
    assert not [name for name, m in model.named_modules() if m._forward_pre_hooks or m._forward_hooks]


@pytest.mark.parametrize("own", [None, "forward", "hook"])
def test_a_layer_that_the_probe_does_not_run_is_idle_only_if_its_class_cannot_tell(own: str | None) -> None:
    model = TINY_MODELS["llama"]()
    model.model.layers[1].spare = spare = nn.Linear(32, 32)
    if own == "forward":
        spare.forward = lambda x: 2 * nn.functional.linear(x, spare.weight)
    elif own == "hook":
        spare.register_forward_hook(lambda _, __, output: 2 * output)
    found = {site.name: (site.seen, site.idle) for site in probed(model).sites if site.idle or not site.seen}
    assert found == {"model.layers.1.spare": (False, own is not None)}


def test_a_layer_that_runs_twice_shares_with_nobody() -> None:
    model = TINY_MODELS["llama"]()
    mlp = model.model.layers[0].mlp

    def twice(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x) + self.up_proj(x * 2))

    mlp.forward = MethodType(twice, mlp)
    reads = {site.name.rpartition(".")[2]: site.reads for site in probed(model).sites_of(0)}
    assert reads["up_proj"] == "model.layers.0.mlp.up_proj"
    assert reads["gate_proj"] == "model.layers.0.mlp.gate_proj"


class Block(nn.Module):
    """Hidden states and something else in, the same out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(
        self, hidden_states: torch.Tensor, extra: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        extra = torch.zeros(()) if extra is None else extra
        return torch.tanh(self.fc(hidden_states)) + extra, hidden_states.mean()


@dataclass
class Wiring:
    """What happens between two blocks: the next block's hidden states and its extra argument."""

    of: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


PLAIN = Wiring(lambda _, hidden, __: (hidden, None))


class Chain(PreTrainedModel):
    """Three blocks, wired as the test says; a call is ``wiring.of(embedded, hidden states, extra)``."""

    config_class = PreTrainedConfig

    def __init__(self, wiring: Wiring, order: tuple[int, ...] = (0, 1, 2)) -> None:
        super().__init__(PreTrainedConfig())
        self.wiring, self.order = wiring, order
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([Block(), Block(), Block()])

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        embedded = hidden = self.embed(input_ids)
        extra = None
        for index in self.order:
            hidden, computed = self.layers[index](hidden, extra)
            hidden, extra = self.wiring.of(embedded, hidden, computed)
        return hidden


def test_a_plain_chain_is_accepted() -> None:
    model = Chain(PLAIN)
    assert [site.name for site in probed(model).sites] == ["layers.0.fc", "layers.1.fc", "layers.2.fc"]


@pytest.mark.parametrize(
    "wiring",
    [
        pytest.param(Wiring(lambda embedded, hidden, _: (hidden + embedded, None)), id="skip connection"),
        pytest.param(Wiring(lambda _, hidden, __: (hidden * 0.5, None)), id="scaled"),
        pytest.param(Wiring(lambda embedded, hidden, _: (hidden.add_(embedded), None)), id="in place"),
        pytest.param(Wiring(lambda embedded, _, __: (embedded, None)), id="all blocks read the embeddings"),
    ],
)
def test_hidden_states_changed_between_blocks_are_refused_by_the_block_name(wiring: Wiring) -> None:
    with pytest.raises(ParedError, match=r"block layers\.1 does not read the output of the block before it"):
        probed(Chain(wiring))


@pytest.mark.parametrize(
    "order", [(0, 1), (0, 2), (1, 2), (0, 2, 1), (0, 1, 2, 0), (0, 1, 2, 0, 1, 2), (0, 1, 0, 1, 2)]
)
def test_blocks_that_do_not_run_in_order_are_refused_where_text_is_read(order: tuple[int, ...]) -> None:
    with pytest.raises(ParedError, match=r"3 blocks of layers ran in the order \[\d, .*, not each one or more times"):
        probed(Chain(PLAIN, order))
    assert probe(model := Chain(PLAIN, order), find_anatomy(model), read=False)[0].sites


@pytest.mark.parametrize("order", [(0, 1, 1, 2), (0, 0, 0, 1, 1, 2), (0, 1, 2, 2, 2)])
def test_every_run_of_a_block_in_a_row_is_seen(order: tuple[int, ...]) -> None:
    anatomy, calls = probe(model := Chain(PLAIN, order), find_anatomy(model))
    assert tuple(call.block for call in calls) == order
    assert [site.reads for site in anatomy.sites] == [site.name for site in anatomy.sites]


@pytest.mark.parametrize(
    "wiring",
    [
        pytest.param(Wiring(lambda _, hidden, extra: (hidden, extra)), id="handed on"),
        pytest.param(Wiring(lambda _, hidden, __: (hidden, hidden.mean())), id="from the hidden states"),
        pytest.param(Wiring(lambda _, hidden, extra: (hidden, extra * 0.5)), id="computed with"),
    ],
)
def test_a_block_fed_with_what_an_earlier_one_computed_is_refused_by_its_name(wiring: Wiring) -> None:
    model = Chain(wiring).eval()
    anatomy, calls = probe(model, find_anatomy(model))
    with pytest.raises(ParedError, match=r"block layers\.1 is given values that an earlier block computed"):
        capture(model, anatomy, torch.zeros(1, 4, dtype=torch.long), 1, calls, torch.float32, torch.device("cpu"))
    assert not any("forward" in block.__dict__ for block in model.layers)


def test_a_block_called_without_hidden_states_is_refused_by_its_name() -> None:
    model = Chain(PLAIN)
    model.forward = lambda input_ids, **_: model.layers[0](x=input_ids)
    with pytest.raises(ParedError, match=r"block layers\.0: called without hidden states; got arguments \['x'\]"):
        probed(model)


@pytest.mark.parametrize("error", [AssertionError, KeyError, NotImplementedError, ZeroDivisionError, RuntimeError])
def test_an_error_behind_the_last_block_does_not_keep_it_from_being_looked_at(error: type[Exception]) -> None:
    """The pass goes to the model's end, and an AssertionError of a head ended data-free methods with a traceback."""
    model = Chain(PLAIN).eval()
    forward = model.forward

    def with_head(input_ids: torch.Tensor, **more: object) -> torch.Tensor:
        forward(input_ids, **more)
        raise error("labels")

    model.forward = with_head
    for read in (False, True):
        anatomy, calls = probe(model, find_anatomy(model), read=read)
        assert len(anatomy.sites) == len(calls) == 3


@pytest.mark.parametrize("error", [AssertionError, KeyError])
def test_an_error_before_the_last_block_is_told_by_its_name(error: type[Exception]) -> None:
    model = Chain(PLAIN).eval()

    def broken(*_: object) -> torch.Tensor:
        raise error("labels")

    model.layers[1].forward = broken
    with pytest.raises(ParedError, match=rf"Chain cannot be run on token ids alone \({error.__name__}: '?labels"):
        probe(model, find_anatomy(model))
    assert len(probe(model, find_anatomy(model), read=False)[0].sites) == 3


@pytest.mark.parametrize("recipe", [{"method": "svd"}, {"method": "svd-llm"}, {"method": "loss-optimal"}])
def test_a_model_is_compressed_under_inference_mode_too(
    recipe: dict[str, str], calibration: Calibration, tokenizer: PreTrainedTokenizerFast
) -> None:
    """It was refused as an architecture that is not supported."""
    plans = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            asked = Recipe(keep=0.6, calibration=calibration, **recipe)
            with torch.inference_mode(False):
                model = TINY_MODELS["llama"]()
            plans.append(compress(model, tokenizer, asked).plan)
    assert plans[0] == plans[1]


def test_a_model_that_was_loaded_under_inference_mode_is_refused_by_name(
    calibration: Calibration, tokenizer: PreTrainedTokenizerFast
) -> None:
    with torch.inference_mode():
        model = TINY_MODELS["llama"]()
    with pytest.raises(ParedError, match=r"was loaded under torch\.inference_mode\(\); load it outside"):
        compress(model, tokenizer, Recipe(keep=0.6, method="svd", calibration=calibration))
