"""Is a pivoted layer slower than two factors of the same rank? It computes less, but must put its outputs in order.

    python benchmarks/pivot_speed.py                 # measures, appends JSON lines, renders docs/results/pivot_speed.md
    python benchmarks/pivot_speed.py --render        # renders only

Single-threaded and interleaved (two factors, pivoted, two factors ...) on square layers without bias and inputs of
shape (1, rows, width). A cell is the median over rounds of the ratio of two neighbouring timings; the choices for the
order of the outputs are timed in the same rounds. Time is processor
time of the one thread, so that other jobs on the machine count less.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pared.lowrank import Factors
from pared.lowrank.pivot import pivot
from pared.modules import LowRankLinear, PivotedLinear
from record import RESULTS, append, read, table

LINES = RESULTS / "pivot_speed.jsonl"
PAGE = RESULTS / "pivot_speed.md"
WIDTHS, ROWS, DTYPES = (576, 2048, 4096), (1, 64, 512), ("float32", "bfloat16")
RANKS = {"keep 0.8 of two factors": 0.4, "half the width": 0.5, "keep 0.3 of two factors": 0.15}


class Unordered(PivotedLinear):
    """What remains if the order of the outputs were free: pivots first, others after."""

    def _in_order(self, y: torch.Tensor) -> torch.Tensor:
        return y


class ByIndexSelect(PivotedLinear):
    """``index_select`` without making two dimensions of three first."""

    def _in_order(self, y: torch.Tensor) -> torch.Tensor:
        return y.index_select(-1, self.order)


class ByGather(PivotedLinear):
    """``gather`` with one index for every row."""

    def _in_order(self, y: torch.Tensor) -> torch.Tensor:
        y_TO = y.view(-1, self.out_features)
        return y_TO.gather(1, self.order.long().expand_as(y_TO)).view(y.shape)


class ByCopy(PivotedLinear):
    """Both parts copied into an empty output with ``index_copy_``; its indices made once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        y_p = self.down(x)
        y_r = self.up(y_p)
        y = y_p.new_empty(*y_p.shape[:-1], self.out_features)
        return y.index_copy_(-1, self.places[: self.rank], y_p).index_copy_(-1, self.places[self.rank :], y_r)


VARIANTS = {"pivoted": PivotedLinear, "index_select, 3-D": ByIndexSelect, "gather": ByGather, "index_copy_": ByCopy,
            "no order": Unordered}  # fmt: skip


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
        found[name].set_weight(stored.pivots_K, stored.W_KN, stored.C_RK)
        found[name].places = found[name].order.argsort()
    return found


def seconds_of(layer: nn.Module, x: torch.Tensor, repeats: int) -> float:
    start = time.thread_time()
    for _ in range(repeats):
        layer(x)
    return (time.thread_time() - start) / repeats


@torch.inference_mode()
def measure(width: int, rank: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    found = layers(width, rank, getattr(torch, dtype))
    rows_of_cells = []
    for rows in ROWS:
        x = torch.randn(1, rows, width, dtype=getattr(torch, dtype))
        for layer in found.values():
            layer(x)
        repeats = max(1, int(0.01 / seconds_of(found["two factors"], x, 3)))
        base, ratios = [], {name: [] for name in VARIANTS}
        for _ in range(rounds):
            for name in VARIANTS:
                before = seconds_of(found["two factors"], x, repeats)
                changed = seconds_of(found[name], x, repeats)
                after = seconds_of(found["two factors"], x, repeats)
                base.append(before)
                ratios[name].append(2 * changed / (before + after))
        rows_of_cells.append({"rows": rows, "microseconds": statistics.median(base) * 1e6,
                              "ratios": {name: statistics.median(values) for name, values in ratios.items()},
                              "quartiles": statistics.quantiles(ratios["pivoted"], n=4)})  # fmt: skip
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
        "Below 1 the pivoted layer is faster. Median of a cell; in brackets the quartiles. `no order` leaves the "
        "outputs as they come, what a free order would give; the other columns are ways to put them in order that "
        "were not taken.",
        "",
        _summary(list(cells.values())),
        "",
    ]
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
            slower = sum(ratio > 1.02 for ratio in ratios)
            told.append(f"**{dtype}: slower by more than 2% in {slower} of {len(ratios)} cells** "
                        f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    return "; ".join(told) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not asked.render:
        for width in asked.widths:
            for rank_is, share in RANKS.items():
                for dtype in DTYPES:
                    rank = int(share * width)
                    for cell in measure(width, rank, dtype, asked.rounds):
                        append(LINES, {"width": width, "rank": rank, "rank_is": rank_is, "dtype": dtype, **cell,
                                       "load": os.getloadavg()[0]})  # fmt: skip
                        print(width, rank, dtype, cell["rows"], {k: round(v, 2) for k, v in cell["ratios"].items()})
    PAGE.write_text(page(read(LINES)), encoding="utf-8")


if __name__ == "__main__":
    main()
