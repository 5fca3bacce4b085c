"""A model of random weights in the shape of a real one, written shard by shard: no more than one block is in memory.

python benchmarks/random_model.py llama-3.2-3b ~/.cache/pared-benchmarks/llama-3.2-3b
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import pared

SHAPES = {
    "llama-3.2-3b": LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=131072, head_dim=128, rms_norm_eps=1e-5,
    ),
    "llama-2-7b": LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
        vocab_size=32000, tie_word_embeddings=False, max_position_embeddings=4096, rms_norm_eps=1e-5,
    ),
    "tiny": LlamaConfig(  # to try a script with
        hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1000, tie_word_embeddings=False, max_position_embeddings=4096, rms_norm_eps=1e-5,
    ),
}  # fmt: skip
TOKENIZER = "embedded:smollm2-135m"  # any will do whose tokens there are


def write(shape: str, folder: Path, seed: int = 0) -> Path:
    """Write the folder, unless it is there; return it.

    Args:
        shape: one of ``SHAPES``.
        folder: to make; a shard a block.
        seed: of the weights, normal with a deviation of 0.02, each tensor by its own.
    """
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[shape]
    config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shards: dict[str, list[tuple[str, torch.Size]]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        shards.setdefault(parts[2] if parts[1] == "layers" else "rest", []).append((name, parameter.shape))
    index: dict[str, str] = {}
    total = 0
    for number, (_, tensors) in enumerate(shards.items(), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        values = dict(_drawn(tensors, seed))
        save_file(values, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(values, file)
        total += sum(tensor.nbytes for tensor in values.values())
    config.save_pretrained(folder)
    pared.load_tokenizer(TOKENIZER).save_pretrained(folder)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return folder


def _drawn(tensors: list[tuple[str, torch.Size]], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield values: norms are one, everything else is normal."""
    for number, (name, shape) in enumerate(tensors):
        generator = torch.Generator().manual_seed(1_000_003 * seed + 7919 * number + sum(map(ord, name)))
        values = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)
        yield name, values.bfloat16()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    print(write(asked.shape, asked.folder.expanduser()))
