"""Compressed folders in vLLM: whether they answer as in transformers, what weights take, how fast they are.

    make serve-test                                                     # all of it; the environment of vLLM is made
    python benchmarks/serving.py --vllm VENV/bin/python                 # the same, resuming where it stopped
    python benchmarks/serving.py --vllm VENV/bin/python --only llama    # cells whose name has this text
    python benchmarks/serving.py --render                               # renders the page only

One JSON line a cell; a cell that is there is not measured again (delete its line to repeat it). It fails if vLLM
answered a folder otherwise than transformers does.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import pared
from record import RESULTS, append, read
from serving_folders import FAMILIES, STORAGES, make
from serving_page import render
from serving_real import REAL, SPEED, make_real

LINES, PAGE = RESULTS / "serving.jsonl", RESULTS / "serving.md"
PLACE = Path(os.environ.get("PARED_CACHE", "~/.cache/pared")).expanduser() / "benchmarks" / "serving"
HERE = Path(__file__).parent
TOKENS, PROMPTS, LENGTH = 64, 8, 8
MODEL = "smollm2"
MOST = ["every kind", "heads", "shared, pivoted", "widths"]  # has every storage in it
IN_A_PROCESS = 9  # folders that one process serves, one after the other; importing vLLM takes longer than a tiny one
AT_ONCE, SPEED_TOKENS, REPEAT = 16, 32, 2
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Cell(NamedTuple):
    """One row of the page.

    Attributes:
        model: a family of tiny models, or the real one.
        storage: how it is compressed.
        dtype: it is served in, ``fp32`` where tokens are to be the same.
        way: ``plugin``, ``plugin, compiled``, ``plugin, transformers`` (vLLM's own backend of that name) or ``none``.
    """

    model: str
    storage: str
    dtype: str = "fp32"
    way: str = "plugin"


def cells() -> Iterator[Cell]:
    """Yield all cells, those that tell most first."""
    yield from (Cell(family, MOST[0]) for family in FAMILIES)
    yield from (Cell(MODEL, storage) for storage in REAL[:3])
    yield from (Cell(family, storage) for storage in MOST[1:] for family in FAMILIES)
    yield from (Cell(MODEL, storage) for storage in REAL[3:])
    for storage in ("dense", "every kind"):
        yield from (Cell("llama", storage, dtype) for dtype in ("bf16", "fp16"))
        yield Cell("llama", storage, way="plugin, transformers")
    yield from (Cell("llama", storage, way="none") for storage in STORAGES if storage != "dense")
    yield from (Cell(family, storage) for family in FAMILIES for storage in STORAGES if storage not in MOST)
    yield from (Cell("llama", storage, way="plugin, compiled") for storage in ("dense", "every kind"))


def folder_of(cell: Cell) -> Path | None:
    """Return the folder of a cell, made if it is not there; None where a family has nothing of the kind."""
    folder = PLACE / f"{cell.model} {cell.storage}".replace(" ", "_").replace(":", "").replace(",", "")
    return make_real(cell.storage, folder) if cell.model == MODEL else make(cell.model, cell.storage, folder)


def prompts_of(cell: Cell) -> list[list[int]]:
    """Return token ids: for the real model the beginnings of sentences, for a tiny one any."""
    if cell.model != MODEL:
        return [[(7 + 37 * place * (number + 1)) % 253 + 3 for place in range(LENGTH)] for number in range(PROMPTS)]
    text = pared.load_tokenizer("embedded:smollm2-135m")(" ".join(SENTENCES))["input_ids"]
    return [list(text[LENGTH * number : LENGTH * (number + 1)]) for number in range(PROMPTS)]


SENTENCES = (
    "The capital of France is a city on the river Seine that",
    "In the morning the children walked to the old school and",
    "A function that returns the sum of two numbers in Python is",
    "Water boils at a lower temperature on a high mountain, because the",
    "The history of the printing press begins in the fifteenth century, when",
    "To bake bread one needs flour, water, salt and some yeast, which",
)


@torch.no_grad()
def expected(cell: Cell, folder: Path) -> tuple[list[list[int]], int]:
    """Return what transformers answers greedily, and the bytes of the weights there: what the plan says."""
    model = pared.load(str(folder)).to(getattr(torch, DTYPES[cell.dtype])).eval()
    ids = torch.tensor(prompts_of(cell))
    model.generation_config.eos_token_id = None
    answers = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS
    )
    stored = {id(one): one for one in model.parameters()} | {
        id(one): one for name, one in model.named_buffers() if name.endswith(".order")
    }
    return answers[:, LENGTH:].tolist(), sum(one.nbytes for one in stored.values())


def job_of(cell: Cell, folder: Path) -> dict[str, Any]:
    """Return what the process of vLLM is to do."""
    job: dict[str, Any] = {
        "folder": str(folder), "dtype": DTYPES[cell.dtype], "prompts": prompts_of(cell), "tokens": TOKENS,
        "eager": "compiled" not in cell.way,
    }  # fmt: skip
    if "transformers" in cell.way:
        job["options"] = {"model_impl": "transformers"}
    return job


def serve(python: str, jobs: Sequence[dict[str, Any]], plugin: bool) -> list[dict[str, Any]]:
    """Return what vLLM answered, job by job, all of them in one process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    environment.pop("PYTHONPATH", None)
    if not plugin:
        environment["VLLM_PLUGINS"] = ""
    with tempfile.TemporaryDirectory() as place:
        given, answered = Path(place) / "jobs", Path(place) / "answers"
        given.write_text("".join(json.dumps(job) + "\n" for job in jobs), encoding="utf-8")
        with (PLACE / "vllm.log").open("a") as log:
            subprocess.run(
                [python, HERE / "serving_vllm.py", given, answered],
                env=environment,
                stdout=log,
                stderr=log,
                check=False,
            )
        answers = answered.read_text(encoding="utf-8").splitlines() if answered.exists() else []
    lines = [json.loads(line) for line in answers]
    return lines + [{"refused": "the process ended; see vllm.log"}] * (len(jobs) - len(lines))


def measure(group: Sequence[Cell], python: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of cells that are served in one process."""
    folders = {cell: folder_of(cell) for cell in group}
    there = [cell for cell in group if folders[cell] is not None]
    answers = serve(python, [job_of(cell, Path(str(folders[cell]))) for cell in there], group[0].way != "none")
    for cell in group:
        line: dict[str, Any] = cell._asdict()
        if folders[cell] is None:
            yield {**line, "found": "none"}
            continue
        answer = answers[there.index(cell)]
        if "refused" in answer:
            yield {**line, "found": "refused", "message": answer["refused"]}
            continue
        wanted, planned = expected(cell, Path(str(folders[cell])))
        same = [found == one for found, one in zip(answer["answers"], wanted, strict=True)]
        yield {
            **line,
            "found": "identical" if all(same) else "differs",
            "same_prompts": sum(same),
            "first_difference": [_first_difference(*pair) for pair in zip(answer["answers"], wanted, strict=True)],
            "weight_bytes": answer["weight_bytes"],
            "planned_bytes": planned,
        }


def speeds(python: str) -> Iterator[dict[str, Any]]:
    """Yield the throughput of folders that are not measured yet, tokens a second of one thread of the processor."""
    cells = [Cell(MODEL, storage, "bf16") for storage in ("dense", *SPEED)]
    done = {line["storage"] for line in read(LINES) if "speed" in line}
    missing = [cell for cell in cells if cell.storage not in done]
    prompts = [[(31 * place * (number + 1)) % 40000 + 100 for place in range(64)] for number in range(AT_ONCE)]
    jobs = [
        {**job_of(cell, Path(str(folder_of(cell)))), "prompts": prompts, "tokens": SPEED_TOKENS, "repeat": REPEAT}
        for cell in missing
    ]
    for cell, answer in zip(missing, serve(python, jobs, True) if jobs else [], strict=True):
        best = min(answer["cpu_seconds"][1:])
        yield {
            "model": cell.model, "storage": cell.storage, "dtype": DTYPES[cell.dtype], "prompts": AT_ONCE,
            "tokens": SPEED_TOKENS, "speed": AT_ONCE * SPEED_TOKENS / best, "cpu_seconds": answer["cpu_seconds"],
            "weight_bytes": answer["weight_bytes"],
        }  # fmt: skip


def client(python: str) -> Iterator[dict[str, Any]]:
    """Yield what an OpenAI client was answered, if that was not recorded yet."""
    if any("client" in line for line in read(LINES)):
        return
    folder = folder_of(Cell(MODEL, "factors"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment.pop("PYTHONPATH", None)
    with (PLACE / "vllm.log").open("a") as log:
        command = [python, HERE / "serving_client.py", str(folder)]
        answered = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, check=True)
    yield {"model": MODEL, "storage": "factors", "client": json.loads(answered.stdout.splitlines()[-1])}


def _first_difference(found: Sequence[int], wanted: Sequence[int]) -> int:
    """Return how many tokens are the same before the first that is not."""
    pairs = enumerate(zip(found, wanted, strict=True))
    return next((place for place, (one, other) in pairs if one != other), len(wanted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="the Python of an environment with vLLM and pared")
    parser.add_argument("--only", default="", help="a text in the names of the cells to measure")
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    PLACE.mkdir(parents=True, exist_ok=True)
    if not asked.render:
        done = {Cell(*(line[field] for field in Cell._fields)) for line in read(LINES) if "found" in line}
        missing = [cell for cell in cells() if cell not in done and asked.only in ", ".join(cell)]
        groups: list[list[Cell]] = []
        for cell in missing:
            last = groups[-1][-1] if groups else None
            if (
                last is None
                or len(groups[-1]) == IN_A_PROCESS
                or (last.way, last.model == MODEL)
                != (
                    cell.way,
                    cell.model == MODEL,
                )
            ):
                groups.append([])
            groups[-1].append(cell)
        for group in groups:
            for line in measure(group, asked.vllm):
                append(LINES, line)
                print(line["model"], line["storage"], line["way"], line["found"], line.get("message", ""), flush=True)
        for line in (*speeds(asked.vllm), *client(asked.vllm)) if not asked.only else ():
            append(LINES, line)
    lines = read(LINES)
    PAGE.write_text(render(lines), encoding="utf-8")
    wrong = [line for line in lines if line.get("found") == "differs" and line["dtype"] == "fp32"]
    sys.exit(f"{len(wrong)} cells differ from transformers: {wrong[0]}" if wrong else None)


if __name__ == "__main__":
    main()
