"""What `pared explore` predicts of every budget against what is measured.

    PARED_DATA=/path/to/data python benchmarks/explore.py                          # all structures, one after the other
    python benchmarks/explore.py --model qwen2.5-coder-0.5b --texts stdlib:train stdlib:test --structures ranks mixed
    python benchmarks/explore.py --render                                          # renders the page only

One JSON line a model, structure and number of tokens, which holds the whole record; one that is there is not explored
again. Of several of one structure the last is drawn.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

import pared
from grid import signature
from models import source_of
from pared.report.curves import draw
from pared.schema.explore import STRUCTURES, Exploration, Point
from record import RESULTS, append, read, table

LINES, PAGE = RESULTS / "explore.jsonl", RESULTS / "explore.md"
MODEL = "embedded:smollm2-135m"
ENOUGH = 0.95  # of the rank correlation
NEAR = 0.05  # of the knees


def ranks(values: list[float]) -> list[float]:
    """Return the place of every value among all, equal ones in the middle of theirs."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]


def correlation(first: list[float], second: list[float]) -> float:
    """Return Spearman's rank correlation."""
    pair = torch.tensor([ranks(first), ranks(second)], dtype=torch.float64)
    return float(torch.corrcoef(pair)[0, 1])


def losses(found: Exploration) -> tuple[list[float], list[float]]:
    """Return what was predicted of the points that were measured, and what was measured."""
    pairs = [(one.loss, measured) for one in found.points if (measured := found.measured_loss(one)) is not None]
    return [one for one, _ in pairs], [one for _, one in pairs]


def merged(lines: list[dict[str, Any]]) -> Exploration:
    """Return the explorations of all structures as one, the last of each."""
    lines = [*{line["structure"]: line for line in lines}.values()]
    every = [Exploration.model_validate(line["exploration"]) for line in lines]
    knees = {name: keep for one in every for name, keep in one.knees.items()}
    measured = {name: keep for one in every for name, keep in one.measured_knees.items()}
    points = tuple(point for one in every for point in one.points)
    return every[0].model_copy(update={"points": points, "knees": knees, "measured_knees": measured})


def cells(point: Point, loss: float) -> tuple[str, ...]:
    """Return the row of a point that was measured."""
    sizes = f"{point.model_parameters / 1e6:.1f} M", f"{point.bytes_on_disk / 1e6:,.0f} MB", f"x{point.speed:.2f}"
    return (point.structure, f"{point.keep:g}", *sizes, f"{point.loss:.3f}", f"{loss:.3f}", f"x{math.exp(loss):.3g}")


def plot_of(model: str) -> Path:
    """Return where the curves of a model are drawn."""
    return RESULTS / f"explore_{model.rpartition(':')[2].replace('.', '_')}.svg"


def section(model: str, lines: list[dict[str, Any]]) -> list[str]:
    """Return what the page says of one model."""
    whole, names = merged(lines), dict.fromkeys(line["structure"] for line in lines)
    assert whole.evaluation is not None
    rows = []
    for line in lines:
        one, name = Exploration.model_validate(line["exploration"]), line["structure"]
        first, second = losses(one)
        knee, measured = one.knees.get(name), one.measured_knees.get(name)
        gap = "-" if knee is None or measured is None else f"{abs(knee - measured):.2f}"
        told = ["-" if value is None else f"{value:g}" for value in (knee, measured)]
        assert one.calibration is not None
        read = f"{one.calibration['windows']} x {one.calibration['length']}"
        times = sorted(measured / predicted for predicted, measured in zip(first, second, strict=True) if predicted > 0)
        rows.append((name, read, len(first), f"{times[0]:.2f} to {times[-1]:.2f}", *told, gap,
                     f"{sum(one.seconds.values()):,.0f}"))  # fmt: skip
    points = [cells(point, loss) for point in whole.points if (loss := whole.measured_loss(point)) is not None]
    first, second = losses(whole)
    taken = [1 - point.keep for point in whole.points if whole.measured_loss(point) is not None]
    far = [name for name, keep in whole.knees.items() if abs(keep - whole.measured_knees.get(name, keep)) > NEAR + 1e-9]
    assert whole.calibration is not None
    on = whole.evaluation
    return [
        f"## {model}",
        "",
        f"{', '.join(names)}; calibrated on {whole.calibration['text']}, perplexity on {on['windows']} windows of "
        f"{on['length']} tokens of {on['text']}: few, as time on two shared cores was scarce. Losses are nats a token "
        "above the dense model's.",
        "",
        f"![Loss over size]({plot_of(model).name})",
        "",
        table(("structure", "tokens", "budgets", "measured over predicted", "knee predicted", "knee measured", "apart",
               "seconds"), rows),
        "",
        f"Rank correlation of predicted and measured losses over all {len(first)} budgets: "
        f"{correlation(first, second):.3f}; of how much is taken away and measured losses "
        f"{correlation(taken, second):.3f}. (Within one structure both rise with what is taken away.) Asked for were "
        f"{ENOUGH:g}, and knees at most {NEAR:g} apart, which {_missed(far)}.",
        "",
        table(("structure", "keep", "parameters", "weights", "ideal speed", "predicted", "measured", "perplexity"),
              points),
        "",
    ]  # fmt: skip


def _missed(names: list[str]) -> str:
    return f"{', '.join(names)} missed" if names else "all meet"


def render(lines: list[dict[str, Any]]) -> str:
    """Return the page."""
    sections = [section(model, own) for model, own in by_model(lines).items()]
    return "\n".join([
        "# Every budget from one calibration",
        "",
        "Made by `python benchmarks/explore.py`; raw figures in [explore.jsonl](explore.jsonl). Do not edit. "
        "What `pared explore` does is described in [explore](../explore.md).",
        "",
        *(line for own in sections for line in own),
        signature(lines),
    ])  # fmt: skip


def by_model(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of every model."""
    names = dict.fromkeys(line["model"] for line in lines)
    return {name: [line for line in lines if line["model"] == name] for name in names}


def is_of(line: dict[str, Any], asked: argparse.Namespace, structure: str) -> bool:
    """Whether a line is of a model, a structure, and the texts, tokens and budgets that are asked for."""
    read, on = line["exploration"]["calibration"], line["exploration"]["evaluation"]
    found = [line["model"], line["structure"], read["text"], read["windows"], on["text"], on["windows"], read["length"]]
    budgets = [one["keep"] for one in line["exploration"]["points"] if one["structure"] == structure]
    calibrated, measured = asked.texts
    wanted = [asked.model, structure, calibrated, asked.samples, measured, asked.windows, asked.length]
    return found == wanted and sorted(budgets) == sorted(asked.keep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a model that pared loads, or one of benchmarks/models.py")
    texts = ["wikitext2:train", "wikitext2:test"]
    parser.add_argument("--texts", nargs=2, default=texts, help="calibrated on, measured on")
    parser.add_argument("--structures", nargs="+", default=["ranks", "mixed", "widths", "zeros"], choices=STRUCTURES)
    parser.add_argument(
        "--keep", nargs="+", type=float, default=[0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5]
    )
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    for structure in () if asked.render else asked.structures:
        if any(is_of(line, asked, structure) for line in read(LINES)):
            continue
        found = pared.explore(
            source_of(asked.model),
            recipe={
                "calibration": {"text": asked.texts[0], "samples": asked.samples, "length": asked.length},
                "evaluation": {"text": asked.texts[1], "length": asked.length, "windows": asked.windows},
            },
            structures=structure,
            keep=tuple(asked.keep),
            measure=len(asked.keep),
        )
        append(LINES, {"model": asked.model, "structure": structure, "exploration": found.model_dump(mode="json")})
        print(found, flush=True)
    lines = read(LINES)
    for model, own in by_model(lines).items():
        draw(merged(own), plot_of(model))
    PAGE.write_text(render(lines), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
