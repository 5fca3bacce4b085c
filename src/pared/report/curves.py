"""Loss over size as a figure: what is predicted of every budget, what was measured of some, and where curves bend."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pared.report.plots import COLOURS, MARKERS, few_round_ticks, new_figure, require_plotting, save
from pared.schema.explore import Exploration, Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Sized(Protocol):
    """Whatever has a size: a point of a curve, or a model of a comparison."""

    @property
    def model_parameters(self) -> int:
        """Parameters of the whole model."""

    @property
    def bytes_on_disk(self) -> int:
        """Of its weights."""


# What figures are drawn over -> the name of the axis, and where something lies on it.
SIZES: dict[str, tuple[str, Callable[[Sized], float]]] = {
    "parameters": ("parameters of the model", lambda one: one.model_parameters),
    "bytes": ("bytes of the weights", lambda one: one.bytes_on_disk),
}
MOST_NATS = 3.0  # where a curve is cut: 20 times the perplexity of the dense model


def draw(
    exploration: Exploration, path: str | Path | None = None, over: Sequence[str] = ("parameters", "bytes")
) -> "Figure":
    """Draw the curves of an exploration, one panel for each size that they are drawn over.

    Lines are predicted, markers measured, a ring marks the knee and a star what was picked.

    Args:
        exploration: with its points.
        path: of a .svg, .png or .pdf file that the figure is written to, if one is named.
        over: ``parameters`` of the model, ``bytes`` of its weights, or both.

    Raises:
        ParedError: matplotlib is not installed, or the file cannot be written.
    """
    require_plotting("plot")
    figure, panels = new_figure(5.4 * len(over), 3.8, len(over), sharey=True)
    structures = list(dict.fromkeys(point.structure for point in exploration.points))
    for panel, (label, size) in zip(panels, map(SIZES.__getitem__, over), strict=True):
        for structure, colour, marker in zip(structures, COLOURS, MARKERS, strict=False):
            _curve(panel, exploration, structure, size, colour, marker)
        if exploration.pick is not None:
            loss = exploration.measured_loss(exploration.pick)
            height = exploration.pick.loss if loss is None else loss
            panel.plot([size(exploration.pick)], [height], "*", color="#a07800", markersize=13, label="picked")
        panel.set(xlabel=label, ylim=(-0.02, _top(exploration)))
        few_round_ticks(panel.xaxis)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("added loss, nats a token")
    panels[-1].legend(fontsize=8, loc="best")
    if path is not None:
        save(figure, Path(path))
    return figure


def _top(exploration: Exploration) -> float:
    found = [point.loss for point in exploration.points]
    found += [loss for point in exploration.points if (loss := exploration.measured_loss(point)) is not None]
    return min(MOST_NATS, 1.05 * max(found, default=1.0)) or 1.0


def _curve(panel: Any, exploration: Exploration, structure: str, size: Any, colour: str, marker: str) -> None:
    points: list[Point] = [exploration.dense, *exploration.curve(structure)]
    panel.plot(
        [size(one) for one in points], [one.loss for one in points], color=colour, label=f"{structure}, predicted"
    )
    losses = [(size(one), exploration.measured_loss(one)) for one in points[1:]]
    measured = [(at, loss) for at, loss in losses if loss is not None]
    if measured:
        panel.plot(*zip(*measured, strict=True), marker, color=colour, markersize=5, label=f"{structure}, measured")
    knee = next((one for one in points if exploration.knees.get(structure) == one.keep), None)
    if knee is not None:
        panel.plot([size(knee)], [knee.loss], "o", color=colour, markersize=11, fillstyle="none")
