"""The best so far, candidate by candidate, as a figure: a search, and another at the same budget."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pared.errors import ParedError
from pared.io.guarded import read_json
from pared.report.plots import new_figure, save

FREE = ("strategy", "search seed", "iterations", "population", "sample_ratio", "top", "workers", "pared")


def against(settings: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """Return what another search found, if its candidates were measured as these were.

    Args:
        settings: of this search.
        folder: of the other.

    Raises:
        ParedError: there is none in the folder, or it measured something else.
    """
    path = Path(folder) / "FOUND.json"
    try:
        result: dict[str, Any] = read_json(path, "search")
        theirs = dict(result["settings"])
    except (ParedError, ValueError, KeyError, TypeError) as error:
        raise ParedError(f"--against {folder}: no finished search in it ({path}: {error})") from None
    for name in sorted({*settings, *theirs} - set(FREE)):
        if settings.get(name) != theirs.get(name):
            raise ParedError(
                f"--against {folder}: that search has {name} {theirs.get(name)!r}, this one {settings.get(name)!r}; "
                "perplexities can only be compared if it is the same"
            )
    return result


def draw(result: Mapping[str, Any], other: Mapping[str, Any], path: Path) -> Path:
    """Draw the best so far of a search, and of another beside it, cut at the budget of the shorter.

    Args:
        result: content of ``FOUND.json``.
        other: of another search; empty for none.
        path: of the figure.
    """
    figure, (axes,) = new_figure()
    traces = [(one["settings"], one["trace"]) for one in (result, other) if one]
    budget = min(len(trace) for _, trace in traces)
    for settings, trace in traces:
        label = f"{settings['strategy']}, seed {settings['search seed']}"
        values = [float("nan") if value is None else value for value in trace[:budget]]
        axes.step(range(1, budget + 1), values, where="post", label=label)
    axes.axhline(result["uniform"]["search"] or float("nan"), color="gray", linestyle=":", label="uniform")
    axes.set(xlabel="candidates measured", ylabel="perplexity on the search windows, best so far")
    axes.legend()
    return save(figure, path)
