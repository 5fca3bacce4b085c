"""The page of `benchmarks/serving.py`."""

from collections.abc import Iterable, Sequence
from typing import Any

from grid import signature
from record import Line, table

WAYS = {
    "plugin": "vLLM, its own layers",
    "plugin, compiled": "the same, compiled",
    "plugin, transformers": "vLLM, `model_impl=transformers`",
    "none": "vLLM without the plugin",
}


def render(lines: Sequence[Line]) -> str:
    """Return the page."""
    cells = [line for line in lines if "found" in line]
    exact = [line for line in cells if line["dtype"] == "fp32"]
    parts = [
        "# Serving",
        "",
        "Made by `make serve-test`; raw lines in [serving.jsonl](serving.jsonl). Do not edit.",
        "",
        "8 prompts of 8 tokens, 64 greedy tokens behind each, in one batch; against what transformers answers of the "
        "same folder, token by token. Tiny models are random, of three blocks, with biases. `every kind` gives "
        "neighbouring layers two factors, a pivoted weight, a dense one, zeros and 2:4, so that fused layers have "
        "several, and takes channels out of the last MLP.",
        "",
        "## Tiny models, float32",
        "",
        _matrix(line for line in exact if line["way"] == "plugin" and line["model"] != "smollm2"),
        "",
        "- `=`: all 512 tokens are the same. `4/8`: so many of the 8 prompts. Empty: the family has nothing of the "
        "kind, or `pared` stores it as plain weights. `·`: not measured yet.",
        "- GPT-NeoX has no code of its own in vLLM 0.32, which runs transformers' with its own layers in it.",
        *_refusals(exact),
        "",
        *_other_ways(cells),
        *_real(exact),
        *_speed([line for line in lines if "speed" in line]),
        *_client([line for line in lines if "client" in line]),
    ]  # fmt: skip
    return "\n".join([*parts, signature(list(lines))])


def _matrix(lines: Iterable[Line]) -> str:
    by_place = {(line["model"], line["storage"]): line for line in lines}
    storages = list(dict.fromkeys(storage for _, storage in by_place))
    models = list(dict.fromkeys(model for model, _ in by_place))
    rows = [[model, *(_mark(by_place.get((model, storage))) for storage in storages)] for model in models]
    return table(["", *storages], rows)


def _mark(line: Line | None) -> str:
    if line is None:
        return "·"
    if line["found"] == "none":
        return ""
    if line["found"] == "differs":
        return f"{line['same_prompts']}/8"
    return "=" if line["found"] == "identical" else "refused"


def _refusals(lines: Sequence[Line]) -> list[str]:
    told = [(line["model"], line["storage"], line["message"]) for line in lines if line["found"] == "refused"
            and line["way"] == "plugin"]  # fmt: skip
    return [f"- {model}, {storage}: `{message[:400]}`" for model, storage, message in told]


def _other_ways(cells: Sequence[Line]) -> list[str]:
    rows = [
        [WAYS[line["way"]], line["model"], line["storage"], line["dtype"], _mark(line), _message(line)]
        for line in cells
        if (line["way"] != "plugin" or line["dtype"] != "fp32")
    ]
    if not rows:
        return []
    header = ["consumer", "model", "storage", "dtype", "found", "message"]
    note = (
        "In half precision the kernels of the two round differently, of dense folders too, and a random model has many "
        "near ties: what counts there is that a folder is not far behind the dense one."
    )
    return ["## Other ways and dtypes", "", table(header, rows), "", note, ""]


def _message(line: Line) -> str:
    text = line.get("message", "")
    place = text.find("Unknown quantization")
    return f"`{text[max(0, place) :][:80]}`" if text else ""


def _real(lines: Sequence[Line]) -> list[str]:
    real = [line for line in lines if line["model"] == "smollm2"]
    rows = [
        [line["storage"], _mark(line), _bytes(line, "weight_bytes"), _bytes(line, "planned_bytes"), _ratio(line)]
        for line in real
    ]
    note = (
        "Bytes of all weights as vLLM holds them when they are read, float32, against those of the model in "
        "transformers. "
        "Zeros are unpacked in both: a sparse folder is smaller on disk alone."
    )
    header = ["SmolLM2-135M-Instruct", "tokens", "MB in vLLM", "MB in the plan", "ratio"]
    return ["## SmolLM2, float32", "", table(header, rows), "", note, ""] if rows else []


def _bytes(line: Line, key: str) -> str:
    return f"{line[key] / 1e6:,.1f}" if line.get(key) else ""


def _ratio(line: Line) -> str:
    return f"{line['weight_bytes'] / line['planned_bytes']:.4f}" if line.get("weight_bytes") else ""


def _speed(lines: Sequence[Line]) -> list[str]:
    if not lines:
        return []
    dense = next(line for line in lines if line["storage"] == "dense")
    rows = [
        [line["storage"], f"{line['weight_bytes'] / 1e6:,.1f}", f"{line['speed']:,.1f}",
         f"{line['speed'] / dense['speed']:.2f}"]
        for line in lines
    ]  # fmt: skip
    told = (
        f"{dense['prompts']} prompts at once, {dense['tokens']} tokens each, {dense['dtype']}, one thread, eager; the "
        "fastest of the repetitions, as the machine had other work. Ranks are the same in every layer."
    )
    return ["## Throughput", "", told, "", table(["", "MB of weights", "tokens a second", "of dense"], rows), ""]


def _client(lines: Sequence[Line]) -> list[str]:
    if not lines:
        return []
    last: Any = lines[-1]["client"]
    transcript = [
        'client.completions.create(prompt="The capital of France is", temperature=0)',
        f"-> {last['completion']!r}",
        f"client.completions.create(..., stream=True): {last['chunks']} chunks",
        f"-> {last['streamed']!r}",
        'client.chat.completions.create(messages=[{"role": "user", "content": "What is the capital of France?"}])',
        f"-> {last['chat']!r}",
    ]
    told = (
        f"Streamed, the text is {'the same' if last['streamed'] == last['completion'] else 'another'}. "
        f"{last['at_once']} different prompts at once, {last['tokens']} tokens each, took {last['seconds']:.1f} s; "
        f"{last['same_alone']} of the answers are those of the same prompts asked one by one (bfloat16: other batches "
        "round differently)."
    )
    return ["## The server and an OpenAI client", "", "```", *transcript, "```", "", told, ""]
