"""What a search leaves in its folder, and what it says of it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pared.allocation.dsa import parse
from pared.errors import ParedError
from pared.io.files import write_whole
from pared.names import called, option_called
from pared.search.evolution import Result, best_so_far
from pared.search.objective import Trial
from pared.tables import Shown, Table

JOURNAL, FOUND, TRACE = "journal.jsonl", "FOUND.json", "trace.png"  # in the folder of a search
FORMAT = 1


@dataclass(frozen=True, repr=False)
class Found(Shown):
    """What a search found; shown as a table of perplexities, with the program.

    Attributes:
        folder: journal, evidence and ``FOUND.json``.
        told: the content of ``FOUND.json``.
    """

    folder: Path
    told: Mapping[str, Any]

    @property
    def program(self) -> str:
        """The best program."""
        return str(self.told["program"])

    def table(self) -> Table:
        """Return the perplexities of the dense model, the uniform allocation and the best program."""
        rows = [
            (name, *(_number(self.told[key][split]) for split in ("search", "full")))
            for name, key in (("dense", "dense"), ("uniform", "uniform"), ("best", "perplexity"))
        ]
        lines = [f"best program: {self.program}", *self.remarks()]
        return Table("search", ("perplexity", "windows of the search", "full split"), rows, lines)

    def remarks(self) -> list[str]:
        """Return what is to be said of the best program: whether it is better at all, and how it is used."""
        uniform, best = self.told["uniform"]["full"], self.told["perplexity"]["full"]
        no_worse = "on the full split the uniform allocation is no worse: search longer or on more windows"
        program = option_called("program", str(self.folder / FOUND), "allocation_options")
        use = f"use it: {called('allocation', 'dsa')} {program}"
        return [*([no_worse] if uniform is not None and uniform <= best else []), use]


def write_found(
    out: Path,
    trial: Trial,
    settings: Mapping[str, Any],
    results: list[Result],
    finals: list[tuple[Result, float]],
    references: Mapping[str, float],
) -> Found:
    """Write ``FOUND.json``: whole or not at all."""
    if not finals or not math.isfinite(min(value for _, value in finals)):
        raise ParedError(f"no candidate has a finite perplexity (see {out / JOURNAL}); ask for fewer zeros")
    best, value = min(finals, key=lambda one: one[1])
    program = str(best.candidate.program)
    told = {
        "pared_program": FORMAT,
        "program": program,
        "score_tokens": settings["score_tokens"],
        "method": settings["method"],
        **{name: settings[name] for name in ("sparsity", "keep") if name in settings},
        "perplexity": {"search": best.fitness, "full": value},
        "uniform": {"search": references["uniform"], "full": references["uniform final"]},
        "dense": {"search": references["dense"], "full": references["dense final"]},
        "candidate": best.candidate.number,
        "blocks": trial.shares(parse(program)),
        "best": [{"program": str(one.candidate.program), "search": one.fitness, "full": full} for one, full in finals],
        "settings": dict(settings),
        "trace": best_so_far(results),
    }
    told = json.loads(json.dumps(told), parse_constant=lambda _: None)  # JSON has no infinity
    write_whole(out / FOUND, json.dumps(told, indent=2, allow_nan=False) + "\n")
    return Found(out, told)


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.4f}"
