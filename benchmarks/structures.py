"""Perplexity of ranks, widths and both in one budget, on text that was calibrated on and text that was not.

    PARED_DATA=/path/to/data python benchmarks/structures.py                     # the grid, resuming where it stopped
    PARED_DATA=/path/to/data python benchmarks/structures.py --keep 0.8 --structures mixed --statistics once
    python benchmarks/structures.py --render                                     # renders the page only

One JSON line a cell; a cell that is there is not measured again (delete its line to repeat it). Statistics of the dense
model are collected once for all cells and kept in the user's cache folder.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import pared
from grid import LENGTH, SAMPLES, WINDOWS, measured, ratios, require_disjoint, signature
from low_rank import statistics
from pared.calibration import BlockStatistics, saved_blocks
from pared.schema.width import Width
from record import RESULTS, append, read, table

LINES, PAGE = RESULTS / "structures.jsonl", RESULTS / "structures.md"
STRUCTURES = ("ranks", "widths", "mixed")
SHRINKAGE = {"input_shrinkage": 0.03, "output_shrinkage": 0.1}
TEXT = "wikitext2:train"


def recipe_of(
    structures: str, keep: float, when: str, allocation: str, shrunk: bool, heads: str = "auto"
) -> pared.Recipe:
    """Return the recipe of a cell."""
    return pared.Recipe(
        method="loss-optimal",
        keep=keep,
        structures=structures,
        heads=heads,
        statistics=when,
        allocation=allocation,
        options=SHRINKAGE if shrunk else {},
        calibration=pared.Calibration(text=TEXT, samples=SAMPLES, length=LENGTH),
        evaluation=None,
    )


def measure(model_name: str, recipe: pared.Recipe | None) -> dict[str, Any]:
    """Compress the model one way (or not at all) and measure it on every text."""
    model, tokenizer = pared.load(model_name), pared.load_tokenizer(model_name)
    row: dict[str, Any] = {"model": model_name, "structures": "dense", "keep": 1.0}
    if recipe is not None:

        def collected() -> Iterator[BlockStatistics]:
            return saved_blocks(statistics(model_name, recipe.method, recipe.calibration))

        collected()  # before the clock starts
        start = time.perf_counter(), time.process_time()
        result = pared.compress(model, tokenizer, recipe, collected=collected)
        row |= {"structures": recipe.structures, "keep": recipe.keep, "statistics": recipe.statistics}
        row |= {
            "heads": recipe.heads,
            "allocation": recipe.allocation,
            "options": recipe.options,
            "settled": dict(result.settled),
        }
        row |= {"compress_seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}
        row |= {"calibration": result.calibration, "achieved_keep": result.plan.achieved_keep}
        decided = [site.decision for site in result.plan.sites]
        readers = [one for one in decided if isinstance(one, Width) and one.side == "in"]
        row |= {"widths": [one.width for one in readers if one.unit == "channel"]}
        row |= {"kept_heads": [one.width for one in readers if one.unit == "head"]}
        row |= {"low_rank": sum(one.kind == "low_rank" for one in decided)}
        row |= {"dense": sum(one.kind == "dense" for one in decided)}
    row |= {"model_parameters": sum(parameter.numel() for parameter in model.parameters())}
    return row | measured(model, tokenizer)


def key_of(line: dict[str, Any]) -> tuple[object, ...]:
    """Return what distinguishes a cell from every other."""
    if line["structures"] == "dense":
        return line["model"], "dense"
    named = tuple(line[name] for name in ("model", "structures", "keep", "statistics", "allocation"))
    heads = line.get("heads", "auto")
    return (*named, *sorted(line["options"].items()), *([] if heads == "auto" else [f"heads {heads}"]))


def asked(model: str, recipe: pared.Recipe) -> tuple[object, ...]:
    """Return the key that the cell of a recipe will have."""
    fields = {
        name: getattr(recipe, name) for name in ("structures", "keep", "statistics", "allocation", "options", "heads")
    }
    return key_of({"model": model, **fields})


def render(lines: list[dict[str, Any]]) -> str:
    """Return the page."""
    parts = []
    for model in dict.fromkeys(line["model"] for line in lines):
        own = [line for line in lines if line["model"] == model]
        dense = next(line for line in own if line["structures"] == "dense")
        cells = sorted((line for line in own if line is not dense), key=lambda line: (-line["keep"], str(key_of(line))))

        def told(line: dict[str, Any], dense: dict[str, Any] = dense) -> tuple[str, ...]:
            widths = line["widths"]
            spread = f"{len(widths)}: {min(widths):,} to {max(widths):,}" if widths else "none"
            shrunk = "yes" if line["options"] else "no"
            return (
                f"{line['structures']}{'' if line['allocation'] == 'auto' else ', ' + line['allocation']}"
                f"{'' if line.get('heads', 'auto') == 'auto' else ', heads ' + line['heads']}",
                f"{line['keep']:g}",
                f"{line['achieved_keep']:.3f}",
                line["statistics"],
                shrunk,
                spread,
                str(line["low_rank"]),
                f"{line['cpu_seconds']:,.0f}",
                *ratios(line, dense),
            )

        header = ("structures", "keep", "achieved", "statistics", "shrunk", "MLPs narrowed: widths",
                  "weights of low rank", "CPU seconds", *dense["perplexity"])  # fmt: skip
        whole = ("dense", "1", "1", "", "", "", "", "", *ratios(dense, dense))
        parts += [f"## {model}\n", table(header, [whole, *map(told, cells)]), ""]
    return "\n".join([
        "# Ranks, widths, and both in one budget\n",
        f"Perplexity, and its multiple of the dense model's, on {WINDOWS} windows of {LENGTH} tokens of each text. All "
        f"rows are `loss-optimal`, calibrated on {SAMPLES} windows of {LENGTH} tokens of {TEXT}, without training. "
        "`once`: statistics of the dense model; `sequential`: collected again behind the compressed prefix, with a "
        "quarter of the dense model's outputs in the targets. Shrunk: the input Gram by "
        f"{SHRINKAGE['input_shrinkage']:g}, that of output gradients by {SHRINKAGE['output_shrinkage']:g}. CPU seconds "
        "are those of the compression without the statistics of the dense model, which all rows share.\n",
        *parts,
        f"`python benchmarks/structures.py`; raw lines: [structures.jsonl](structures.jsonl). {signature(lines)}",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--structures", nargs="+", default=STRUCTURES, choices=STRUCTURES)
    parser.add_argument("--keep", nargs="+", type=float, default=[0.8, 0.6])
    parser.add_argument("--statistics", nargs="+", default=["once", "sequential"], choices=("once", "sequential"))
    parser.add_argument("--allocation", nargs="+", default=["auto"])
    parser.add_argument("--heads", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--plain", action="store_true", help="moments as they are, not shrunk")
    parser.add_argument("--render", action="store_true", help="only render the page")
    given = parser.parse_args()
    if not given.render:
        require_disjoint(TEXT)
        recipes = [
            recipe_of(structures, keep, when, allocation, not given.plain, given.heads)
            for when, keep, allocation, structures in product(
                given.statistics, given.keep, given.allocation, given.structures
            )
        ]
        there = {key_of(line) for line in read(LINES)}
        if (given.model, "dense") not in there:
            append(LINES, measure(given.model, None))
        for recipe in recipes:
            if asked(given.model, recipe) in there:
                continue
            append(LINES, line := measure(given.model, recipe))
            print(*key_of(line), {text: round(value, 2) for text, value in line["perplexity"].items()}, flush=True)
    if lines := read(LINES):
        PAGE.write_text(render(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
