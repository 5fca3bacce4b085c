"""Whether losses ought to be multiplied, by the kind of a weight and its depth, before one budget is spread over them.

    PARED_DATA=/path/to/data python benchmarks/multipliers.py           # one calibration, then one plan after the other
    python benchmarks/multipliers.py --render                           # renders the page only

The depth first, then kind after kind: what loses less on two held-out texts stays. One JSON line a plan; the first and
the last plan of a budget are measured on the texts of the other pages too.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pared
from grid import measured, ratios, signature
from pared.engine.checks.explorable import require_explorable
from pared.engine.explore import LowRankCurve, explored
from pared.engine.windows import calibration_windows
from pared.progress import Silent
from pared.structure import Site
from record import RESULTS, Line, append, read, table

LINES, PAGE = RESULTS / "multipliers.jsonl", RESULTS / "multipliers.md"
MODEL = "embedded:smollm2-135m"
CALIBRATION = pared.Calibration(text="wikitext2:train", samples=64, length=1024)
HELD_OUT = {"WikiText-2": "wikitext2:validation", "C4": "c4:train"}  # neither is calibrated nor reported on
LENGTH, WINDOWS = 512, 8  # of either
KINDS, FACTORS, STEEP = ("q", "k", "v", "o", "gate", "up", "down"), (1.6, 0.625), 0.5
LEAST = 1e-4  # nats that a multiplier has to gain


def held_out(model: Any, tokenizer: Any) -> dict[str, float]:
    """Return the loss in nats a token on either text."""
    return {
        name: math.log(pared.perplexity(model, tokenizer, text, LENGTH, WINDOWS).value)
        for name, text in HELD_OUT.items()
    }


class Trials:
    """Plans of one calibration, each with losses multiplied otherwise.

    Args:
        model: dense, in memory.
        tokenizer: of it.
        curve: what was decomposed once.
        dense: losses of the dense model.
    """

    def __init__(self, model: Any, tokenizer: Any, curve: LowRankCurve, dense: Mapping[str, float]) -> None:
        self._model, self._tokenizer, self._curve, self._dense = model, tokenizer, curve, dense
        self._whole = curve.budgets
        self._sites = {site.name: site for site in self._whole.anatomy.sites}
        self._last = max(site.block for site in self._sites.values())

    def run(self, keep: float, kinds: Mapping[str, float], depth: float, report: bool = False) -> float:
        """Measure one plan and write its line; return the mean loss above the dense model's."""
        self._curve.budgets = self._multiplied(kinds, depth)
        with self._curve.installed(self._curve.decide(keep)):
            found = held_out(self._model, self._tokenizer)
            told = measured(self._model, self._tokenizer) if report else {}
        above = {name: loss - self._dense[name] for name, loss in found.items()}
        append(LINES, {"model": MODEL, "keep": keep, "kinds": dict(kinds), "depth": depth, "held_out": above, **told})
        return sum(above.values()) / len(above)

    def _multiplied(self, kinds: Mapping[str, float], depth: float) -> Any:
        evidence = self._whole.evidence

        def root(site: Site) -> float:  # costs are square roots of losses
            return math.sqrt(kinds.get(site.kind, 1.0) * math.exp(depth * (site.block / self._last - 0.5)))

        costs = {name: cost * root(self._sites[name]) for name, cost in evidence.cost.items()}
        channels = {
            name: replace(one, cost=None if one.cost is None else one.cost * root(self._sites[name]))
            for name, one in evidence.channels.items()
        }
        return replace(self._whole, evidence=replace(evidence, cost=costs, channels=channels))


def search(trials: Trials, keep: float) -> None:
    """Look for multipliers at a budget, one after the other."""
    best, depth, kinds = trials.run(keep, {}, 0.0, report=True), 0.0, dict[str, float]()
    for steep in (-STEEP, STEEP):
        if (loss := trials.run(keep, {}, steep)) < best - LEAST:
            best, depth = loss, steep
    if depth and (loss := trials.run(keep, {}, 2 * depth)) < best - LEAST:
        best, depth = loss, 2 * depth
    for kind in KINDS:
        for factor in FACTORS:
            if (loss := trials.run(keep, {**kinds, kind: factor}, depth)) < best - LEAST:
                best, kinds = loss, {**kinds, kind: factor}
                break
    trials.run(keep, kinds, depth, report=True)


def told(line: Line) -> str:
    """Return the multipliers of a line in words."""
    words = [f"{kind} {factor:g}" for kind, factor in line["kinds"].items()]
    return ", ".join([*words, *([f"depth e^{line['depth']:g}"] if line["depth"] else [])]) or "none"


def render(lines: list[Line]) -> str:
    """Return the page."""
    dense = next(line for line in read(RESULTS / "structures.jsonl") if line["structures"] == "dense")
    reported = [line for line in lines if "perplexity" in line]
    tried = [
        (told(line), f"{line['keep']:g}", *(f"{value:.4f}" for value in line["held_out"].values())) for line in lines
    ]
    source = "Made by `python benchmarks/multipliers.py`; raw figures in [multipliers.jsonl](multipliers.jsonl)."
    return "\n".join([
        "# Losses multiplied",
        "",
        f"{source} Do not edit.",
        "",
        f"`{MODEL}`, `loss-optimal`, mixed, {CALIBRATION.samples} x {CALIBRATION.length} tokens of "
        f"{CALIBRATION.text}, decomposed once. Every loss is multiplied by a factor of the weight's kind and by e to a "
        "power that falls or rises with depth (from half of it below to half of it above), and the one budget is "
        "spread over the result. Factors are kept, one after the other, where the loss on "
        f"{WINDOWS} windows of {LENGTH} tokens each of {' and '.join(HELD_OUT.values())} falls. What was found is "
        "measured as in [ranks and widths](structures.md):",
        "",
        table(("multipliers", "keep", *HELD_OUT, "speeches"),
              [(told(line), f"{line['keep']:g}", *ratios(line, dense)) for line in reported]),
        "",
        "All that was tried, nats a token above the dense model on what was held out:",
        "",
        table(("multipliers", "keep", *HELD_OUT), tried),
        "",
        signature(lines),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs="+", type=float, default=[0.6, 0.8])
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    if not asked.render:
        model, tokenizer = pared.load(MODEL), pared.load_tokenizer(MODEL)
        recipe = pared.Recipe(calibration=CALIBRATION, evaluation=None)
        specs = require_explorable(recipe, ["mixed"], "wanda")
        windows = calibration_windows(recipe, tokenizer, model.config, causal=True)
        dense = held_out(model, tokenizer)
        with explored(model, tokenizer, specs, windows, Silent()) as curves:
            curve = curves["mixed"]
            assert isinstance(curve, LowRankCurve)
            trials = Trials(model, tokenizer, curve, dense)
            for keep in asked.keep:
                search(trials, keep)
    PAGE.write_text(render(read(LINES)), encoding="utf-8")


if __name__ == "__main__":
    main()
