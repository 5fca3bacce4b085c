"""A figure of a plan has a cell for every block and kind, as light as much of it stays."""

from pathlib import Path

import pytest
from tiny_models import TINY_MODELS

import pared
from pared.report.plan_map import draw_plan
from pared.schema.plan import Dense, LowRank, Plan, SitePlan

pytest.importorskip("matplotlib")


def site(kind: str, block: int, rank: int) -> SitePlan:
    decision = LowRank(rank=rank) if rank else Dense(reason="whole")
    return SitePlan(name=f"{kind}.{block}", kind=kind, block=block, out_features=8, in_features=8, decision=decision)


PLAN = Plan(
    keep=0.5,
    sites=(site("q", 0, 2), site("q", 2, 1), site("up", 0, 0), site("up", 0, 2)),
    model_parameters=1000,
    bytes_per_parameter=4,
)


def test_a_cell_is_what_stays_and_layers_of_one_kind_in_a_block_have_their_mean() -> None:
    panel = draw_plan(PLAN).axes[0]
    (drawn,) = panel.images
    found = drawn.get_array()
    assert found.shape == (2, 3)
    assert found[0].tolist() == [0.5, None, 0.25]
    assert found[1].tolist() == [0.75, None, None]
    assert [text.get_text() for text in panel.get_yticklabels()] == ["q", "up"]


def test_a_compression_is_drawn_to_a_file(tmp_path: Path) -> None:
    result = pared.compress(TINY_MODELS["llama"](), method="svd", keep=0.5)
    result.plot(tmp_path / "plan.svg")
    assert "what stays of every layer" in (tmp_path / "plan.svg").read_text(encoding="utf-8")


def test_a_notebook_shows_a_figure_where_pyplot_was_never_imported() -> None:
    """Regression: it wrote <Figure size 910x350 with 2 Axes>."""
    assert draw_plan(PLAN)._repr_png_().startswith(b"\x89PNG")
