"""Is a sparse layer faster than the dense one here? Half of its weights are zero; does anything skip them?

    python benchmarks/sparse_speed.py                # measures, appends JSON lines, renders results/sparse_speed.md
    python benchmarks/sparse_speed.py --quick        # a small check that prints its page and writes nothing
    python benchmarks/sparse_speed.py --render       # renders only

Single-threaded and interleaved (dense, sparse, dense, sparse ...) on square layers without bias and inputs of shape
(1, rows, width). A cell is the median over rounds of the ratio of a timing to the mean of its two neighbours. Time is
processor time of the one thread, so that other jobs on the machine count less. bfloat16 is measured only where a
product in it is not slower than in float32. The zeros are those of magnitude pruning, of random weights.
"""

import argparse
import os
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from pared.modules import NMGroups, SparseLinear
from pared.sparsity import magnitude, parse
from pared.sparsity.pattern import NM
from record import RESULTS, append, provenance, read, table
from timing import Layer, bfloat16_slowdown, interleaved

LINES = RESULTS / "sparse_speed.jsonl"
PAGE = RESULTS / "sparse_speed.md"
WIDTHS, ROWS, DTYPES = (576, 2048, 4096), (1, 64, 512), ("float32", "bfloat16")
PATTERNS = {"0.5": "half of the weights, anywhere", "2:4": "2 of every 4", "0.9": "9 of 10, anywhere"}
WAYS = {"unpacked": "a loaded `SparseLinear`: a dense weight with zeros",
        "packed": "one that was not unpacked: it makes the dense weight anew in every product",
        "CSR": "`torch.sparse` compressed rows, the product of `torch.mm`"}  # fmt: skip
HARDWARE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


def pruned(width: int, pattern: str, dtype: torch.dtype) -> SparseLinear:
    """Return the unpacked layer of a random weight, pruned by magnitude."""
    zeros = parse(pattern)
    found = magnitude.prune(torch.randn(width, width, dtype=dtype) / width**0.5, zeros)
    groups = NMGroups(zeros.kept, zeros.group) if isinstance(zeros, NM) else None
    return SparseLinear.of(found.weight, found.mask, None, groups)


def still_packed(layer: SparseLinear) -> SparseLinear:
    """Return the same layer as it is before it is unpacked."""
    packed = SparseLinear(**layer.entry(), dtype=layer.weight.dtype)
    packed.load_state_dict(layer.state_dict())
    return packed


def compressed_rows(layer: SparseLinear) -> Layer:
    """Return the product with the weight in compressed rows."""
    W_ON = layer.weight.detach().to_sparse_csr()

    def product(x: torch.Tensor) -> torch.Tensor:
        return torch.mm(W_ON, x.reshape(-1, layer.in_features).t()).t().view(*x.shape[:-1], layer.out_features)

    return product


@torch.inference_mode()
def measure(width: int, pattern: str, dtype: str, rows_of: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    layer = pruned(width, pattern, getattr(torch, dtype))
    dense = torch.nn.Linear(width, width, bias=False, dtype=layer.weight.dtype)
    ways: dict[str, Layer] = {"unpacked": layer, "packed": still_packed(layer), "CSR": compressed_rows(layer)}
    missing: dict[str, str] = {}
    cells = []
    for rows in rows_of:
        x = torch.randn(1, rows, width, dtype=layer.weight.dtype)
        for name, way in list(ways.items()):
            try:
                torch.testing.assert_close(way(x), layer(x), atol=2e-2, rtol=2e-2)
            except NotImplementedError as error:
                missing[name] = first_line(error)
                del ways[name]
        timed = interleaved(dense, ways, x, rounds)
        cells.append({"width": width, "pattern": pattern, "dtype": dtype, "rows": rows,
                      "microseconds": statistics.median(timed.base) * 1e6,
                      "ratios": {name: statistics.quantiles(values, n=4) for name, values in timed.ratios.items()},
                      "missing": missing, "load": os.getloadavg()[0]})  # fmt: skip
    return cells


def hardware_24() -> dict[str, str]:
    """Return what torch's own 2:4 products say on this machine, by dtype."""
    said = {}
    for dtype in HARDWARE_DTYPES:
        weight = torch.tensor([0, 0, 1, 1]).repeat(128, 32).to(dtype)
        try:
            sparse = torch.sparse.to_sparse_semi_structured(weight)
            torch.mm(sparse, torch.ones(128, 128, dtype=dtype))
            said[str(dtype)] = "available"
        except Exception as error:  # each kind of hardware and each dtype has its own
            said[str(dtype)] = first_line(error)
    return said


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def page(lines: Sequence[dict[str, Any]]) -> str:
    cells = {(one["dtype"], one["pattern"], one["width"], one["rows"]): one for one in lines}
    last = lines[-1]
    parts = [
        "# How fast is a sparse layer?",
        "",
        "Made by `python benchmarks/sparse_speed.py`; raw figures in [sparse_speed.jsonl](sparse_speed.jsonl). "
        "Do not edit.",
        "",
        "Time of a layer with zeros divided by that of the dense layer, square layers, no bias, one thread's processor "
        "time, inputs (1, rows, width). Below 1 the zeros pay. Median of a cell; in brackets the quartiles.",
        "",
        *(f"- {name}: {what}" for name, what in WAYS.items()),
        "",
        _summary(list(cells.values())),
        "",
        "Torch's products for the 2:4 of the hardware (`torch.sparse.to_sparse_semi_structured`) on this machine: "
        + _told(last["hardware_24"]),
        "",
    ]
    missing = {f"{way} in {one['dtype']}: `{why}`" for one in cells.values() for way, why in one["missing"].items()}
    if missing:
        parts += [f"Not available: {'; '.join(sorted(missing))}.", ""]
    if last["bfloat16_slowdown"] > 1:
        parts += [f"bfloat16 was not measured: on this processor a product in it takes {last['bfloat16_slowdown']:.0f} "
                  "times as long as in float32, so it would not be run.", ""]  # fmt: skip
    for dtype in DTYPES:
        for pattern, what in PATTERNS.items():
            chosen = [one for key, one in cells.items() if key[:2] == (dtype, pattern)]
            if chosen:
                header = ("width", "rows", "dense, µs", *(f"{way} / dense" for way in WAYS))
                rows = [_row(one) for one in sorted(chosen, key=lambda one: (one["width"], one["rows"]))]
                parts += [f"## {dtype}, zeros: {what}", "", table(header, rows), ""]
    parts += [f"Commit {last['commit']}, {last['date']}, {last['cpu']}, {last['threads']} thread, torch "
              f"{last['torch']}, Python {last['python']}. The machine was {last['load']:.1f} busy (load average) "
              "when the last cell was measured.", ""]  # fmt: skip
    return "\n".join(parts)


def _row(cell: dict[str, Any]) -> tuple[object, ...]:
    found = [cell["ratios"].get(way) for way in WAYS]
    ratios = ("not available" if one is None else f"{one[1]:.2f} ({one[0]:.2f} to {one[2]:.2f})" for one in found)
    return (cell["width"], cell["rows"], f"{cell['microseconds']:,.0f}", *ratios)


def _told(said: dict[str, str]) -> str:
    if len(set(said.values())) == 1:
        return f"`{next(iter(said.values()))}`, for {', '.join(said)}."
    return "; ".join(f"{dtype} `{what}`" for dtype, what in said.items()) + "."


def _summary(cells: Sequence[dict[str, Any]]) -> str:
    told = []
    for way in WAYS:
        for pattern, what in PATTERNS.items():
            ratios = [one["ratios"][way][1] for one in cells if one["pattern"] == pattern and way in one["ratios"]]
            if ratios:
                faster = sum(ratio < 1 for ratio in ratios)
                told.append(f"- **{way}, {what}: faster than dense in {faster} of {len(ratios)} cells** "
                            f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    return "\n".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--render", action="store_true")
    only.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    if asked.render:
        PAGE.write_text(page(read(LINES)), encoding="utf-8")
        return
    widths, rows, rounds = ((128,), ROWS[:2], 3) if asked.quick else (asked.widths, ROWS, asked.rounds)
    about = {"bfloat16_slowdown": bfloat16_slowdown(), "hardware_24": hardware_24()}
    quick: list[dict[str, Any]] = []
    for width in widths:
        for pattern in PATTERNS:
            for dtype in DTYPES[: 1 if about["bfloat16_slowdown"] > 1 else 2]:
                for cell in measure(width, pattern, dtype, rows, rounds):
                    quick.append({**cell, **about, **provenance()})
                    if not asked.quick:
                        append(LINES, {**cell, **about})
                    told = {name: round(values[1], 2) for name, values in cell["ratios"].items()}
                    print(width, pattern, dtype, cell["rows"], told, flush=True)
    if asked.quick:
        print(page(quick))
    else:
        PAGE.write_text(page(read(LINES)), encoding="utf-8")


if __name__ == "__main__":
    main()
