"""How every figure is drawn: by matplotlib, the same bytes from the same numbers, as a file or inside of a page."""

import importlib.util
import io
import re
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pared.errors import ParedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#123456"  # stands for the colour of the text around a figure that is drawn into a page
SALT = "pared"  # of the names inside of a picture, which are random without one
# Told apart in both light and dark, and by those who do not see some colours (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a07800", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")


def require_plotting(what: str) -> None:
    """Check that figures can be drawn.

    Args:
        what: draws them, for messages: an option, or a function.

    Raises:
        ParedError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ParedError(f"{what} draws with matplotlib; install it with: pip install matplotlib")


def new_figure(width: float = 7, height: float = 4, panels: int = 1, **more: Any) -> "tuple[Figure, list[Any]]":
    """Return an empty figure and its panels, side by side.

    Args:
        width: inches.
        height: inches.
        panels: how many.
        **more: for ``Figure.subplots``.
    """
    figure = _figure_class()(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False, **more)[0])


@cache
def _figure_class() -> "type[Figure]":
    """Return a figure that a notebook shows, also where pyplot was never imported to have it do so."""
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        def _repr_png_(self) -> bytes:
            written = io.BytesIO()
            with _repeatable():
                self.savefig(written, format="png", dpi=96)
            return written.getvalue()

    return ShownFigure


def few_round_ticks(axis: Any) -> None:
    """Give an axis of sizes few ticks with units, 135M for 135 million: they never run into each other."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(EngFormatter(sep=""))


def save(figure: "Figure", path: Path) -> Path:
    """Write a figure as what its name ends with: .svg, .png or .pdf.

    Raises:
        ParedError: it cannot be written, or there is no such kind of picture.
    """
    try:
        with _repeatable():
            figure.savefig(
                path, dpi=120, metadata=None if path.suffix == ".png" else {_DATE.get(path.suffix, ""): None}
            )
    except (OSError, ValueError) as error:
        raise ParedError(f"{path}: {error}; expected the name of a .svg, .png or .pdf file") from None
    return path


_DATE = {".svg": "Date", ".pdf": "CreationDate"}


def inline(figure: "Figure", name: str, description: str) -> str:
    """Return a figure as SVG to stand in a page: in the colour of its text, and described to who does not see it.

    Args:
        figure: drawn with :data:`INK` for what is not a curve.
        name: of the figure in the page, of letters, digits and hyphens; no other has it.
        description: what it shows.
    """
    from xml.sax.saxutils import escape

    _ink(figure)
    written = io.StringIO()
    with _repeatable():
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    text = written.getvalue()
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text[text.index("<svg") :])
    text = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{name}-", text).replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head = f'<svg role="img" aria-labelledby="{name}-title" '
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )
    opened = text.index(">") + 1
    return f'{head}{text[4:opened].lstrip()}<title id="{name}-title">{escape(description)}</title>{text[opened:]}'


def _ink(figure: "Figure") -> None:
    """Draw what is not a curve in the ink."""
    for panel in figure.axes:
        for spine in panel.spines.values():
            spine.set_color(INK)
        panel.tick_params(colors=INK, which="both")
        for words in (panel.title, panel.xaxis.label, panel.yaxis.label):
            words.set_color(INK)
        panel.patch.set_alpha(0)
        if (legend := panel.get_legend()) is not None:
            legend.get_frame().set_alpha(0)
            for words in legend.get_texts():
                words.set_color(INK)


def _repeatable() -> AbstractContextManager[None]:
    import matplotlib

    context: AbstractContextManager[None] = matplotlib.rc_context(
        {"svg.hashsalt": SALT, "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "sans-serif"]}
    )
    return context
