"""One folder of every size against a compression of its own to each, on the embedded model.

    PARED_DATA=/path/to/data python benchmarks/elastic.py --place /tmp/elastic     # one step after the other
    python benchmarks/elastic.py --render                                         # renders the page only

One JSON line a step: the folder is made, a size is cut out of it, a compression of its own is made to that size, of the
same statistics and storage (``nested``) and by the recipe's own (``own``: pivots, sequential statistics at 0.7 and
below). A line that is there is not made again; folders lie in ``--place`` and are left there.
"""

import argparse
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
NESTED = {"storage": "factors", "statistics": "once"}
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


def make(asked: argparse.Namespace, place: Path) -> Line:
    """Make the folder."""
    begun = time.perf_counter()
    made = pared.compress(MODEL, recipe=recipe(asked, LARGEST, elastic=True))
    made.save(place, overwrite=True)
    seconds = time.perf_counter() - begun
    stages = {**made.seconds}
    tokenizer = pared.load_tokenizer(place)
    manifest = pared.Manifest.read(place)
    assert manifest.elastic is not None
    return {
        "seconds": seconds, "stages": stages, "weights": manifest.bytes_on_disk, "dense": manifest.bytes_before,
        "factors": (place / FACTORS_FILE).stat().st_size, "least": manifest.elastic.least,
        "sizes": len(manifest.elastic.sizes),
        "dense_sites": sum(site.decision.kind == "dense" for site in manifest.plan.sites),
        "sites": len(manifest.plan.sites), "perplexity": perplexities(pared.load(place), tokenizer, asked),
        "dense_perplexity": perplexities(pared.load(MODEL), tokenizer, asked), "windows": asked.windows,
        "samples": asked.samples, "length": asked.length,
    }  # fmt: skip


def cut(asked: argparse.Namespace, place: Path, keep: float) -> Line:
    """Cut a size out of it, to a folder and in memory."""
    begun = time.perf_counter()
    outcome = pared.slice(place, place.parent / f"slice-{keep:g}", keep, overwrite=True)
    written = time.perf_counter() - begun
    begun = time.perf_counter()
    pared.load(place, keep=keep)
    loaded = time.perf_counter() - begun
    model, tokenizer = pared.load(outcome.folder), pared.load_tokenizer(outcome.folder)
    return {"seconds": written, "load_seconds": loaded, "weights": outcome.manifest.bytes_on_disk,
            "parameters": outcome.manifest.plan.after.covered_parameters, "stages": outcome.manifest.seconds,
            "perplexity": perplexities(model, tokenizer, asked)}  # fmt: skip


def compress(asked: argparse.Namespace, place: Path, keep: float, **more: Any) -> Line:
    """Compress to a size of its own, and compare with the one that was cut."""
    begun = time.perf_counter()
    made = pared.compress(MODEL, recipe=recipe(asked, keep, **more))
    seconds = time.perf_counter() - begun
    line = {"seconds": seconds, "parameters": made.plan.after.covered_parameters,
            "perplexity": perplexities(made.model, made.tokenizer, asked)}  # fmt: skip
    if more:
        manifest = pared.Manifest.read(place.parent / f"slice-{keep:g}")
        names = [site.name for site in made.plan.sites]
        same = manifest.plan == made.plan
        line |= {"same_plan": same, "apart": apart(pared.load(place, keep=keep), made.model, names) if same else None}
    return line


def render(lines: list[Line]) -> str:
    """Return the page."""
    by = {(line["step"], line["keep"]): line for line in lines}
    whole = by["elastic", LARGEST]
    dense = whole["dense_perplexity"]

    def times(step: str, keep: float) -> list[str]:
        line = by.get((step, keep))
        return ["-" if line is None else f"{line['perplexity'][text] / dense[text]:.4f} x" for text in TEXTS]

    def seconds(step: str, keep: float) -> str:
        return f"{by[step, keep]['seconds']:,.0f}" if (step, keep) in by else "-"

    largest = ", ".join(f"{text} {value / dense[text]:.4f} x" for text, value in whole["perplexity"].items())
    rows, same = [], []
    for keep in KEEPS:
        if ("slice", keep) not in by:
            continue
        nested, sliced = by.get(("nested", keep)), by["slice", keep]
        if nested is not None:
            same.append(nested["same_plan"])
        gap = "-" if nested is None or nested["apart"] is None else f"{nested['apart']:.1g}"
        rows.append((f"{keep:g}", f"{sliced['weights'] / 1e6:,.0f} MB", f"{sliced['seconds']:.1f}",
                     f"{sliced['load_seconds']:.1f}", seconds("nested", keep), gap, *times("slice", keep),
                     *times("nested", keep), *times("own", keep)))  # fmt: skip
    header = ["keep", "weights", "slice, s", "load, s", "compress, s", "weights apart"]
    header += [f"{name}, {text}" for name in ("slice", "same, apart", "own default") for text in TEXTS]
    folders = sum(by["slice", keep]["weights"] for keep in KEEPS if ("slice", keep) in by)
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
            "scarce, so that rows are to be compared with each other and not with other pages.",
            "",
            f"The folder was made in {whole['seconds']:,.0f} s. Its weights have {whole['weights'] / 1e6:,.0f} MB, and "
            f"spectra and factors of smaller sizes {whole['factors'] / 1e6:,.0f} MB more, as {whole['dense_sites']} of "
            f"{whole['sites']} target modules are dense in the largest size; the dense model has "
            f"{whole['dense'] / 1e6:,.0f} MB, the {len(rows)} sizes below as folders of their own {folders / 1e6:,.0f} "
            f"MB. It holds {whole['sizes']} sizes, from keep {whole['least']:g}. Perplexity of the largest: "
            f"{largest}.",
            "",
            table(header, rows),
            "",
            f"`same, apart` is a compression of its own to the size, of factors and statistics collected once: the "
            f"plans of {sum(same)} of {len(same)} are the slices', and *weights apart* is the largest difference of a "
            "weight (Frobenius, relative), where 4e-3 is one step of bfloat16. `own default` is what `pared compress` "
            "does without `--elastic`: pivots, which hold a higher rank in as many parameters, and at 0.7 and below "
            "statistics behind what is compressed. That is what a folder of every size costs.",
            "",
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
    steps = [("elastic", LARGEST), *(("slice", keep) for keep in KEEPS), *(("nested", keep) for keep in KEEPS),
             *(("own", keep) for keep in KEEPS)]  # fmt: skip
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
