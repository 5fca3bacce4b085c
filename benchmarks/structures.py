"""Perplexity of ranks, widths and both in one budget, on text that was calibrated on and text that was not.

    PARED_DATA=/path/to/data python benchmarks/structures.py                     # the grid, resuming where it stopped
    PARED_DATA=/path/to/data python benchmarks/structures.py --keep 0.8 --structures mixed --statistics once
    PARED_DATA=/path/to/data python benchmarks/structures.py --keep 0.6 --structures mixed --refine
    PARED_DATA=/path/to/data python benchmarks/structures.py --text mix         # calibrated on half C4, half WikiText-2
    PARED_DATA=/path/to/data python benchmarks/structures.py --samples 256      # four times as many windows
    python benchmarks/structures.py --render                                     # renders the page only

With ``--refine`` every block is trained behind the others, and what the model was before that is measured in the same
run, as the cell without, unless that is there. One JSON line a cell; a cell that is there is not measured again (delete
its line to repeat it). Statistics of the dense model are collected once for all cells of a text and kept in the user's
cache folder.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import platformdirs

import pared
import pared.engine.compress as engine
from grid import LENGTH, SAMPLES, WINDOWS, measured, ratios, require_disjoint, signature
from low_rank import statistics
from models import source_of
from pared.calibration import BlockStatistics, saved_blocks
from pared.data import find_text
from pared.engine.refine import refine
from pared.schema.width import Width
from record import RESULTS, UNSHRUNK, append, read, table

LINES, PAGE = RESULTS / "structures.jsonl", RESULTS / "structures.md"
STRUCTURES = ("ranks", "widths", "mixed")
SHRINKAGE: dict[str, dict[str, float | str]] = {
    "none": dict(UNSHRUNK),
    "fixed": {"input_shrinkage": 0.03, "output_shrinkage": 0.1},
    "auto": {"input_shrinkage": "auto", "output_shrinkage": "auto"},
}
DRAWN: dict[str, float] = {"labels_per_token": 1, "gradient_clip": 0.0}
TEXT, MIX = "wikitext2:train", "mix"
HALVES = ("c4:train", "wikitext2:train")  # of the mix
MIXED_CHARACTERS = 15_000  # of every window, more than it takes
PIECE = 16_000  # characters of one text in a row, some windows: what belongs together stays together
ASKED = ("structures", "keep", "statistics", "allocation", "options", "heads")  # of a recipe, that a cell is told by


def text_of(name: str, samples: int = SAMPLES) -> str:
    """Return the text of a name; that of the mix is a file of documents, some of one half, then some of the other."""
    if name != MIX:
        return name
    path = Path(platformdirs.user_cache_dir("pared")) / "benchmarks" / f"half-c4-half-wikitext2-{samples}.jsonl"
    left = {half: iter(find_text(half).documents) for half in HALVES}
    taken = dict.fromkeys(HALVES, 0)
    rows: list[str] = []
    while sum(taken.values()) < MIXED_CHARACTERS * samples:
        half = min(taken, key=taken.__getitem__)
        until = taken[half] + PIECE
        while taken[half] < until:
            document = next(left[half])
            taken[half] += len(document)
            rows.append(json.dumps({"text": document}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows), encoding="utf-8")
    return f"file:{path}"


def drawn_of(options: dict[str, Any]) -> dict[str, float]:
    """Return which of some options say how gradients are taken, where that is not the usual way."""
    return {name: options[name] for name, usual in DRAWN.items() if options.get(name, usual) != usual}


def recipe_of(
    structures: str, keep: float, when: str, allocation: str, shrinkage: str, given: argparse.Namespace
) -> pared.Recipe:
    """Return the recipe of a cell."""
    return pared.Recipe(
        method="loss-optimal",
        keep=keep,
        structures=structures,
        heads=given.heads,
        statistics=when,
        allocation=allocation,
        options=SHRINKAGE[shrinkage] | drawn_of(vars(given)),
        calibration=pared.Calibration(text=text_of(given.text, given.samples), samples=given.samples, length=LENGTH),
        evaluation=None,
        refine=given.refine,
    )


def measure(model_name: str, recipe: pared.Recipe | None, text: str, before_too: bool) -> list[dict[str, Any]]:
    """Compress the model one way (or not at all) and measure it on every text; before it is refined, too, if asked."""
    model, tokenizer = pared.load(source_of(model_name)), pared.load_tokenizer(source_of(model_name))
    if recipe is None:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        row = {"model": model_name, "structures": "dense", "keep": 1.0, "model_parameters": parameters}
        return [row | measured(model, tokenizer)]

    def collected() -> Iterator[BlockStatistics]:
        return saved_blocks(statistics(model_name, recipe.method, recipe.calibration, **drawn_of(recipe.options)))

    collected()  # before the clock starts
    before: dict[str, Any] = {}
    start, taken = time.perf_counter(), time.process_time()

    def refine_measured(*args: Any) -> Any:
        nonlocal start, taken
        before.update(seconds_of(start, taken))
        if before_too:
            before.update(measured(model, tokenizer))
        start, taken = time.perf_counter(), time.process_time()
        return refine(*args)

    with patch.object(engine, "refine", refine_measured):
        result = pared.compress(model, tokenizer, recipe, collected=collected)
    seconds = seconds_of(start, taken)
    row = told_of(result, model_name, recipe) | {"text": text, "samples": recipe.calibration.samples}
    if recipe.refine is None:
        return [row | seconds | measured(model, tokenizer)]
    refined = {
        "refine": recipe.refine.model_dump(),
        "refine_cpu_seconds": seconds["cpu_seconds"],
        "refined": [one.model_dump() for one in result.refined],
    }
    whole = {name: before[name] + taken for name, taken in seconds.items()}
    own = row | whole | refined | measured(model, tokenizer)
    return [row | before, own] if before_too else [own]


def seconds_of(start: float, taken: float) -> dict[str, float]:
    """Return how long something took, on the clock and of the processor."""
    return {"compress_seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - taken}


def told_of(result: pared.Compressed, model_name: str, recipe: pared.Recipe) -> dict[str, Any]:
    """Return what a line says of a compression, its figures aside."""
    decided = [site.decision for site in result.plan.sites]
    readers = [one for one in decided if isinstance(one, Width) and one.side == "in"]
    asked = {name: getattr(recipe, name) for name in ASKED}
    return {
        "model": model_name,
        **asked,
        "settled": dict(result.settled),
        "calibration": result.calibration,
        "achieved_keep": result.plan.achieved_keep,
        "widths": [one.width for one in readers if one.unit == "channel"],
        "kept_heads": [one.width for one in readers if one.unit == "head"],
        "low_rank": sum(one.kind == "low_rank" for one in decided),
        "dense": sum(one.kind == "dense" for one in decided),
        "model_parameters": sum(parameter.numel() for parameter in result.model.parameters()),
    }


def key_of(line: dict[str, Any]) -> tuple[object, ...]:
    """Return what distinguishes a cell from every other."""
    if line["structures"] == "dense":
        return line["model"], "dense"
    named = tuple(line[name] for name in ("model", "structures", "keep", "statistics", "allocation"))
    heads = [] if line["heads"] == "auto" else [f"heads {line['heads']}"]
    refined = [f"refined {value} {name}" for name, value in (line.get("refine") or {}).items()]
    text = [] if line.get("text", TEXT) == TEXT else [f"text {line['text']}"]
    samples = [] if line.get("samples", SAMPLES) == SAMPLES else [f"samples {line['samples']}"]
    return (*named, *sorted(line["options"].items()), *heads, *text, *samples, *refined)


def asked(model: str, recipe: pared.Recipe, text: str) -> tuple[object, ...]:
    """Return the key that the cell of a recipe will have."""
    refine = None if recipe.refine is None else recipe.refine.model_dump()
    fields = {"model": model, "text": text, "samples": recipe.calibration.samples, "refine": refine}
    return key_of(fields | {name: getattr(recipe, name) for name in ASKED})


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
            drawn = drawn_of(line["options"])
            amounts = {name: value for name, value in line["options"].items() if name not in drawn}
            shrunk = next((name for name, one in SHRINKAGE.items() if one == amounts), str(amounts))
            return (
                f"{line['structures']}{'' if line['allocation'] == 'auto' else ', ' + line['allocation']}"
                f"{'' if line['heads'] == 'auto' else ', heads ' + line['heads']}"
                f"{', refined' if line.get('refine') else ''}",
                f"{line['keep']:g}",
                f"{line['achieved_keep']:.3f}",
                f"{line['calibration']['windows']} of {'WikiText-2' if line.get('text', TEXT) == TEXT else 'half C4'}",
                line["statistics"],
                shrunk + "".join(f", {name.replace('_', ' ')} {value:g}" for name, value in drawn.items()),
                spread,
                str(line["low_rank"]),
                f"{line['cpu_seconds']:,.0f}",
                *ratios(line, dense),
            )

        header = ("structures", "keep", "achieved", "calibrated on", "statistics", "shrinkage, gradients",
                  "MLPs narrowed: widths", "weights of low rank", "CPU seconds", *dense["perplexity"])  # fmt: skip
        whole = ("dense", "1", "1", "", "", "", "", "", "", *ratios(dense, dense))
        parts += [f"## {model}\n", table(header, [whole, *map(told, cells)]), ""]
    return "\n".join([
        "# Ranks, widths, and both in one budget\n",
        f"Perplexity, and its multiple of the dense model's, on {WINDOWS} windows of {LENGTH} tokens of each text. All "
        f"rows are `loss-optimal`, calibrated on windows of {LENGTH} tokens, as many as the row says: of {TEXT}, or "
        f"half of that and half of {HALVES[0]}, in turns. `refined`: every block was trained on the same windows "
        "to output what the dense one does ([how](../refine.md)); the others without training. "
        "`once`: statistics of the dense model; `sequential`: collected again behind the compressed prefix, with a "
        "quarter of the dense model's outputs in the targets. Shrinkage `fixed`: the input Gram by "
        f"{SHRINKAGE['fixed']['input_shrinkage']}, that of output gradients by "
        f"{SHRINKAGE['fixed']['output_shrinkage']}; `auto`: both by their rule. `labels per token`: so many were "
        "sampled and sent back, each by itself; `gradient clip`: no token's gradient was longer at the head than so "
        "many times the median of its window. CPU seconds "
        "are those of the compression and of refining, without the statistics of the dense model, which all rows of a "
        "text share.\n",
        *parts,
        f"`python benchmarks/structures.py`; raw lines: [structures.jsonl](structures.jsonl). {signature(lines)}",
    ])  # fmt: skip


def fill(given: argparse.Namespace) -> None:
    """Measure the cells that were asked for and are not there."""
    require_disjoint(text_of(given.text, given.samples))
    recipes = [
        recipe_of(structures, keep, when, allocation, shrinkage, given)
        for when, keep, allocation, shrinkage, structures in product(
            given.statistics, given.keep, given.allocation, given.shrinkage, given.structures
        )
    ]
    there = {key_of(line) for line in read(LINES)}
    if (given.model, "dense") not in there:
        append(LINES, measure(given.model, None, given.text, False)[0])
    for recipe in recipes:
        if asked(given.model, recipe, given.text) in there:
            continue
        without = asked(given.model, recipe.model_copy(update={"refine": None}), given.text)
        for line in measure(given.model, recipe, given.text, without not in there):
            append(LINES, line)
            print(*key_of(line), {text: round(value, 2) for text, value in line["perplexity"].items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--structures", nargs="+", default=STRUCTURES, choices=STRUCTURES)
    parser.add_argument("--keep", nargs="+", type=float, default=[0.8, 0.6])
    parser.add_argument("--statistics", nargs="+", default=["once", "sequential"], choices=("once", "sequential"))
    parser.add_argument("--allocation", nargs="+", default=["auto"])
    parser.add_argument("--heads", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--shrinkage", nargs="+", default=["fixed"], choices=list(SHRINKAGE), help="of both Grams")
    parser.add_argument("--text", default=TEXT, choices=(TEXT, MIX), help="that is calibrated on")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="windows that are calibrated on")
    parser.add_argument("--labels-per-token", type=int, default=DRAWN["labels_per_token"])
    parser.add_argument("--gradient-clip", type=float, default=DRAWN["gradient_clip"])
    parser.add_argument("--refine", action="store_true", help="train every block afterwards, and measure before it too")
    parser.add_argument("--render", action="store_true", help="only render the page")
    given = parser.parse_args()
    if not given.render:
        fill(given)
    if lines := read(LINES):
        PAGE.write_text(render(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
