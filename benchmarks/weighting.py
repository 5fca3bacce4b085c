"""Whether outputs of some kinds of weights are better not weighted one against the other: q and k above all.

    PARED_DATA=/path/to/data python benchmarks/weighting.py                   # one set of kinds after the other
    PARED_DATA=/path/to/data python benchmarks/weighting.py --kinds q,k
    python benchmarks/weighting.py --render                                   # renders the page only

In place of the Gram of their output gradients these weights get its mean diagonal, so that their losses stay
comparable. One JSON line a set; a set that is there is not measured again.
"""

import argparse
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch

import pared
from grid import LENGTH, SAMPLES, WINDOWS, measured, ratios, signature
from low_rank import statistics
from pared.calibration import BlockStatistics, saved_blocks
from pared.calibration.statistics import StatisticView
from pared.structure import find_anatomy
from record import RESULTS, append, read, table

LINES, PAGE = RESULTS / "weighting.jsonl", RESULTS / "weighting.md"
MODEL, KEEP = "embedded:smollm2-135m", 0.8
KINDS = ("q,k", "v", "o", "gate,up", "down")
CALIBRATION = pared.Calibration(text="wikitext2:train", samples=SAMPLES, length=LENGTH)


@dataclass
class Even:
    """The Gram of output gradients, as if all outputs had the same and none had to do with another."""

    whole: StatisticView
    shrinkage: float = 0.0

    @property
    def tokens(self) -> int:
        """How many tokens were seen."""
        return self.whole.tokens

    @property
    def value(self) -> torch.Tensor:
        """The mean diagonal, on a diagonal."""
        diagonal = self.whole.value.diagonal()
        return torch.full_like(diagonal, float(diagonal.mean())).diag()


def collected(even: Collection[str]) -> Iterator[BlockStatistics]:
    """Yield the statistics of every block, those of some sites made even."""
    for block in saved_blocks(statistics(MODEL, "loss-optimal", CALIBRATION)):
        yield replace(block, statistics={
            site: {name: Even(one) if name.startswith("output_gradient") and site in even else one
                   for name, one in own.items()}
            for site, own in block.statistics.items()
        })  # fmt: skip


def measure(kinds: str) -> None:
    """Compress with the outputs of some kinds weighted alike, and write the line."""
    model, tokenizer = pared.load(MODEL), pared.load_tokenizer(MODEL)
    even = {site.name for site in find_anatomy(model).sites if site.kind in kinds.split(",")}
    if not even:
        raise SystemExit(f"{MODEL} has no weights of the kinds {kinds}")
    recipe = pared.Recipe(keep=KEEP, statistics="once", calibration=CALIBRATION, evaluation=None)
    pared.compress(model, tokenizer, recipe, collected=lambda: collected(even))
    append(LINES, {"model": MODEL, "keep": KEEP, "kinds": kinds, "sites": len(even), **measured(model, tokenizer)})


def render() -> str:
    """Return the page."""
    lines, others = read(LINES), read(RESULTS / "structures.jsonl")
    dense = next(line for line in others if line["structures"] == "dense")
    auto = {"input_shrinkage": "auto", "output_shrinkage": "auto"}
    asked = {"model": MODEL, "structures": "mixed", "keep": KEEP, "statistics": "once", "options": auto}
    usual = next(one for one in others if asked.items() <= one.items() and one.get("samples", SAMPLES) == SAMPLES)
    rows = [("none: all outputs weighted", *ratios(usual, dense))]
    rows += [(line["kinds"], *ratios(line, dense)) for line in lines]
    return "\n".join([
        "# Outputs weighted alike",
        "",
        "Made by `python benchmarks/weighting.py`; raw figures in [weighting.jsonl](weighting.jsonl). Do not edit.",
        "",
        f"`{MODEL}`, `loss-optimal`, mixed, keep {KEEP:g}, {SAMPLES} x {LENGTH} tokens of {CALIBRATION.text}, "
        f"statistics once; perplexity on {WINDOWS} windows of {LENGTH} tokens, and its multiple of the dense model's. "
        "The weights of the kinds named have the mean energy of their output gradients in place of its Gram.",
        "",
        table(("weighted alike", *dense["perplexity"]), rows),
        "",
        signature(lines),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    for kinds in () if asked.render else asked.kinds:
        if kinds not in {line["kinds"] for line in read(LINES)}:
            measure(kinds)
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
