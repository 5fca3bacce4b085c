"""A figure of a plan: how much stays of every kind of layer in every block."""

from pathlib import Path
from typing import TYPE_CHECKING

from pared.report.plots import new_figure, require_plotting, save
from pared.report.sites import shares_of
from pared.schema.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_plan(plan: Plan, path: str | Path | None = None) -> "Figure":
    """Draw how much stays of every layer: a row for each kind, a column for each block; of several alike their mean.

    Args:
        plan: of a model.
        path: of a .svg, .png or .pdf file that the figure is written to, if one is named.

    Raises:
        ParedError: matplotlib is not installed, or the file cannot be written.
    """
    require_plotting("plot")
    shares = shares_of(plan)
    blocks = 1 + max(block for by_block in shares.values() for block in by_block)
    cells = [
        [sum(each) / len(each) if (each := by_block.get(block)) else float("nan") for block in range(blocks)]
        for by_block in shares.values()
    ]
    figure, (panel,) = new_figure(2.5 + 0.22 * min(blocks, 60), 1.4 + 0.3 * len(shares))
    drawn = panel.imshow(cells, vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="nearest")
    panel.set_yticks(range(len(shares)), list(shares))
    panel.set(xlabel="block", title=f"what stays of every layer, {plan.budget}")
    figure.colorbar(drawn, ax=panel, label="of its parameters")
    if path is not None:
        save(figure, Path(path))
    return figure
