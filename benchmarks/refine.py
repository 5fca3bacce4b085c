"""What refining every block brings: perplexity before and after, and its time against a forward pass.

    PARED_DATA=/path/to/data python benchmarks/refine.py                 # every cell, resuming where it stopped
    PARED_DATA=/path/to/data python benchmarks/refine.py --cells wanda-0.5
    python benchmarks/refine.py --render                                  # renders the page only

One JSON line a cell; a cell that is there is not measured again (delete its line to repeat it). A cell is a run of its
own that resumes block by block after a kill. What the model was before it was refined is measured in the same run.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import platformdirs
import torch

import pared
import pared.engine.compress as engine
from grid import LENGTH, SAMPLES, WINDOWS, measured, ratios, require_disjoint, signature
from pared.engine.observe import Observer
from pared.engine.refine import refine
from pared.engine.spec import PassSpec
from pared.schema.manifest import Refined
from pared.structure.store import DenseBlocks
from record import RESULTS, Line, append, ranks_alone, read, table

LINES, PAGE = RESULTS / "refine.jsonl", RESULTS / "refine.md"
FORWARD_WINDOWS = 8  # of the calibration text, on which a forward pass is timed
BEFORE, CPU = "before it is refined", "seconds of the processor"  # names in the state of a run

CELLS: dict[str, dict[str, Any]] = {
    "loss-optimal-0.6": {**ranks_alone(output_weighting="diagonal"), "keep": 0.6},
    "loss-optimal-0.8": {**ranks_alone(output_weighting="diagonal"), "keep": 0.8},
    "wanda-0.5": {"method": "wanda", "sparsity": 0.5},
    "basis-sharing-0.8": {"method": "basis-sharing", "keep": 0.8},
}


def measured_before(observer: Observer, step: PassSpec, number: int, dense: DenseBlocks) -> tuple[Refined, ...]:
    """Refine a model in memory, and keep in its state what it was before and what that took of the processor."""
    state = observer.state
    assert state is not None
    assert observer.windows is not None
    if state.get(BEFORE) is None:  # of a process that resumes some blocks are refined already
        tokens = observer.windows.tokens[:FORWARD_WINDOWS]
        start = time.process_time()
        with torch.no_grad():
            for window in tokens:
                observer.model.base_model(window.unsqueeze(0), use_cache=False)
        forward = (time.process_time() - start) * len(observer.windows.tokens) / len(tokens)
        state.put(BEFORE, {**measured(observer.model, observer.tokenizer), "forward": forward})
    start = time.process_time()
    try:
        return refine(observer, step, number, dense)
    finally:
        state.put(CPU, (state.get(CPU) or 0) + time.process_time() - start)
        FOUND.update(state.get(BEFORE), refine=state.get(CPU), tokens=observer.tokens)


FOUND: dict[str, Any] = {}  # of the run under way


def measure(name: str, model: str, text: str, refinement: dict[str, Any]) -> Line:
    """Compress and refine, or resume that, and measure both ends."""
    out = Path(platformdirs.user_cache_dir("pared")) / "benchmarks" / f"refine-{name}"
    recipe = pared.Recipe(
        model=model,
        calibration=pared.Calibration(text=text, samples=SAMPLES, length=LENGTH),
        evaluation=None,
        refine=refinement,
        out=str(out),
        **CELLS[name],
    )
    FOUND.clear()
    engine.refine = measured_before  # type: ignore[attr-defined]
    manifest = pared.run(recipe, resume=True, overwrite=True).manifest
    refined = [one.model_dump() for one in manifest.refined]
    folder = pared.load(str(out)), pared.load_tokenizer(str(out))
    return {
        "cell": name,
        "model": model,
        "text": text,
        "refine": recipe.refine.model_dump() if recipe.refine else None,
        "achieved_keep": manifest.plan.achieved_keep,
        "before": FOUND["perplexity"],
        "perplexity": measured(*folder)["perplexity"],
        "forward_cpu_seconds": FOUND["forward"],
        "refine_cpu_seconds": FOUND["refine"],
        "tokens": FOUND["tokens"],
        "resumed": manifest.resumed,
        "refined": refined,
    }


def dense(model: str) -> Line:
    """Measure the dense model."""
    return {"cell": "dense", "model": model, **measured(pared.load(model), pared.load_tokenizer(model))}


def render(lines: list[Line]) -> str:
    """Return the page."""
    whole = next(line for line in lines if line["cell"] == "dense")
    order = {name: number for number, name in enumerate(CELLS)}
    cells = sorted((line for line in lines if line["cell"] != "dense"), key=lambda line: order[line["cell"]])
    texts = list(whole["perplexity"])
    rows, blocks = [], []
    for line in cells:
        before = {"perplexity": line["before"]}
        asked = ", ".join(f"{key} {value}" for key, value in line["refine"].items())
        ratio = line["refine_cpu_seconds"] / line["forward_cpu_seconds"]
        both = [f"{a} → {b}" for a, b in zip(ratios(before, whole), ratios(line, whole), strict=True)]
        rows.append((line["cell"], *both, f"{ratio:.1f}", asked))
        better = sum(one["epochs"] > 0 for one in line["refined"])
        shown = (line["refined"][place] for place in (0, len(line["refined"]) // 2, -1))
        errors = [f"{one['before']:.4f} → {one['after']:.4f}" for one in shown]
        blocks.append((line["cell"], f"{better} of {len(line['refined'])}", *errors))
    tokens = f"{cells[0]['tokens']:,}" if cells else "no"
    return "\n".join(
        [
            "# Refining every block",
            "",
            "Made by `python benchmarks/refine.py`; raw figures in [refine.jsonl](refine.jsonl). Do not edit. What "
            "refining is: [refine.md](../refine.md).",
            "",
            f"`{whole['model']}`, float32; calibrated and refined on the same {tokens} tokens of wikitext2:train; "
            f"perplexity on the first {WINDOWS} windows of {LENGTH} tokens of each text, before → after, in brackets "
            "as a multiple of the dense model's. `loss-optimal` with `output_weighting=diagonal`; everything else is "
            "what `auto` gives the method. Time is of the processor, one thread, as a multiple of one forward pass of "
            "the compressed model over the same tokens in the same run; the passes of the compression are not in it.",
            "",
            table(("cell", *texts, "refine / forward", "options"), rows),
            "",
            "Error of what a block outputs on the windows held out, weighted by the next norm, relative to the size of "
            "a token's hidden state, before → after that block was trained:",
            "",
            table(("cell", "blocks improved", "first", "middle", "last"), blocks),
            "",
            signature(lines),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--text", default="wikitext2:train")
    parser.add_argument("--epochs", type=int, default=pared.Recipe(refine=True).refine.epochs)  # type: ignore[union-attr]
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if not asked.render:
        require_disjoint(asked.text)
        there = {line["cell"] for line in read(LINES)}
        if "dense" not in there:
            append(LINES, dense(asked.model))
        for name in asked.cells:
            if name not in there:
                append(LINES, measure(name, asked.model, asked.text, {"epochs": asked.epochs}))
                print(read(LINES)[-1], flush=True)
    PAGE.write_text(render(read(LINES)), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
