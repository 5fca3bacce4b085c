"""Evolution against random programs at the same budget: which finds the better allocation of zeros?

    PARED_DATA=/path/to/data python benchmarks/search.py             # both searches, resuming, then the page
    PARED_DATA=/path/to/data python benchmarks/search.py --strategy random
    python benchmarks/search.py --render                             # renders docs/results/search.md only

Journals, seconds and what was found are kept in benchmarks/search/, one folder a strategy; they are those of
`pared search`, which can go on with them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pared
from pared.entrypoints.search import run
from pared.schema.search import SearchConfig, Strategy
from record import RESULTS, ROOT, table

FOLDERS = ROOT / "benchmarks" / "search"
PAGE = RESULTS / "search.md"
PLOT = RESULTS / "search.svg"
STRATEGIES: tuple[Strategy, ...] = ("evolution", "random")

RECIPE = {
    "model": "embedded:smollm2-135m",
    "method": "wanda",
    "sparsity": 0.7,
    "dtype": "bfloat16",
    "calibration": {"text": "wikitext2:train", "samples": 128, "length": 512},
}
CONFIG = SearchConfig(iterations=300, windows=8, length=512, final_windows=40, halving=True)  # 320 candidates


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def seconds_of(folder: Path) -> float:
    """Return the wall time of a search: that of its sessions, each of which counts from its own beginning."""
    total, last = 0.0, 0.0
    for line in lines_of(folder / "seconds.jsonl"):
        if line["seconds"] < last:
            total += last
        last = line["seconds"]
    return total + last


def told_of(strategy: str) -> dict[str, Any]:
    """Return what a search found."""
    found: dict[str, Any] = json.loads((FOLDERS / strategy / "FOUND.json").read_text(encoding="utf-8"))
    return found


def summary(strategy: str) -> tuple[str, ...]:
    """Return the row of a search."""
    told, folder = told_of(strategy), FOLDERS / strategy
    lines = [line for line in lines_of(folder / "journal.jsonl") if str(line.get("name", "")).startswith("candidate")]
    whole = sum(len(line["values"]) == CONFIG.rungs for line in lines)
    drawn = sum(line["draws"] for line in lines)
    at = [told["trace"][min(n, len(lines)) - 1] for n in (20, 50, 100, 200, len(lines))]
    best = f"{told['perplexity']['full']:.1f} ({told['perplexity']['full'] / told['uniform']['full']:.3f})"
    return (strategy, str(len(lines)), str(whole), str(drawn), *(f"{value:.1f}" for value in at), best,
            f"{seconds_of(folder) / 60:.0f}")  # fmt: skip


def render() -> str:
    """Return the page."""
    told = told_of("evolution")
    settings = told["settings"]
    header = ("strategy", "candidates", "of them measured whole", "programs drawn", "best after 20", "50", "100", "200",
              "all", "best on the full split (of uniform)", "minutes")  # fmt: skip
    parts = [
        "# Searching for an allocation",
        "",
        "Made by `python benchmarks/search.py`; journals and what was found are in "
        "[benchmarks/search](../../benchmarks/search). Do not edit. How it works: [search.md](../search.md).",
        "",
        f"`{settings['model']}` in {settings['dtype'].removeprefix('torch.')}, `{settings['method']}` at "
        f"{settings['sparsity']:g}; scores from {settings['calibration samples']} x {settings['calibration length']} "
        f"tokens of the first 80% of {settings['calibration text']}, perplexity on windows of {settings['length']} "
        f"tokens of its last 20%: {settings['windows']} for a candidate, a quarter of them first, then half; who is "
        f"worse than the median of the population stops there. The {settings['top']} best are measured on "
        f"{settings['final_windows']} windows. No text of the results pages is read. Population "
        f"{settings['population']}, sample ratio {settings['sample_ratio']:g}, seed {settings['search seed']}.",
        "",
        table(header, [summary(strategy) for strategy in STRATEGIES if (FOLDERS / strategy / "FOUND.json").exists()]),
        "",
        f"Dense {told['dense']['search']:.2f} on the windows of the search and {told['dense']['full']:.2f} on the full "
        f"split, uniform {told['uniform']['search']:.1f} and {told['uniform']['full']:.1f}.",
        "",
        f"![Best so far]({PLOT.name})",
        "",
    ]
    for strategy in STRATEGIES:
        if (FOLDERS / strategy / "FOUND.json").exists():
            rows = [(f"`{one['program']}`", f"{one['search']:.1f}", f"{one['full']:.1f}") for one in
                    sorted(told_of(strategy)["best"], key=lambda one: one["full"])]  # fmt: skip
            parts += [
                f"## The best of {strategy}",
                "",
                table(("program", "windows of the search", "full split"), rows),
                "",
            ]
    return "\n".join(parts)


def draw() -> None:
    """Draw the best so far of both searches."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pared"  # the same picture from the same figures
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for strategy in STRATEGIES:
        if (FOLDERS / strategy / "FOUND.json").exists():
            trace = told_of(strategy)["trace"]
            axes.step(range(1, len(trace) + 1), trace, where="post", label=strategy)
    axes.axhline(told_of("evolution")["uniform"]["search"], color="gray", linestyle=":", label="uniform")
    axes.set(xlabel="candidates measured", ylabel="perplexity on the windows of the search, best so far")
    axes.legend()
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    if not asked.render:
        import torch

        torch.set_num_threads(asked.threads)
        for strategy in asked.strategy:
            run(pared.Recipe.of(RECIPE), CONFIG.model_copy(update={"strategy": strategy}), FOLDERS / strategy)
    draw()
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
