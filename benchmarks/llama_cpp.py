"""GGUF files in llama.cpp: the same greedy text as transformers, and tokens a second, dense against narrower layers.

    npm install --prefix .serve --ignore-scripts node-llama-cpp     # the engine, once
    python benchmarks/llama_cpp.py                                  # resumes where it stopped; on a quiet machine
    python benchmarks/llama_cpp.py --render                         # renders the page only

One JSON line for a model and a type. Every model is asked in turns with the dense one, on one thread, and its file is
what `pared export --to gguf` writes. `PARED_LLAMA_CPP` names another folder than `.serve`.
"""

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import pared
from pared.models.gguf import header_of
from record import RESULTS, ROOT, Line, append, read, spread, table

LINES, PAGE = RESULTS / "llama_cpp.jsonl", RESULTS / "llama_cpp.md"
PLACE = Path(os.environ.get("PARED_CACHE", "~/.cache/pared")).expanduser() / "benchmarks" / "llama_cpp"
ENGINE = Path(os.environ.get("PARED_LLAMA_CPP", ROOT / ".serve"))
SCRIPT = Path(__file__).with_suffix(".mjs")
MODEL, KEEP, MULTIPLE = "embedded:smollm2-135m", 0.6, 32
TYPES, ROUNDS, TOKENS, BAR = ("f32", "f16", "q8_0"), 5, 32, 0.95
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea,",
)
# name -> fields of the recipe; widths by layer are spread by loss, heads too
MODELS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "one width": {"structures": "widths", "allocation": "uniform", "calibration": {"samples": 2, "length": 256}},
    "widths and heads by layer": {"structures": "widths", "calibration": {"samples": 8, "length": 512}},
}


class Engine:
    """llama.cpp in a process of its own.

    Raises:
        FileNotFoundError: node, or node-llama-cpp, is not there.
    """

    def __init__(self, folder: Path = ENGINE) -> None:
        self._process = subprocess.Popen(
            ["node", str(SCRIPT), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.communicate()

    def ask(self, file: Path, prompts: Sequence[str] = PROMPTS, tokens: int = TOKENS) -> dict[str, Any]:
        """Return what a file answers to every prompt, and how fast; see ``llama_cpp.mjs``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"file": str(file), "prompts": prompts, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        while not (line := self._process.stdout.readline()).startswith("{"):
            if not line:
                raise FileNotFoundError(f"node-llama-cpp does not run in {ENGINE} (exit {self._process.wait()})")
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise RuntimeError(f"{file}: {told['error']}")
        return told


@torch.inference_mode()
def in_transformers(name: str, prompts: Sequence[str] = PROMPTS, tokens: int = TOKENS) -> dict[str, list[list[int]]]:
    """Return the tokens of every prompt and of its greedy continuation, float32."""
    model, tokenizer = pared.load(name, "float32"), pared.load_tokenizer(name)
    model.generation_config.eos_token_id = None
    asked = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    greedy = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": 0}
    answers = [model.generate(torch.tensor([one]), **greedy)[0, len(one) :].tolist() for one in asked]
    return {"prompts": asked, "answers": answers}


def equal_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two continuations have in common before they part."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def folder_of(name: str) -> str:
    """Return a model of this page by a name of pared, made if it is not there."""
    fields = MODELS[name]
    if fields is None:
        return MODEL
    out = PLACE / name.replace(" ", "-")
    if not (out / "config.json").exists():
        recipe = {"model": MODEL, "keep": KEEP, "multiple_of": MULTIPLE, "method": "loss-optimal", "evaluation": None}
        pared.run(pared.Recipe.model_validate({**recipe, **fields, "out": str(out)}), resume=False)
    return str(out)


def file_of(name: str, kind: str) -> Path:
    """Return the file of a model, exported if it is not there."""
    out = PLACE / f"{name.replace(' ', '-')}-{kind}.gguf"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        pared.export(folder_of(name), out, to="gguf", quantize=kind)
    return out


def multiplied(file: Path) -> int:
    """Return how many numbers are multiplied for a token, the head included, which is the embeddings."""
    shapes = [tensor.shape for tensor in header_of(file).tensors.values()]
    return sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)


def measure(engine: Engine, name: str, kind: str) -> Line:
    """Compare a model's answers with those of transformers, and time it in turns with the dense one."""
    file, dense = file_of(name, kind), file_of("dense", kind)
    expected, found = in_transformers(folder_of(name)), engine.ask(file)
    seconds: dict[str, list[float]] = {"model": [], "dense": []}
    rates: dict[str, list[float]] = {"model": [], "dense": []}
    for _ in range(ROUNDS):
        for which, one in (("dense", dense), ("model", file)):
            told = engine.ask(one)
            seconds[which].append(sum(told["seconds"]))
            rates[which].append(statistics.median(told["rates"]))
    pairs = zip(found["answers"], expected["answers"], strict=True)
    return {
        "model": name,
        "keep": KEEP if MODELS[name] else 1.0,
        "type": kind,
        "architecture": header_of(file).fields["general.architecture"],
        "prompts_equal": found["prompts"] == expected["prompts"],
        "equal_tokens": [equal_tokens(one, other) for one, other in pairs],
        "tokens": TOKENS,
        "texts": found["texts"],
        "tokens_per_second": rates,
        "ratios": [b / a for a, b in zip(seconds["model"], seconds["dense"], strict=True)],
        "ideal": multiplied(dense) / multiplied(file),
        "bytes": [file.stat().st_size, dense.stat().st_size],
    }


def row_of(line: Line) -> tuple[Any, ...]:
    """Return a row of the page."""
    rates = line["tokens_per_second"]
    share = statistics.median(line["ratios"]) / line["ideal"]
    dense = line["model"] == "dense"
    return (
        line["model"],
        line["type"],
        f"`{line['architecture']}`",
        f"{line['bytes'][0] / 1e6:,.0f}",
        ", ".join(map(str, line["equal_tokens"])) + ("" if line["prompts_equal"] else "; prompts cut otherwise"),
        f"{statistics.median(rates['model']):.1f} / {statistics.median(rates['dense']):.1f}",
        "" if dense else spread(line["ratios"]),
        "" if dense else f"{line['ideal']:.2f}",
        "" if dense else f"{share:.2f}",
    )


def missed(lines: list[Line]) -> str:
    """Say which models are slower than the bar."""
    shares = {f"{one['model']}, {one['type']}": statistics.median(one["ratios"]) / one["ideal"] for one in lines
              if one["model"] != "dense"}  # fmt: skip
    below = [f"{name} ({share:.2f})" for name, share in shares.items() if round(share, 2) < BAR]
    return f"Missed: {'; '.join(below)}." if below else "It is reached."


def render(lines: list[Line]) -> str:
    """Return the page."""
    order = [(name, kind) for kind in TYPES for name in MODELS]
    lines = sorted(lines, key=lambda line: order.index((line["model"], line["type"])))
    header = ("model", "type", "architecture", "MB", f"equal tokens of {TOKENS}, by prompt", "tokens a second / dense",
              "times as fast", "ideal", "of ideal")  # fmt: skip
    return "\n".join([
        "# llama.cpp",
        "",
        "Made by `python benchmarks/llama_cpp.py`; raw figures in [llama_cpp.jsonl](llama_cpp.jsonl). Do not edit.",
        "",
        f"`{MODEL}`, dense and with narrower layers at keep {KEEP} (`--structures widths`, multiples of {MULTIPLE}), "
        "written by `pared export --to gguf` and run by llama.cpp (node-llama-cpp) on one thread, keys and values in "
        "float32. *Equal tokens* are those that the greedy continuation has in common with transformers in float32 "
        f"before they part, for {len(PROMPTS)} prompts. Every model is timed in turns with the dense one, {ROUNDS} "
        "rounds of all prompts: tokens a second behind the first by the clock, *times as fast* by the seconds of the "
        "processor. Ideal is the quotient of the numbers that are multiplied for a token, the head included. The bar "
        f"is {BAR} of it. {missed(lines)}",
        "",
        table(header, map(row_of, lines)),
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--types", nargs="*", default=list(TYPES), choices=TYPES)
    parser.add_argument("--render", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    there = {(line["model"], line["type"]) for line in read(LINES)}
    asked = [(name, kind) for kind in arguments.types for name in arguments.models if (name, kind) not in there]
    if asked and not arguments.render:
        for name, kind in asked:
            file_of(name, kind)
        with Engine() as engine:
            for name, kind in asked:
                append(LINES, measure(engine, name, kind))
                print(name, kind, flush=True)
    PAGE.write_text(render(read(LINES)), encoding="utf-8")


if __name__ == "__main__":
    main()
