"""What the grids of perplexities share: the texts, the measure, and how a cell is written."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pared
from pared.data import find_text
from record import Line

WINDOWS, LENGTH, SAMPLES = 20, 1024, 64


def evaluation_texts() -> dict[str, str]:
    """Return what is evaluated on, by the name the page uses; none of it is ever calibrated on."""
    speeches = f"file:{os.environ['PARED_DATA']}/lm/us_state_of_the_union_1945_2006.jsonl"
    return {"WikiText-2": "wikitext2:test", "C4": "c4:validation", "speeches": speeches}


def require_disjoint(calibration: str) -> None:
    """Stop if a text that is evaluated on shares a document with the calibration text."""
    seen = {document.strip() for document in find_text(calibration).documents if len(document) > 200}
    for name, source in evaluation_texts().items():
        if seen & {document.strip() for document in find_text(source).documents}:
            raise SystemExit(f"{name} shares documents with {calibration}")


def measured(
    model: Any, tokenizer: Any, texts: Sequence[str] = (), length: int = LENGTH, windows: int = WINDOWS
) -> dict[str, Any]:
    """Return the perplexity of a model on texts by name (all if none is named), and how long that took."""
    start = time.perf_counter()
    found = {
        name: pared.perplexity(model, tokenizer, source, length, windows).value
        for name, source in evaluation_texts().items()
        if name in texts or not texts
    }
    return {"perplexity": found, "evaluate_seconds": time.perf_counter() - start}


def ratios(line: Line, dense: Line) -> list[str]:
    """Return every perplexity of a line, and what multiple it is of the dense model's."""
    return [f"{value:,.2f} ({value / dense['perplexity'][text]:,.3f} x)" for text, value in line["perplexity"].items()]


def signature(lines: Sequence[Line]) -> str:
    """Return the commits, the machine and the versions behind a page."""
    last = lines[-1]
    return (
        f"Commits {', '.join(sorted({line['commit'] for line in lines}))}; {last['date']}, {last['cpu']}, "
        f"{last['threads']} thread, torch {last['torch']}, transformers {last['transformers']}, Python "
        f"{last['python']}.\n"
    )


def plot(
    path: Path, curves: dict[str, dict[str, list[tuple[float, float]]]], axis: str, falling: bool, most: float
) -> None:
    """Draw multiples of the dense perplexity over a budget, one panel a text.

    Args:
        path: of the picture.
        curves: by text and name, points ``(budget, multiple)``.
        axis: what the budget is called.
        falling: whether the largest budget comes first.
        most: where multiples are cut.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pared"  # the same picture from the same figures
    from matplotlib import pyplot

    figure, (panels,) = pyplot.subplots(1, len(curves), figsize=(12, 4.2), sharey=True, squeeze=False)
    for panel, (text, named) in zip(panels, curves.items(), strict=True):
        for name, points in named.items():
            if points:
                panel.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
        panel.set(title=text, xlabel=axis, yscale="log", ylim=(0.95, most))
        if falling:
            panel.invert_xaxis()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"perplexity / dense (cut at {most:g})")
    panels[-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
