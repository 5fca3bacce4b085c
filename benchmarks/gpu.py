"""How long does a model of LLaMA-2-7B's shape take to compress on a GPU, by every method, and how much memory?

    python benchmarks/gpu.py                                # on one CUDA device; renders docs/results/gpu.md
    python benchmarks/gpu.py --cases svd-llm wanda          # some of the cases
    python benchmarks/gpu.py --render                       # renders only
    python benchmarks/gpu.py --device cpu --shape tiny --samples 4 --length 64 --results /tmp/gpu   # tries the script

A random-weight model in bfloat16 (13.5 GB on the disk, made once by random_model.py), 256 x 2,048 random tokens, no
perplexity. Each case runs in a process of its own of at most ten minutes, from reading the weights to factors or zeros
in place; a JSON line each, what is there is not measured again (delete lines to repeat them).
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from random_model import SHAPES, write
from record import RESULTS, append, read, table

PLACE = Path(os.environ.get("PARED_BENCHMARKS", "~/.cache/pared-benchmarks")).expanduser()
LIMIT = 600  # seconds of a case
GIB = 2**30
# Ranks by shapes: papers' allocations that try plans on a text are no part of what is timed here.
UNIFORM = {"allocation": "uniform"}
CASES: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd", "keep": 0.8},
    "asvd": {"method": "asvd", "keep": 0.8},
    "fwsvd": {"method": "fwsvd", "keep": 0.8},
    "svd-llm": {"method": "svd-llm", "keep": 0.8},
    "svd-llm-v2": {"method": "svd-llm-v2", "keep": 0.8},
    "swift-svd, 0.8": {"method": "swift-svd", "keep": 0.8, **UNIFORM},
    "swift-svd, 0.6": {"method": "swift-svd", "keep": 0.6, **UNIFORM},
    "swift-svd, 0.4": {"method": "swift-svd", "keep": 0.4, **UNIFORM},
    "basis-sharing": {"method": "basis-sharing", "keep": 0.8},
    "loss-optimal, diagonal": {"method": "loss-optimal", "keep": 0.8, "options": {"output_weighting": "diagonal"}},
    "loss-optimal, full": {"method": "loss-optimal", "keep": 0.8},
    "magnitude": {"method": "magnitude", "sparsity": 0.5},
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
}
PUBLISHED = {
    "svd-llm": "SVD-LLM, LLaMA-7B at 20%, one A100: 15 min (arXiv 2403.07378)",
    "swift-svd, 0.8": "Swift-SVD, three ratios on 256 samples: 753 s together (arXiv 2604.01609)",
}


def run_one(case: str, folder: Path, device: str, samples: int, length: int, told: Path) -> None:
    """Compress the model in this process, and write what it took."""
    import pared
    from pared.data.windows import Windows
    from pared.environment import device_of

    where = device_of(device)
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tokens = torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    windows = Windows(tokens, digest, "random tokens", "random", True)
    cuda = where.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(where)
    start = time.perf_counter()
    made = pared.compress(str(folder), data=windows, device=device, evaluation=None, **CASES[case])
    if cuda:
        torch.cuda.synchronize(where)
    row = {
        "seconds": time.perf_counter() - start, "stages": made.seconds, "settled": made.settled,
        "achieved_keep": made.plan.achieved_keep, "gpu_bytes": torch.cuda.max_memory_allocated(where) if cuda else None,
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": torch.cuda.get_device_name(where) if cuda else "cpu",
    }  # fmt: skip
    told.write_text(json.dumps(row, default=str), encoding="utf-8")


def measure(asked: argparse.Namespace, lines: Path) -> None:
    """Run every case that is missing, each in a process of its own."""
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is there; --device cpu --shape tiny tries the script without one")
    folder, told = write(asked.shape, PLACE / asked.shape), lines.with_suffix(".told.json")
    lines.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(asked, name) for name in ("shape", "samples", "length")}
    for case in asked.cases or CASES:
        key = {"case": case, **settings, "on": asked.device}
        if any(key.items() <= line.items() for line in read(lines)):
            continue
        told.unlink(missing_ok=True)
        child = [sys.executable, __file__, "--child", case, "--folder", str(folder), "--told", str(told)]
        child += ["--device", asked.device, "--samples", str(asked.samples), "--length", str(asked.length)]
        try:
            done = subprocess.run(child, timeout=LIMIT, capture_output=True, text=True)
            row = json.loads(told.read_text(encoding="utf-8")) if done.returncode == 0 else {
                "failed": (done.stderr.strip().splitlines() or ["killed"])[-1][:300]}  # fmt: skip
        except subprocess.TimeoutExpired:
            row = {"failed": f"not done after {LIMIT} s"}
        told.unlink(missing_ok=True)
        append(lines, key | row)
        print(case, row.get("failed") or f"{row['seconds']:.0f} s", flush=True)


def render(lines: Path, page: Path) -> None:
    """Write the page from the lines; without any it says that nothing ran."""
    found, parts = read(lines), [HEAD]
    if not found:
        parts.append("**Nothing of this has run yet: no GPU was at hand.** The script was tried with `--device cpu "
                     "--shape tiny`. What one H100 is computed to take is in [predicted costs](cost.md).")  # fmt: skip
    for settings in dict.fromkeys((line["shape"], line["samples"], line["length"], line["on"]) for line in found):
        own = [line for line in found if (line["shape"], line["samples"], line["length"], line["on"]) == settings]
        shape, samples, length, on = settings
        device = next((line["device"] for line in own if "device" in line), on)
        cells = []
        for line in sorted(own, key=lambda one: list(CASES).index(one["case"])):
            case = line["case"]
            if "failed" in line:
                cells.append((case, line["failed"], "", "", "", "", PUBLISHED.get(case, "")))
                continue
            stages = line["stages"]
            gpu = "" if line["gpu_bytes"] is None else f"{line['gpu_bytes'] / GIB:.1f}"
            cells.append((case, f"{line['seconds']:.0f}", f"{stages.get('walk', 0) + stages.get('backward', 0):.0f}",
                          f"{stages.get('solve', 0):.0f}", gpu, f"{line['host_bytes'] / GIB:.1f}",
                          PUBLISHED.get(case, "")))  # fmt: skip
        swift = [line.get("seconds") for line in own if line["case"].startswith("swift-svd")]
        header = ("method", "seconds", "passes", "solve", "GPU GiB", "host GiB", "published, on other hardware")
        parts += [f"## {shape}, {samples} x {length:,} tokens, {device}", table(header, cells)]
        if len(swift) == 3 and all(swift):
            parts.append(f"The three ratios of `swift-svd` together: {sum(swift):.0f} s.")
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


HEAD = """# Compression on a GPU

Made by `python benchmarks/gpu.py`; raw lines with commit and machine in `gpu.jsonl` beside this page, once there are
any. A model of random weights in the shape of LLaMA-2-7B, 256 x 2,048 random tokens, one process a case, from reading
the weights to factors or zeros in place. Memory is the most that torch allocated on the device, and the process's
highest resident memory. `make test-gpu` compares what runs on a GPU with the CPU."""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--cases", nargs="*", choices=[*CASES, []], default=[])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of gpu.jsonl and gpu.md")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    for hidden in ("--child", "--folder", "--told"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        run_one(asked.child, Path(asked.folder), asked.device, asked.samples, asked.length, Path(asked.told))
    else:
        if not asked.render:
            measure(asked, asked.results / "gpu.jsonl")
        render(asked.results / "gpu.jsonl", asked.results / "gpu.md")
        print(asked.results / "gpu.md")
