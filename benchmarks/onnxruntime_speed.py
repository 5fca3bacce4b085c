"""Decoding in onnxruntime, one thread: two factors and pivoted storage against dense, as torch itself is timed beside.

    pip install onnx onnxscript onnxruntime
    python benchmarks/onnxruntime_speed.py            # resumes where it stopped
    python benchmarks/onnxruntime_speed.py --render   # renders the page only

The wide model of ``speed.py``: 4 random blocks of width 2,048. One JSON line for a storage. Graphs are what
`pared export --to onnx` writes.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pared
from pared.serving.onnx import compare, empty_cache, exported
from record import RESULTS, Line, append, read, spread, table
from speed import HIDDEN, INTERMEDIATE, MODELS, PLACE, folder_of, make_wide

LINES, PAGE = RESULTS / "onnxruntime.jsonl", RESULTS / "onnxruntime.md"
KEEP, STORAGES, PROMPT, TOKENS, ROUNDS = 0.5, ("factors", "pivoted"), 32, 8, 3
BARS = {"factors": 1.50, "pivoted": 1.57}  # what a first try of the exporter of torch gave
Decode = Callable[[], float]


def folder(storage: str) -> str:
    return MODELS["wide"] if storage == "dense" else str(folder_of("wide", KEEP, storage))


def graph_of(storage: str) -> tuple[Path, float]:
    """Return the graph of a storage, made if it is not there, and how far its logits are from the model's."""
    out, model = PLACE / f"wide-{storage}-onnx", pared.load(folder(storage), "float32")
    if not (out / "export.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        exported(model, storage).save_pretrained(out)
    return out, compare(out, model, storage)


def in_onnxruntime(storage: str) -> Decode:
    """Return what decodes some tokens behind a prompt and gives the seconds of the processor for them."""
    import onnxruntime
    from transformers.exporters.base import ExportedModel

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    graph = ExportedModel.from_pretrained(graph_of(storage)[0], session_options=options)
    empty = empty_cache(pared.load(folder(storage), "float32"))

    def step(tokens: torch.Tensor, first: int, cache: Any) -> Any:
        positions = torch.arange(first, first + tokens.shape[1]).unsqueeze(0)
        return graph(input_ids=tokens, position_ids=positions, past_key_values=cache)

    return lambda: _seconds(step, empty)


def in_torch(storage: str) -> Decode:
    """Return the same of the model itself."""
    model = pared.load(folder(storage), "float32")

    def step(tokens: torch.Tensor, first: int, cache: Any) -> Any:
        del first
        return model(tokens, past_key_values=cache, use_cache=True)

    return lambda: _seconds(step, None)


@torch.inference_mode()
def _seconds(step: Callable[[torch.Tensor, int, Any], Any], cache: Any) -> float:
    told = step(torch.arange(PROMPT).unsqueeze(0), 0, cache)
    start = time.process_time()
    for number in range(TOKENS):
        told = step(told.logits[:, -1:].argmax(-1), PROMPT + number, told.past_key_values)
    return time.process_time() - start


def measure(storage: str) -> Line:
    """Time a storage in turns with dense, in onnxruntime and in torch."""
    ratios: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    for engine, decoder in (("onnxruntime", in_onnxruntime), ("torch", in_torch)):
        dense, small = decoder("dense"), decoder(storage)
        dense(), small()
        pairs = [(dense(), small()) for _ in range(ROUNDS)]
        ratios[engine] = [one / other for one, other in pairs]
        rates[engine] = [TOKENS / statistics.median(each) for each in zip(*pairs, strict=True)]
    return {"storage": storage, "keep": KEEP, "ratios": ratios, "rates": rates, "off": graph_of(storage)[1]}


def ideal() -> float:
    """Return the quotient of the numbers that are multiplied for a token by the wide model, the head included."""
    blocks, head = 4 * HIDDEN * (4 * HIDDEN + 3 * INTERMEDIATE), 4096 * HIDDEN
    return (blocks + head) / (KEEP * blocks + head)


def render(lines: list[Line]) -> str:
    """Return the page."""
    below = [one["storage"] for one in lines
             if statistics.median(one["ratios"]["onnxruntime"]) < BARS[one["storage"]]]  # fmt: skip
    open_ = [storage for storage in STORAGES if storage not in {line["storage"] for line in lines}]
    rows = []
    for line in lines:
        for engine, ratios in line["ratios"].items():
            dense, small = line["rates"][engine]
            off = f"{line['off']:.1g}" if engine == "onnxruntime" else ""
            told = f"{small:.1f} / {dense:.1f}"
            rows.append((line["storage"], f"{line['keep']:g}", engine, told, spread(ratios), off))
    header = ("storage", "keep", "engine", "tokens a second / dense", "times as fast", "logits differ by")
    return "\n".join([
        "# onnxruntime",
        "",
        "Made by `python benchmarks/onnxruntime_speed.py`; raw figures in [onnxruntime.jsonl](onnxruntime.jsonl). Do "
        "not edit.",
        "",
        f"4 random blocks of width 2,048 in float32, decoding {TOKENS} tokens behind a prompt of {PROMPT}, one at a "
        f"time, one thread, in turns with the dense model, {ROUNDS} rounds. By seconds of the processor. Graphs are "
        "those of `pared export --to onnx`; logits are compared with the model's, relative to the largest. A first try "
        f"gave {BARS['factors']:.2f} times for factors and {BARS['pivoted']:.2f} for pivoted storage: the bar. "
        f"Ideal is {ideal():.2f}; what is above it is noise of a machine that does other work too. "
        + (f"Missed by {' and '.join(below)}." if below else "It is reached by what was measured.")
        + (f" Not measured yet: {' and '.join(open_)}." if open_ else ""),
        "",
        table(header, rows),
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--render", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.render:
        make_wide()
        there = {line["storage"] for line in read(LINES)}
        for storage in STORAGES:
            if storage not in there:
                append(LINES, measure(storage))
                print(storage, flush=True)
    PAGE.write_text(render(read(LINES)), encoding="utf-8")


if __name__ == "__main__":
    main()
