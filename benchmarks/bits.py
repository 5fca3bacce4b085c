"""Bytes of the target modules against perplexity: few bits, and mixtures of bits and ranks in one budget of bytes.

    PARED_DATA=/path/to/data python benchmarks/bits.py             # the grid, resuming where it stopped
    PARED_DATA=/path/to/data python benchmarks/bits.py --only "keep bytes 0.35" int4
    python benchmarks/bits.py --render                              # renders the page only

One JSON line a cell; a cell that is there is not measured again (delete its line to repeat it). Statistics of the dense
model are collected once for all cells and kept in the user's cache folder.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import pared
from grid import measured as perplexities
from grid import plot, ratios, require_disjoint, signature
from low_rank import statistics
from pared.calibration import BlockStatistics, saved_blocks
from record import RESULTS, Line, append, ranks_alone, read, table

LINES, PAGE, PLOT = RESULTS / "bits.jsonl", RESULTS / "bits.md", RESULTS / "bits.svg"
MODEL, TEXTS = "embedded:smollm2-135m", ("WikiText-2", "C4")
DTYPE = "bfloat16"  # of what is not in few bits: as models are published
CALIBRATION = pared.Calibration(text="wikitext2:train", samples=16, length=512)
WINDOWS, LENGTH = 3, 1024
UNIFORM, MIXED, RANKS = "few bits alone", "bits and ranks in one budget", "loss-optimal 0.8, then few bits"
# Name of a cell -> the curve that it is a point of, and the fields of its recipe; in the order of how much they say.
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("", {}),
    "int4": (UNIFORM, {"quantize": "int4"}),
    "keep bytes 0.35": (MIXED, {"keep_bytes": 0.35}),
    "int8": (UNIFORM, {"quantize": "int8"}),
    "keep bytes 0.25": (MIXED, {"keep_bytes": 0.25}),
    "int4, to the nearest": (UNIFORM, {"quantize": "int4", "rounding": "nearest"}),
    "keep bytes 0.27": (MIXED, {"keep_bytes": 0.27}),
    "keep bytes 0.45": (MIXED, {"keep_bytes": 0.45}),
    "keep bytes 0.6": (MIXED, {"keep_bytes": 0.6}),
    "int8, to the nearest": (UNIFORM, {"quantize": "int8", "rounding": "nearest"}),
    "keep bytes 0.3": (MIXED, {"keep_bytes": 0.3}),
    "keep bytes 0.8": (MIXED, {"keep_bytes": 0.8}),
    "loss-optimal 0.8, int8": (RANKS, {**ranks_alone(), "keep": 0.8, "quantize": "int8"}),
    "loss-optimal 0.8, int4": (RANKS, {**ranks_alone(), "keep": 0.8, "quantize": "int4"}),
}


def measure(name: str) -> Line:
    """Store the model in one way (or not at all) and measure it."""
    _, fields = CELLS[name]
    model, tokenizer = pared.load(MODEL, dtype=DTYPE), pared.load_tokenizer(MODEL)
    row: Line = {"model": MODEL, "cell": name, "share": 1.0}
    if fields:
        recipe = pared.Recipe.of({**fields, "calibration": CALIBRATION.model_dump(), "evaluation": None})

        def collected() -> Iterator[BlockStatistics]:
            return saved_blocks(statistics(MODEL, recipe.method, CALIBRATION, DTYPE))

        reads = recipe.method == "loss-optimal"
        if reads:
            collected()  # before the clock starts
        start, taken = time.perf_counter(), time.process_time()
        result = pared.compress(model, tokenizer, recipe, collected=collected if reads else None)
        row |= {"compress_seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - taken}
        row |= told_of(result.plan) | {"recipe": fields, "calibration": result.calibration}
    return row | perplexities(model, tokenizer, TEXTS, LENGTH, WINDOWS)


def told_of(plan: Any) -> Line:
    """Return what a line says of a plan: its bytes, and how many weights are stored in which way."""
    itemsize = plan.bytes_per_parameter
    spent = sum(site.stored_bytes(itemsize) for site in plan.sites)
    dense = plan.before.covered_parameters * itemsize
    kinds: dict[str, int] = {}
    for site in plan.sites:
        kind = f"{'rank' if site.decision.kind == 'low_rank' else 'whole'} {site.decision.quantized or 'as it is'}"
        kinds[kind] = kinds.get(kind, 0) + 1
    return {"bytes": spent, "share": spent / dense, "kinds": kinds}


def render(lines: list[Line]) -> str:
    """Return the page, and draw its picture."""
    dense = next(line for line in lines if line["cell"] == "dense")
    order = list(CELLS)
    cells = sorted((line for line in lines if line is not dense), key=lambda line: (-line["share"], line["cell"]))

    def row(line: Line) -> list[str]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(line["kinds"].items()))
        return [line["cell"], f"{line['share']:.3f}", f"{line['bytes'] / 1e6:,.1f}", *ratios(line, dense), kinds]

    curves: dict[str, dict[str, list[tuple[float, float]]]] = {text: {} for text in TEXTS}
    for line in cells:
        for text in TEXTS:
            multiple = line["perplexity"][text] / dense["perplexity"][text]
            curves[text].setdefault(CELLS[line["cell"]][0], []).append((line["share"], multiple))
    plot(PLOT, curves, "bytes of the target modules / bfloat16", True, 3)
    missing = [name for name in order if name not in {line["cell"] for line in lines}]
    text = [
        "# Bits",
        "",
        f"{dense['model']}, {WINDOWS} windows of {LENGTH:,} tokens of each text, calibrated on {CALIBRATION.samples} "
        f"windows of {CALIBRATION.length} tokens of WikiText-2. Bytes are those of the target modules, with scales; "
        "`share` is of their bytes in bfloat16. Rounded with feedback unless a cell says otherwise. Made by "
        "`benchmarks/bits.py`.",
        "",
        "Dense: " + ", ".join(f"{name} {value:,.2f}" for name, value in dense["perplexity"].items()) + ".",
        "",
        table(["cell", "share", "MB", *TEXTS, "weights"], map(row, cells)),
        "",
        *([f"Not measured yet: {', '.join(missing)}.", ""] if missing else []),
        "![Perplexity by bytes](bits.svg)",
        "",
        signature(lines),
    ]
    return "\n".join(text)


def main() -> None:
    """Measure what is not there yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CELLS, default=list(CELLS), help="cells to measure")
    parser.add_argument("--render", action="store_true", help="render the page only")
    asked = parser.parse_args()
    if not asked.render:
        require_disjoint(CALIBRATION.text)
        for name in asked.only:
            if name not in {line["cell"] for line in read(LINES)}:
                append(LINES, measure(name))
                print(read(LINES)[-1], flush=True)
    PAGE.write_text(render(read(LINES)), encoding="utf-8")


if __name__ == "__main__":
    main()
