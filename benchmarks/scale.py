"""What does it take to compress a model that does not fit in memory, in a process that may be killed?

    python benchmarks/scale.py memory stream kills linear ranks  # measures what is missing, renders the page
    python benchmarks/scale.py memory --cases 3b-wanda            # one of the cases
    python benchmarks/scale.py                                    # renders docs/results/scale.md only

One JSON line a measurement; what is there is not measured again (delete lines to repeat them). Commands run in
processes of their own, one thread each, memory limits in a control group of the kernel.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import pared
from capped import run_capped
from models import PLACE, folder_of
from random_model import write
from record import RESULTS, append, read, spread, table

LINES, PAGE = RESULTS / "scale.jsonl", RESULTS / "scale.md"
GIB = 2**30
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
METHODS: dict[str, dict[str, Any]] = {
    "svd-llm": {"method": "svd-llm", "keep": 0.8},
    "basis-sharing": {"method": "basis-sharing", "keep": 0.8},
    "loss-optimal": {"method": "loss-optimal", "keep": 0.8},
    "wanda": {"method": "wanda", "sparsity": 0.5},
}
MODELS = {"3b": (4 * GIB, {"samples": 4, "length": 512, "batch": 1}),
          "qwen": (int(1.5 * GIB), {"samples": 8, "length": 512, "batch": 1}),
          "qwen-short": (int(1.5 * GIB), {"samples": 16, "length": 128, "batch": 1})}  # fmt: skip
EMBEDDED = "embedded:smollm2-135m"
PLAIN = {"samples": 16, "length": 512, "dtype": "float32"}  # of what is compared bit for bit
KILLED: dict[str, dict[str, Any]] = {
    "svd-llm": {"method": "svd-llm", "keep": 0.8},
    "basis-sharing, refit": {"method": "basis-sharing", "keep": 0.5},
    "loss-optimal": {"method": "loss-optimal", "keep": 0.8},
    "loss-optimal, sequential": {"method": "loss-optimal", "keep": 0.6},
    "wanda, owl": {"method": "wanda", "sparsity": 0.5, "allocation": "owl"},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
}


def model_of(name: str) -> str:
    """Return a folder of a model, made once."""
    if name == "3b":
        return str(write("llama-3.2-3b", PLACE / "llama-3.2-3b"))
    return folder_of("qwen2.5-coder-0.5b")


def pared_command(model: str, fields: dict[str, Any], out: Path, *more: str) -> list[str]:
    """Return the command line of a compression, without perplexities."""
    recipe = {"model": model, "evaluation": None, **fields}
    file = out.with_name(f"{out.name}.recipe.json")
    file.write_text(json.dumps(recipe), encoding="utf-8")
    compress = [sys.executable, "-m", "pared", "compress"]
    left = [] if "--resume" in more else ["--restart"]  # of a benchmark that was killed: no part of a measurement
    return [*compress, "--recipe", str(file), "--out", str(out), "--overwrite", *left, *more]


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor of a folder, by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                data = tensors.get_tensor(name).contiguous().flatten().view(torch.uint8)
                found[name] = hashlib.sha256(data.numpy().tobytes()).hexdigest()
    return found


def missing(line: dict[str, Any]) -> bool:
    """Whether no line with these entries is there yet."""
    return not any(line.items() <= one.items() for one in read(LINES))


def memory(cases: Sequence[str]) -> None:
    """Compress and verify under a hard cap."""
    for name, (cap, calibration) in MODELS.items():
        for method, fields in METHODS.items():
            key = {"what": "memory", "model": name, "method": method}
            if (cases and f"{name}-{method}" not in cases) or not missing(key):
                continue
            model, out, log = model_of(name), PLACE / f"{name}-{method}", PLACE / f"{name}-{method}.log"
            asked = pared_command(model, {**fields, "calibration": calibration}, out, "--stream", "on", "--resume")
            done = run_capped(asked, cap, ONE_THREAD, log)
            row = key | {"cap": cap, "calibration": calibration, **{f"compress_{k}": v for k, v in done.items()}}
            if done["exit"] == 0:
                manifest = json.loads((out / "pared.json").read_text(encoding="utf-8"))
                row |= {"seconds_by_stage": manifest["seconds"], "bytes": manifest["bytes_on_disk"]}
                row |= {"bound": manifest["memory_bound_bytes"], "peak": manifest["peak_memory_bytes"]}
                check = [sys.executable, "-m", "pared", "verify", str(out), "--stream", "on"]
                row |= {f"verify_{k}": v for k, v in run_capped(check, cap, ONE_THREAD, log).items()}
            append(LINES, row)
            print(row, flush=True)
            shutil.rmtree(out, ignore_errors=True)


def stream(rounds: int = 3) -> None:
    """Compare a streamed compression with one in memory: every tensor, and the time, interleaved."""
    for method, fields in METHODS.items():
        if not missing(key := {"what": "stream", "method": method}):
            continue
        seconds: dict[str, list[float]] = {"off": [], "on": []}
        found: dict[str, dict[str, str]] = {}
        for _ in range(rounds):
            for mode in seconds:
                out = PLACE / f"stream-{mode}"
                asked = pared_command(EMBEDDED, {**fields, "calibration": PLAIN}, out, "--stream", mode)
                done = run_capped(asked, None, ONE_THREAD, PLACE / "stream.log")
                if done["exit"]:
                    raise SystemExit(f"{asked} failed; see {PLACE / 'stream.log'}")
                seconds[mode].append(done["seconds"])
                found[mode] = digests(out)
        ratios = [on / off for on, off in zip(seconds["on"], seconds["off"], strict=True)]
        append(LINES, key | {"equal": found["on"] == found["off"], "tensors": len(found["on"]), "ratios": ratios,
                             "seconds": seconds, "calibration": PLAIN})  # fmt: skip
        print(key, found["on"] == found["off"], ratios, flush=True)


def kills(each: int = 9, seed: int = 0) -> None:
    """Kill compressions at random moments and let them resume, until they end; compare with one that was let alone."""
    model = _small_model()
    calibration = {"samples": 16, "length": 64, "batch": 4, "dtype": "float32"}
    for name, fields in KILLED.items():
        if not missing(key := {"what": "kills", "method": name}):
            continue
        draw, log = random.Random(f"{seed}{name}"), PLACE / "kills.log"
        out = PLACE / "killed"
        asked = pared_command(model, {**fields, "calibration": calibration}, out)
        whole = run_capped(asked, None, ONE_THREAD, log)
        expected = _files_of(out)
        shutil.rmtree(out)
        killed, moments = 0, list[float]()
        asked = pared_command(model, {**fields, "calibration": calibration}, out, "--resume")
        while True:
            told = log.open("ab")
            process = subprocess.Popen(asked, env={**os.environ, **ONE_THREAD}, stdout=told, stderr=subprocess.STDOUT)
            wait = draw.uniform(0.3, 1.0) * whole["seconds"] if killed < each else None
            try:
                code = process.wait(wait)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed, moments = killed + 1, [*moments, float(wait or 0)]
                continue
            if code or killed >= each:
                break
            shutil.rmtree(out)  # it ended before it was to be killed
        append(LINES, key | {"kills": killed, "exit": code, "equal": _files_of(out) == expected, "moments": moments,
                             "whole_seconds": whole["seconds"], "calibration": calibration})  # fmt: skip
        print(key, killed, code, _files_of(out) == expected, flush=True)
        shutil.rmtree(out, ignore_errors=True)


def _files_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file that does not tell the time."""
    names = [path for path in sorted(folder.iterdir()) if path.name not in ("pared.json", "README.md", "SHA256SUMS")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def _small_model() -> str:
    """Return a folder of a small model of random weights: eight blocks of width 128."""
    folder = PLACE / "small"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        tokenizer = pared.load_tokenizer(EMBEDDED)
        config = LlamaConfig(
            hidden_size=128, intermediate_size=352, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=len(tokenizer), max_position_embeddings=1024, tie_word_embeddings=True,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def linear() -> None:
    """Time compressions on more and more tokens, and of more and more blocks."""
    model = _small_model()
    for samples in (16, 32, 64, 128):
        for method in ("svd-llm", "wanda"):
            if missing(key := {"what": "tokens", "method": method, "samples": samples}):
                calibration = {"samples": samples, "length": 512, "batch": 4, "dtype": "float32"}
                append(LINES, key | _stages(model, METHODS[method] | {"calibration": calibration}))
    for blocks in (4, 8, 16, 32):
        for method in ("svd-llm", "wanda"):
            if missing(key := {"what": "blocks", "method": method, "blocks": blocks}):
                calibration = {"samples": 32, "length": 512, "batch": 4, "dtype": "float32"}
                append(LINES, key | _stages(_of_blocks(blocks), METHODS[method] | {"calibration": calibration}))


def _of_blocks(blocks: int) -> str:
    folder = PLACE / f"small-{blocks}"
    if not (folder / "config.json").exists():
        tokenizer = pared.load_tokenizer(EMBEDDED)
        config = LlamaConfig(
            hidden_size=128, intermediate_size=352, num_hidden_layers=blocks, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=1024, tie_word_embeddings=True,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def _stages(model: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of the passes over the text, and of solving, the same for any text; the least of three."""
    found: dict[str, list[float]] = {}
    for _ in range(3):
        out = PLACE / "linear"
        done = run_capped(pared_command(model, fields, out), None, ONE_THREAD, PLACE / "linear.log")
        if done["exit"]:
            raise SystemExit(f"failed; see {PLACE / 'linear.log'}")
        for stage, seconds in json.loads((out / "pared.json").read_text(encoding="utf-8"))["seconds"].items():
            found.setdefault(stage, []).append(seconds)
    passes, solve = (
        sum(min(found.get(stage, [0.0])) for stage in stages) for stages in (("walk", "backward"), ("solve",))
    )
    return {"passes": passes, "solve": solve}


def ranks(count: int = 2, rounds: int = 3, model: str = EMBEDDED, calibration: dict[str, Any] = PLAIN) -> None:
    """Time a compression by several processes against one by a single process, interleaved; each on one thread.

    Args:
        count: of processes.
        rounds: pairs that are run of every method.
        model: that is compressed.
        calibration: of the recipe.
    """
    for method in ("svd-llm", "wanda", "loss-optimal"):
        key = {"what": "ranks", "method": method, "ranks": count, "model": model, "calibration": calibration}
        if not missing(key):
            continue
        fields = METHODS[method] | {"calibration": calibration, "device": "cpu"}
        seconds: dict[int, list[dict[str, float]]] = {1: [], count: []}
        plans: dict[int, Any] = {}
        for _ in range(rounds):
            for processes, found in seconds.items():
                manifest = _by(processes, pared_command(model, fields, PLACE / f"ranks-{processes}"))
                taken = manifest["seconds"]
                calibrated = sum(taken.get(stage, 0.0) for stage in ("walk", "backward", "all-reduce"))
                found.append({"calibration": calibrated, "solve": taken.get("solve", 0.0)})
                plans[processes] = manifest["plan"]["sites"]
        row: dict[str, Any] = {"rounds": rounds, "seconds": seconds, "same_plan": plans[1] == plans[count]}
        for stage, name in (("calibration", "ratios"), ("solve", "solve_ratios")):
            pairs = zip(seconds[1], seconds[count], strict=True)
            row[name] = [one[stage] / several[stage] for one, several in pairs if several[stage]]
        append(LINES, key | row)
        print(key, row, flush=True)


def _by(processes: int, command: list[str]) -> dict[str, Any]:
    """Run a command line in so many processes; return the manifest, and remove the folder."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    if processes > 1:
        command = [*launcher, *command[1:]]
    log, out = PLACE / "ranks.log", Path(command[command.index("--out") + 1])
    if run_capped(command, None, ONE_THREAD, log)["exit"]:
        raise SystemExit(f"{command} failed; see {log}")
    manifest: dict[str, Any] = json.loads((out / "pared.json").read_text(encoding="utf-8"))
    shutil.rmtree(out)
    return manifest


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the exponent of the power law that fits the seconds best."""
    x, y = ([math.log(one) for one in values] for values in (sizes, seconds))
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def _mib(number: float | None) -> str:
    return "" if number is None else f"{number / 2**20:,.0f}"


def render() -> None:
    """Write the page from the lines."""
    lines = read(LINES)

    def of(what: str) -> list[dict[str, Any]]:
        return [line for line in lines if line["what"] == what]

    parts = [HEAD]
    cells: list[tuple[object, ...]]
    if rows := of("memory"):
        cells = [
            (f"{one['model']}, {one['method']}", _mib(one["cap"]), one["compress_exit"],
             _mib(one.get("compress_peak_group")), _mib(one["compress_peak_rss"]), _mib(one.get("peak")),
             _mib(one.get("bound")), f"{one['compress_seconds']:,.0f}",
             one.get("verify_exit", ""), _mib(one.get("verify_peak_rss")), one["compress_enforced"])
            for one in rows
        ]  # fmt: skip
        header = ("model, method", "cap MiB", "exit", "group MiB", "RSS MiB", "peak MiB", "bound MiB", "seconds",
                  "verify", "its RSS MiB", "by")  # fmt: skip
        parts += ["## Larger than memory", MEMORY, table(header, cells)]
    if rows := of("stream"):
        cells = [(one["method"], one["tensors"], "yes" if one["equal"] else "NO", spread(one["ratios"]))
                 for one in rows]  # fmt: skip
        header = ("method", "tensors", "equal bit for bit", "time streamed / in memory")
        parts += ["## Streaming against memory", STREAM, table(header, cells)]
    if rows := of("kills"):
        cells = [(one["method"], one["kills"], one["exit"], "yes" if one["equal"] else "NO") for one in rows]
        total = sum(one["kills"] for one in rows)
        parts += ["## Killed and resumed", KILLS.format(total=total),
                  table(("method", "kills", "exit", "byte-identical"), cells)]  # fmt: skip
    for what, by, title in (("tokens", "samples", "tokens"), ("blocks", "blocks", "blocks")):
        if rows := of(what):
            cells = []
            for method in dict.fromkeys(one["method"] for one in rows):
                own = [one for one in rows if one["method"] == method]
                sizes, passes = [one[by] for one in own], [one["passes"] for one in own]
                told = (", ".join(f"{one[stage]:.2f}" for one in own) for stage in ("passes", "solve"))
                fitted = [passes] if what == "tokens" else [passes, [one["solve"] for one in own]]
                powers = (f"{exponent(sizes, seconds):.2f}" for seconds in fitted)
                cells.append((method, ", ".join(map(str, sizes)), *told, " and ".join(powers)))
            header = ("method", by, "passes over the text s", "solve s", "exponent")
            parts += [f"## Time against {title}", LINEAR, table(header, cells)]
    if rows := of("ranks"):
        cells = [
            (one["method"], one["ranks"], *(spread([taken[stage] for taken in one["seconds"][processes]], 1)
             for stage in ("calibration", "solve") for processes in ("1", str(one["ranks"]))),
             spread(one["ratios"]), spread(one["solve_ratios"]) if one["solve_ratios"] else "",
             "yes" if one["same_plan"] else "no")
            for one in rows
        ]  # fmt: skip
        header = ("method", "ranks", "calibration s, 1", "N", "solve s, 1", "N", "calibration 1 / N", "solve 1 / N",
                  "same plan")  # fmt: skip
        parts += ["## Several processes", RANKS, table(header, cells)]
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


HEAD = """# Scale: larger than memory, longer than a process

Made by `python benchmarks/scale.py`; raw lines with commit and machine in [scale.jsonl](scale.jsonl). Two cores;
nothing here was run on a GPU."""
MEMORY = """A random-weight model of the shape of LLaMA-3.2-3B in bfloat16 (6.4 GB on disk) and Qwen2.5-Coder-0.5B,
compressed with `--stream on` under a hard limit of memory, and verified under the same. *Group* is what the control
group held at most, page cache included, which cannot exceed the cap; *RSS* is the process's own peak (`ru_maxrss`),
pages of mapped files included, which the group need not be charged for; *peak* is the same in the manifest. *Bound* is
what a streamed compression is to keep to: the process before weights are read, what is outside of the blocks, three
blocks, the statistics of one, activation memory and 1 GiB. The machine was shared by other work, so seconds say little.
Exit -9: killed by the kernel at the cap."""
STREAM = """The embedded model, 16 windows of 512 tokens, float32, one thread: every tensor of the output, and the wall
time of whole commands, interleaved, three pairs."""
KILLS = """A small model; every command is killed with SIGKILL at a random moment (30 to 100% of the time a whole run
takes) and started again with `--resume`, {total} kills altogether; then every file that tells no time is compared with
those of a run that was let alone."""
LINEAR = """Small models of random weights, windows of 512 tokens, one thread, the least of three runs. The exponent is
that of the power law through the seconds of the passes over the text; of blocks, the second is that of solving, which
takes as long for any text."""
RANKS = """The embedded model, 16 windows of 512 tokens, float32: two gloo processes on two cores against one process,
one thread each, interleaved. *Calibration* is what the first process takes to run the blocks forward and, for
`loss-optimal`, backward, the exchange of statistics and waiting for the others included; *solve* is all that is made
of the statistics. Seconds are medians (least to most); a ratio of 2 would be perfect."""

SECTIONS: dict[str, Callable[[], None]] = {"stream": stream, "kills": kills, "linear": linear, "ranks": ranks}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=["memory", *SECTIONS, []])
    parser.add_argument("--cases", nargs="*", default=[], help="of memory: 3b-svd-llm, qwen-wanda ...")
    asked = parser.parse_args()
    PLACE.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for section in asked.sections:
        memory(asked.cases) if section == "memory" else SECTIONS[section]()
    render()
    print(f"{PAGE} ({time.perf_counter() - began:.0f} s)")
