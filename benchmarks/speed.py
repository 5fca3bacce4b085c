"""How fast low rank and narrower layers are: prefill and decoding, two factors, pivoted or widths, against dense.

    python benchmarks/speed.py                        # the grid, resuming where it stopped; on a machine that is quiet
    python benchmarks/speed.py --storages widths --keeps 0.6 --dtype bfloat16
    python benchmarks/speed.py --models wide          # the wide random model alone
    python benchmarks/speed.py --render               # renders the page only

One JSON line for a model, a storage, a keep and a case. ``wide`` has 4 random blocks of width 2,048 and a small
vocabulary: its products are those of a model of billions, and speed does not depend on what weights are.
"""

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import pared
from grid import signature
from pared.checkpoint import mark, save
from pared.engine import plan_from_shapes, resolve
from pared.evaluation.speed import Settings, bench, parse_case
from pared.evaluation.speed.worker import run
from pared.modules import LowRankLinear, PivotedLinear, replace_module
from pared.schema.plan import LowRank
from record import RESULTS, Line, append, read, spread, table

LINES, PAGE = RESULTS / "speed.jsonl", RESULTS / "speed.md"
PLACE = Path(os.environ.get("PARED_CACHE", "~/.cache/pared")).expanduser() / "benchmarks" / "speed"
MODELS = {"embedded": "embedded:smollm2-135m", "wide": str(PLACE / "wide")}
CASES = ("prefill:1x512", "decode:1x32+32", "decode:8x32+16")
KEEPS, STORAGES, REPEATS = (0.8, 0.5), ("factors", "pivoted", "widths"), 5
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")  # of the profiler's events
BAR, WIDTHS_BAR = 0.85, 0.95  # of the ideal ratio: of low rank in decoding, of narrower layers
HIDDEN, INTERMEDIATE, MULTIPLE = 2048, 5632, 64  # of the wide model, and what widths are rounded to


def make_wide() -> None:
    """Make the wide model, if it is not there."""
    folder = Path(MODELS["wide"])
    if not (folder / "config.json").exists():
        _save_wide(folder, INTERMEDIATE)


def _save_wide(folder: Path, intermediate: int) -> None:
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=HIDDEN, intermediate_size=intermediate, num_hidden_layers=4,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=2048, tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def folder_of(model: str, keep: float, storage: str) -> Path:
    """Return the folder of a compression, made if it is not there; of the wide model, with random factors."""
    out = PLACE / f"{model}-{keep:g}-{storage}"
    if (out / "config.json").exists():
        return out
    if storage == "widths" and model == "wide":  # MLPs as narrow as it takes: what a width result of equal widths is
        attention = 4 * HIDDEN
        width = (keep * (attention + 3 * INTERMEDIATE) - attention) / 3
        _save_wide(out, round(width / MULTIPLE) * MULTIPLE)
        return out
    if storage == "widths":
        text = pared.Calibration(samples=8, length=512)
        fields = {"method": "loss-optimal", "structures": "widths", "multiple_of": MULTIPLE, "calibration": text}
    else:
        fields = {"method": "svd", "storage": storage}
    recipe = pared.Recipe(model=MODELS[model], keep=keep, evaluation=None, out=str(out), **fields)
    if model == "embedded":
        pared.run(recipe, resume=False)
        return out
    loaded = pared.load(MODELS[model])
    for site in plan_from_shapes(loaded, resolve(recipe)).sites:
        assert isinstance(site.decision, LowRank)
        kind = PivotedLinear if site.decision.pivoted else LowRankLinear
        layer = kind(site.in_features, site.out_features, site.decision.rank, bias=False)
        if isinstance(layer, PivotedLinear):
            layer.order.copy_(torch.randperm(site.in_features))
        replace_module(loaded, site.name, layer)
    mark(loaded)
    save(loaded, None, out)
    return out


def measure(model: str, keep: float, storage: str, dtype: str) -> list[Line]:
    """Time a compression against its dense model, in turns."""
    make_wide()
    settings = Settings(tuple(map(parse_case, CASES)), REPEATS, 1, dtype, "cpu")
    found = bench([str(folder_of(model, keep, storage)), MODELS[model]], settings)
    small, dense = found.models
    return [
        {
            "model": model,
            "keep": keep,
            "storage": storage,
            "dtype": dtype,
            "case": str(timed.case),
            "ratios": timed.ratios,
            "ideal": timed.ideal,
            "seconds": timed.seconds,
            "first_token": timed.first_token,
            "tokens_per_second": [timed.tokens_per_second(index) for index in range(2)],
            "parameters": [small["parameters"], dense["parameters"]],
            "memory": [small["memory"], dense["memory"]],
            "bytes_on_disk": [small["bytes_on_disk"], dense["bytes_on_disk"]],
        }
        for timed in found.timed
    ]


def share_of_ideal(line: Line) -> float:
    """Return the median ratio of a case as a share of the ideal one."""
    return float(statistics.median(line["ratios"]) / line["ideal"])


def missed(lines: list[Line]) -> str:
    """Say where decoding by the wide model at half of its parameters stays below the bar."""
    asked = [line for line in lines if line["model"] == "wide" and line["keep"] == 0.5 and "decode" in line["case"]
             and line["storage"] != "widths"]  # fmt: skip
    below = [f"{line['storage']}, {line['case']} ({share_of_ideal(line):.2f})" for line in asked
             if round(share_of_ideal(line), 2) < BAR]  # fmt: skip
    why = "a pivoted layer has two operations more than two factors, and one token a step pays for them alone"
    return f"Missed: {'; '.join(below)}: {why} ([pivot_speed](pivot_speed.md))." if below else "It is reached."


def products(model: str, dtype: str) -> list[Line]:
    """Return, for every case, which share of the dense model's time on the processor its products take."""
    make_wide()
    loaded = pared.load(MODELS[model], dtype=dtype)
    found = []
    for case in map(parse_case, CASES):
        ids = torch.randint(0, 4096, (case.batch, case.length), generator=torch.Generator().manual_seed(0))
        run(loaded, case, ids)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            run(loaded, case, ids)
        seconds = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
        share = sum(seconds.get(name, 0.0) for name in PRODUCTS) / sum(seconds.values())
        found.append({"model": model, "dtype": dtype, "case": str(case), "products": share})
    return found


def bound(line: Line, shares: list[Line]) -> str:
    """Return the share of the ideal that is left if products alone become faster, where their share is known."""
    for one in shares:
        if all(one[name] == line[name] for name in ("model", "dtype", "case")):
            faster = 1 / (1 - one["products"] + one["products"] / line["ideal"])
            return f"; products take {one['products']:.2f} of the dense time, which allows {faster / line['ideal']:.2f}"
    return ""


def missed_by_widths(lines: list[Line], shares: list[Line]) -> str:
    """Say where narrower layers stay below their bar."""
    asked = [line for line in lines if line["storage"] == "widths"]
    below = [
        f"{line['model']}, {line['dtype']}, {line['case']} ({share_of_ideal(line):.2f}{bound(line, shares)})"
        for line in asked
        if round(share_of_ideal(line), 2) < WIDTHS_BAR
    ]
    return f"Missed: {', '.join(below)}." if below else "It is reached." if asked else "Not measured yet."


def row_of(line: Line) -> tuple[Any, ...]:
    """Return a row of the page."""
    peak = [memory.get("peak", 0) / 2**20 for memory in line["memory"]]
    return (
        line["case"],
        f"{line['keep']:g}",
        line["storage"],
        f"{line['tokens_per_second'][0]:,.1f} / {line['tokens_per_second'][1]:,.1f}",
        spread(line["ratios"]),
        f"{line['ideal']:.2f}",
        f"{share_of_ideal(line):.2f}",
        f"{peak[0]:,.0f} / {peak[1]:,.0f}",
    )


def render(lines: list[Line]) -> str:
    """Return the page."""
    shares, lines = [one for one in lines if "products" in one], [one for one in lines if "ratios" in one]
    parts = [
        "# Speed of low rank and of narrower layers",
        "",
        "Made by `python benchmarks/speed.py`; raw figures in [speed.jsonl](speed.jsonl). Do not edit.",
        "",
        f"Against the dense model, in turns, {REPEATS} pairs, each model in a process of its own, one thread. "
        "`prefill:1x512` is a pass over one prompt of 512 tokens, `decode:8x32+16` takes 16 tokens behind 8 prompts of "
        "32, with the cache. Ideal is the quotient of the parameters multiplied for a token, the head included; "
        "attention, norms and the work of Python are in neither. Decoding at keep 0.5 is meant to reach "
        f"{BAR} of it for widths of 2,048 and more. {missed(lines)}",
        "",
        "*widths* are MLPs that lost channels, dense as they were: of the embedded model what `--structures widths` "
        f"makes, of the wide one all MLPs equally narrow, in multiples of {MULTIPLE}. Both are meant to reach "
        f"{WIDTHS_BAR} of the ideal, in both dtypes. {missed_by_widths(lines, shares)}",
        "",
    ]  # fmt: skip
    header = (
        "case",
        "keep",
        "storage",
        "tokens a second / dense",
        "times as fast",
        "ideal",
        "of ideal",
        "peak MiB / dense",
    )
    for model, dtype in dict.fromkeys((line["model"], line["dtype"]) for line in lines):
        own = [line for line in lines if (line["model"], line["dtype"]) == (model, dtype)]
        title = "4 random blocks of width 2,048" if model == "wide" else f"`{MODELS[model]}`"
        parts += [f"## {title}, {dtype}", "", table(header, [row_of(line) for line in own]), ""]
    return "\n".join([*parts, signature(lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--keeps", nargs="+", type=float, default=list(KEEPS))
    parser.add_argument("--storages", nargs="+", default=list(STORAGES), choices=STORAGES)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--products", action="store_true", help="measure products' share of the dense time instead")
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.products:
        for model in asked.models:
            for line in products(model, asked.dtype):
                append(LINES, line)
    elif not asked.render:
        for model in asked.models:
            for keep in asked.keeps:
                for storage in asked.storages:
                    key = {"model": model, "keep": keep, "storage": storage, "dtype": asked.dtype}
                    if not any(key.items() <= line.items() for line in read(LINES)):
                        for line in measure(model, keep, storage, asked.dtype):
                            append(LINES, line)
                            print(model, keep, storage, line["case"], spread(line["ratios"]), flush=True)
    PAGE.write_text(render(read(LINES)), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
