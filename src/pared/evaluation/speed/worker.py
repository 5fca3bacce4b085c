"""A process that holds one model and runs a case on request: a line in, a line out, as JSON.

``python -m pared.evaluation.speed.worker MODEL SETTINGS``. The first line out tells of the model; then, for the number
of a case on a line, its seconds. Everything else that is printed goes to standard error.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pared.checkpoint import load
from pared.errors import ParedError
from pared.evaluation.speed.settings import Case, Settings
from pared.io.files import path_of


def run(model: PreTrainedModel, case: Case, ids: torch.Tensor) -> dict[str, float]:
    """Run a case once; return its seconds, and for decoding those to the first token apart.

    Args:
        model: a causal language model.
        case: what.
        ids: the tokens ``(batch, length)`` on the model's device.
    """
    watch = _watch(ids.device)
    with torch.inference_mode():
        if case.kind == "forward":
            seconds = watch(lambda: model(input_ids=ids, use_cache=False))
            return {"seconds": seconds}
        held: dict[str, Any] = {}

        def read() -> None:
            output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            held["cache"], held["next"] = output.past_key_values, output.logits[:, -1:].argmax(-1)

        first = watch(read)
        if case.kind == "prefill":
            return {"seconds": first}

        def write() -> None:
            for _ in range(case.new):
                output = model(input_ids=held["next"], past_key_values=held["cache"], use_cache=True)
                held["cache"], held["next"] = output.past_key_values, output.logits[:, -1:].argmax(-1)

        return {"seconds": watch(write), "first_token": first}


def describe(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """Return what of a model decides its speed."""
    embedding = model.get_input_embeddings().weight
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    # Every layer multiplies a basis that several share; an embedding that is looked up is not multiplied.
    multiplied = sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False)) - embedding.numel()
    folder = path_of(name)
    files = list(folder.glob("*.safetensors")) if folder.is_dir() else []
    return {
        "parameters": total,
        "multiplied": multiplied,
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
        "bytes_on_disk": sum(file.stat().st_size for file in files) or None,
        "flops_per_token": 2 * multiplied,
        "dtype": str(model.dtype).removeprefix("torch."),
        "vocabulary": embedding.shape[0],
    }


def memory(device: torch.device) -> dict[str, int]:
    """Return bytes in use now and at most so far: of this process, or with CUDA of its tensors."""
    if device.type == "cuda":
        return {"resident": torch.cuda.memory_allocated(device), "peak": torch.cuda.max_memory_allocated(device)}
    status = Path("/proc/self/status")
    if not status.exists():
        return {}
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return {"resident": int(lines["VmRSS"].split()[0]) * 1024, "peak": int(lines["VmHWM"].split()[0]) * 1024}


def _watch(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """Return what times an act: a clock, or with CUDA events of its own."""

    def by_clock(act: Callable[[], Any]) -> float:
        start = time.perf_counter()
        act()
        return time.perf_counter() - start

    def by_events(act: Callable[[], Any]) -> float:
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        act()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1000

    return by_events if device.type == "cuda" else by_clock


def main() -> None:
    """Serve one model."""
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    settings = Settings.of_json(json.loads(sys.argv[2]))
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    try:
        before = memory(device)
        model = load(sys.argv[1], settings.dtype).to(device).eval()
        about = describe(model, sys.argv[1])
        random = torch.Generator().manual_seed(settings.seed)
        inputs = [torch.randint(about["vocabulary"], (case.batch, case.length), generator=random).to(device)
                  for case in settings.cases]  # fmt: skip
        answer({**about, "memory_before": before, "memory": memory(device)})
        for line in sys.stdin:
            number = int(line)
            answer({**run(model, settings.cases[number], inputs[number]), "memory": memory(device)})
    except ParedError as error:
        answer({"error": str(error)})
    except torch.OutOfMemoryError as error:
        answer({"error": f"out of memory ({error}); try a smaller batch or length"})


if __name__ == "__main__":
    main()
