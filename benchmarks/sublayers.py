"""Whether a whole attention or a whole MLP is ever worth dropping, by the loss and the price of one budget.

    PARED_DATA=/path/to/data python benchmarks/sublayers.py        # one calibration, every budget
    python benchmarks/sublayers.py --render                        # renders the page only

Dropping a sub-layer costs what its last weight is expected to cost without any rank, and saves what its weights still
hold in the plan of the budget. It is worth it where that is less, for each parameter, than what the budget pays.
"""

import argparse
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pared
from grid import signature
from pared.allocation.rank_budget import tail_energy
from pared.engine.checks.explorable import require_explorable
from pared.engine.explore import LowRankCurve, explored
from pared.engine.windows import calibration_windows
from pared.progress import Silent
from record import RESULTS, append, read, table

LINES, PAGE = RESULTS / "sublayers.jsonl", RESULTS / "sublayers.md"
MODEL = "embedded:smollm2-135m"
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
STEP = 0.01  # of a budget, over which its price is taken
CALIBRATION = pared.Calibration(text="wikitext2:train", samples=64, length=1024)


def measured(curve: LowRankCurve, keep: float) -> dict[str, Any]:
    """Return what dropping costs at a budget as a multiple of what the same parameters cost there, by sub-layer."""
    one, less = curve.decide(keep), curve.decide(keep - STEP)
    saved = one.plan.after.covered_parameters - less.plan.after.covered_parameters
    price = (less.loss - one.loss) / saved
    held = {site.name: site.decision.parameters(site.out_features, site.in_features) for site in one.plan.sites}
    ratios: dict[str, float] = {}
    for parent, sites in groupby(curve.budgets.anatomy.sites, key=lambda site: site.parent):
        every = [site.name for site in sites]
        cost = float(tail_energy(curve.budgets.evidence.cost[every[-1]])[0])
        ratios[parent] = cost / price / sum(held[name] for name in every)
    return {"keep": keep, "loss": one.loss, "price": price, "ratios": ratios}


def rows(lines: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of the page."""
    for line in lines:
        cheapest = sorted((ratio, name) for name, ratio in line["ratios"].items())[:3]
        told = ", ".join(f"{ratio:.1f} x ({name.removeprefix('model.layers.')})" for ratio, name in cheapest)
        yield f"{line['keep']:g}", f"{line['loss']:.3f}", f"{line['price'] * 1e6:.4f}", told


def render(lines: list[dict[str, Any]]) -> str:
    """Return the page."""
    header = ("keep", "predicted loss, nats", "price of a million parameters, nats", "cheapest sub-layers to drop")
    return "\n".join([
        "# Whole sub-layers",
        "",
        "Made by `python benchmarks/sublayers.py`; raw figures in [sublayers.jsonl](sublayers.jsonl). Do not edit.",
        "",
        f"`{MODEL}`, `loss-optimal`, mixed, {CALIBRATION.samples} x {CALIBRATION.length} tokens of {CALIBRATION.text}. "
        "What it is expected to cost to drop a whole attention or a whole MLP, as a multiple of what the parameters "
        "that it still holds at that budget cost there: below 1 it would be worth dropping.",
        "",
        table(header, list(rows(lines))),
        "",
        signature(lines),
    ])  # fmt: skip


def measure() -> None:
    """Calibrate once, and measure every budget."""
    model, tokenizer = pared.load(MODEL), pared.load_tokenizer(MODEL)
    recipe = pared.Recipe(calibration=CALIBRATION, evaluation=None)
    specs = require_explorable(recipe, ["mixed"], "wanda")
    windows = calibration_windows(recipe, tokenizer, model.config, causal=True)
    with explored(model, tokenizer, specs, windows, Silent()) as curves:
        curve = curves["mixed"]
        assert isinstance(curve, LowRankCurve)
        for keep in KEEPS:
            append(LINES, {"model": MODEL, **measured(curve, keep)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true")
    if not parser.parse_args().render and not LINES.exists():
        measure()
    PAGE.write_text(render(read(LINES)), encoding="utf-8")


if __name__ == "__main__":
    main()
