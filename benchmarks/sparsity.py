"""Perplexity of every pruner with every allocation of zeros, on text that was calibrated on and text that was not.

    PARED_DATA=/path/to/data python benchmarks/sparsity.py                   # the grid, resuming where it stopped
    PARED_DATA=/path/to/data python benchmarks/sparsity.py --shard 0/2       # every second cell, for two processes
    PARED_DATA=/path/to/data python benchmarks/sparsity.py --pruners wanda --budgets 0.6 --allocations uniform loss
    python benchmarks/sparsity.py --dtype float32                            # where bfloat16 has no units of its own
    python benchmarks/sparsity.py --render                                   # renders the page only

One JSON line a cell; a cell that is there is not measured again (delete its line to repeat it), in whatever dtype it is
there; the dense model is measured in every dtype asked for. What an allocation needs of the dense model is collected
once for all its cells of a run.
"""

import argparse
import time
from functools import cache
from typing import Any, NamedTuple

import torch

import pared
from grid import LENGTH, SAMPLES, WINDOWS, measured, plot, ratios, require_disjoint, signature
from pared.allocation import Evidence
from pared.engine import collect_evidence, compress_blocks, resolve
from record import RESULTS, Line, append, read, table

LINES = RESULTS / "sparsity.jsonl"
PAGE = RESULTS / "sparsity.md"
PLOT = RESULTS / "sparsity.svg"
DTYPES = ("bfloat16", "float32")  # a line without one is of the first

PRUNERS = ("wanda", "sparsegpt", "magnitude")
BUDGETS = ("0.6", "0.7", "0.5", "2:4", "4:8")  # the first are measured first
FLIPPED = "W:(ABSLOG)-(VAR)-(ATAN,ASIN)-(7)-(KEEP)"  # the README's program, its sign turned around

# What a row is called: the allocation and its options.
ALLOCATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("uniform", {}),
    "owl": ("owl", {}),
    "alphapruning": ("alphapruning", {}),
    "dsa-paper": ("dsa", {"program": "dsa-readme", "legacy_nan_to_zero": True}),
    "dsa-flipped": ("dsa", {"program": FLIPPED, "legacy_nan_to_zero": True}),
    "dsa-found": ("dsa", {"program": "found-wanda-0.7"}),
    "loss": ("loss", {}),
}


class Cell(NamedTuple):
    """One row: pruner, sparsity or pattern, allocation by the name of its row."""

    pruner: str
    budget: str
    allocation: str


def cells_of(pruners: list[str], budgets: list[str], allocations: list[str]) -> list[Cell]:
    """Return the cells of a grid, what matters most first; a pattern goes with `uniform` alone."""
    return [
        Cell(pruner, budget, allocation)
        for pruner in pruners
        for budget in budgets
        for allocation in allocations
        if ":" not in budget or allocation == "uniform"
    ]


def recipe_of(cell: Cell, calibration: pared.Calibration) -> pared.Recipe:
    """Return what a cell asks for."""
    name, options = ALLOCATIONS[cell.allocation]
    budget = {"pattern": cell.budget} if ":" in cell.budget else {"sparsity": float(cell.budget)}
    return pared.Recipe(
        method=cell.pruner, calibration=calibration, allocation=name, allocation_options=options, **budget
    )


@cache
def evidence_of(model_name: str, dtype: str, allocation: str, calibration: pared.Calibration) -> Evidence:
    """Collect what an allocation needs, by its name in the library: options do not change it."""
    recipe = pared.Recipe(method="wanda", sparsity=0.5, calibration=calibration, allocation=allocation)
    return collect_evidence(pared.load(model_name, dtype).eval(), pared.load_tokenizer(model_name), recipe)


def measure(model_name: str, dtype: str, cell: Cell, calibration: pared.Calibration) -> Line:
    """Prune the model one way and measure it on every text."""
    recipe = recipe_of(cell, calibration)
    evidence = evidence_of(model_name, dtype, recipe.allocation, calibration)
    model, tokenizer = pared.load(model_name, dtype).eval(), pared.load_tokenizer(model_name)
    start = time.perf_counter()
    result = compress_blocks(model, tokenizer, resolve(recipe), evidence=evidence)
    row: Line = {
        "model": model_name,
        "dtype": dtype,
        **cell._asdict(),
        "text": calibration.text,
        "samples": calibration.samples,
    }
    row |= {"options": recipe.allocation_options, "prune_seconds": time.perf_counter() - start}
    row |= {"achieved": 1 - result.plan.achieved_keep, "calibration": result.calibration}
    spread = [1 - site.after / site.before for site in result.plan.sites]
    row |= {"least_sparse": min(spread), "most_sparse": max(spread)}
    return row | measured(model, tokenizer)


def measure_dense(model_name: str, dtype: str) -> Line:
    """Measure the model as it is."""
    row: Line = {
        "model": model_name,
        "dtype": dtype,
        "pruner": "dense",
        "budget": "-",
        "allocation": "-",
        "achieved": 0.0,
    }
    return row | measured(pared.load(model_name, dtype).eval(), pared.load_tokenizer(model_name))


def dtype_of(line: Line) -> str:
    """Return what the weights of a line were in."""
    return str(line.get("dtype", DTYPES[0]))


def dense_of(lines: list[Line]) -> dict[str, Line]:
    """Return the dense model's lines by dtype."""
    return {dtype_of(line): line for line in lines if line["pruner"] == "dense"}


def rows_of(lines: list[Line], dense: dict[str, Line]) -> list[tuple[str, ...]]:
    """Return the cells of the table of one pruner at one budget."""
    base = next((line for line in lines if line["allocation"] == "uniform"), None)

    def against(line: Line) -> str:
        if base is None or line is base:
            return "-"
        return ", ".join(f"{line['perplexity'][t] / base['perplexity'][t]:.2f}" for t in line["perplexity"])

    return [
        (
            line["allocation"],
            dtype_of(line),
            f"{line['achieved']:.4f}",
            f"{line.get('least_sparse', 0):.2f} to {line.get('most_sparse', 0):.2f}",
            *ratios(line, dense[dtype_of(line)]),
            against(line),
        )
        for line in lines
    ]


def render(lines: list[Line]) -> str:
    """Return the page."""
    dense = dense_of(lines)
    model, texts = lines[0]["model"], list(lines[0]["perplexity"])
    order = list(ALLOCATIONS)
    header = ("allocation", "dtype", "sparsity", "of a layer", *texts, "of uniform")
    parts = [
        "# Pruning and its allocation",
        "",
        "Made by `python benchmarks/sparsity.py`; raw figures in [sparsity.jsonl](sparsity.jsonl). Do not edit. What "
        "they say is summarised in [sparsity.md](../sparsity.md#what-was-measured).",
        "",
        f"`{model}`; calibrated on {SAMPLES} x {LENGTH} tokens of {lines[-1]['text']}; perplexity "
        f"on the first {WINDOWS} windows of {LENGTH} tokens of each text, no beginning-of-sequence token, in brackets "
        "as a multiple of the dense model's in the same dtype; the last column is the perplexity as a share of that "
        "with the uniform allocation, text by text; where dtypes differ, the dense lines say how little that is. C4 "
        "and the speeches (State of the Union addresses, 1945 to 2006) were never "
        "calibrated on. Sparsity counts the linear layers inside the blocks.",
        "",
        *(
            f"Dense in {dtype}: " + ", ".join(f"{text} {value:.2f}" for text, value in line["perplexity"].items()) + "."
            for dtype, line in dense.items()
        ),
        "",
        f"![Perplexity over sparsity]({PLOT.name})",
        "",
    ]
    for pruner in PRUNERS:
        for budget in sorted(BUDGETS, key=lambda budget: (":" in budget, budget)):
            chosen = [line for line in lines if (line["pruner"], line["budget"]) == (pruner, budget)]
            chosen.sort(key=lambda line: order.index(line["allocation"]))
            if chosen:
                parts += [f"## {pruner}, {budget}", "", table(header, rows_of(chosen, dense)), ""]
    return "\n".join([*parts, signature(lines)])


def curves(lines: list[Line]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return multiples of the dense perplexity over sparsity, by text, pruner and allocation."""
    dense = dense_of(lines)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {text: {} for text in lines[0]["perplexity"]}
    for line in lines:
        if line["pruner"] in ("wanda", "sparsegpt") and ":" not in line["budget"]:
            for text, points in found.items():
                name = f"{line['pruner']}, {line['allocation']}"
                points.setdefault(name, []).append(
                    (float(line["budget"]), line["perplexity"][text] / dense[dtype_of(line)]["perplexity"][text])
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--pruners", nargs="+", default=list(PRUNERS), choices=PRUNERS)
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), choices=BUDGETS)
    parser.add_argument("--allocations", nargs="+", default=list(ALLOCATIONS), choices=list(ALLOCATIONS))
    parser.add_argument("--dtype", default=DTYPES[0], choices=DTYPES)
    parser.add_argument("--text", default="wikitext2:train")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th cell, from the I-th on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if not asked.render:
        calibration = pared.Calibration(text=asked.text, samples=asked.samples, length=LENGTH)
        first, every = (int(number) for number in asked.shard.split("/"))
        require_disjoint(asked.text)
        if first == 0 and asked.dtype not in dense_of(read(LINES)):
            append(LINES, measure_dense(asked.model, asked.dtype))
        for cell in cells_of(asked.pruners, asked.budgets, asked.allocations)[first::every]:
            key = {"model": asked.model, "text": asked.text, "samples": asked.samples, **cell._asdict()}
            if not any(key.items() <= line.items() for line in read(LINES)):
                row = measure(asked.model, asked.dtype, cell, calibration)
                append(LINES, row)
                print(" ".join(cell), {text: round(value, 2) for text, value in row["perplexity"].items()}, flush=True)
    lines = read(LINES)
    if lines:
        plot(PLOT, curves(lines), "sparsity", falling=False, most=100)
        PAGE.write_text(render(lines), encoding="utf-8")
        print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
