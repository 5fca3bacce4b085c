"""Is a pivoted layer slower than two factors of the same rank? It computes less, but must put its inputs in order.

    python benchmarks/pivot_speed.py                 # measures, appends JSON lines, renders docs/results/pivot_speed.md
    python benchmarks/pivot_speed.py --render        # renders only

Single-threaded and interleaved (two factors, pivoted, two factors ...) on square layers without bias and inputs of
shape (1, rows, width). A cell is the median over rounds of the ratio of two neighbouring timings; other ways to the
same answer are timed in the same rounds. Time is processor time of the one thread, so that other jobs on the machine
count less. bfloat16 is measured only where a product in it is not slower than in float32: on processors made for
it.
"""

import argparse
import os
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pared.lowrank import Factors
from pared.lowrank.pivot import pivot
from pared.modules import LowRankLinear, PivotedLinear
from record import RESULTS, append, read, table
from timing import bfloat16_slowdown, interleaved

LINES = RESULTS / "pivot_speed.jsonl"
PAGE = RESULTS / "pivot_speed.md"
MARGIN = 0.02  # ratio above 1 that counts as slower
WIDTHS, ROWS, DTYPES = (576, 2048, 4096), (1, 64, 512), ("float32", "bfloat16")
RANKS = {"keep 0.8 of two factors": 0.4, "half the width": 0.5, "keep 0.3 of two factors": 0.15}


class Unordered(PivotedLinear):
    """What remains if the features came in order: pivots first, others after."""

    def _in_order(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Fused(PivotedLinear):
    """The sum made by ``addmm``, past the module ``down``: its hooks and adapters would not be run."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        parts = (self.rank, self.in_features - self.rank)
        x_p, x_r = x.reshape(-1, self.in_features).index_select(1, self.order).split_with_sizes(parts, 1)
        return self.up(torch.addmm(x_p, x_r, self.down.weight.t())).view(*x.shape[:-1], self.out_features)


class TwoSelects(PivotedLinear):
    """One ``index_select`` for either part, so that both are contiguous, and the sum made in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        x_TN = x.reshape(-1, self.in_features)
        pivots, others = self.order.split_with_sizes((self.rank, self.in_features - self.rank))
        z = x_TN.index_select(1, pivots).add_(self.down(x_TN.index_select(1, others)))
        return self.up(z.view(*x.shape[:-1], self.rank))


class ByGather(PivotedLinear):
    """``gather`` with one index for every row."""

    def _in_order(self, x: torch.Tensor) -> torch.Tensor:
        x_TN = x.view(-1, self.in_features)
        return x_TN.gather(1, self.places.expand_as(x_TN)).view_as(x)


class ByColumns(PivotedLinear):
    """Whole rows of the transposed input, which are copied one at a time."""

    def _in_order(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, self.in_features).t().contiguous().index_select(0, self.order).t().view_as(x)


VARIANTS = {"pivoted": PivotedLinear, "addmm": Fused, "two selects": TwoSelects, "gather": ByGather,
            "rows of xᵀ": ByColumns, "no order": Unordered}  # fmt: skip


def layers(width: int, rank: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return two factors and the pivoted layers of the same random weight."""
    factors = Factors(down=torch.randn(rank, width) / width**0.5, up=torch.randn(width, rank) / rank**0.5)
    plain = LowRankLinear(width, width, rank, bias=False, dtype=dtype)
    plain.down.weight.data.copy_(factors.down)
    plain.up.weight.data.copy_(factors.up)
    found: dict[str, nn.Module] = {"two factors": plain}
    stored = pivot(factors)
    for name, cls in VARIANTS.items():
        found[name] = cls(width, width, rank, bias=False, dtype=dtype)
        found[name].set_weight(stored.pivots_K, stored.W_OK, stored.C_KR)
        found[name].places = found[name].order.long()
    return found


def measure(width: int, rank: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    found = layers(width, rank, getattr(torch, dtype))
    plain = found.pop("two factors")
    rows_of_cells = []
    for rows in ROWS:
        timed = interleaved(plain, found, torch.randn(1, rows, width, dtype=getattr(torch, dtype)), rounds)
        rows_of_cells.append({"rows": rows, "microseconds": statistics.median(timed.base) * 1e6,
                              "ratios": {name: statistics.median(values) for name, values in timed.ratios.items()},
                              "quartiles": statistics.quantiles(timed.ratios["pivoted"], n=4)})  # fmt: skip
    return rows_of_cells


def page(lines: Sequence[dict[str, Any]]) -> str:
    cells = {(one["dtype"], one["rank_is"], one["width"], one["rows"]): one for one in lines}
    last = lines[-1]
    parts = [
        "# How fast is a pivoted layer?",
        "",
        "Made by `python benchmarks/pivot_speed.py`; raw figures in [pivot_speed.jsonl](pivot_speed.jsonl). "
        "Do not edit.",
        "",
        "Time of a pivoted layer divided by that of two factors of the same rank, square layers, no bias, one thread's "
        "processor time, inputs (1, rows, width). "
        "Below 1 the pivoted layer is faster. Median of a cell; in brackets the quartiles. `addmm` adds in "
        "the product, past the module `down`, so that hooks and adapters on it would not be run; `two selects` takes "
        "pivots and others apart and adds in place; `gather` and `rows of xᵀ` are other ways to put the features in "
        "order; `no order` leaves them as they come, what a free order would give.",
        "",
        _summary(list(cells.values())),
        "",
    ]
    if last["bfloat16_slowdown"] > 1:
        parts += [f"bfloat16 was not measured: on this processor a product in it takes {last['bfloat16_slowdown']:.0f} "
                  "times as long as in float32, so it would not be run.", ""]  # fmt: skip
    for dtype in DTYPES:
        for rank_is in RANKS:
            chosen = [one for key, one in cells.items() if key[:2] == (dtype, rank_is)]
            if not chosen:
                continue
            header = ("width, rank", "rows", "two factors, µs", "**pivoted / two factors**", *list(VARIANTS)[1:])
            rows = []
            for one in sorted(chosen, key=lambda one: (one["width"], one["rows"])):
                low, _, high = one["quartiles"]
                ratios = dict(one["ratios"])
                main = f"**{ratios.pop('pivoted'):.2f}** ({low:.2f} to {high:.2f})"
                others = (f"{value:.2f}" for value in ratios.values())
                where = f"{one['width']}, {one['rank']}"
                rows.append((where, one["rows"], f"{one['microseconds']:,.0f}", main, *others))
            parts += [f"## {dtype}, rank: {rank_is}", "", table(header, rows), ""]
    parts += [f"Commit {last['commit']}, {last['date']}, {last['cpu']}, {last['threads']} thread, torch "
              f"{last['torch']}, Python {last['python']}. The machine was {last['load']:.1f} busy (load average) "
              "when the last cell was measured; it has two cores.", ""]  # fmt: skip
    return "\n".join(parts)


def _summary(cells: Sequence[dict[str, Any]]) -> str:
    told = []
    for dtype in DTYPES:
        ratios = [one["ratios"]["pivoted"] for one in cells if one["dtype"] == dtype]
        if ratios:
            slower = sum(ratio > 1 + MARGIN for ratio in ratios)
            told.append(f"**{dtype}: slower by more than {MARGIN:.0%} in {slower} of {len(ratios)} cells** "
                        f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    return "; ".join(told) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not asked.render:
        slowdown = bfloat16_slowdown()
        for width in asked.widths:
            for rank_is, share in RANKS.items():
                for dtype in DTYPES[: 1 if slowdown > 1 else 2]:
                    rank = int(share * width)
                    for cell in measure(width, rank, dtype, asked.rounds):
                        append(LINES, {"width": width, "rank": rank, "rank_is": rank_is, "dtype": dtype, **cell,
                                       "load": os.getloadavg()[0], "bfloat16_slowdown": slowdown})  # fmt: skip
                        ratios = {name: round(value, 2) for name, value in cell["ratios"].items()}
                        print(width, rank, dtype, cell["rows"], ratios, flush=True)
    PAGE.write_text(page(read(LINES)), encoding="utf-8")


if __name__ == "__main__":
    main()
