"""One folder of every size against a compression of its own to each, on the embedded model.

    PARED_DATA=/path/to/data python benchmarks/elastic.py --place /tmp/elastic     # one step after the other
    python benchmarks/elastic.py --render                                         # renders the page only

One JSON line a step: the folder is made, a size is cut out of it, a compression of its own is made to that size, of the
same statistics and storage (``nested``) and by the recipe's own (``own``: pivots, sequential statistics at 0.7 and
below). A line that is there is not made again; folders lie in ``--place`` and are left there.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

import pared
from grid import signature
from pared.modules import LowRankLinear
from pared.schema.elastic import FACTORS_FILE
from record import RESULTS, Line, append, read, table

LINES, PAGE = RESULTS / "elastic.jsonl", RESULTS / "elastic.md"
MODEL = "embedded:smollm2-135m"
LARGEST, KEEPS = 0.9, (0.85, 0.8, 0.7, 0.6, 0.5)
NESTED = {"structures": "ranks", "storage": "factors", "statistics": "once"}
TEXTS = {"WikiText-2": "wikitext2:test", "C4": "c4:validation"}


def recipe(asked: argparse.Namespace, keep: float, **more: Any) -> dict[str, Any]:
    """Return the recipe of a compression."""
    calibration = {"text": "wikitext2:train", "samples": asked.samples, "length": asked.length}
    return {"keep": keep, "calibration": calibration, "evaluation": None, **more}


def perplexities(model: Any, tokenizer: Any, asked: argparse.Namespace) -> dict[str, float]:
    return {
        name: pared.perplexity(model, tokenizer, text, asked.length, asked.windows).value
        for name, text in TEXTS.items()
    }


def product(layer: torch.nn.Module) -> torch.Tensor:
    """Return what a layer multiplies with, float32."""
    if isinstance(layer, LowRankLinear):
        return layer.up.weight.float() @ layer.down.weight.float()
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    return weight.float()


@torch.no_grad()
def apart(one: Any, other: Any, names: list[str]) -> float:
    """Return the largest difference of a weight, relative to the Frobenius norm of it."""
    found = []
    for name in names:
        first, second = (product(model.get_submodule(name)) for model in (one, other))
        found.append(float((first - second).norm() / second.norm()))
    return max(found)


class Clock:
    """Seconds since it was made, on the wall and of the processor: on a busy machine they are far apart."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Return both, and how busy the machine is."""
        wall, processor = time.perf_counter() - self._wall, time.process_time() - self._processor
        return {"seconds": wall, "processor_seconds": processor, "load": os.getloadavg()[0]}


def make(asked: argparse.Namespace, place: Path) -> Line:
    """Make the folder."""
    clock = Clock()
    made = pared.compress(MODEL, recipe=recipe(asked, LARGEST, elastic=True))
    made.save(place, overwrite=True)
    taken, stages = clock.read(), {**made.seconds}
    tokenizer = pared.load_tokenizer(place)
    manifest = pared.Manifest.read(place)
    assert manifest.elastic is not None
    return {
        **taken, "stages": stages, "weights": manifest.bytes_on_disk, "dense": manifest.bytes_before,
        "factors": (place / FACTORS_FILE).stat().st_size, "least": manifest.elastic.least,
        "sizes": len(manifest.elastic.sizes),
        "dense_sites": sum(site.decision.kind == "dense" for site in manifest.plan.sites),
        "sites": len(manifest.plan.sites), "perplexity": perplexities(pared.load(place), tokenizer, asked),
        "dense_perplexity": perplexities(pared.load(MODEL), tokenizer, asked), "windows": asked.windows,
        "samples": asked.samples, "length": asked.length,
    }  # fmt: skip


def cut(asked: argparse.Namespace, place: Path, keep: float) -> Line:
    """Cut a size out of it, to a folder and in memory."""
    clock = Clock()
    outcome = pared.slice(place, place.parent / f"slice-{keep:g}", keep, overwrite=True)
    written, clock = clock.read(), Clock()
    model, tokenizer = pared.load(place, keep=keep), pared.load_tokenizer(outcome.folder)
    return {**written, "loading": clock.read(), "weights": outcome.manifest.bytes_on_disk,
            "parameters": outcome.manifest.plan.after.covered_parameters, "stages": outcome.manifest.seconds,
            "perplexity": perplexities(model, tokenizer, asked)}  # fmt: skip


def compress(asked: argparse.Namespace, place: Path, keep: float, **more: Any) -> Line:
    """Compress to a size of its own, and compare with the one that was cut."""
    clock = Clock()
    made = pared.compress(MODEL, recipe=recipe(asked, keep, **more))
    line = {**clock.read(), "parameters": made.plan.after.covered_parameters,
            "perplexity": perplexities(made.model, made.tokenizer, asked)}  # fmt: skip
    if more:
        manifest = pared.Manifest.read(place.parent / f"slice-{keep:g}")
        names = [site.name for site in made.plan.sites]
        same = manifest.plan == made.plan
        line |= {"same_plan": same, "apart": apart(pared.load(place, keep=keep), made.model, names) if same else None}
    return line


def took(line: Line | None) -> str:
    """Return the seconds of a step, those of the processor in brackets."""
    if line is None:
        return "-"
    return f"{line['seconds']:,.0f}" + (f" ({line['processor_seconds']:.1f})" if "processor_seconds" in line else "")


def rows_of(by: dict[tuple[str, float], Line], steps: list[str], dense: dict[str, float]) -> list[tuple[str, ...]]:
    """Return the row of every size that was cut out."""
    rows = []
    for keep in KEEPS:
        if (sliced := by.get(("slice", keep))) is None:
            continue
        row = [f"{keep:g}", f"{sliced['weights'] / 1e6:,.0f} MB", took(sliced), took(sliced["loading"])]
        for step in steps:
            line = by.get((step, keep))
            row += [] if step == "slice" else [took(line)]
            if step == "nested":
                row.append("-" if line is None or line["apart"] is None else f"{line['apart']:.1g}")
            row += ["-" if line is None else f"{line['perplexity'][text] / dense[text]:.4f} x" for text in TEXTS]
        rows.append(tuple(row))
    return rows


def render(lines: list[Line]) -> str:
    """Return the page."""
    by = {(line["step"], line["keep"]): line for line in lines}
    whole = by["elastic", LARGEST]
    dense = whole["dense_perplexity"]
    largest = ", ".join(f"{text} {value / dense[text]:.4f} x" for text, value in whole["perplexity"].items())
    steps = [step for step in ("slice", "nested", "own") if any(line["step"] == step for line in lines)]
    rows = rows_of(by, steps, dense)
    header = ["keep", "weights", "slice, s", "load, s"]
    for step, name in (("slice", "slice"), ("nested", "same"), ("own", "own")):
        if step in steps:
            header += [] if step == "slice" else [f"compress ({name}), s"]
            header += (["weights apart"] if step == "nested" else []) + [f"{name}, {text}" for text in TEXTS]
    folders = sum(by["slice", keep]["weights"] for keep in KEEPS if ("slice", keep) in by)
    same = [line["same_plan"] for line in lines if line["step"] == "nested"]
    told = {
        "nested": "*same* is a compression of its own to the size, of factors and statistics collected once: the "
        f"plans of {sum(same)} of {len(same)} are the slices', and *weights apart* is the largest difference of a "
        "weight (Frobenius, relative), where 4e-3 is one step of bfloat16.",
        "own": "*own* is what `pared compress` does without `--elastic`: widths beside ranks, pivots, which hold a "
        "higher rank in as many parameters, and at 0.7 and below statistics behind what is compressed.",
    }
    missing = [f"{name} at keep {keep:g}" for step, name in (("nested", "same"), ("own", "own")) for keep in KEEPS
               if (step, keep) not in by]  # fmt: skip
    seconds = [
        "Seconds are those of the wall, in brackets those of the processor: the process was one of low priority (load "
        f"averages up to {max(line.get('load', 0.0) for line in lines):.1f}). A slice is loaded, cut, saved, reloaded "
        "and compared; *load* is `pared.load(FOLDER, keep=...)`."
    ]
    if any("processor_seconds" not in line for line in lines):
        seconds.append("Those without brackets were taken on a busier machine, before the processor's were recorded.")
    left = [f"Not measured yet: {', '.join(missing)}.", ""] if missing else []
    return "\n".join(
        [
            "# One folder, every size",
            "",
            "Made by `python benchmarks/elastic.py`; raw figures in [elastic.jsonl](elastic.jsonl). Do not edit. What "
            "`pared compress --elastic` and `pared slice` do is described in [every size](../elastic.md).",
            "",
            f"`{MODEL}`, `loss-optimal`, largest size keep {LARGEST:g}; calibrated on {whole['samples']} x "
            f"{whole['length']} tokens of wikitext2:train, perplexity on {whole['windows']} windows of "
            f"{whole['length']} tokens as a multiple of the dense model's: few, as time on two shared cores was "
            "scarce, so that figures are to be compared with each other and not with other pages.",
            "",
            f"The folder was made in {took(whole)} s, of which the allocations of all sizes took "
            f"{whole['stages']['allocate']:,.0f}. Its weights have {whole['weights'] / 1e6:,.0f} MB, and spectra and "
            f"factors of smaller sizes {whole['factors'] / 1e6:,.0f} MB more, as {whole['dense_sites']} of "
            f"{whole['sites']} target modules are dense in the largest size; the dense model has "
            f"{whole['dense'] / 1e6:,.0f} MB, the {len(rows)} sizes below as folders of their own {folders / 1e6:,.0f} "
            f"MB. It holds {whole['sizes']} sizes, from keep {whole['least']:g}. Perplexity of the largest: {largest}.",
            "",
            table(header, rows),
            "",
            " ".join([*seconds, *(told[step] for step in steps if step in told)]),
            "",
            *left,
            signature(lines),
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", type=Path, default=Path("elastic"))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    place = asked.place / "elastic"
    steps = [("elastic", LARGEST), *((step, keep) for step in ("slice", "nested", "own") for keep in KEEPS)]
    for step, keep in () if asked.render else steps:
        if (step, keep) in {(line["step"], line["keep"]) for line in read(LINES)}:
            continue
        asked.place.mkdir(parents=True, exist_ok=True)
        line = (make(asked, place) if step == "elastic" else cut(asked, place, keep) if step == "slice" else
                compress(asked, place, keep, **(NESTED if step == "nested" else {})))  # fmt: skip
        append(LINES, {"step": step, "keep": keep, **line})
        print(step, keep, line, flush=True)
    PAGE.write_text(render(read(LINES)), encoding="utf-8")


if __name__ == "__main__":
    main()
