"""Which modules make a layer of an engine, and what one rank holds of it."""

import pytest

from pared.serving.vllm.layout import Member, UnsupportedError, members_of, split

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LOW_RANK = {"kind": "low_rank", "in_features": 8, "out_features": 8, "rank": 2, "bias": False}
SPARSE = {"kind": "sparse", "in_features": 8, "out_features": 8, "bias": False, "stored": 9, "kept": 0, "group": 0}


def test_a_fused_layer_is_made_of_its_modules_in_order() -> None:
    modules = {"a.q_proj": LOW_RANK, "a.v_proj": SPARSE}
    members = members_of("a.qkv_proj", 3, FUSED, modules, {})
    assert members == [
        Member("a.q_proj", "low_rank", LOW_RANK, (0,), "a.q_proj.down.weight"),
        Member("a.k_proj", "dense", {}, (1,)),
        Member("a.v_proj", "sparse", SPARSE, (2,)),
    ]


def test_a_layer_that_the_checkpoint_has_fused_is_one_module() -> None:
    assert members_of("a.c_attn", 3, {}, {"a.c_attn": SPARSE}, {}) == [Member("a.c_attn", "sparse", SPARSE, (0, 1, 2))]


def test_a_layer_that_the_map_does_not_change_has_no_modules() -> None:
    assert members_of("a.qkv_proj", 3, FUSED, {"b.q_proj": LOW_RANK}, {}) == []


def test_a_module_that_shares_its_basis_names_the_one_that_is_stored() -> None:
    shared = {"b.o.down.weight": "a.o.down.weight"}
    modules = {"a.o": LOW_RANK, "b.o": LOW_RANK}
    assert [members_of(name, 1, {}, modules, shared)[0].basis for name in ("a.o", "b.o")] == ["a.o.down.weight"] * 2


def test_a_layer_fused_of_another_number_of_modules_than_outputs_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"a\.q_proj: a\.qkv_proj is fused of 3 modules.* has 2 outputs"):
        members_of("a.qkv_proj", 2, FUSED, {"a.q_proj": LOW_RANK}, {})


def test_one_rank_holds_everything() -> None:
    for style in ("column", "row", "replicated"):
        cut = split(style, 6, (4, 2), 1, 0)
        assert (list(cut.inputs), [list(one) for one in cut.outputs]) == ([*range(6)], [[0, 1, 2, 3], [0, 1]])


def test_columns_are_cut_segment_by_segment_and_rows_by_inputs() -> None:
    column, row = split("column", 6, (4, 2), 2, 1), split("row", 6, (4,), 2, 1)
    assert (list(column.inputs), column.outputs) == ([*range(6)], (range(2, 4), range(1, 2)))
    assert (list(row.inputs), row.columns, row.outputs) == ([3, 4, 5], 6, (range(4),))


def test_keys_that_are_fewer_than_ranks_are_on_several_of_them() -> None:
    held = [split("column", 6, (8, 4, 4), 4, rank, (1, 2, 2)).outputs for rank in range(4)]
    assert [one[0].start for one in held] == [0, 2, 4, 6]
    assert [one[1].start for one in held] == [0, 0, 2, 2]


def test_channels_that_ranks_cannot_share_evenly_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="6 channels cannot be divided among 4 ranks"):
        split("row", 6, (4,), 4, 0)
