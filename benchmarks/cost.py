"""Does `pared plan --cost` predict what a compression takes? And what would large models take?

    python benchmarks/cost.py             # measures what is missing, renders docs/results/cost.md
    python benchmarks/cost.py runs        # real runs against their predictions only
    python benchmarks/cost.py shapes      # the table of large models only
    python benchmarks/cost.py --render    # renders only

One JSON line a case; what is there is not measured again (delete lines to repeat them). Real runs are in processes of
their own on one thread, and their seconds are processor time, which other work on the machine disturbs little; each is
predicted before and after it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from record import RESULTS, append, ranks_alone, read, table

LINES, PAGE = RESULTS / "cost.jsonl", RESULTS / "cost.md"
EMBEDDED = "embedded:smollm2-135m"
TEXT = {"samples": 16, "length": 512}
EVALUATION = {"windows": 2}
DIAGONAL = {"output_weighting": "diagonal"}
RUNS: dict[str, dict[str, Any]] = {
    "svd-llm": {"method": "svd-llm", "keep": 0.8},
    "basis-sharing": {"method": "basis-sharing", "keep": 0.8},
    "loss-optimal, full": {**ranks_alone(), "keep": 0.8},
    "loss-optimal, diagonal": {**ranks_alone(**DIAGONAL), "keep": 0.8},
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
    "basis-sharing, refit": {"method": "basis-sharing", "keep": 0.5},
    "loss-optimal, sequential": {**ranks_alone(), "keep": 0.6},
    "fwsvd": {"method": "fwsvd", "keep": 0.8},
    "svd": {"method": "svd", "keep": 0.8},
}
# What a stage of less than this share is predicted as is not counted: there are constants in it that nothing tells.
SMALL = 0.03
NEAR = 0.3


def _llama(width: int, inner: int, blocks: int, heads: int, key_value: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=key_value, vocab_size=vocabulary, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip


SHAPES = {
    "LLaMA-2-7B": (_llama(4096, 11008, 32, 32, 32, 32000), 256),
    "LLaMA-3-70B": (_llama(8192, 28672, 80, 64, 8, 128256), 256),
    "LLaMA-3.1-405B": (_llama(16384, 53248, 126, 128, 8, 128256), 128),
}
LARGE = {name: RUNS[name] for name in ("svd-llm", "basis-sharing", "loss-optimal, diagonal", "loss-optimal, full",
                                       "wanda")}  # fmt: skip


def missing(key: Mapping[str, Any]) -> bool:
    """Whether no line with these entries is there yet."""
    return not any(key.items() <= line.items() for line in read(LINES))


def runs() -> None:
    """Compress the embedded model by every method, and predict it before and after."""
    for name in RUNS:
        if not missing(key := {"what": "run", "case": name}):
            continue
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder) / "told.json"
            child = [sys.executable, __file__, "--child", name, "--folder", folder]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            subprocess.run(child, check=True, env=environment, stdout=subprocess.DEVNULL)
            row = json.loads(told.read_text(encoding="utf-8"))
        append(LINES, key | row)
        told_ratio = sum(row["predicted"].values()) / sum(row["seconds"].values())
        print(f"{name}: predicted / taken {told_ratio:.2f}", flush=True)


def run_one(name: str, folder: Path) -> None:
    """Predict and run one case in this process, by the time that its processor works."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # solved in turn: stages tell what each takes
    time.perf_counter = time.process_time  # what stages are timed by
    import pared

    fields = {"model": EMBEDDED, "calibration": TEXT, "evaluation": EVALUATION, **RUNS[name]}
    recipe = pared.Recipe.model_validate({**fields, "out": str(folder / "out")})
    before, cost = _predicted(recipe)
    outcome = pared.run(recipe)
    after, _ = _predicted(recipe)
    predicted = {stage: (before[stage] + after[stage]) / 2 for stage in before}
    row = {
        "predicted": predicted, "seconds": outcome.manifest.seconds, "predictions": [before, after],
        "memory": sum(cost.memory.values()), "peak_memory_bytes": outcome.manifest.peak_memory_bytes,
        "disk": cost.disk, "bytes_on_disk": outcome.manifest.bytes_on_disk, "calibration": TEXT,
    }  # fmt: skip
    (folder / "told.json").write_text(json.dumps(row), encoding="utf-8")


def _predicted(recipe: Any) -> tuple[dict[str, float], Any]:
    """Return the seconds by stage, measured anew, and all else of a prediction."""
    from pared.engine.cost.measured import Measured
    from pared.entrypoints.cost import cost_of_source
    from pared.entrypoints.plan import plan_of

    planned = plan_of(recipe)
    from pared.models.source import find_model

    rates = Measured("cpu", time.process_time, fresh=True)
    cost = cost_of_source(find_model(recipe.model), planned.spec, planned.plan, rates)
    return cost.seconds, cost


def shapes() -> None:
    """Predict large models on this machine, by measured rates, and on one H100, by published ones."""
    import pared
    from pared.engine.allocate import plan_from_shapes
    from pared.engine.checks.early import require_possible
    from pared.engine.cost.measured import Measured
    from pared.engine.cost.published import MACHINES
    from pared.engine.cost.sizes import Tokens
    from pared.entrypoints.cost import predict

    here = Measured("cpu", time.process_time if torch.get_num_threads() == 1 else time.perf_counter)
    for shape, (config, windows) in SHAPES.items():
        todo = [(case, machine) for case in LARGE for machine in ("this", "h100")
                if missing({"what": "shape", "shape": shape, "case": case, "on": machine})]  # fmt: skip
        if not todo:
            continue
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for case, machine in todo:
            recipe = pared.Recipe.model_validate({**LARGE[case], "stream": "auto"})
            spec = require_possible(recipe)
            plan = plan_from_shapes(model, spec)
            rates = here if machine == "this" else MACHINES[machine]
            cost = predict(model, spec, plan, rates, Tokens(windows, 2048, 4), None)
            append(LINES, {"what": "shape", "shape": shape, "case": case, "on": machine, "windows": windows,
                           **cost.model_dump(mode="json")})  # fmt: skip
            print(f"{shape}, {case}, {machine}: {cost.total / 3600:.1f} h", flush=True)


def render() -> None:
    """Write the page from the lines."""
    from pared.memory import format_size
    from pared.schema.cost import format_seconds

    lines, parts = read(LINES), [HEAD]
    if rows := [line for line in lines if line["what"] == "run"]:
        cells, apart = [], []
        for line in sorted(rows, key=lambda one: list(RUNS).index(one["case"])):
            taken, predicted = line["seconds"], line["predicted"]
            counted = {stage for stage in taken if taken[stage] >= SMALL * sum(taken.values())}
            ratios = {stage: predicted.get(stage, 0.0) / taken[stage] for stage in counted}
            far = [f"{line['case']}: {stage} {ratio:.2f}" for stage, ratio in sorted(ratios.items())
                   if not 1 - NEAR <= ratio <= 1 + NEAR]  # fmt: skip
            apart += far
            both = [sum(part.values()) for part in line["predictions"]]
            whole = sum(predicted.values()) / sum(taken.values())
            told = [f"{predicted.get(stage, 0):.1f} / {taken.get(stage, 0):.1f}"
                    if stage in taken or stage in predicted else ""
                    for stage in ("walk", "backward", "solve", "refit", "perplexity before")]  # fmt: skip
            cells.append((line["case"], *told, f"{sum(predicted.values()):.0f} / {sum(taken.values()):.0f}",
                          f"{whole:.2f}", f"{min(both) / max(both):.2f}",
                          f"{line['memory'] / line['peak_memory_bytes']:.2f}"))  # fmt: skip
        header = ("method", "walk", "backward", "solve", "refit", "perplexity", "all", "ratio", "two predictions",
                  "memory ratio")  # fmt: skip
        missed = ", ".join(apart) or "none"
        parts += ["## Against real runs", RAN, table(header, cells), f"Stages of {SMALL:.0%} of a run or more that are "
                  f"predicted more than {NEAR:.0%} off (predicted / taken): {missed}."]  # fmt: skip
    for shape in SHAPES:
        found = {(line["case"], line["on"]): line for line in lines if line.get("shape") == shape}
        if not found:
            continue
        cells = []
        for case in LARGE:
            for on in ("this", "h100"):
                line = found.get((case, on))
                if line is None:
                    continue
                seconds = line["seconds"]
                solve = seconds.get("solve", 0.0)
                whole = sum(seconds.values())
                disk = format_size(sum(line["disk"].values()))
                cells.append((f"{case}, {'measured rates' if on == 'this' else 'H100, computed'}",
                              format_seconds(whole), format_seconds(seconds.get("walk", 0)),
                              format_seconds(seconds.get("backward", 0)), format_seconds(solve),
                              format_size(sum(line["memory"].values())), disk,
                              _held(line)))  # fmt: skip
        windows = SHAPES[shape][1]
        machine = next((line["machine"] for (_, on), line in found.items() if on == "this"), "")
        parts += [f"## {shape}, {windows} x 2,048 tokens", f"This machine: {machine}.",
                  table(("method", "time", "walk", "backward", "solve", "memory", "disk", "held"), cells)]  # fmt: skip
    notes = sorted({note for line in lines if line.get("computed") for note in line["notes"] if "rates" in note})
    parts += [f"H100: {note}." for note in notes]
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _held(line: Mapping[str, Any]) -> str:
    """Return where the model is, and whether the machine's memory holds that."""
    misfit = ", does not fit" if any("does not fit" in note for note in line["notes"]) else ""
    return ("block by block" if line["streamed"] else "in memory") + misfit


HEAD = """# What a compression costs, predicted

Made by `python benchmarks/cost.py`; raw lines with commit and machine in [cost.jsonl](cost.jsonl). A prediction adds up
operations: what blocks compute is traced on shapes, what a method solves is declared beside it, and each operation is
timed on this machine, at its size or at the largest that is quick, or computed from published rates. Nothing here was
run on a GPU, and no model of 7B parameters or more was compressed for it: those times are predictions."""
RAN = """SmolLM2-135M-Instruct, 16 windows of 512 tokens, perplexity on 2 windows of 1,024. Seconds are processor time
of one thread, predicted / taken; each run is predicted before and after it with everything measured anew, and the mean
counts. *Two predictions* is the ratio of the two, which says how steady the machine was. *Memory ratio* is what is
computed to be needed over the highest resident memory of a process that holds its libraries, too; it is an estimate
from above of what comes on top of them."""

SECTIONS = {"runs": runs, "shapes": shapes}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []])
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        run_one(asked.child, asked.folder)
    else:
        for section in [] if asked.render else asked.sections or list(SECTIONS):
            SECTIONS[section]()
            render()
        render()
        print(PAGE)
