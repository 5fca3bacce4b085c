"""The page of `benchmarks/matrix.py`."""

from collections.abc import Sequence

from grid import signature
from record import Line, table

EXACT, ROUNDED = 0.0, 1e-5
LOSSY = ("torchao int8 after loading",)  # whose difference is that of eight bits


def render(lines: Sequence[Line], consumers: Sequence[str], storages: Sequence[str]) -> str:
    """Return the page: the last line of every cell.

    Args:
        lines: in the order in which they were measured.
        consumers: rows.
        storages: columns.
    """
    last = {(line["consumer"], line["storage"]): line for line in lines}
    rows = [[consumer, *(_mark(last.get((consumer, storage))) for storage in storages)] for consumer in consumers]
    failed = [line for line in last.values() if line["found"] == "failed"]
    packages = sorted({line["package"] for line in last.values() if "package" in line})
    parts = [
        "# What ran",
        "",
        "Made by `benchmarks/matrix.py`; raw lines in [matrix.jsonl](matrix.jsonl). Do not edit.",
        "",
        "Tiny random Llamas of three blocks, each linear layer of which is stored as the column says, given to what "
        "the row says. `every kind` has factors, pivots, zeros, 2:4 and narrow layers side by side.",
        "",
        table(["", *storages], rows),
        "",
        "- `=`: the logits, or the greedy tokens, of what was loaded and what came of it are the same, bit for bit. A "
        "number: the largest difference of logits, relative to the largest of them; in int8 that of eight bits.",
        "- An adapter merged into pruned layers keeps their zeros, so that the merged model is another one than "
        "the adapted; it is compared with itself, saved and loaded.",
        "- `torchao int8: shared bases stay shared`: how many more tensors there are than before.",
        "- `·`: not run.",
        *(f"- {line['consumer']}, {line['storage']}: `{line['message']}`" for line in _first(failed)),
        "",
        f"With {', '.join(packages)}. " if packages else "",
    ]
    return "\n".join(parts) + signature(list(lines))


def _first(failed: Sequence[Line]) -> list[Line]:
    """Return one line for every consumer and kind of failure."""
    return list({(line["consumer"], line["message"].partition(":")[0]): line for line in reversed(failed)}.values())


def _mark(line: Line | None) -> str:
    if line is None or line["found"] == "not installed":
        return "·"
    if line["found"] == "failed":
        return "fails"
    return "=" if line["difference"] == EXACT else f"{line['difference']:.1g}"
