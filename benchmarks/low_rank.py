"""Perplexity of every low-rank method at every budget, on text that was calibrated on and text that was not.

    PARED_DATA=/path/to/data python benchmarks/low_rank.py                       # the grid, resuming where it stopped
    PARED_DATA=/path/to/data python benchmarks/low_rank.py --methods svd-llm --keep 0.8
    python benchmarks/low_rank.py --render                                       # renders the page only

One JSON line a cell; a cell that is there is not measured again (delete its line to repeat it).
"""

import argparse
import os
import time
from typing import Any

import pared
from pared.lowrank import METHODS
from pared.sources import find_text
from record import RESULTS, append, read, table

LINES = RESULTS / "low_rank.jsonl"
PAGE = RESULTS / "low_rank.md"
WINDOWS, LENGTH = 20, 1024


def evaluation_texts() -> dict[str, str]:
    """Return what is evaluated on, by the name the page uses; none of it is ever calibrated on."""
    speeches = f"file:{os.environ['PARED_DATA']}/lm/us_state_of_the_union_1945_2006.jsonl"
    return {"WikiText-2": "wikitext2:test", "C4": "c4:validation", "speeches": speeches}


def measure(model_name: str, method: str, keep: float, text: str, samples: int) -> dict[str, Any]:
    """Compress the model one way (or not at all) and measure it on every text."""
    model, tokenizer = pared.load(model_name), pared.load_tokenizer(model_name)
    row: dict[str, Any] = {"model": model_name, "method": method, "keep": keep, "text": text, "samples": samples}
    if method != "dense":
        calibration = pared.Calibration(text=text, samples=samples, length=LENGTH)
        start = time.perf_counter()
        result = pared.compress(model, tokenizer, pared.Recipe(method=method, keep=keep, calibration=calibration))
        row |= {"compress_seconds": time.perf_counter() - start, "calibration": result.calibration}
    parameters = sum(p.numel() for p in model.parameters())
    row |= {"model_parameters": parameters, "bytes": sum(p.numel() * p.itemsize for p in model.parameters())}
    row["perplexity"] = {
        name: pared.perplexity(model, tokenizer, source, LENGTH, WINDOWS).value
        for name, source in evaluation_texts().items()
    }
    return row


def require_disjoint(calibration: str) -> None:
    """Stop if a text that is evaluated on shares a document with the calibration text."""
    seen = {document.strip() for document in find_text(calibration).documents if len(document) > 200}
    for name, source in evaluation_texts().items():
        if seen & {document.strip() for document in find_text(source).documents}:
            raise SystemExit(f"{name} shares documents with {calibration}")


def render(lines: list[dict[str, Any]]) -> str:
    """Return the page."""
    texts = list(lines[0]["perplexity"])
    dense = next(line for line in lines if line["method"] == "dense")
    rows = [
        (
            line["method"],
            f"{line['keep']:g}",
            f"{line['model_parameters'] / 1e6:.1f} M",
            f"{line['bytes'] / 2**20:,.0f} MiB",
            *(f"{line['perplexity'][t]:,.2f} ({line['perplexity'][t] / dense['perplexity'][t]:,.2f} x)" for t in texts),
            f"{line['compress_seconds']:.0f}" if "compress_seconds" in line else "",
        )
        for line in sorted(lines, key=lambda line: (-line["keep"], line["method"] != "dense", line["method"]))
    ]
    last = lines[-1]
    calibrated = next((line for line in lines if line.get("calibration")), {"text": "-", "samples": 0})
    return "\n".join(
        [
            "# Low-rank methods",
            "",
            "Made by `python benchmarks/low_rank.py`; raw figures in [low_rank.jsonl](low_rank.jsonl). Do not edit.",
            "",
            f"`{last['model']}`, float32; calibrated on {calibrated['samples']} x {LENGTH} tokens of "
            f"{calibrated['text']}; perplexity on the first {WINDOWS} windows of {LENGTH} tokens of each text, no "
            "beginning-of-sequence token, in brackets as a multiple of the dense model's. `keep` counts the linear "
            "layers inside the blocks; parameters and bytes are the whole model's. C4 and the speeches (State of the "
            "Union addresses, 1945 to 2006) were never calibrated on.",
            "",
            table(("method", "keep", "parameters", "bytes", *texts, "seconds"), rows),
            "",
            "Seconds are those of the compression on this machine, for orientation only: [road.md](road.md) measures "
            "time properly.",
            "",
            f"Commits {', '.join(sorted({line['commit'] for line in lines}))}; {last['date']}, {last['cpu']}, "
            f"{last['threads']} threads, torch {last['torch']}, transformers {last['transformers']}, Python "
            f"{last['python']}.\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--keep", nargs="+", type=float, default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--text", default="wikitext2:train")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    cells = [("dense", 1.0), *((method, keep) for keep in asked.keep for method in asked.methods)]
    if not asked.render:
        require_disjoint(asked.text)
        for number, (method, keep) in enumerate(cells, 1):
            done = {(line["model"], line["method"], line["keep"], line["samples"]) for line in read(LINES)}
            if (asked.model, method, keep, asked.samples) not in done:
                row = measure(asked.model, method, keep, asked.text, asked.samples)
                append(LINES, row)
                print(f"{number}/{len(cells)} {method} keep {keep}: {row['perplexity']}", flush=True)
    PAGE.write_text(render(read(LINES)), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
