"""Methods that take out channels and heads by scores of others beside our own, at equal parameters.

    PARED_DATA=/path/to/data python benchmarks/baselines.py            # little text, resuming where it stopped
    PARED_DATA=/path/to/data python benchmarks/baselines.py --full     # as much text as structures.py
    python benchmarks/baselines.py --render                            # renders the page only

One JSON line a cell; a cell that is there is not measured again (delete its line to repeat it). Statistics of the dense
model are collected once for all cells of a protocol and kept in the user's cache folder.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import pared
from grid import LENGTH, SAMPLES, WINDOWS, measured, ratios, require_disjoint, signature
from low_rank import statistics
from models import source_of
from pared.calibration import BlockStatistics, saved_blocks
from pared.schema.width import Width
from record import RESULTS, append, read, table

LINES, PAGE = RESULTS / "baselines.jsonl", RESULTS / "baselines.md"
TEXT = "wikitext2:train"
OURS = "loss-optimal"
SHRINKAGE = {"input_shrinkage": 0.03, "output_shrinkage": 0.1}
# What is asked of each; all else is what `auto` gives the method. Attentions of SmolLM2 have three key/value heads, and
# one width everywhere is any number, as multiples of 64 would leave 2% of the budget.
ANY = {"multiple_of": 1}
CELLS: dict[str, dict[str, Any]] = {
    "flap": {"method": "flap"},
    "modegpt": {"method": "modegpt", **ANY},
    "wanda-sp": {"method": "wanda-sp", **ANY},
    "llm-pruner": {"method": "llm-pruner", **ANY},
    "ours": {"method": OURS, "statistics": "once", "options": SHRINKAGE},
    "ours, uniform": {"method": OURS, "statistics": "once", "options": SHRINKAGE, "allocation": "uniform", **ANY},
    "flap, heads off": {"method": "flap", "heads": "off"},
    "wanda-sp, heads off": {"method": "wanda-sp", "heads": "off", **ANY},
    "llm-pruner, heads off": {"method": "llm-pruner", "heads": "off", **ANY},
    "flap, uniform, heads off": {"method": "flap", "heads": "off", "allocation": "uniform", **ANY},
}


class Protocol(NamedTuple):
    """How much text is calibrated on and evaluated on; windows of both have one length."""

    samples: int
    length: int
    windows: int
    texts: tuple[str, ...]


PROTOCOLS = {
    "little": Protocol(12, 512, 6, ("WikiText-2", "C4")),
    "full": Protocol(SAMPLES, LENGTH, WINDOWS, ("WikiText-2", "C4", "speeches")),
}


def measure(model_name: str, cell: str, keep: float, name: str) -> dict[str, Any]:
    """Compress the model one way (or not at all) and measure it on every text of a protocol."""
    protocol = PROTOCOLS[name]
    model, tokenizer = pared.load(source_of(model_name)), pared.load_tokenizer(source_of(model_name))
    row: dict[str, Any] = {"model": model_name, "protocol": name, "cell": cell, "keep": keep}
    if cell != "dense":
        calibration = pared.Calibration(text=TEXT, samples=protocol.samples, length=protocol.length)
        recipe = pared.Recipe(keep=keep, structures="widths", calibration=calibration, evaluation=None, **CELLS[cell])
        folder = statistics(model_name, recipe.method, calibration)

        def collected() -> Iterator[BlockStatistics]:
            return saved_blocks(folder)

        start = time.perf_counter(), time.process_time()
        result = pared.compress(model, tokenizer, recipe, collected=collected)
        row |= {"compress_seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}
        row |= {"method": recipe.method, "options": recipe.options, "settled": dict(result.settled)}
        row |= {"calibration": result.calibration, "achieved_keep": result.plan.achieved_keep}
        readers = [one for site in result.plan.sites if isinstance(one := site.decision, Width) and one.side == "in"]
        row |= {"widths": [one.width for one in readers if one.unit == "channel"]}
        row |= {"kept_heads": [one.width for one in readers if one.unit == "head"]}
    row |= {"model_parameters": sum(parameter.numel() for parameter in model.parameters())}
    return row | measured(model, tokenizer, protocol.texts, protocol.length, protocol.windows)


def key_of(line: dict[str, Any]) -> tuple[object, ...]:
    """Return what distinguishes a cell from every other."""
    return line["model"], line["protocol"], line["cell"], line["keep"]


def spread(sizes: list[int]) -> str:
    """Return how many layers have how many channels or heads left."""
    return f"{len(sizes)}: {min(sizes):,} to {max(sizes):,}" if sizes else "none"


def render(lines: list[dict[str, Any]]) -> str:
    """Return the page."""
    order, parts = [*CELLS], []
    for model, name in dict.fromkeys((line["model"], line["protocol"]) for line in lines):
        own, protocol = [one for one in lines if (one["model"], one["protocol"]) == (model, name)], PROTOCOLS[name]
        dense = next(line for line in own if line["cell"] == "dense")
        cells = sorted(
            (line for line in own if line is not dense), key=lambda line: (-line["keep"], order.index(line["cell"]))
        )
        header = ("method", "keep", "parameters", "allocation", "statistics", "MLPs narrowed: widths",
                  "attentions narrowed: heads", "CPU seconds", *dense["perplexity"])  # fmt: skip
        rows = [("dense", "1", f"{dense['model_parameters']:,}", "", "", "", "", "", *ratios(dense, dense))]
        rows += [
            (
                line["cell"],
                f"{line['keep']:g}",
                f"{line['model_parameters']:,}",
                line["settled"]["allocation"],
                line["settled"]["statistics"],
                spread(line["widths"]),
                spread(line["kept_heads"]),
                f"{line['cpu_seconds']:,.0f}",
                *ratios(line, dense),
            )
            for line in cells
        ]
        parts += [
            f"## {model}, calibrated on {protocol.samples} windows of {protocol.length} tokens\n",
            f"Perplexity on {protocol.windows} windows of {protocol.length} tokens of each text.\n",
            table(header, rows),
            "",
        ]
    return "\n".join([
        "# Channels and heads by scores of others\n",
        "Perplexity, and its multiple of the dense model's, at equal parameters of the target modules, without "
        f"training. Calibrated on {TEXT}. Ours is `{OURS} --structures widths`, statistics of the dense model, the "
        f"input Gram shrunk by {SHRINKAGE['input_shrinkage']:g}, that of output gradients by "
        f"{SHRINKAGE['output_shrinkage']:g}; widths are multiples of 64 where they differ by layer, and a score of "
        "others has what `auto` gives it unless the row says otherwise. CPU seconds are those of the compression, "
        "without the statistics of the dense model. [The methods](../low_rank.md#widths-by-scores-of-others).\n",
        *parts,
        f"`python benchmarks/baselines.py`; raw lines: [baselines.jsonl](baselines.jsonl). {signature(lines)}",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--cells", nargs="+", default=[*CELLS], choices=[*CELLS])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.8, 0.6])
    parser.add_argument("--full", action="store_true", help="as much text as structures.py")
    parser.add_argument("--render", action="store_true", help="only render the page")
    given = parser.parse_args()
    if not given.render:
        require_disjoint(TEXT)
        name = "full" if given.full else "little"
        there = {key_of(line) for line in read(LINES)}
        for cell, keep in [("dense", 1.0), *product(given.cells, given.keep)]:
            if (given.model, name, cell, keep) in there:
                continue
            append(LINES, line := measure(given.model, cell, keep, name))
            print(*key_of(line), {text: round(value, 2) for text, value in line["perplexity"].items()}, flush=True)
    if lines := read(LINES):
        PAGE.write_text(render(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
