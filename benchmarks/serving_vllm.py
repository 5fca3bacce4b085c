"""Folders served by vLLM in this process: what each answers, and what its weights take.

`benchmarks/serving.py` calls it. It runs in the environment of vLLM, so it imports nothing of pared; vLLM finds the
plugin by itself, or not.

    VENV/bin/python benchmarks/serving_vllm.py JOBS OUT

JOBS has a JSON line for every folder, `{"folder": ..., "dtype": "float32", "prompts": [[1, 2]], "tokens": 64}`, and OUT
gets one for each.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the model can be looked at

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

LOADED: dict[str, int] = {}


def _count(load: Any) -> Any:
    """Return a loader that notes the bytes of the weights before the engine packs them for its kernels."""

    def load_weights(self: Any, model: torch.nn.Module, *rest: Any) -> Any:
        answer = load(self, model, *rest)
        roots = [model]
        for module in model.modules():  # modules that the plugin has not put into the model yet
            roots += getattr(getattr(module, "quant_method", None), "made", [])
        tensors = {id(one): one for root in roots for one in (*root.parameters(), *_orders(root))}
        LOADED["bytes"] = sum(one.nbytes for one in tensors.values())
        return answer

    return load_weights


def _orders(root: torch.nn.Module) -> list[torch.Tensor]:
    return [one for name, one in root.named_buffers() if name.rpartition(".")[2] == "order"]


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Serve the folder and answer the prompts greedily.

    Args:
        job: the folder, dtype, prompts as token ids, how many tokens, and options of vLLM.
    """
    start = time.perf_counter()
    try:
        engine = LLM(
            model=job["folder"],
            dtype=job["dtype"],
            skip_tokenizer_init=True,
            max_model_len=job.get("length", 256),
            max_num_seqs=job.get("at_once", 16),
            enforce_eager=job.get("eager", True),
            seed=0,
            **job.get("options", {}),
        )
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    loaded = time.perf_counter()
    ask = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    runs = []
    for _ in range(1 + job.get("repeat", 0)):
        begin = time.process_time()  # the processor's own, which other work on the machine does not count in
        outputs = engine.generate(prompts, ask, use_tqdm=False)
        runs.append(time.process_time() - begin)
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    return {
        "answers": answers,
        "weight_bytes": LOADED.get("bytes"),
        "load_seconds": loaded - start,
        "cpu_seconds": runs,
    }


if __name__ == "__main__":
    DefaultModelLoader.load_weights = _count(DefaultModelLoader.load_weights)
    with Path(sys.argv[2]).open("w", encoding="utf-8") as out:
        for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
            LOADED.clear()
            out.write(json.dumps(main(json.loads(line))) + "\n")
            out.flush()
            gc.collect()
            cleanup_dist_env_and_memory()
