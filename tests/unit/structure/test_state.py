"""What a block keeps from one call to the next reaches no statistic of another batch, and no copy of the block."""

import copy
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from passes import walk
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

import pared
from pared import ParedError, Recipe
from pared.calibration import capture
from pared.structure import find_anatomy, probe
from pared.structure.state import KeptState, copy_block

VOCAB, WIDTH = 64, 16
TOKENS = torch.randint(0, VOCAB, (7, 12), generator=torch.Generator().manual_seed(0))
EVERY: list[dict[str, Any]] = [
    *({"method": method, "keep": 0.6} for method in ("svd", "asvd", "svd-llm", "loss-optimal")),
    {"method": "fwsvd", "keep": 0.6, "options": {"loss": "sampled"}},
    {"method": "svd-llm", "keep": 0.6, "statistics": "sequential", "refit": "update"},
    {"method": "wanda", "sparsity": 0.5},
]


@pytest.fixture
def compress(calibration: pared.Calibration, tokenizer: Any) -> Callable[..., Any]:
    return lambda model, **recipe: pared.compress(model, tokenizer, Recipe(calibration=calibration, **recipe))


class Stateful(nn.Module):
    """Adds what it put out last time, kept in one way or another."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        self.inner, self.outer, self.kept = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH), kept
        self.last: torch.Tensor | None = None
        self.entries: list[torch.Tensor] = []
        self.queue: deque[torch.Tensor] = deque(maxlen=1)
        self.named: dict[str, torch.Tensor] = {}
        self.register_buffer("held", torch.zeros(WIDTH))
        self.step = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        y = self.outer(torch.tanh(self.inner(hidden + self.read())))
        self.write(y.mean((0, 1)))
        return y

    def read(self) -> torch.Tensor | float:
        kept = {
            "attribute": self.last,
            "list": self.entries[-1] if self.entries else None,
            "deque": self.queue[-1] if self.queue else None,
            "dict": self.named.get("last"),
            "buffer in place": self.held,
            "buffer": self.held,
            "counter": torch.tensor(float(self.step)),
        }[self.kept]
        return 0.0 if kept is None else kept

    def write(self, value: torch.Tensor) -> None:
        self.step += 1
        if self.kept == "attribute":
            self.last = value
        elif self.kept == "list":
            self.entries.append(value)
        elif self.kept == "deque":
            self.queue.append(value)
        elif self.kept == "dict":
            self.named["last"] = value
        elif self.kept == "buffer in place":
            self.held.copy_(value.detach())
        elif self.kept == "buffer":
            self.held = value.detach()


KEPT = ["attribute", "list", "deque", "dict", "buffer in place", "buffer", "counter"]


class Model(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__(PreTrainedConfig(vocab_size=VOCAB))
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.layers = nn.ModuleList([block() for _ in range(3)])

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, **_: object) -> CausalLMOutput:
        hidden = self.embed(input_ids)
        for block in self.layers:
            hidden = block(hidden)
        return CausalLMOutput(logits=self.head(hidden))


def stateful(kept: str) -> Model:
    torch.manual_seed(0)
    return Model(lambda: Stateful(kept)).eval()


def state_of(model: nn.Module) -> list[Any]:
    return [
        (block.last, list(block.entries), list(block.queue), dict(block.named), block.held.clone(), block.step)
        for block in model.layers
    ]


@pytest.mark.parametrize("kept", KEPT)
def test_no_batch_is_seen_through_the_state_of_another(kept: str) -> None:
    """The Gram is that of a fresh model for every batch."""
    model = stateful(kept)
    anatomy, calls = probe(model, find_anatomy(model))
    inputs = capture(model, anatomy, TOKENS, 3, calls, torch.float32, torch.device("cpu"))
    found = {
        name: own["gram"].value
        for walked in walk(model, anatomy, inputs, lambda _: frozenset({"gram"}))
        for name, own in walked.statistics.items()
    }
    expected: dict[str, Any] = defaultdict(float)
    for part in torch.split(TOKENS, 3):
        fresh = stateful(kept)
        for site in anatomy.sites:

            def add(_: nn.Module, args: tuple[torch.Tensor], name: str = site.name) -> None:
                x = args[0].detach().flatten(0, -2).double()
                expected[name] = expected[name] + x.T @ x

            fresh.get_submodule(site.name).register_forward_pre_hook(add)
        fresh(input_ids=part)
    for name, gram in found.items():
        torch.testing.assert_close(gram, expected[name], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("recipe", EVERY, ids=lambda recipe: "-".join(map(str, recipe.values())))
@pytest.mark.parametrize("kept", KEPT)
def test_every_method_leaves_the_state_as_it_was(
    compress: Callable[..., Any], kept: str, recipe: dict[str, Any]
) -> None:
    model, before = stateful(kept), state_of(stateful(kept))
    compress(model, **recipe)
    for now, then in zip(state_of(model), before, strict=True):
        assert now[:4] == then[:4]
        assert torch.equal(now[4], then[4])
        assert now[5] == then[5]
    copy.deepcopy(model)


@pytest.mark.parametrize("kept", KEPT[:6])
def test_a_state_that_an_earlier_run_has_left_is_refused(compress: Callable[..., Any], kept: str) -> None:
    model = stateful(kept)
    model(input_ids=TOKENS[:3])
    with pytest.raises(ParedError, match=r"block layers\.0 computes with a state that an earlier run has left on it"):
        compress(model, method="svd-llm", keep=0.6)


@pytest.mark.parametrize("recipe", [one for one in EVERY if one["method"] != "svd"], ids=lambda one: one["method"])
def test_a_state_that_cannot_be_put_back_is_refused(compress: Callable[..., Any], recipe: dict[str, Any]) -> None:
    hidden_away: dict[str, float] = {"calls": 0.0}

    class Secretive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            hidden_away["calls"] += 1
            return self.fc(hidden) * hidden_away["calls"]

    with pytest.raises(ParedError, match=r"block layers\.0 does not give the same output twice"):
        compress(Model(Secretive).eval(), **recipe)
    compress(Model(Secretive).eval(), method="svd", keep=0.6)


def recurrent() -> PreTrainedModel:
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        lru_width=32, num_key_value_heads=2, head_dim=8, attention_window_size=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return RecurrentGemmaForCausalLM._from_config(config).eval()


@pytest.mark.parametrize("recipe", EVERY, ids=lambda recipe: "-".join(map(str, recipe.values())))
@pytest.mark.parametrize("used", [False, True])
def test_recurrent_gemma_takes_every_method(compress: Callable[..., Any], used: bool, recipe: dict[str, Any]) -> None:
    """Its state is put back by its own code; a copy of a block met the graph of an earlier backward pass."""
    model = recurrent()
    if used:
        model(input_ids=TOKENS[:3])
    compress(model, **recipe)
    with torch.no_grad():
        assert bool(model(input_ids=TOKENS).logits.isfinite().all())


def test_a_refit_copies_blocks_that_an_earlier_backward_pass_has_left_a_graph_on(
    calibration: pared.Calibration, tokenizer: Any
) -> None:
    model = recurrent()
    model(input_ids=TOKENS[:3])
    half = calibration.model_copy(update={"dtype": "bfloat16"})
    recipe = Recipe(method="svd-llm", keep=0.6, statistics="sequential", refit="update", calibration=half)
    pared.compress(model, tokenizer, recipe)


def test_a_block_with_a_graph_on_it_is_copied_without_it() -> None:
    block = Stateful("attribute")
    block(torch.randn(1, 4, WIDTH))
    assert block.last is not None
    assert block.last.grad_fn is not None
    twin = copy_block(block)
    assert torch.equal(twin.last, block.last)
    assert twin.last.grad_fn is None
    assert twin.inner.weight is not block.inner.weight


def test_what_changed_is_told() -> None:
    block = Stateful("list")
    state = KeptState([block])
    assert state.changes() == []
    block(torch.randn(1, 4, WIDTH))
    assert len(state.changes()) == 2  # the counter and the list
    state.restore()
    assert state.changes() == []
