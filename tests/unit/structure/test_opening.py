"""Experts of a mixture as layers of their own: they compute what the module that held them did, or stay as they are."""

from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from tiny_models import MIXTURES, TINY_MODELS
from torch import nn
from transformers import Llama4ForCausalLM, Llama4TextConfig, PreTrainedModel

from pared.modules.opened import Layout, OpenedExperts, close, open_by_layout
from pared.structure import find_anatomy, opening
from pared.structure.opening import layout_of, openable
from unit.checkpoint.test_checkpoint import logits

FAMILIES = sorted(MIXTURES)
EXPERTS_OF = 6
found = opening._found


def llama4() -> PreTrainedModel:
    """Return a tiny model whose experts are called with what each of them reads."""
    config = Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=EXPERTS_OF, num_experts_per_tok=2,
        moe_layers=[0, 1], max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return Llama4ForCausalLM._from_config(config).eval()


def opened(model: PreTrainedModel) -> list[str]:
    """Open all experts of a model; return the names of the modules that held them."""
    anatomy = find_anatomy(model)
    found = openable(anatomy.blocks(model), anatomy.blocks_path)
    for one in found:
        open_by_layout(model, one.name, one.layout)
    return [one.name for one in found]


@pytest.mark.parametrize("family", [*FAMILIES, "llama4"])
def test_opened_experts_compute_what_the_mixture_does_and_close_to_the_same_bits(family: str):
    model = llama4() if family == "llama4" else MIXTURES[family]()
    expected, before = logits(model), {name: one.clone() for name, one in model.state_dict().items()}
    names = opened(model)
    assert len(names) == (1 if family == "deepseek_v3" else 2)
    sites = {site.name for site in find_anatomy(model).sites}
    assert {f"{name}.{j}.{leaf}" for name in names for j in range(EXPERTS_OF) for leaf in ("first", "second")} <= sites
    assert not any(one.ndim == 3 for one in model.parameters())
    assert float((logits(model) - expected).norm()) <= 1e-6 * float(expected.norm())
    for name in names:
        close(model, name)
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()


class Bank(nn.Module):
    """Experts of other names than those of transformers: one activation, a bias of the last layers, transposed."""

    def __init__(self, post: bool = False) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.randn(5, 12, 8))
        self.a = nn.Parameter(torch.randn(5, 8, 12))
        self.c = nn.Parameter(torch.randn(5, 8))
        self.curve, self.post = nn.Tanh(), post

    def forward(self, x: torch.Tensor, weights: Any, which: Any) -> torch.Tensor:
        total = torch.zeros_like(x)
        for place in range(which.shape[1]):
            one = which[:, place]
            made = (self.curve(x[:, None] @ self.a[one]) @ self.b[one])[:, 0] + self.c[one]
            total += weights[:, place, None] * (made.relu() if self.post else made)
        return total


def test_how_tensors_lie_is_told_by_what_they_compute_and_no_name():
    found = layout_of(Bank())
    assert found == Layout("a", "b", "", "c", True, "plain")
    layouts = {family: layout_of(MIXTURES[family]().model.layers[1].mlp.experts) for family in FAMILIES}
    assert all(isinstance(one, Layout) and one.between == "own" for one in layouts.values())
    assert {family for family, one in layouts.items() if isinstance(one, Layout) and one.transposed} == {"gpt_oss"}


def test_a_layout_is_proved_once_for_all_modules_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that is no mixture nothing is proved, and mixtures of a kind are looked at again for nothing."""
    proofs: list[nn.Module] = []
    monkeypatch.setattr(opening, "_FOUND", WeakKeyDictionary())
    monkeypatch.setattr(opening, "_found", lambda module, *given: proofs.append(module) or found(module, *given))
    find_anatomy(TINY_MODELS["llama"]())
    assert proofs == []
    for _ in range(2):
        opened(MIXTURES["mixtral"]())
    assert len(proofs) == 1


def test_what_is_not_two_layers_an_expert_stays_and_says_why():
    model = MIXTURES["mixtral"]()
    for block in model.model.layers:
        block.mlp.experts.forward = block.mlp.experts.forward
    assert opened(model) == []
    reasons = {one.reason for one in find_anatomy(model).uncovered if len(one.shape) == 3}
    assert reasons == {"a 3-D stack of expert weights: its module has a forward or a hook of its own"}
    assert "not two linear layers each" in str(layout_of(Bank(post=True)))
    more = Bank()
    more.register_buffer("scale", torch.ones(8))
    assert "two stacks of weights that a module holds alone" in str(layout_of(more))


@torch.no_grad()
def test_an_expert_of_half_precision_adds_up_in_float32():
    module = MIXTURES["mixtral"]().model.layers[0].mlp.experts.bfloat16()
    layout = layout_of(module)
    assert isinstance(layout, Layout)
    hidden, index = torch.randn(9, 32).bfloat16(), torch.rand(9, 6).argsort(dim=1)[:, :3]
    weights = torch.rand(9, 3).bfloat16()
    expected = module(hidden, index, weights)
    found = OpenedExperts(module, layout, views=True)(hidden, index, weights)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected.float()).norm()) <= 6e-3 * float(expected.float().norm())
