"""Layers that lost channels or heads, as an engine that has the widths of the dense model runs them."""

import pytest
import torch
from engine_layers import Entry, checkpoint, engine, multiply
from torch import nn
from torch.nn import functional

from pared.serving.vllm.layout import UnsupportedError, members_of
from pared.serving.vllm.narrowing import Heads, Narrowed, Shape, arrange, head_places

D = 4  # channels of a head


def narrow(out: int, inputs: int, bias: bool = False, parts: int = 1) -> Entry:
    return {"kind": "narrow", "in_features": inputs, "out_features": out, "bias": bias, "parts": parts}


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Attention over the rows, ``(tokens, queries * size)``, a key for every group of queries."""
    q, k, v = (one.view(len(one), -1, heads.size).transpose(0, 1) for one in (q, k, v))
    group = heads.queries // heads.keys
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)


def _on_ranks(
    made: nn.ModuleDict, modules: dict[str, Entry], dense: Heads, ranks: int, x: torch.Tensor
) -> torch.Tensor:
    """What an engine with all heads makes of an attention that lost some."""
    total, sizes = torch.zeros_like(x), (dense.queries * D, dense.keys * D, dense.keys * D)
    for rank in range(ranks):
        narrowed: Narrowed = {}
        shape = Shape("column", x.shape[1], sizes, ranks, rank, dense)
        qkv = engine("qkv_proj", modules, made, shape, True, narrowed=narrowed)(x, multiply, True)
        keys = max(1, dense.keys // ranks)
        q, k, v = qkv.split([sizes[0] // ranks, keys * D, keys * D], 1)
        mixed = attention(q, k, v, Heads(dense.queries // ranks, keys, D))
        row = Shape("row", sizes[0], (x.shape[1],), ranks, rank)
        total += engine("o_proj", modules, made, row, True, narrowed=narrowed)(mixed, multiply, rank == 0)
    return total


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    "kept",
    [Heads(4, 2, D), Heads(4, 4, D), Heads(3, 3, D), Heads(2, 2, D), Heads(8, 2, D)],
    ids=lambda h: f"{h[0]}/{h[1]}",
)
def test_an_attention_that_lost_heads_computes_the_same_where_all_heads_are(ranks: int, kept: Heads) -> None:
    dense = Heads(8, 4, D) if kept != Heads(8, 2, D) else Heads(16, 4, D)
    shapes = {"q_proj": (kept.queries * D, 6), "k_proj": (kept.keys * D, 6), "v_proj": (kept.keys * D, 6)}
    modules = {name: narrow(*shape, bias=True) for name, shape in shapes.items()}
    modules["o_proj"] = narrow(6, kept.queries * D, bias=True)
    made, x = checkpoint(modules, {**shapes, "o_proj": (6, kept.queries * D)}, True), torch.randn(5, 6)
    expected = made["o_proj"](attention(*(made[name](x) for name in shapes), kept))
    sizes = (dense.queries * D, dense.keys * D, dense.keys * D)
    if ranks > kept.keys:
        for rank in range(ranks):
            shape = Shape("column", 6, sizes, ranks, rank, dense)
            if not any(place * dense.keys // kept.keys == rank for place in range(kept.keys)):
                with pytest.raises(UnsupportedError, match="a rank has none of the heads that are left; take fewer"):
                    engine("qkv_proj", modules, made, shape, True)
    else:
        torch.testing.assert_close(_on_ranks(made, modules, dense, ranks, x), expected)


def test_heads_of_a_layer_that_is_fused_on_disk_are_placed_part_by_part() -> None:
    dense, kept, x = Heads(4, 4, D), Heads(3, 3, D), torch.randn(5, 6)
    modules = {"c_attn": narrow(3 * 3 * D, 6, True, 3), "c_proj": narrow(6, 3 * D, True)}
    made = checkpoint(modules, {"c_attn": (36, 6), "c_proj": (6, 12)}, True)
    narrowed: Narrowed = {}
    shape = Shape("column", 6, (4 * D,) * 3, heads=dense)
    qkv = engine("c_attn", modules, made, shape, True, narrowed=narrowed)(x, multiply, True)
    mixed = attention(*qkv.chunk(3, 1), dense)
    found = engine("c_proj", modules, made, Shape("row", 16, (6,)), True, narrowed=narrowed)(mixed, multiply, True)
    torch.testing.assert_close(found, made["c_proj"](attention(*made["c_attn"](x).chunk(3, 1), kept)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_narrow_mlp_is_as_wide_as_its_layers(ranks: int) -> None:
    modules = {"gate_proj": narrow(8, 6), "up_proj": narrow(8, 6), "down_proj": narrow(6, 8)}
    made = checkpoint(modules, {"gate_proj": (8, 6), "up_proj": (8, 6), "down_proj": (6, 8)}, False)
    x, total = torch.randn(5, 6), torch.zeros(5, 6)
    for rank in range(ranks):
        narrowed: Narrowed = {}
        column, row = Shape("column", 6, (12, 12), ranks, rank), Shape("row", 12, (6,), ranks, rank)
        gate, up = engine("gate_up_proj", modules, made, column, narrowed=narrowed)(x, multiply, False).chunk(2, 1)
        assert gate.shape[1] == 8 // ranks
        total += engine("down_proj", modules, made, row, narrowed=narrowed)(
            functional.silu(gate) * up, multiply, False
        )  # fmt: skip
    expected = made["down_proj"](functional.silu(made["gate_proj"](x)) * made["up_proj"](x))
    torch.testing.assert_close(total, expected)


def test_queries_that_are_left_read_the_key_that_they_read_before() -> None:
    queries, keys = head_places(Heads(6, 2, 2), Heads(4, 2, 2))
    assert queries == [0, 1, 2, 3, 6, 7, 8, 9]  # heads 0 and 1 of key 0, 3 and 4 of key 1
    assert keys == [0, 1, 2, 3]


def test_heads_that_are_left_are_spread_over_the_ranks() -> None:
    queries, keys = head_places(Heads(8, 4, 1), Heads(2, 2, 1))
    assert (queries, keys) == ([0, 4], [0, 2])


def _refused(prefix: str, modules: dict[str, Entry], shape: Shape, narrowed: Narrowed | None = None) -> str:
    fused = {"gate_up_proj": ["gate_proj", "up_proj"]}
    members = members_of(prefix, len(shape.sizes), fused, modules, {})
    with pytest.raises(UnsupportedError) as refused:
        arrange(prefix, members, shape, {} if narrowed is None else narrowed)
    return str(refused.value)


def test_what_would_not_compute_what_the_checkpoint_says_is_refused_by_name() -> None:
    column, row = Shape("column", 6, (12, 12)), Shape("row", 12, (6,))
    gate, up, down = "m.gate_proj", "m.up_proj", "m.down_proj"
    assert f"{down}: 8 of 12 inputs are left" in _refused(down, {down: narrow(6, 8)}, row)
    assert f"{down}: 8 of 12 inputs are left" in _refused(down, {down: narrow(6, 8)}, row, {"m": 9})
    assert f"{down}: outputs were removed" in _refused(down, {down: narrow(4, 12)}, row)
    assert "parts of m.gate_up_proj are (8, 12) wide" in _refused("m.gate_up_proj", {gate: narrow(8, 6)}, column)
    assert f"{gate}: inputs were removed" in _refused("m.gate_up_proj", {gate: narrow(12, 4)}, column)
    both = {gate: narrow(8, 6), up: narrow(8, 6)}
    assert f"{gate}: a second layer of m" in _refused("m.gate_up_proj", both, column, {"m": 8})
    assert f"{gate}: 9 channels cannot be divided among 2 ranks" in _refused(
        "m.gate_up_proj", {gate: narrow(9, 6), up: narrow(9, 6)}, Shape("column", 6, (12, 12), 2, 0)
    )
    low_rank = {"kind": "low_rank", "in_features": 12, "out_features": 6, "rank": 2, "bias": False}
    assert f"{down}: the layer before it lost channels" in _refused(down, {down: low_rank}, row, {"m": 8})
    one = Shape("column", 6, (12,))
    assert "m.fc1: 2 parts lost channels, but it makes 1 outputs" in _refused(
        "m.fc1", {"m.fc1": narrow(8, 6, parts=2)}, one
    )


def test_heads_that_fit_no_grouping_are_refused_by_name() -> None:
    shape = Shape("column", 6, (8 * D, 4 * D, 4 * D), heads=Heads(8, 4, D))
    entries = {"a.q_proj": narrow(5 * D, 6), "a.k_proj": narrow(2 * D, 6), "a.v_proj": narrow(2 * D, 6)}
    members = members_of("a.qkv_proj", 3, {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}, entries, {})
    with pytest.raises(UnsupportedError, match=r"a\.q_proj: 5 heads of queries on 2 of keys"):
        arrange("a.qkv_proj", members, shape, {})
