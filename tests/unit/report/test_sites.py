"""What is decided for layers, kind by kind and as a map."""

import pytest

from pared.report.sites import kinds_table, layers_table, rank_map
from pared.schema.plan import NM, Decision, Dense, LowRank, Plan, SitePlan, Sparse, Uncovered
from pared.schema.width import Width

BLOCKS = 30


def plan_of(decisions: dict[str, list[Decision]], uncovered: tuple[Uncovered, ...] = ()) -> Plan:
    sites = tuple(
        SitePlan(name=f"model.layers.{block}.self_attn.{kind}", kind=kind, block=block, out_features=576,
                 in_features=576, decision=decision)
        for kind, each in decisions.items()
        for block, decision in enumerate(each)
    )  # fmt: skip
    return Plan(keep=0.5, sites=sites, uncovered=uncovered, model_parameters=10**8, bytes_per_parameter=2)


def ranked() -> Plan:
    ranks: dict[str, list[Decision]] = {
        "q_proj": [LowRank(rank=10 + block) for block in range(BLOCKS)],
        "down_proj": [Dense(reason="skipped") if block < 2 else LowRank(rank=200) for block in range(BLOCKS)],
    }
    return plan_of(ranks)


def test_layers_with_ranks_of_their_own_take_a_row_a_kind() -> None:
    """Regression: `pared info` printed a line for every rank."""
    rows = kinds_table(ranked()).rows
    assert [row[:4] for row in rows] == [
        ("q_proj", "30", "576 x 576", "rank 10 / 24 / 39"),
        ("down_proj", "2", "576 x 576", "dense: skipped"),
        ("down_proj", "28", "576 x 576", "rank 200"),
    ]
    assert rows[0][4] == "3% / 8% / 14%"


def test_parameters_of_the_rows_add_up_to_the_plan() -> None:
    plan = ranked()
    assert sum(int(row[-1].replace(",", "")) for row in kinds_table(plan).rows) == plan.after.covered_parameters


@pytest.mark.parametrize(
    ("decisions", "told"),
    [
        ([Sparse(sparsity=0.25), Sparse(sparsity=0.5), Sparse(sparsity=0.75)], ["sparsity 0.25 / 0.5 / 0.75"]),
        ([NM(kept=2, group=4), NM(kept=1, group=4)], ["pattern 2:4", "pattern 1:4"]),
        ([LowRank(rank=8), LowRank(rank=9, pivoted=True)], ["rank 8", "rank 9, pivoted"]),
        ([Width(group="g", side="in", width=n, channels=576) for n in (100, 300)], ["width 100 / 100 / 300 of 576"]),
        ([Width(group="g", side="in", width=300, channels=576, rank=n) for n in (4, 6)],
         ["width 300 of 576, rank 4 / 4 / 6"]),
    ],
)  # fmt: skip
def test_every_sort_of_decision_is_told_by_its_least_median_and_largest(
    decisions: list[Decision], told: list[str]
) -> None:
    assert [row[3] for row in kinds_table(plan_of({"q_proj": decisions})).rows] == told


def test_a_map_has_a_column_a_block_and_a_level_an_eighth() -> None:
    title, queries, down = rank_map(ranked())
    assert "block 0 to 29" in title
    assert queries == f"q_proj     {'▁' * 27}{'▂' * 3}"  # 39 of 576 are 13.5% of the parameters, 36 are 12.5%
    assert down == f"down_proj  ██{'▆' * 28}"
    assert all(len(line) <= 80 for line in (queries, down))


def test_more_blocks_than_a_line_holds_stand_together() -> None:
    plan = plan_of({"q_proj": [LowRank(rank=10 + 2 * block) for block in range(126)]})
    title, queries = rank_map(plan)
    assert "3 blocks a column" in title
    assert len(queries) <= 80


def test_what_is_alike_everywhere_needs_no_map() -> None:
    assert not list(rank_map(plan_of({"q_proj": [LowRank(rank=8)] * 3})))


def test_every_layer_is_listed_by_name_if_asked() -> None:
    left = Uncovered(name="model.layers.0.norm.weight", shape=(576,), parameters=576, reason="no matrix")
    table = layers_table(plan_of({"q_proj": [LowRank(rank=8)] * 3}, (left,)))
    assert [row[0] for row in table.rows][-2:] == ["model.layers.2.self_attn.q_proj", "model.layers.0.norm.weight"]
    assert table.faint_from == 3


@pytest.mark.parametrize("width", [80])
def test_tables_fit_a_terminal(width: int) -> None:
    left = tuple(
        Uncovered(name=f"model.layers.{block}.post_attention_layernorm.weight", shape=(576,), parameters=576,
                  reason="not a matrix") for block in range(BLOCKS)
    )  # fmt: skip
    plan = plan_of({"q_proj": [LowRank(rank=100 + block, pivoted=True) for block in range(BLOCKS)]}, left)
    for table in (kinds_table(plan), layers_table(plan)):
        assert max(map(len, table.as_text(width).splitlines())) <= width
